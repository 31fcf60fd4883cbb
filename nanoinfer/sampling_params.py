"""SamplingParams: what a request may ask for, with vLLM's names and defaults, validated when made."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from nanoinfer.errors import InvalidRequest
from nanoinfer.options import NoOp, check_flag, check_integer, check_number, named_options

logger = logging.getLogger("nanoinfer")

MIN_TEMPERATURE = 0.01  # below this, logits / temperature leaves the range in which float32 tells them apart
MAX_STOP_TOKENS = 1024
MAX_STOP_STRINGS = 1024
MAX_CHOICES = 4096


# vLLM's parameters that change nothing here, with the values that mean so; any other value is refused by name.
NO_OP: NoOp = {
    "min_tokens": (0,),
    "logprobs": (None,),
    "prompt_logprobs": (None,),
    "spaces_between_special_tokens": (True,),
    "bad_words": (None, []),
    "logit_bias": (None,),
    "allowed_token_ids": (None,),
    "logits_processors": (None, []),
}


@named_options(NO_OP)
@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are chosen and when it ends. Wrong values raise InvalidRequest (a ValueError).

    Logits lose what the penalties say: repetition_penalty first, then frequency_penalty * (times that the output holds
    the id) + presence_penalty * (1 if it does). Probabilities are those of logits / temperature, cut by min_p, then
    top_k, then top_p.
    """

    n: int = 1  # completions of the prompt; a seed serves the first, seed + 1 the second, and so on
    presence_penalty: float = 0.0  # -2 to 2; above 0, ids that the output already holds become less likely
    frequency_penalty: float = 0.0  # -2 to 2; above 0, the more so the more often it holds them
    repetition_penalty: float = 1.0  # 1e-6 to 1e4; above 1, ids that prompt or output already hold become less likely
    temperature: float = 1.0  # 0 to 2; 0 is greedy
    top_p: float = 1.0  # (0, 1]: the fewest ids whose probabilities reach it
    top_k: int = 0  # the k likeliest ids; 0 or -1: all
    min_p: float = 0.0  # [0, 1]: ids at least this probable relative to the likeliest
    seed: int | None = None  # None: from the engine's seed and the request's number
    stop: str | Sequence[str] | None = None  # texts of which the first to appear ends the request
    include_stop_str_in_output: bool = False  # else the text ends before it
    stop_token_ids: Sequence[int] | None = None  # these end the request, as end-of-sequence ids do
    ignore_eos: bool = False  # go on past the model's end-of-sequence ids
    max_tokens: int | None = 16  # None: to the end of the model's or the cache's length
    detokenize: bool = True  # False: text stays empty
    skip_special_tokens: bool = True  # leave special tokens out of the text

    def __post_init__(self) -> None:
        check_number("presence_penalty", self.presence_penalty, -2, 2)
        check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        check_number("repetition_penalty", self.repetition_penalty, 1e-6, 1e4)
        check_number("temperature", self.temperature, 0, 2)
        check_number("top_p", self.top_p, 0, 1, open_low=True)
        check_integer("top_k", self.top_k, -1, 2**31 - 1)
        check_number("min_p", self.min_p, 0, 1)
        if self.seed is not None:
            check_integer("seed", self.seed, -(2**63), 2**63 - 1)
        if self.max_tokens is not None:
            check_integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        for flag in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output"):
            check_flag(flag, getattr(self, flag))
        self._check_stop_token_ids()
        self._check_stop()
        check_integer("n", self.n, 1, MAX_CHOICES)
        if self.n > 1 and self.temperature == 0:
            raise InvalidRequest(f"n must be 1 with temperature = 0, whose completions are all the same; got {self.n}")
        if 0 < self.temperature < MIN_TEMPERATURE:
            logger.warning("temperature %g is raised to %g", self.temperature, MIN_TEMPERATURE)

    def _check_stop_token_ids(self) -> None:
        ids = self.stop_token_ids
        if ids is None:
            return
        if isinstance(ids, (str, bytes)) or not isinstance(ids, Sequence):
            raise InvalidRequest(f"stop_token_ids must be a list of integers, got {ids!r}")
        if len(ids) > MAX_STOP_TOKENS:
            raise InvalidRequest(f"stop_token_ids may hold {MAX_STOP_TOKENS} ids, got {len(ids)}")
        for i, token in enumerate(ids):
            check_integer(f"stop_token_ids[{i}]", token, 0, 2**31 - 1)
        object.__setattr__(self, "stop_token_ids", tuple(map(int, ids)))  # the caller's list may change

    def _check_stop(self) -> None:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if not isinstance(stop, Sequence) or not all(isinstance(text, str) and text for text in stop):
            raise InvalidRequest(f"stop must be a string or a list of strings, none of them empty, got {self.stop!r}")
        if len(stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"stop may hold {MAX_STOP_STRINGS} strings, got {len(stop)}")
        if stop and not self.detokenize:
            raise InvalidRequest(f"stop = {self.stop!r} needs detokenize=True: it is looked for in the text")
        object.__setattr__(self, "stop", tuple(stop))

    @property
    def sampled_temperature(self) -> float:
        """The temperature in use: 0, or at least MIN_TEMPERATURE."""
        return max(float(self.temperature), MIN_TEMPERATURE) if self.temperature else 0.0
