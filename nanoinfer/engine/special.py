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
    """Log probabilities at some places, on the device: of the id that stands there, then of the likeliest ones."""

    ids: Tensor  # [places, 1 + count]
    logprobs: Tensor
    ranks: Tensor  # [places], of the id that stands there; 1 is the likeliest

    def read(self) -> list[TokenLogprobs]:
        rows = zip(self.ids.tolist(), self.logprobs.tolist(), self.ranks.tolist(), strict=True)
        return [TokenLogprobs(*row) for row in rows]


def tell(logits: Tensor, tokens: Tensor, count: int) -> Told:
    """Log probability and rank of tokens [places], and the `count` likeliest ids (-1: all). logits [places, V]."""
    logprobs = logits - logits.logsumexp(1, keepdim=True)
    tokens = tokens.to(torch.int64).view(-1, 1)
    own = logprobs.gather(1, tokens.clamp_min(0))
    top = logprobs.topk(logits.shape[1] if count < 0 else min(count, logits.shape[1]))
    return Told(torch.cat((tokens, top.indices), 1), torch.cat((own, top.values), 1), (logprobs > own).sum(1) + 1)


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
        self.prompt_told: list[tuple[Sequence, int, Told]] = []  # from which position on

    def before(self, logits: Tensor, first: int) -> None:
        """Look at rows first, first + 1, ... of the samples' logits, then change them."""
        for i, seq, length in self._within(first, len(logits)):
            row = logits[i - first, : self.vocab_size]
            if seq.params.logprobs is not None:
                self.raw[i] = row.clone().unsqueeze(0)
            if seq.rules is not None:
                seq.rules.apply(row, seq.tokens, length)

    def after(self, tokens: Tensor, first: int) -> None:
        """The tokens that were chosen from those rows."""
        for i, seq, _ in self._within(first, len(tokens)):
            if i in self.raw:
                self.told[i] = tell(self.raw.pop(i), tokens[i - first : i - first + 1], seq.params.logprobs or 0)

    def tell_prompts(self, hidden: Tensor, logits: Callable[[Tensor], Tensor], rows_at_once: int) -> None:
        """Log probabilities of prompt tokens, from the hidden states before them, a few rows of logits at a time."""
        for seq, start, count, offset in self.prompts:
            for begin in range(0, count, rows_at_once):
                end = min(begin + rows_at_once, count)
                part = logits(hidden[offset + begin : offset + end])[:, : self.vocab_size]
                place = start + begin + 1
                tokens = torch.tensor(seq.tokens[place : start + end + 1], device=hidden.device)
                self.prompt_told.append((seq, place, tell(part, tokens, seq.params.prompt_logprobs or 0)))

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
