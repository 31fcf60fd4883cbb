"""What a request gives back."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

# What is told of one place: the rank of the id that stands there, then that id and the likeliest, each with its log
# probability, a float32 by its bits.
TokenLogprobs = npt.NDArray[np.int32]


class Logprob(NamedTuple):
    """One id at one place, by the model's logits as they are: before temperature, penalties and filters."""

    logprob: float
    rank: int | None = None  # 1 is the likeliest
    decoded_token: str | None = None


class Logprobs(Sequence[dict[int, Logprob] | None]):
    """Log probabilities of places in order: of each {id: Logprob}, the id that stands there first; None: of none.

    Reads as a list of dicts, each of which is made when it is asked for; list(...) makes all. Making those of 134,000
    tokens, with 5 ids each, took longer than a GPU took for the tokens.
    """

    def __init__(self, told: Sequence[TokenLogprobs | None], texts: Mapping[int, str | None]) -> None:
        """texts: of each id that is told of."""
        self.told, self.texts = told, texts

    def __len__(self) -> int:
        return len(self.told)

    @overload
    def __getitem__(self, index: int) -> dict[int, Logprob] | None: ...
    @overload
    def __getitem__(self, index: slice) -> "Logprobs": ...
    def __getitem__(self, index: int | slice) -> "dict[int, Logprob] | Logprobs | None":
        if isinstance(index, slice):
            return Logprobs(self.told[index], self.texts)
        numbers = self.told[index]
        if numbers is None:
            return None
        ids, logprobs = numbers[1::2].tolist(), numbers.view(np.float32)[2::2].tolist()
        entries = zip(logprobs, range(len(ids)), map(self.texts.__getitem__, ids), strict=True)
        found = dict(zip(ids, map(Logprob._make, entries), strict=True))
        # Among the likeliest an id may stand behind others of equal probability.
        found[ids[0]] = Logprob(logprobs[0], int(numbers[0]), self.texts[ids[0]])
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __add__(self, other: Iterable[dict[int, Logprob] | None]) -> list[dict[int, Logprob] | None]:
        return [*self, *other]

    def __radd__(self, other: Iterable[dict[int, Logprob] | None]) -> list[dict[int, Logprob] | None]:
        return [*other, *self]

    def __repr__(self) -> str:
        return repr(list(self))

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        """Copied and sent elsewhere it is a list: the texts may come from a tokenizer, which stays here."""
        return list, (list(self),)


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One generated continuation."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None  # "stop", "length", "abort" or "error"; None while it runs
    stop_reason: int | str | None = None  # the stop_token_ids entry or stop string; None for end-of-sequence

    cumulative_logprob: float | None = None  # of all its tokens, where logprobs were asked for
    logprobs: Sequence[dict[int, Logprob]] | None = None  # for each token: itself and the likeliest ids

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """When things happened to a request, in seconds by time.monotonic(); 0 for what has not happened yet."""

    arrival_time: float
    first_scheduled_time: float
    first_token_time: float
    last_token_time: float
    num_preemptions: int  # times that it gave up its KV blocks to an earlier request


@dataclass(frozen=True, slots=True)
class EngineStats:
    """How an engine is doing. Rates are over the time since it was asked last."""

    num_running: int  # sequences
    num_waiting: int
    kv_cache_usage: float  # share of the KV blocks that running sequences hold
    prefix_cache_hit_rate: float  # share of admitted prompt tokens whose KV was there, since the start
    num_generated_tokens: int  # since the start
    generated_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A request with what it has generated. `out["text"]` and `out["token_ids"]` read its first completion."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0  # prompt tokens whose KV came from the prefix cache
    error: str | None = None  # why finish_reason is "error"
    metrics: RequestMetrics | None = None
    prompt_logprobs: Sequence[dict[int, Logprob] | None] | None = None  # likewise; the prompt's first has none
    index: int = 0  # of its prompt among those of one call of LLM.generate or LLM.stream

    def __getitem__(self, key: str) -> str | list[int]:
        if key == "text":
            return self.outputs[0].text
        if key == "token_ids":
            return self.outputs[0].token_ids
        raise KeyError(f"{key!r}; a RequestOutput has 'text' and 'token_ids'")
