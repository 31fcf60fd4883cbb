"""RMSNorm (Zhang and Sennrich, 2019)."""

import torch
from torch import Tensor

from nanoinfer import ops
from nanoinfer.layers.layer import Layer, empty_parameter


class RMSNorm(Layer):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. weight [size], whole on every rank."""

    mean = 1.0

    def __init__(self, size: int, eps: float, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = empty_parameter(size, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The norm of x [T, size]."""
        return ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual += x in place; the norm of the sum. x, residual [T, size]."""
        return ops.add_rms_norm(x, residual, self.weight, self.eps)
