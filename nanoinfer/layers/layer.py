"""Layer: a module with weights, which knows the checkpoint tensors that fill them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint tensor and where it goes."""

    name: str
    target: Tensor  # view of a parameter: this rank's part of the tensor
    shard_dim: int | None  # the axis along which ranks hold equal, consecutive parts; None: each holds all of it
    mean: float  # about which random weights scatter
    tied: bool = False  # target has another source: the checkpoint may lack this one, or must repeat the other


class Layer(nn.Module):
    """A module with weights of its own; checkpoint names are module paths."""

    shard_dim: ClassVar[int | None] = None
    mean: ClassVar[float] = 0.0

    def sources(self, path: str) -> Iterator[Source]:
        """What fills the layer's parameters when it stands at `path` in the model."""
        for name, parameter in self.named_parameters(recurse=False):
            yield Source(f"{path}.{name}", parameter, self.shard_dim_of(parameter), self.mean)

    def shard_dim_of(self, parameter: Tensor) -> int | None:
        """A bias has the first axis alone, so it is whole on every rank where weights are cut along the second."""
        return None if self.shard_dim is None or self.shard_dim >= parameter.ndim else self.shard_dim


def empty_parameter(*shape: int, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)
