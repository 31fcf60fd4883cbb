"""Rotary position embedding (RoFormer, Su et al., 2021): the table of cosines and sines for each RoPE type."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nanoinfer.config import RopeConfig


def rope_table(rope: RopeConfig, head_dim: int, length: int, device: torch.device) -> Tensor:
    """[length, head_dim] float32: each position's cosines in the first half of a row, sines in the second.

    Frequencies and angles are rounded to float32 just where Hugging Face rounds them, and on the CPU whatever the
    device: the tables are equal bit by bit, where an exact one would differ by 1.2e-3 at positions near 32k.
    """
    inv_freq = FREQUENCIES[rope.type](rope, head_dim)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * inv_freq
    return torch.cat((angles.cos(), angles.sin()), dim=1).mul_(rope.attention_factor).to(device)


def _base(rope: RopeConfig, head_dim: int) -> Tensor:
    """theta ^ (2 i / head_dim), [head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2).float() / head_dim
    return torch.pow(rope.theta, exponents)


def _default(rope: RopeConfig, head_dim: int) -> Tensor:
    return 1.0 / _base(rope, head_dim)


def _linear(rope: RopeConfig, head_dim: int) -> Tensor:
    """Position interpolation (Chen et al., 2023)."""
    return _default(rope, head_dim) / rope.factor


def _llama3(rope: RopeConfig, head_dim: int) -> Tensor:
    """Llama 3.1: wavelengths beyond the original length are stretched, short ones stay, between them a blend."""
    inv_freq = _default(rope, head_dim)
    turns = rope.original_length / (2 * math.pi / inv_freq)
    keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - keep) * inv_freq / rope.factor + keep * inv_freq


def _yarn(rope: RopeConfig, head_dim: int) -> Tensor:
    """YaRN (Peng et al., 2023): dimensions that turn often stay, slow ones are stretched, between them a ramp."""

    def dimension(turns: float) -> float:
        """The dimension, fractional, that makes so many turns within the original length."""
        return head_dim * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    stretch = ((torch.arange(head_dim // 2).float() - low) / width).clamp(0, 1)
    keep = 1 - stretch
    base = _base(rope, head_dim)
    return 1.0 / (rope.factor * base) * (1 - keep) + 1.0 / base * keep


# "dynamic" changes frequencies only beyond the original length, where ModelConfig.max_length ends.
FREQUENCIES: dict[str, Callable[[RopeConfig, int], Tensor]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _default,
    "llama3": _llama3,
    "yarn": _yarn,
}
