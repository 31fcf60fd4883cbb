"""Text to token ids and back, without importing transformers where tokenizer.json is there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nanoinfer.errors import ModelLoadError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as JsonTokenizer
    from transformers import PreTrainedTokenizerBase


class Tokenizer(Protocol):
    """What the engine asks of a tokenizer."""

    size: int  # ids from this on belong to no token
    longest_token: int  # characters

    @property
    def backend(self) -> JsonTokenizer | None: ...  # decodes the very same; None where there is no such object

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool, spaces_between_special_tokens: bool = True
    ) -> str: ...


def measure(vocabulary: dict[str, int], path: Path) -> tuple[int, int]:
    """The first id beyond all tokens', and the characters of the longest token."""
    if not vocabulary:
        raise ModelLoadError(f"{path} holds a tokenizer without tokens")
    return max(vocabulary.values()) + 1, max(map(len, vocabulary))


class FastTokenizer:
    """A tokenizer.json, read by the tokenizers library: importing transformers can take 9 s on a cold machine."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as JsonTokenizer

        try:
            self.backend: JsonTokenizer = JsonTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for any malformed file
            raise ModelLoadError(f"{path} is not a tokenizer file: {error}") from error
        # Saved along by whoever trained with them; a prompt is to stay as it is, as it does with transformers.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.size, self.longest_token = measure(self.backend.get_vocab(with_added_tokens=True), path)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool, spaces_between_special_tokens: bool = True) -> str:
        """Spaces are where the tokenizer's decoder puts them, whatever is asked for, as with transformers."""
        return str(self.backend.decode(ids, skip_special_tokens=skip_special_tokens))


class SlowTokenizer:
    """A folder with any other tokenizer files, read by transformers."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = load_hf_tokenizer(folder)
        self.size, self.longest_token = measure(self.tokenizer.get_vocab(), folder)
        self.backend = plain_backend(self.tokenizer)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool, spaces_between_special_tokens: bool = True) -> str:
        options = {"spaces_between_special_tokens": spaces_between_special_tokens}  # not every tokenizer heeds it
        return str(self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **options))


def load_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer; ModelLoadError where it has none."""
    path = folder / "tokenizer.json"
    return FastTokenizer(path) if path.exists() else SlowTokenizer(folder)


def load_hf_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer as transformers has it, chat template included."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if len(tokenizer.added_tokens_decoder) >= len(tokenizer.get_vocab()):  # what transformers makes of no files
            raise ValueError("it has no vocabulary")
    except (OSError, ValueError) as error:
        raise ModelLoadError(
            f"{folder} holds no tokenizer ({error}); pass tokenizer=FOLDER, or skip_tokenizer_init=True to work "
            "with token ids"
        ) from error
    return tokenizer


def plain_backend(tokenizer: PreTrainedTokenizerBase) -> JsonTokenizer | None:
    """The tokenizers library's object behind it, unless transformers does more to a text than that decodes."""
    from transformers import PreTrainedTokenizerFast

    of, plain = type(tokenizer), PreTrainedTokenizerFast
    if not isinstance(tokenizer, plain) or of.decode is not plain.decode or of._decode is not plain._decode:
        return None
    return None if tokenizer.clean_up_tokenization_spaces else tokenizer.backend_tokenizer
