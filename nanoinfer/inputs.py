"""What a prompt may be: text, token ids, or a dict with either."""

from collections.abc import Sequence
from typing import TypedDict

from typing_extensions import NotRequired


class TextPrompt(TypedDict):
    """A prompt as text. cache_salt: only prompts with the same salt share cached KV."""

    prompt: str
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """A prompt as token ids. cache_salt: only prompts with the same salt share cached KV."""

    prompt_token_ids: Sequence[int]
    prompt: NotRequired[str]
    cache_salt: NotRequired[str]


PromptType = str | Sequence[int] | TextPrompt | TokensPrompt
