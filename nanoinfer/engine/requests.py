"""From what a user passes to a validated request: refused here, with field, value and limit, or never."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from nanoinfer.errors import InvalidRequest
from nanoinfer.inputs import PromptType
from nanoinfer.options import shown
from nanoinfer.sampling_params import SamplingParams
from nanoinfer.utils.tokenizer import Tokenizer

PROMPT_KEYS = {"prompt", "prompt_token_ids", "cache_salt"}


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may have: fixed once the KV pool is sized."""

    vocab_size: int
    max_model_len: int  # prompt and output tokens together
    pool_tokens: int  # tokens that the whole KV pool holds
    max_logprobs: int = 20  # likeliest ids to tell of at each place; -1: any number


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and parameters that can be served."""

    prompt: str | None
    token_ids: list[int]
    params: SamplingParams
    cache_salt: str
    max_length: int
    bad_words: list[list[int]]


def make_request(prompt: PromptType, params: SamplingParams, tokenizer: Tokenizer | None, limits: Limits) -> Request:
    """Check a prompt and its parameters against the limits. Raises InvalidRequest."""
    if not isinstance(params, SamplingParams):
        raise InvalidRequest(f"sampling_params must be a SamplingParams, got {shown(params)}")
    text, ids, salt = _unpack(prompt)
    if ids is None and text is not None:
        token_ids = _encode(text, tokenizer, limits)
    else:
        token_ids = _checked_ids(ids, limits.vocab_size)
    _check_length(len(token_ids), limits)
    if params.stop and tokenizer is None:
        raise InvalidRequest(f"stop = {shown(list(params.stop))} needs a tokenizer, but skip_tokenizer_init=True")
    for field in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        for token in getattr(params, field) or ():
            if token >= limits.vocab_size:
                raise InvalidRequest(f"{field} holds {token}; the vocabulary has {limits.vocab_size} ids")
    for field in ("logprobs", "prompt_logprobs"):
        if limits.max_logprobs >= 0 and not 0 <= (count := getattr(params, field) or 0) <= limits.max_logprobs:
            raise InvalidRequest(f"{field} must be at most max_logprobs = {limits.max_logprobs}, got {count}")
    bad_words = _encode_words(params.bad_words or (), tokenizer)
    end = limits.max_model_len if params.max_tokens is None else len(token_ids) + params.max_tokens
    return Request(text, token_ids, params.clone(), salt, min(end, limits.max_model_len, limits.pool_tokens), bad_words)


def _encode_words(words: Sequence[str], tokenizer: Tokenizer | None) -> list[list[int]]:
    """Each word's ids at the start of a text and, where they differ, after a space."""
    if not words:
        return []
    if tokenizer is None:
        raise InvalidRequest(f"bad_words = {shown(list(words))} needs a tokenizer, but skip_tokenizer_init=True")
    found = [tokenizer.encode(space + word.lstrip(" "), False) for word in words for space in ("", " ")]
    return [list(ids) for ids in dict.fromkeys(map(tuple, found)) if ids]


def _unpack(prompt: PromptType) -> tuple[str | None, object | None, str]:
    """Text, token ids (unchecked) and cache salt of any form of prompt; text or ids is there."""
    if isinstance(prompt, str):
        return prompt, None, ""
    if not isinstance(prompt, Mapping):
        return None, prompt, ""
    if unknown := prompt.keys() - PROMPT_KEYS:
        raise InvalidRequest(f"prompt has unknown keys {sorted(unknown, key=str)}; it may have {sorted(PROMPT_KEYS)}")
    text, ids, salt = (prompt.get(key) for key in ("prompt", "prompt_token_ids", "cache_salt"))
    if text is None and ids is None:
        raise InvalidRequest("prompt must hold 'prompt' or 'prompt_token_ids'")
    for key, value in (("prompt", text), ("cache_salt", salt)):
        if value is not None and not isinstance(value, str):
            raise InvalidRequest(f"{key} must be a string, got {shown(value)}")
    return cast("str | None", text), ids, cast("str | None", salt) or ""


def _checked_ids(ids: object, vocab_size: int) -> list[int]:
    """The ids as plain integers in [0, vocab_size)."""
    if isinstance(ids, np.ndarray) and ids.ndim == 1 and ids.dtype.kind in "iu":
        values: list[int] = ids.tolist()
    elif isinstance(ids, (list, tuple)) and set(map(type, ids)) <= {int}:  # 3 ms for 140,000 ids, a loop 40
        values = list(ids)
    elif isinstance(ids, (list, tuple)) and all(type(i) is int or isinstance(i, np.integer) for i in ids):
        values = [int(i) for i in ids]
    else:
        got = f"{type(ids).__name__} {shown(ids)}"
        raise InvalidRequest(f"prompt must be a string or a list of token ids (integers), got {got}")
    for place in (min, max) if values else ():
        if not 0 <= place(values) < vocab_size:
            raise InvalidRequest(f"prompt token id {place(values)} is out of vocabulary: ids are 0 to {vocab_size - 1}")
    return values


def _encode(text: str, tokenizer: Tokenizer | None, limits: Limits) -> list[int]:
    if tokenizer is None:
        raise InvalidRequest("prompt is text, but skip_tokenizer_init=True: pass token ids")
    if len(text) > limits.max_model_len * tokenizer.longest_token:  # refused before minutes of tokenizing
        most = limits.max_model_len * tokenizer.longest_token
        raise InvalidRequest(f"prompt of {len(text)} characters: {limits.max_model_len} tokens hold {most} at most")
    try:
        ids = tokenizer.encode(text)
    except (TypeError, UnicodeEncodeError) as error:  # lone surrogates
        raise InvalidRequest(f"prompt is not valid Unicode text: {error}") from error
    return _checked_ids(ids, limits.vocab_size)


def _check_length(length: int, limits: Limits) -> None:
    if length == 0:
        raise InvalidRequest("prompt is empty: it needs at least 1 token")
    if length + 1 > limits.max_model_len:
        raise InvalidRequest(
            f"prompt of {length} tokens: with at least 1 output token it must fit max_model_len = "
            f"{limits.max_model_len}"
        )
    if length + 1 > limits.pool_tokens:
        raise InvalidRequest(
            f"prompt of {length} tokens: with at least 1 output token it must fit the KV pool of {limits.pool_tokens} "
            "tokens; raise kv_cache_memory_bytes or num_gpu_blocks_override"
        )
