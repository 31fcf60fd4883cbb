"""What a request gives back."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Logprob:
    """One id at one place, by the model's logits as they are: before temperature, penalties and filters."""

    logprob: float
    rank: int | None  # 1 is the likeliest
    decoded_token: str | None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One generated continuation."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None  # "stop", "length", "abort" or "error"; None while it runs
    stop_reason: int | str | None = None  # the stop_token_ids entry or stop string; None for end-of-sequence

    cumulative_logprob: float | None = None  # of all its tokens, where logprobs were asked for
    logprobs: list[dict[int, Logprob]] | None = None  # for each token: itself and the likeliest ids

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
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # as logprobs, of the prompt; its first has none
    index: int = 0  # of its prompt among those of one call of LLM.generate or LLM.stream

    def __getitem__(self, key: str) -> str | list[int]:
        if key == "text":
            return self.outputs[0].text
        if key == "token_ids":
            return self.outputs[0].token_ids
        raise KeyError(f"{key!r}; a RequestOutput has 'text' and 'token_ids'")
