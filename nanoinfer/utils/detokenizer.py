"""Text for streams: what new token ids add to a text for certain.

A tokenizer's decoder is mapped, once, to what each token adds to a text (a piece), so that a stream looks every id up
once and decodes nothing twice. Decoding a window of ids again, the usual way, costs more and is wrong wherever a token
changes text before it: a run of byte tokens that turns out invalid, a space that only the start of a text loses.
"""

import codecs
import json
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from nanoinfer.utils.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as JsonTokenizer

logger = logging.getLogger("nanoinfer")

Piece = str | bytes

BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
# Decoders (by their types) that work token by token, of which the first alone may differ; and those that also drop
# characters from the start of the text.
TOKENWISE = re.compile("((Replace|Metaspace|WordPiece) )*(ByteFallback )?(Fuse )?")
STRIPPING = re.compile("(Replace )*(ByteFallback )?Fuse Strip ")


class Detokenizer(Protocol):
    """One text. All that `push` returned and then what `flush` returns is the decode of all ids at once."""

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids make certain; never a character that a later id could change."""

    def flush(self) -> str:
        """The rest, as the text ends here; nothing may be pushed afterwards."""


class Pieces(dict[int, Piece]):
    """Token id -> the text it adds, or, where that is no text by itself, its bytes. Filled as ids come up."""

    def __init__(self, backend: "JsonTokenizer", hidden: set[str], piece_of: Callable[[str], Piece]) -> None:
        super().__init__()
        self.backend = backend
        self.hidden = hidden
        self.piece_of = piece_of

    def __missing__(self, index: int) -> Piece:
        token = self.backend.id_to_token(index)
        piece = self[index] = b"" if token is None or token in self.hidden else self.piece_of(token)
        return piece


@dataclass(frozen=True)
class PieceTable:
    """How a tokenizer's texts are put together. Bytes come in runs; b"" stands for a token that does not show."""

    first: Pieces  # of the token that begins the text
    rest: Pieces
    whole_runs: bool = True  # a run is one text if it is valid as a whole, else U+FFFD for each of its bytes
    strip: str = ""  # characters that the start of the text loses if it has them


def make_detokenizers(
    tokenizer: Tokenizer, skip_special_tokens: bool, spaces_between_special_tokens: bool = True
) -> Callable[[], Detokenizer]:
    """A maker of detokenizers, one for each text; they share what they learn about tokens.

    Streamed are the decoders of byte-level, SentencePiece-like and WordPiece tokenizers, and none at all. The text of
    any other, which may rewrite what earlier tokens said, comes whole with `flush`; a warning says so.
    """
    table = piece_table(tokenizer, skip_special_tokens)
    if table:
        return partial(PieceDetokenizer, table)
    return partial(WholeDetokenizer, tokenizer, skip_special_tokens, spaces_between_special_tokens)


def piece_table(tokenizer: Tokenizer, skip_special_tokens: bool) -> PieceTable | None:
    """None, and a warning, where a token's text depends on more than whether it is the first."""
    backend = tokenizer.backend
    if not backend:
        logger.warning("this tokenizer's text cannot be streamed: it comes whole, at its end")
        return None
    added = backend.get_added_tokens_decoder().values()
    hidden = {token.content for token in added if token.special and skip_special_tokens}
    decoder = backend.decoder
    join = decoder.decode if decoder else " ".join
    # Its own JSON: that of the tokenizer carries the vocabulary, and takes a tenth of a second.
    steps = decoder_steps(json.loads(decoder.__getstate__())) if decoder else []
    kinds = "".join(f"{step['type']} " for step in steps)

    def pieces_after(before: list[str]) -> Pieces:
        return Pieces(backend, hidden, partial(added_piece, join, before, "ByteFallback" in kinds))

    if kinds == "ByteLevel ":
        pieces = Pieces(backend, hidden, byte_level_piece)
        return PieceTable(pieces, pieces, whole_runs=False)
    if join(["a"]) == "a" and TOKENWISE.fullmatch(kinds):
        return PieceTable(pieces_after([]), pieces_after(["a"]))
    if join(["a"]) == "a" and STRIPPING.fullmatch(kinds) and not steps[-1]["stop"]:
        pieces = pieces_after(["a"])
        return PieceTable(pieces, pieces, strip=steps[-1]["content"] * steps[-1]["start"])
    logger.warning("text of the decoder %s cannot be streamed: it comes whole, at its end", kinds.split())
    return None


def decoder_steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    """A decoder's steps in order, out of whatever nesting."""
    inner = decoder.get("decoders")
    return [decoder] if inner is None else [step for part in inner for step in decoder_steps(part)]


def added_piece(join: Callable[[list[str]], str], before: list[str], byte_fallback: bool, token: str) -> Piece:
    """What a token adds to a text of `before`, an ordinary token of one character, or nothing."""
    byte = BYTE_TOKEN.fullmatch(token) if byte_fallback else None
    return bytes.fromhex(byte[1]) if byte else join([*before, token])[len(before) :]


def byte_values() -> dict[str, int]:
    """Byte-level tokens spell a byte as a visible character: itself, or else the next from U+0100 on (GPT-2, 2019)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_VALUES = byte_values()


def byte_level_piece(token: str) -> Piece:
    """Its bytes, as text where they are whole characters; a token of other characters stands for itself."""
    try:
        raw = bytes(BYTE_VALUES[char] for char in token)
    except KeyError:
        return token
    try:
        return raw.decode() or b""  # no bytes must not end the run before them
    except UnicodeDecodeError:
        return raw


class PieceDetokenizer:
    """A text from its tokens' pieces: one look-up for each id, each byte decoded at most four times.

    Held back: with byte-level tokens at most the three bytes of an unfinished character; with byte fallback the run of
    byte tokens at the end of the text, since one more can still make all of it invalid.
    """

    def __init__(self, table: PieceTable) -> None:
        self.table = table
        self.pieces = table.first
        self.strip = table.strip
        self.run = bytearray()  # bytes that are not text yet

    def push(self, ids: Iterable[int]) -> str:
        text = ""
        for index in ids:
            piece = self.pieces[index]
            if not piece and isinstance(piece, bytes):
                continue
            self.pieces = self.table.rest
            if isinstance(piece, bytes):
                text += self._extend_run(piece)
            else:  # begins a new character, so it ends the run
                text += self._end_run() + piece if self.run else piece
        return self._stripped(text) if self.strip else text

    def flush(self) -> str:
        return self._stripped(self._end_run())

    def _extend_run(self, raw: bytes) -> str:
        self.run += raw
        if self.table.whole_runs:
            return ""
        text, used = codecs.utf_8_decode(self.run, "replace", False)
        del self.run[:used]
        return text

    def _end_run(self) -> str:
        run, self.run = self.run, bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run) if self.table.whole_runs else run.decode(errors="replace")

    def _stripped(self, text: str) -> str:
        while text and self.strip:
            if text[0] == self.strip[0]:
                text, self.strip = text[1:], self.strip[1:]
            else:
                self.strip = ""
        return text


class WholeDetokenizer:
    """A text that is decoded once, at its end."""

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool, spaces_between_special_tokens: bool = True
    ) -> None:
        self.tokenizer = tokenizer
        self.options = skip_special_tokens, spaces_between_special_tokens
        self.ids: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        self.ids += ids
        return ""

    def flush(self) -> str:
        return self.tokenizer.decode(self.ids, *self.options)
