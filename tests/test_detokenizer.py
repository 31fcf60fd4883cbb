"""What a stream shows, joined, is the full decode, whatever the tokenizer, the ids and the steps they come in."""

import json
import logging
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, decoders, models
from tokenizers import Tokenizer as JsonTokenizer

from nanoinfer.utils.detokenizer import PieceDetokenizer, WholeDetokenizer, make_detokenizers, piece_table
from nanoinfer.utils.tokenizer import load_tokenizer

DEMO = Path(__file__).parents[1] / "nanoinfer" / "assets" / "demo"
# Emoji of one and of several code points, CJK of three and four bytes, Thai and Devanagari, combining marks, a
# right-to-left script, flags, keycaps, and the ends of UTF-8's ranges.
HARD = (
    "🙂 👩🏽‍💻 👨‍👩‍👧 🇺🇳 1️⃣ 世界 日本語 한국어 𠮷 สวัสดี नमस्ते é e\u0301 a\u0308\u0323 שָׁלוֹם עולם "
    "\x7f\x80\u07ff\u0800\ud7ff\ue000\uffff\U00010000\U0010ffff\u200d\ufeff\ufffd"
)
WORDS = ["a", "the", "of", ".", ",", "!", "'", "n't", "do", "not", "'s", "##", "##s", "a##b", "##ing", "▁", "▁▁", "▁a"]
WORDS += ["▁the", "a▁b", "▁.", " ", "  ", "\n", "<0x4", "<0xzz>", "<0x123>", "世", "世界", "🙂", "é", "e\u0301", "Ġa"]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
DECODERS = {
    "llama": decoders.Sequence(LLAMA),
    "gemma": decoders.Sequence(LLAMA[:3]),
    "nested": decoders.Sequence([decoders.Sequence(LLAMA[:2]), decoders.Sequence([decoders.Fuse()])]),
    "strips three": decoders.Sequence([*LLAMA[:3], decoders.Strip(" ", 3, 0)]),
    "metaspace": decoders.Metaspace(),
    "metaspace, no prefix": decoders.Metaspace(prepend_scheme="never"),
    "metaspace and bytes": decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()]),
    "wordpiece": decoders.WordPiece(cleanup=True),
    "wordpiece as is": decoders.WordPiece(cleanup=False),
    "pattern": decoders.Replace(Regex("[▁ ]+"), " "),
    "empty sequence": decoders.Sequence([]),
    "none": None,
}
# These rewrite what earlier tokens said, or what a later one lets them say.
WHOLE = {
    "suffix": decoders.BPEDecoder(suffix="a"),
    "ctc": decoders.CTC(pad_token="a"),
    "rewritten": decoders.Sequence([decoders.Fuse(), decoders.Replace("a.", "b")]),
    "end stripped": decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
    "other letters": decoders.Replace("a", "b"),
}


class Wrapped:
    """A Tokenizer around the library's object, as FastTokenizer is."""

    longest_token = 12

    def __init__(self, backend: JsonTokenizer | None, reference: JsonTokenizer | None = None) -> None:
        self.backend = backend
        self.reference = reference or backend
        self.size = self.reference.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.reference.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: list[int], skip_special_tokens: bool, spaces_between_special_tokens: bool = True) -> str:
        return self.reference.decode(ids, skip_special_tokens=skip_special_tokens)


def small_tokenizer(decoder: decoders.Decoder | None, words: list[str]) -> Wrapped:
    """A vocabulary with special tokens, added ordinary ones, a byte token that is special, and ids nobody has."""
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    backend = JsonTokenizer(models.WordLevel(vocabulary, "a"))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens(["<s>", "▁sp", "é漢", "<0x0A>"])
    backend.add_tokens([AddedToken("<tool>"), AddedToken("▁x "), AddedToken("é é")])
    return Wrapped(backend)


