"""What the kernels' tests share: the yardstick for errors, memory with a red zone, rows of requests."""

from collections.abc import Callable

import torch
from torch import Tensor

from nanoinfer.row_state import (
    FREQUENCY_PENALTY,
    LENGTH,
    MIN_P,
    PRESENCE_PENALTY,
    REPETITION_PENALTY,
    ROW_STATE_WIDTH,
    SEED_HI,
    SEED_LO,
    TEMPERATURE,
    TOP_K,
    TOP_P,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INT_CANARY = -0x5EAD


def assert_error(got: Tensor, plain: Tensor, truth: Tensor) -> None:
    """The kernel's largest error is at most twice that of plain torch at the same dtype; both against float64."""
    assert got.dtype == plain.dtype and got.shape == truth.shape
    error = (got.double() - truth).abs().max()
    yardstick = (plain.double() - truth).abs().max()
    assert error <= 2 * yardstick, f"error {error:.3g}, plain torch's {yardstick:.3g}"


def bits(tensor: Tensor) -> Tensor:
    """The tensor as integers, so that NaN equals itself and -0 differs from 0."""
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def assert_waits(chain: Callable[[Callable[[], None]], Tensor], replays: int) -> None:
    """A captured chain of kernels that overlap gives what it gives with a halt after each.

    chain(after) calls `after` behind each of its kernels; its result is a new tensor.
    """
    expected = chain(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(lambda: None)
    for _ in range(replays):
        out.zero_()
        graph.replay()
        assert torch.equal(bits(out), bits(expected))


class RedZone:
    """Copies of tensors with 64 numbers of canary on either side of each."""

    def __init__(self) -> None:
        self._zones: list[tuple[Tensor, Tensor]] = []

    def copy(self, tensor: Tensor) -> Tensor:
        canary = torch.nan if tensor.is_floating_point() else INT_CANARY
        flat = torch.full((tensor.numel() + 128,), canary, dtype=tensor.dtype, device=tensor.device)
        inner = flat[64:-64].view(tensor.shape)
        inner.copy_(tensor)
        for zone in (flat[:64], flat[-64:]):
            self._zones.append((zone, zone.clone()))
        return inner

    def check(self) -> None:
        for zone, original in self._zones:
            assert torch.equal(bits(zone), bits(original)), "written outside"


def in_wider_rows(tensor: Tensor) -> Tensor:
    """The same numbers as a view into rows that are wider, as q, k and v are of one product; NaN in the rest."""
    wide = torch.full((tensor.shape[0], 3, *tensor.shape[1:]), torch.nan, dtype=tensor.dtype, device=tensor.device)
    wide[:, 1] = tensor
    return wide[:, 1]


def make_rows(
    count: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, penalty: float = 1.0,
    presence: float = 0.0, frequency: float = 0.0, seed: int = 0,
) -> Tensor:  # fmt: skip
    """row_state of `count` requests with seeds of their own, and the last row, which belongs to none."""
    state = torch.zeros(count + 1, ROW_STATE_WIDTH, dtype=torch.int32)
    generator = torch.Generator().manual_seed(seed)
    state[:, SEED_LO : SEED_HI + 1] = torch.randint(-(2**31), 2**31, (count + 1, 2), generator=generator)
    state[:, LENGTH] = torch.randint(0, 1000, (count + 1,), generator=generator)
    state[:, TOP_K] = top_k
    floats = state.view(torch.float32)
    for column, value in (
        (TEMPERATURE, temperature), (TOP_P, top_p), (MIN_P, min_p), (REPETITION_PENALTY, penalty),
        (PRESENCE_PENALTY, presence), (FREQUENCY_PENALTY, frequency),
    ):  # fmt: skip
        floats[:, column] = value
    return state
