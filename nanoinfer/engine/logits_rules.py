"""LogitsRules: what a request wants done to its logits before a token is chosen, in plain torch on its row alone.

They come before penalties and temperature. A step with such a request in it is not replayed from graphs.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanoinfer.sampling_params import SamplingParams

NEVER = float("-inf")


@dataclass(frozen=True, slots=True, eq=False)
class LogitsRules:
    """Made once for a request. Tensors of ids are int64, on the logits' device."""

    allowed: Tensor | None  # all other ids are out
    bias: tuple[Tensor, Tensor] | None  # ids, and what is added to their logits
    min_length: int  # until a sequence has so many tokens, the prompt's included, stop_ids are out
    stop_ids: Tensor
    bad_words: Sequence[Sequence[int]]  # no sequence of ids here is completed
    processors: Sequence[Callable[..., Tensor]]
    num_prompt_tokens: int

    @property
    def needs_tokens(self) -> bool:
        """Whether the host has to know every token before the next is chosen."""
        return bool(self.processors) or any(len(word) > 1 for word in self.bad_words)

    def apply(self, logits: Tensor, tokens: list[int], length: int) -> None:
        """Change one row of logits in place. tokens: those of the sequence as far as known; length: of all of them."""
        if self.allowed is not None:
            kept = logits[self.allowed]
            logits.fill_(NEVER)
            logits[self.allowed] = kept
        if self.bias is not None:
            logits.index_add_(0, *self.bias)
        if length < self.min_length:
            logits[self.stop_ids] = NEVER
        for *begin, last in self.bad_words:
            if not begin or tokens[-len(begin) :] == begin:
                logits[last] = NEVER
        prompt, output = tokens[: self.num_prompt_tokens], tokens[self.num_prompt_tokens :]
        for process in self.processors:
            logits.copy_(process(prompt, output, logits) if _takes_prompt(process) else process(output, logits))


def _takes_prompt(process: Callable[..., Tensor]) -> bool:
    """vLLM's two forms: (output ids, logits) and (prompt ids, output ids, logits)."""
    return len(inspect.signature(process).parameters) == 3


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
        stop_ids=ids(sorted(stop_ids)),
        bad_words=bad_words,
        processors=params.logits_processors or (),
        num_prompt_tokens=num_prompt_tokens,
    )