def byte_level_alphabet() -> dict[int, str]:
    """Byte -> its spelling, as the demo model's tokenizer has it: of 256 single characters, in the order of code."""
    visible = [byte for byte in range(256) if chr(byte).isprintable() and byte not in (0x20, 0xAD)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def byte_level_tokenizer() -> Wrapped:
    """Tokens for every cut of every hard character's bytes in two, and of the text into pieces across characters."""
    spelling = byte_level_alphabet()
    raw = HARD.encode()
    parts = {bytes([byte]) for byte in range(256)} | {raw[i : i + n] for i in range(len(raw)) for n in (2, 3, 4, 5)}
    for char in HARD:
        parts |= {part for i in range(len(char.encode()) + 1) for part in (char.encode()[:i], char.encode()[i:])}
    words = ["".join(spelling[byte] for byte in part) for part in sorted(parts)]
    return small_tokenizer(decoders.ByteLevel(), ["a", *words, "漢Ġ", "é漢字"])


def tokenizers() -> Iterator[tuple[str, Wrapped]]:
    yield "demo", load_tokenizer(DEMO)
    yield "byte level", byte_level_tokenizer()
    for name, decoder in DECODERS.items():
        yield name, small_tokenizer(decoder, WORDS + BYTE_TOKENS)


TOKENIZERS = dict(tokenizers())
every_kind = pytest.mark.parametrize("kind", TOKENIZERS)
skipping = pytest.mark.parametrize("skip", [False, True], ids=["special shown", "special skipped"])


def check_stream(tokenizer: Wrapped, skip: bool, make, steps: list[list[int]]) -> None:
    stream = make()
    deltas = [stream.push(ids) for ids in steps]
    deltas.append(stream.flush())
    ids = [token for step in steps for token in step]
    assert "".join(deltas) == tokenizer.decode(ids, skip), f"{ids}: {deltas}"


@every_kind
@skipping
def test_every_token_alone(kind: str, skip: bool) -> None:
    """The whole vocabulary, and two ids beyond it, each as a text of its own, first in a text, and after a word."""
    tokenizer = TOKENIZERS[kind]
    make = make_detokenizers(tokenizer, skip)
    assert isinstance(make(), PieceDetokenizer), "this kind is to be streamed"
    for token in range(tokenizer.size + 2):
        check_stream(tokenizer, skip, make, [[token]])
        check_stream(tokenizer, skip, make, [[token], [0]])
        check_stream(tokenizer, skip, make, [[0], [token], [token]])


@pytest.mark.parametrize("lone", [False, True], ids=["in a text", "alone"])
def test_every_cut_of_a_character_in_two_tokens(lone: bool) -> None:
    """Emoji, CJK, combining marks: the first half shows nothing, the second the character."""
    tokenizer = TOKENIZERS["byte level"]
    make = make_detokenizers(tokenizer, False)
    spelling = byte_level_alphabet()
    cuts = 0
    for char in set(HARD):
        raw = char.encode()
        for cut in range(1, len(raw)):
            halves = ["".join(spelling[byte] for byte in half) for half in (raw[:cut], raw[cut:])]
            head, tail = (tokenizer.backend.token_to_id(half) for half in halves)
            stream = make()
            assert lone or stream.push([0]) == "a"
            assert (stream.push([head]), stream.push([tail]), stream.flush()) == ("", char, "")
            cuts += 1
    assert cuts > 100


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_byte_fallback_texts(kind: str) -> None:
    """The hard text as byte tokens alone, in steps of any size, and with words between."""
    tokenizer = TOKENIZERS[kind]
    make = make_detokenizers(tokenizer, False)
    ids = [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in HARD.encode()]
    for size in (1, 2, 3, 7, len(ids)):
        check_stream(tokenizer, False, make, [ids[i : i + size] for i in range(0, len(ids), size)])
    word = tokenizer.backend.token_to_id("▁the")
    assert tokenizer.decode([*ids, word, *ids], False) == f"{HARD} the{HARD}"
    check_stream(tokenizer, False, make, [[token] for token in [*ids, word, *ids]])


def random_steps(rng: random.Random, size: int) -> list[list[int]]:
    """Up to 24 ids out of all, out of a few neighbours, or of the last (the special ones), in steps of 0 to 4."""
    low = rng.choice([0, 0, rng.randrange(size), size - 12])
    high = rng.choice([size + 3, min(low + rng.choice([2, 8, 130, 300]), size + 3)])
    ids = [rng.randrange(low, high) for _ in range(rng.randrange(25))]
    steps = []
    while ids:
        n = rng.randrange(5)
        steps.append(ids[:n])
        ids = ids[n:]
    return steps


def check_random_strings(kind: str, skip: bool, count: int) -> None:
    tokenizer = TOKENIZERS[kind]
    make = make_detokenizers(tokenizer, skip)
    rng = random.Random(f"{kind} {skip}")
    for _ in range(count):
        check_stream(tokenizer, skip, make, random_steps(rng, tokenizer.size))


@every_kind
@skipping
def test_random_ids(kind: str, skip: bool) -> None:
    """2,000 strings of random ids for each kind, mostly invalid UTF-8."""
    check_random_strings(kind, skip, 2_000)


@pytest.mark.slow
@every_kind
@skipping
def test_100_000_strings_of_random_ids(kind: str, skip: bool) -> None:
    """As the text to be held to says: no exception among 100,000."""
    check_random_strings(kind, skip, 100_000)


@every_kind
def test_nothing_certain_is_held_back(kind: str) -> None:
    """Streams are to be timely: what is missing after a token is an unfinished character, or a run of byte tokens."""
    tokenizer = TOKENIZERS[kind]
    make = make_detokenizers(tokenizer, False)
    rng = random.Random(kind)
    for _ in range(300):
        stream, shown = make(), ""
        ids = [token for step in random_steps(rng, tokenizer.size) for token in step]
        for n, token in enumerate(ids, 1):
            shown += stream.push([token])
            so_far = tokenizer.decode(ids[:n], False)
            if kind in ("demo", "byte level"):
                # Two for the start of a surrogate, which Python's decoder takes for unfinished.
                assert so_far in (shown, shown + "\ufffd", shown + "\ufffd\ufffd")
            elif tokenizer.backend.id_to_token(token) not in (*BYTE_TOKENS, None):
                assert so_far == shown
        assert tokenizer.decode(ids, False).startswith(shown)


class Counting:
    """A backend that counts what it is asked."""

    def __init__(self, backend: JsonTokenizer) -> None:
        self.backend = backend
        self.decoder = backend.decoder
        self.get_added_tokens_decoder = backend.get_added_tokens_decoder
        self.looked_up: list[int] = []

    def id_to_token(self, index: int) -> str | None:
        self.looked_up.append(index)
        return self.backend.id_to_token(index)


@every_kind
def test_a_token_is_looked_up_once_whatever_the_texts(kind: str) -> None:
    """The cost: nothing is decoded again, not even between texts; a token costs at most two look-ups ever (one as the
    first of a text). Decoding windows costs several ids a token, without bound where a window cannot close."""
    tokenizer = TOKENIZERS[kind]
    counting = Counting(tokenizer.backend)
    make = make_detokenizers(Wrapped(counting, reference=tokenizer.backend), False)
    assert counting.looked_up == []
    ids = [token for n in range(5) for token in range(tokenizer.size)]
    for _ in range(2):
        check_stream(tokenizer, False, make, [[token] for token in ids])
    assert sorted(set(counting.looked_up)) == list(range(tokenizer.size))
    assert len(counting.looked_up) <= tokenizer.size + 1


def test_a_run_that_turns_out_invalid() -> None:
    """One bad byte makes its whole run of byte tokens U+FFFD, valid characters before it too: shown early, they would
    have to be taken back (where others end the request or lose text)."""
    tokenizer = TOKENIZERS["llama"]
    stream = make_detokenizers(tokenizer, True)()
    run = [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in "世".encode()]
    bad = tokenizer.backend.token_to_id("<0xFF>")
    the = tokenizer.backend.token_to_id("▁the")
    assert [stream.push([token]) for token in (the, *run, bad)] == ["the", "", "", "", ""]
    assert stream.push([the]) == "\ufffd" * 4 + " the"


def test_a_hidden_token_does_not_take_the_place_of_the_first() -> None:
    """The first token that shows loses its space, and no other; a hidden one within a character does not cut it."""
    for kind in ("llama", "metaspace"):
        tokenizer = TOKENIZERS[kind]
        start, the = tokenizer.backend.token_to_id("<s>"), tokenizer.backend.token_to_id("▁the")
        stream = make_detokenizers(tokenizer, True)()
        assert [stream.push([token]) for token in (start, the, start, the)] == ["", "the", "", " the"]
    tokenizer = TOKENIZERS["byte level"]
    start, spelling = tokenizer.backend.token_to_id("<s>"), byte_level_alphabet()
    head, tail = (tokenizer.backend.token_to_id(spelling[byte]) for byte in "é".encode())
    assert make_detokenizers(tokenizer, True)().push([head, start, tail]) == "é"
    assert make_detokenizers(tokenizer, False)().push([head, start, tail]) == "\ufffd<s>\ufffd"


@pytest.mark.parametrize("kind", WHOLE)
def test_other_decoders_come_whole_and_say_so(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Wrong text must not be shown for the sake of a stream."""
    tokenizer = small_tokenizer(WHOLE[kind], WORDS)
    with caplog.at_level(logging.WARNING, "nanoinfer"):
        make = make_detokenizers(tokenizer, False)
    assert isinstance(make(), WholeDetokenizer) and "comes whole" in caplog.text
    rng = random.Random(kind)
    for _ in range(100):  # begins with a word: the library itself panics where Strip has less than it strips
        check_stream(tokenizer, False, make, [[0, 0], *random_steps(rng, tokenizer.size)])


def test_without_the_library_behind_it_text_comes_whole() -> None:
    """Tokenizers that transformers alone can read."""
    tokenizer = Wrapped(None, reference=TOKENIZERS["wordpiece"].backend)
    assert piece_table(tokenizer, False) is None
    check_stream(tokenizer, False, make_detokenizers(tokenizer, False), [[0, 1], [2]])


@pytest.mark.parametrize("cleanup", [False, True])
def test_transformers_tokenizers_stream_unless_they_clean_up(tmp_path: Path, cleanup: bool) -> None:
    """Without tokenizer.json transformers decodes, and may then take spaces out of the whole text."""
    vocabulary = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "a", "##b", ".", "'", "s", "!"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    settings = f'{{"tokenizer_class": "BertTokenizer", "clean_up_tokenization_spaces": {str(cleanup).lower()}}}'
    (tmp_path / "tokenizer_config.json").write_text(settings)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.backend is None) == cleanup
    make, rng = make_detokenizers(tokenizer, True), random.Random(0)
    for _ in range(200):
        check_stream(tokenizer, True, make, [[rng.randrange(len(vocabulary))] for _ in range(8)])


def test_vocabulary_and_merges_stream(tmp_path: Path) -> None:
    """Qwen2 in the older form of its files."""
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, tmp_path)
    model = json.loads((DEMO / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    tokenizer = load_tokenizer(tmp_path)
    make = make_detokenizers(tokenizer, False)
    assert isinstance(make(), PieceDetokenizer)
    check_stream(tokenizer, False, make, [[token] for token in tokenizer.encode(HARD)])
