"""Token ids to vectors, and vectors to logits over token ids. Both are whole on every rank."""

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoinfer import ops
from nanoinfer.layers.layer import Layer, Source, empty_parameter


class VocabEmbedding(Layer):
    """A row of weight [vocab_size, hidden_size] for each token id."""

    def __init__(self, vocab_size: int, hidden_size: int, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = empty_parameter(vocab_size, hidden_size, device=device, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [T] int32 -> [T, hidden_size]."""
        return F.embedding(tokens, self.weight)


class LMHead(Layer):
    """hidden [L, hidden_size] -> logits [L, vocab_size] float32. tied: its weight is the embedding's."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        tied: VocabEmbedding | None,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.tied = tied is not None
        own = tied or VocabEmbedding(vocab_size, hidden_size, device=device, dtype=dtype)
        self.weight = own.weight

    def sources(self, path: str) -> Iterator[Source]:
        for source in super().sources(path):
            yield replace(source, tied=self.tied)

    def forward(self, hidden: Tensor) -> Tensor:
        # Sampling divides and compares logits: rounding them to half precision would make ties.
        return ops.linear(hidden, self.weight, float_out=True)
