"""SamplingParams: what a request may ask for, with vLLM's names and defaults, validated when made."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from nanoinfer.errors import InvalidRequest
from nanoinfer.options import NoOp, check_choice, check_flag, check_integer, check_number, named_options, shown

logger = logging.getLogger("nanoinfer")

MIN_TEMPERATURE = 0.01  # below this, logits / temperature leaves the range in which float32 tells them apart
MAX_STOP_TOKENS = 1024
MAX_STOP_STRINGS = 1024
MAX_BAD_WORDS = 1024
MAX_PROCESSORS = 64
MAX_IDS = 2**20  # of logit_bias and allowed_token_ids: more than vocabularies have
MAX_CHOICES = 4096


# vLLM's parameters that change nothing here, with the values that mean so; any other value is refused by name.
NO_OP: NoOp = dict.fromkeys(
    ("watermarking", "structured_outputs", "extra_args", "logprob_token_ids", "prompt_logprob_token_ids",
     "prompt_logprob_start", "stream_interval", "thinking_token_budget", "repetition_detection",
     "trace_decode_token_ids"), (None,),
) | {"flat_logprobs": (False,), "skip_clone": (False, True), "routed_experts_prompt_start": (0,)}  # fmt: skip


class RequestOutputKind(Enum):
    """What AsyncLLMEngine yields of a request that goes on."""

    CUMULATIVE = 0  # all of it so far
    DELTA = 1  # what is new
    FINAL_ONLY = 2  # nothing until it has finished


@named_options(NO_OP)
@dataclass(kw_only=True)
class SamplingParams:
    """How one request's tokens are chosen and when it ends. Wrong values raise InvalidRequest (a ValueError).

    Logits lose what the penalties say: repetition_penalty first, then frequency_penalty * (times that the output holds
    the id) + presence_penalty * (1 if it does). Probabilities are those of logits / temperature, cut by min_p, then
    top_k, then top_p.

    A field that is set later is checked as when made; a request keeps what it was given.
    """

    n: int = 1  # completions of the prompt; a seed serves the first, seed + 1 the second, and so on
    presence_penalty: float = 0.0  # -2 to 2; above 0, ids that the output already holds become less likely
    frequency_penalty: float = 0.0  # -2 to 2; above 0, the more so the more often it holds them
    repetition_penalty: float = 1.0  # 1e-6 to 1e4; above 1, ids that prompt or output already hold become less likely
    temperature: float = 1.0  # 0 to 2; 0 is greedy
    top_p: float = 1.0  # (0, 1]: the fewest ids whose probabilities reach it
    top_k: int = 0  # the k likeliest ids; 0 or -1: all
    min_p: float = 0.0  # [0, 1]: ids at least this probable relative to the likeliest
    seed: int | None = None  # None or -1: from the engine's seed and the request's number
    stop: str | Sequence[str] | None = None  # texts of which the first to appear ends the request
    include_stop_str_in_output: bool = False  # else the text ends before the stop string, or the token of a stop id
    stop_token_ids: Sequence[int] | None = None  # these end the request, as end-of-sequence ids do
    ignore_eos: bool = False  # go on past the model's end-of-sequence ids
    max_tokens: int | None = 16  # None: to the end of the model's or the cache's length
    min_tokens: int = 0  # end-of-sequence and stop_token_ids are not chosen, and no stop string ends it, before so many
    logprobs: int | None = None  # log probabilities of each token and of so many likeliest ones; -1: of all
    prompt_logprobs: int | None = None  # the same of the prompt's tokens
    bad_words: Sequence[str] | None = None  # texts whose last token is never chosen after the ones before it
    logit_bias: Mapping[int, float] | None = None  # id: what is added to its logit, -100 to 100
    allowed_token_ids: Sequence[int] | None = None  # no other ids
    # Callables (output ids, logits) or (prompt ids, output ids, logits) -> logits [vocabulary], float32, on the device.
    # Such a request runs every other step on a GPU, since the host has to know its tokens.
    logits_processors: Sequence[Callable[..., Any]] | None = None
    detokenize: bool = True  # False: text stays empty
    skip_special_tokens: bool = True  # leave special tokens out of the text
    spaces_between_special_tokens: bool = True  # for tokenizers without a tokenizer.json, some of which put them there
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE  # of AsyncLLMEngine

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
            object.__setattr__(self, "seed", None if self.seed == -1 else self.seed)
        if self.max_tokens is not None:
            check_integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        for flag in ("ignore_eos", "detokenize", "skip_special_tokens", "spaces_between_special_tokens",
                     "include_stop_str_in_output"):  # fmt: skip
            check_flag(flag, getattr(self, flag))
        check_choice("output_kind", self.output_kind, tuple(RequestOutputKind))
        self._check_stop_token_ids()
        self._check_stop()
        self._check_logprobs()
        self._check_logits()
        check_integer("n", self.n, 1, MAX_CHOICES)
        if self.n > 1 and self.temperature == 0:
            raise InvalidRequest(f"n must be 1 with temperature = 0, whose completions are all the same; got {self.n}")
        if 0 < self.temperature < MIN_TEMPERATURE:
            logger.warning("temperature %g is raised to %g", self.temperature, MIN_TEMPERATURE)
        object.__setattr__(self, "_made", True)

    def __setattr__(self, name: str, value: object) -> None:
        if self.__dict__.get("_made", False):
            value = getattr(replace(self, **{name: value}), name)  # type: ignore[arg-type]
        object.__setattr__(self, name, value)

    def _check_stop_token_ids(self) -> None:
        ids = self.stop_token_ids
        if ids is None:
            return
        if isinstance(ids, (str, bytes)) or not isinstance(ids, Sequence):
            raise InvalidRequest(f"stop_token_ids must be a list of integers, got {shown(ids)}")
        if len(ids) > MAX_STOP_TOKENS:
            raise InvalidRequest(f"stop_token_ids may hold {MAX_STOP_TOKENS} ids, got {len(ids)}")
        for i, token in enumerate(ids):
            check_integer(f"stop_token_ids[{i}]", token, 0, 2**31 - 1)
        object.__setattr__(self, "stop_token_ids", tuple(map(int, ids)))  # the caller's list may change

    def _check_stop(self) -> None:
        stop = [self.stop] if isinstance(self.stop, str) else () if self.stop is None else self.stop
        if not isinstance(stop, Sequence) or not all(isinstance(text, str) and text for text in stop):
            raise InvalidRequest(f"stop must be a string or a list of strings, none empty, got {shown(self.stop)}")
        if len(stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"stop may hold {MAX_STOP_STRINGS} strings, got {len(stop)}")
        if stop and not self.detokenize:
            raise InvalidRequest(f"stop = {shown(self.stop)} needs detokenize=True: it is looked for in the text")
        object.__setattr__(self, "stop", tuple(stop))

    def _check_logprobs(self) -> None:
        check_integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(f"min_tokens must be at most max_tokens = {self.max_tokens}, got {self.min_tokens}")
        for field in ("logprobs", "prompt_logprobs"):
            if getattr(self, field) is True:
                object.__setattr__(self, field, 1)
            if getattr(self, field) is not None:
                check_integer(field, getattr(self, field), -1, 2**31 - 1)

    def _check_logits(self) -> None:
        """Copies are kept: the caller's own may change."""
        if self.logit_bias is not None:
            self._check_size("logit_bias", self.logit_bias, Mapping, MAX_IDS, "a dict of ids and numbers")
            for id_, value in self.logit_bias.items():
                of_json = isinstance(id_, str) and id_.isascii() and id_.isdigit()
                check_integer("logit_bias's ids", int(id_) if of_json else id_, 0, 2**31 - 1)
                check_number(f"logit_bias[{id_}]", value, -100, 100)
            object.__setattr__(self, "logit_bias", {int(id_): float(v) for id_, v in self.logit_bias.items()})
        if self.allowed_token_ids is not None:
            self._check_size("allowed_token_ids", self.allowed_token_ids, Sequence, MAX_IDS, "a list of integers")
            if not self.allowed_token_ids:
                raise InvalidRequest("allowed_token_ids must hold at least 1 id, got none")
            for i, id_ in enumerate(self.allowed_token_ids):
                check_integer(f"allowed_token_ids[{i}]", id_, 0, 2**31 - 1)
            object.__setattr__(self, "allowed_token_ids", tuple(map(int, self.allowed_token_ids)))
        words = () if self.bad_words is None else self.bad_words
        processors = () if self.logits_processors is None else self.logits_processors
        self._check_size("bad_words", words, Sequence, MAX_BAD_WORDS, "a list of strings")
        if not all(isinstance(word, str) and word for word in words):
            raise InvalidRequest(f"bad_words must be a list of strings, none empty, got {shown(self.bad_words)}")
        self._check_size("logits_processors", processors, Sequence, MAX_PROCESSORS, "a list of callables")
        if not all(map(callable, processors)):
            raise InvalidRequest(f"logits_processors must be callables, got {shown(self.logits_processors)}")
        object.__setattr__(self, "bad_words", tuple(words))
        object.__setattr__(self, "logits_processors", tuple(processors))

    @staticmethod
    def _check_size(field: str, value: Collection[object], kind: type, most: int, what: str) -> None:
        if isinstance(value, (str, bytes)) or not isinstance(value, kind):
            raise InvalidRequest(f"{field} must be {what}, got {shown(value)}")
        if len(value) > most:
            raise InvalidRequest(f"{field} may hold {most} entries, got {len(value)}")

    @classmethod
    def from_optional(cls, **options: object) -> "SamplingParams":
        """Of these options; one that is None has its default."""
        return cls(**{name: value for name, value in options.items() if value is not None})  # type: ignore[arg-type]

    def clone(self) -> "SamplingParams":
        """Its like, to be set apart."""
        return copy(self)

    @property
    def sampled_temperature(self) -> float:
        """The temperature in use: 0, or at least MIN_TEMPERATURE."""
        return max(float(self.temperature), MIN_TEMPERATURE) if self.temperature else 0.0
