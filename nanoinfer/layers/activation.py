"""Activations between the two linear layers of an MLP."""

from torch import Tensor, nn

from nanoinfer import ops


class SiluAndMul(nn.Module):
    """silu(gate) * up (SwiGLU, Shazeer, 2020). [T, 2 I], the gates first -> [T, I]."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.silu_and_mul(x)
