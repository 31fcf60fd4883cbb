"""thin_gated_linear: the bits of its two halves, as exact as plain torch, and `gated_linear` takes it."""

from collections.abc import Callable

import pytest
import torch
from op_helpers import DTYPES, assert_error, assert_waits, bits
from test_tall_gated_linear import HALVES, aligned, on_gpu
from test_thin_linear import ALL_ROWS, make, poisoned
from torch import Tensor

from nanoinfer import ops, reference

# Every split of the plan, then columns and inputs that do not fill their tiles.
SHAPES = [(4864, 896), (1216, 896), (1000, 1536), (400, 2048), (33000, 72), (9, 33), (77, 453), (20, 64), (1, 1)]


def assert_accurate(x: Tensor, weight: Tensor) -> None:
    plain, truth = (reference.thin_gated_linear(*args) for args in ((x, weight), (x.double(), weight.double())))
    assert_error(ops.thin_gated_linear(x, weight), plain, truth)


@pytest.mark.parametrize("device", on_gpu)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_are_those_of_its_two_halves(device: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Both round sums to x's dtype before silu, and add them up in one order."""
    x, weight, _ = make(ops.THIN_ROWS, 2 * shape[0], shape[1], dtype, device)
    for rows in (1, 2, 7, 8, 9, 16):
        halves = ops.silu_and_mul(ops.thin_linear(x[:rows], weight))
        assert torch.equal(bits(ops.thin_gated_linear(x[:rows], weight)), bits(halves)), rows


@pytest.mark.parametrize("device", on_gpu)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_error_is_at_most_twice_torchs(device: str, dtype: torch.dtype) -> None:
    """Every number of rows, with dims that fill the tiles and dims that do not."""
    for rows in ALL_ROWS:
        for out_dim, dim in ((128, 896), (77, 453), (203, 1544)):
            x, weight, _ = make(rows, 2 * out_dim, dim, dtype, device)
            assert_accurate(x, weight)


@pytest.mark.parametrize("device", on_gpu)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_depends_on_itself_alone(device: str, dtype: torch.dtype) -> None:
    """Bit-equal results alone and among any number of other rows, in any order."""
    for out_dim, dim in ((896, 896), (203, 1544), (77, 453)):
        x, weight, _ = make(ops.THIN_ROWS, 2 * out_dim, dim, dtype, device)
        alone = torch.cat([ops.thin_gated_linear(row[None], weight) for row in x])
        for rows in ALL_ROWS:
            assert torch.equal(ops.thin_gated_linear(x[:rows], weight), alone[:rows]), (out_dim, rows)
        assert torch.equal(ops.thin_gated_linear(x.flip(0), weight), alone.flip(0)), out_dim


@pytest.mark.parametrize("device", on_gpu)
def test_reads_its_arguments_alone(device: str) -> None:
    """x and weight may be views with NaN on all sides, whether or not vectors fit their rows."""
    for rows, out_dim, dim in ((1, 24, 64), (3, 9, 33), (16, 21, 104)):
        x, weight, _ = make(rows, 2 * out_dim, dim, torch.bfloat16, device)
        expected = ops.thin_gated_linear(x, weight)
        for framed in (poisoned, aligned):
            assert torch.equal(ops.thin_gated_linear(framed(x), framed(weight)), expected), framed


def test_infinities_and_nan_stay_in_their_row(device: str) -> None:
    """What is not finite reaches the results that read it, and no other."""
    x, weight, _ = make(6, 2 * 30, 70, torch.bfloat16, device)
    x[2, 69], weight[11, 0], weight[30 + 20, 5] = torch.nan, torch.inf, torch.nan
    finite = torch.isfinite(ops.thin_gated_linear(x, weight))
    expected = torch.ones(6, 30, dtype=torch.bool)
    expected[2], expected[:, [11, 20]] = False, False
    assert torch.equal(finite.cpu(), expected)


@pytest.mark.parametrize("device", on_gpu)
def test_waits_for_what_it_reads(device: str) -> None:
    """x may be what the kernel just before writes, and weights what a foreign one does."""
    dim, rows = 896, 4
    x, scale = torch.randn(rows, dim, device=device).bfloat16(), torch.ones(dim, device=device).bfloat16()
    _, weight, _ = make(1, 2 * dim, dim, torch.bfloat16, device)

    def chain(after: Callable[[], None]) -> Tensor:
        h, residual = x, torch.zeros_like(x)
        for i in range(30):
            h = ops.add_rms_norm(h, residual, scale, 1e-6)
            after()
            h = ops.thin_gated_linear(h * 1 if i % 3 == 0 else h, weight)  # or after a foreign kernel
            after()
            fresh = ops.rms_norm(weight, scale, 1e-6) * 1
            after()
            h = ops.thin_gated_linear(h, fresh)
            after()
        return torch.cat((h, residual))

    assert_waits(chain, replays=50)


def test_empty_sizes(device: str) -> None:
    """No rows, no outputs and no inputs are sizes like others; a sum of nothing is 0."""
    for rows, out_dim, dim in ((0, 8, 32), (4, 0, 32), (3, 8, 0)):
        for dtype in DTYPES:
            x = torch.ones(rows, dim, device=device, dtype=dtype)
            out = ops.thin_gated_linear(x, x.new_ones(2 * out_dim, dim))
            assert out.shape == (rows, out_dim) and not out.any()


def test_opcheck(device: str) -> None:
    """Schema, fake and kernel agree."""
    x, weight, _ = make(3, 20, 40, torch.bfloat16, device)
    torch.library.opcheck(torch.ops.nanoinfer.thin_gated_linear.default, (x, weight))


REFUSED = {
    r"x must have shape \[any, any\], got \[64\]": lambda x, w: (x[0], w),
    "x must have packed rows": lambda x, w: (x[:, ::2], w[:, :32]),
    "x must have at most 16 rows, got 17": lambda x, w: (x.repeat(5, 1)[:17], w),
    "weight must have dtype": lambda x, w: (x, w.half()),
    r"weight must have shape \[any, 64\], got \[24, 60\]": lambda x, w: (x, w[:, :60]),
    "weight must have an even number of rows, got 23": lambda x, w: (x, w[:23]),
}


@pytest.mark.parametrize("device", on_gpu)
@pytest.mark.parametrize("message", REFUSED)
def test_refused(device: str, message: str) -> None:
    """Each check at the door says what was wanted and what came."""
    with pytest.raises(RuntimeError, match=f"thin_gated_linear: {message}"):
        ops.thin_gated_linear(*REFUSED[message](*make(4, 24, 64, torch.bfloat16, device)[:2]))


def test_gated_linear_takes_it(monkeypatch) -> None:
    """By number of rows and dtype; one op after the other elsewhere, or where there is no kernel."""
    asked, kernel = [], ("thin_gated_linear", "CPU")
    monkeypatch.setattr(ops, "thin_gated_linear", lambda x, weight: asked.append((len(x), x.dtype)))
    weight = torch.ones(32, 64)
    for compiled in (ops.COMPILED | {kernel}, ops.COMPILED - {kernel}):
        monkeypatch.setattr(ops, "COMPILED", compiled)
        for rows, dtype in ((1, torch.bfloat16), (16, torch.float16), (17, torch.bfloat16), (16, torch.float32)):
            ops.gated_linear(torch.ones(rows, 64, dtype=dtype), weight.to(dtype))
    assert asked == [(1, torch.bfloat16), (16, torch.float16)]
