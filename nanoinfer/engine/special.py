"""Special: what some requests of a step want beside a token: their logits changed, log probabilities told."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanoinfer.engine.rows import Step
from nanoinfer.engine.sequence import Sequence, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Told:
    """Log probabilities at one place, on the device: of the chosen id, then of the likeliest ones."""

    ids: Tensor
    logprobs: Tensor
    rank: Tensor  # of the chosen id; 1 is the likeliest

    def read(self) -> TokenLogprobs:
        return TokenLogprobs(self.ids.tolist(), self.logprobs.tolist(), int(self.rank))


def tell(logits: Tensor, token: Tensor, count: int) -> Told:
    """The log probability and rank of `token`, and the `count` likeliest ids (-1: all). logits [V]."""
    logprobs = logits - logits.logsumexp(0)
    chosen = logprobs[token.clamp_min(0)]
    top = logprobs.topk(len(logits) if count < 0 else min(count, len(logits)))
    ids = torch.cat((token.view(1).to(top.indices.dtype), top.indices))
    return Told(ids, torch.cat((chosen.view(1), top.values)), (logprobs > chosen).sum() + 1)


class Special:
    """One step's. Log probabilities are those of the logits as the model gave them."""

    def __init__(self, step: Step, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        places = np.cumsum(step.samples) - 1
        chosen = np.flatnonzero(step.special & step.samples).tolist()
        self.samples = {int(places[i]): (step.seqs[i], int(step.ends[i])) for i in chosen}
        self.raw: dict[int, Tensor] = {}
        self.told: dict[int, Told] = {}  # by the place among the step's samples
        self.prompts = list(self._prompt_chunks(step))
        self.prompt_told: list[tuple[Sequence, int, Told]] = []

    def before(self, logits: Tensor, first: int) -> None:
        """Look at rows first, first + 1, ... of the samples' logits, then change them."""
        for i, seq, length in self._within(first, len(logits)):
            row = logits[i - first, : self.vocab_size]
            if seq.params.logprobs is not None:
                self.raw[i] = row.clone()
            if seq.rules is not None:
                seq.rules.apply(row, seq.tokens, length)

    def after(self, tokens: Tensor, first: int) -> None:
        """The tokens that were chosen from those rows."""
        for i, seq, _ in self._within(first, len(tokens)):
            if i in self.raw:
                self.told[i] = tell(self.raw.pop(i), tokens[i - first], seq.params.logprobs or 0)

    def tell_prompts(self, hidden: Tensor, logits: Callable[[Tensor], Tensor], rows_at_once: int) -> None:
        """Log probabilities of prompt tokens, from the hidden states before them, a few rows of logits at a time."""
        for seq, start, count, offset in self.prompts:
            for begin in range(0, count, rows_at_once):
                part = logits(hidden[offset + begin : offset + min(begin + rows_at_once, count)])
                for j, row in enumerate(part[:, : self.vocab_size]):
                    place = start + begin + j + 1
                    token = torch.tensor(seq.tokens[place], device=hidden.device)
                    self.prompt_told.append((seq, place, tell(row, token, seq.params.prompt_logprobs or 0)))

    def _within(self, first: int, count: int) -> Iterator[tuple[int, Sequence, int]]:
        return ((i, seq, end) for i, (seq, end) in self.samples.items() if first <= i < first + count)

    def _prompt_chunks(self, step: Step) -> Iterator[tuple[Sequence, int, int, int]]:
        """Sequence, first position, positions whose next token is the prompt's, and where they are in the step."""
        offsets = np.cumsum(step.ends - step.starts) - (step.ends - step.starts)
        for i in np.flatnonzero(step.special).tolist():
            seq, start = step.seqs[i], int(step.starts[i])
            count = min(int(step.ends[i]), seq.num_prompt_tokens - 1) - start
            if seq.params.prompt_logprobs is not None and count > 0:
                yield seq, start, count, int(offsets[i])
