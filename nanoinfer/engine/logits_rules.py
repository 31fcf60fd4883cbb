"""LogitsRules: what a request wants done to its logits before a token is chosen, in plain torch.

They come before penalties and temperature. Those of all requests of a step are applied together, except for Python's
processors: one call for each.
"""

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanoinfer.sampling_params import SamplingParams

logger = logging.getLogger("nanoinfer")

NEVER = float("-inf")
FOR_EVER = 2**31 - 1

Upload = Callable[[npt.NDArray[Any]], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class LogitsRules:
    """Made once for a request. Tensors of ids are int64, on the logits' device: they may be long."""

    allowed: Tensor | None  # all other ids are out
    bias: tuple[Tensor, Tensor] | None  # ids, and what is added to their logits
    min_length: int  # until a sequence has so many tokens, the prompt's included, stop_ids are out
    stop_ids: Sequence[int]
    bad_words: Sequence[Sequence[int]]  # no sequence of ids here is completed
    processors: Sequence[Callable[..., Tensor]]
    num_prompt_tokens: int

    @property
    def needs_tokens(self) -> bool:
        """Whether the host has to know every token before the next is chosen."""
        return bool(self.processors) or any(len(word) > 1 for word in self.bad_words)

    @property
    def until(self) -> int:
        """Sequences of so many tokens are left as they are."""
        for_ever = self.allowed is not None or self.bias is not None or self.bad_words or self.processors
        return FOR_EVER if for_ever else self.min_length

    def banned(self, tokens: list[int], length: int) -> list[int]:
        """Ids that are out just now. tokens: those of the sequence as far as known; length: of all of them."""
        words = [last for *begin, last in self.bad_words if not begin or tokens[-len(begin) :] == begin]
        return [*words, *self.stop_ids] if length < self.min_length else words

    def process(self, logits: Tensor, tokens: list[int]) -> None:
        """Let the processors change one row of logits [V] in place. Raises what they raise, ValueError for a result
        that is no such row."""
        prompt, output = tokens[: self.num_prompt_tokens], tokens[self.num_prompt_tokens :]
        for process in self.processors:
            changed = process(prompt, output, logits) if _takes_prompt(process) else process(output, logits)
            if not isinstance(changed, Tensor) or changed.shape != logits.shape:
                shown = tuple(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
                raise ValueError(f"it must return logits of shape {tuple(logits.shape)}, got {shown}")
            logits.copy_(changed)


Asked = tuple[int, LogitsRules, list[int], int]  # row of the logits, what to do to it, tokens as known, their number


def apply_rules(logits: Tensor, asked: Sequence[Asked], vocab_size: int, upload: Upload) -> dict[int, str]:
    """Change rows of logits in place by their rules: allowed ids first, then biases, bans and processors.

    Returns the rows whose processors failed, and why; no token can be chosen from these.
    """
    if allowed := [(row, rules.allowed) for row, rules, *_ in asked if rules.allowed is not None]:
        rows, ids = _pairs(allowed, upload)
        kept = logits[rows, ids]
        logits.index_fill_(0, rows, NEVER)
        logits[rows, ids] = kept
    if biased := [(row, *rules.bias) for row, rules, *_ in asked if rules.bias is not None]:
        rows, ids = _pairs([(row, ids) for row, ids, _ in biased], upload)
        logits[rows, ids] += torch.cat([bias for *_, bias in biased])
    bans = ((row, rules.banned(tokens, length)) for row, rules, tokens, length in asked)
    if banned := [(row, id_) for row, ids in bans for id_ in ids]:
        rows, ids = upload(np.array(banned)).unbind(1)
        logits[rows, ids] = NEVER
    failed = dict[int, str]()
    for row, rules, tokens, _ in asked:
        if not rules.processors:
            continue
        logits[row, vocab_size:] = NEVER  # ids of the model's that are no tokens; masks are made for all of its ids
        try:
            rules.process(logits[row], tokens)
        except Exception as error:  # a user's code must not end the other requests of the step
            logger.error("a request's logits processor failed: %r", error, exc_info=error)
            failed[row] = f"a logits processor failed: {error!r}"
            logits[row] = float("nan")
    return failed


def _pairs(rows_of_ids: Sequence[tuple[int, Tensor]], upload: Upload) -> tuple[Tensor, Tensor]:
    """Row and id [pairs] of each id of each row."""
    rows, counts = upload(np.array([(row, len(ids)) for row, ids in rows_of_ids])).unbind(1)
    ids = torch.cat([ids for _, ids in rows_of_ids])
    return torch.repeat_interleave(rows, counts, output_size=len(ids)), ids


def _takes_prompt(process: Callable[..., Tensor]) -> bool:
    """vLLM's two forms: (output ids, logits) and (prompt ids, output ids, logits). One with a default is neither's."""
    places = inspect.signature(process).parameters.values()
    return sum(place.default is place.empty for place in places) == 3


def make_rules(
    params: SamplingParams, bad_words: Sequence[Sequence[int]], stop_ids: frozenset[int], num_prompt_tokens: int,
    device: torch.device,
) -> LogitsRules | None:  # fmt: skip
    """The rules that params ask for, if any."""
    asked = params.allowed_token_ids, params.logit_bias, params.min_tokens, bad_words, params.logits_processors
    if not any(asked):
        return None

    def ids(values: Sequence[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=device)

    bias = params.logit_bias
    return LogitsRules(
        allowed=ids(params.allowed_token_ids) if params.allowed_token_ids else None,
        bias=(ids(list(bias)), torch.tensor(list(bias.values()), device=device)) if bias else None,
        min_length=num_prompt_tokens + params.min_tokens,
        stop_ids=sorted(stop_ids),
        bad_words=bad_words,
        processors=params.logits_processors or (),
        num_prompt_tokens=num_prompt_tokens,
    )
