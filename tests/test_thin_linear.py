"""thin_linear: exact enough, and a row's result depends on that row alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_helpers import DTYPES
from torch import Tensor

from nanoinfer import ops, reference

ALL_ROWS = range(1, ops.THIN_ROWS + 1)


def make(rows: int, out_dim: int, dim: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """x, weight, bias; results are about 1 in size."""
    generator = torch.Generator().manual_seed(rows * 7919 + out_dim * 31 + dim)
    shapes = ((rows, dim), (out_dim, dim), (out_dim,))
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    return x.to(device, dtype), (weight / dim**0.5).to(device, dtype), bias.to(device, dtype)


def poisoned(x: Tensor) -> Tensor:
    """A copy of x [rows, dim] as a view that has NaN on all sides."""
    frame = torch.full((x.shape[0] + 2, x.shape[1] + 5), torch.nan, dtype=x.dtype, device=x.device)
    frame[1:-1, 2:-3] = x
    return frame[1:-1, 2:-3]


def assert_accurate(x: Tensor, weight: Tensor, bias: Tensor | None, float_out: bool) -> None:
    """Error at most twice plain torch's, or at most that of adding one product after the other, against float64.

    The second counts for float32 results alone, where torch's own order of additions decides the first. To be off by
    one unit in the last place of the largest result, and in float32 of the largest sum of magnitudes, is allowed.
    """
    out = ops.thin_linear(x, weight, bias, float_out)
    plain = reference.thin_linear(x, weight, bias, float_out)
    one_by_one = torch.zeros(out.shape) if bias is None else bias.float().cpu().expand(out.shape)
    for column, factors in zip(x.float().cpu().T, weight.float().cpu().T, strict=True):
        one_by_one = one_by_one + torch.outer(column, factors)
    truth = reference.thin_linear(x.double(), weight.double(), None if bias is None else bias.double(), False).cpu()
    assert out.dtype == plain.dtype and out.shape == plain.shape and out.is_contiguous()
    error, plain_error, slow_error = ((y.double().cpu() - truth).abs().max() for y in (out, plain, one_by_one))
    magnitude = reference.thin_linear(x.double().abs(), weight.double().abs(), None, False).max().cpu()
    rounding = torch.finfo(out.dtype).eps / 2 * truth.abs().max() + torch.finfo(torch.float32).eps / 2 * magnitude
    assert error <= max(2 * plain_error, slow_error, 2 * rounding)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("out_dim", "dim"), [(128, 896), (77, 453), (9, 64), (1, 1), (40, 31)])
def test_error_is_at_most_twice_torchs(device: str, dtype: torch.dtype, out_dim: int, dim: int) -> None:
    """Every number of rows, with dims that fill the tiles and dims that do not."""
    for rows in ALL_ROWS:
        x, weight, bias = make(rows, out_dim, dim, dtype, device)
        assert_accurate(x, weight, bias if rows % 2 else None, float_out=rows % 3 == 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_depends_on_itself_alone(device: str, dtype: torch.dtype) -> None:
    """Bit-equal results alone and among any number of other rows: the batch does not change tokens."""
    x, weight, bias = make(ops.THIN_ROWS, 203, 453, dtype, device)
    alone = torch.cat([ops.thin_linear(row[None], weight, bias, True) for row in x])
    for rows in ALL_ROWS:
        assert torch.equal(ops.thin_linear(x[:rows], weight, bias, True), alone[:rows]), rows


@pytest.mark.parametrize("rows", [1, 7, 16])
def test_threads_do_not_change_results(rows: int) -> None:
    """Bit-equal for one, two and three threads; 1001 rows of weights cannot be split evenly."""
    x, weight, bias = make(rows, 1001, 896, torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        results = [torch.set_num_threads(n) or ops.thin_linear(x, weight, bias, True) for n in (1, 2, 3)]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_its_arguments_alone(device: str, dtype: torch.dtype) -> None:
    """x and weight may be views with NaN on all sides: nothing beside them enters the result."""
    for rows, out_dim, dim in ((1, 24, 64), (3, 9, 33), (16, 21, 95)):
        x, weight, bias = make(rows, out_dim, dim, dtype, device)
        expected = ops.thin_linear(x, weight, bias)
        assert torch.equal(ops.thin_linear(poisoned(x), poisoned(weight), bias), expected)


def test_empty_sizes(device: str) -> None:
    """No rows, no outputs and no inputs are sizes like others; a sum of nothing is the bias."""
    for rows, out_dim, dim in ((0, 8, 32), (4, 0, 32), (3, 8, 0)):
        x, bias = torch.ones(rows, dim, device=device), torch.arange(float(out_dim), device=device)
        out = ops.thin_linear(x, torch.ones(out_dim, dim, device=device), bias)
        assert torch.equal(out, bias.expand(rows, out_dim)) if dim == 0 else out.shape == (rows, out_dim)


def test_infinities_and_nan_stay_in_their_row(device: str) -> None:
    """What is not finite reaches the results that read it, and no other."""
    x, weight, _ = make(6, 30, 70, torch.bfloat16, device)
    x[2, 69], weight[11, 0] = torch.nan, torch.inf
    finite = torch.isfinite(ops.thin_linear(x, weight))
    expected = torch.ones(6, 30, dtype=torch.bool)
    expected[2], expected[:, 11] = False, False
    assert torch.equal(finite.cpu(), expected)


def test_opcheck(device: str) -> None:
    """Schema, fake and kernel agree."""
    x, weight, bias = make(3, 20, 40, torch.bfloat16, device)
    for args in ((x, weight, bias, False), (x, weight, None, True)):
        torch.library.opcheck(torch.ops.nanoinfer.thin_linear.default, args)


@given(st.integers(1, ops.THIN_ROWS), st.integers(1, 70), st.integers(1, 150), st.sampled_from(DTYPES), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_size(rows: int, out_dim: int, dim: int, dtype: torch.dtype, float_out: bool) -> None:
    """The error rule holds for sizes nobody thought of."""
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        assert_accurate(*make(rows, out_dim, dim, dtype, device), float_out)


REFUSED = {
    "x must have dtype": lambda x, w, b: (x.double(), w, b),
    r"x must have shape \[any, any\], got \[64\]": lambda x, w, b: (x[0], w, b),
    "x must have packed rows": lambda x, w, b: (x[:, ::2], w[:, :32], b),
    "x must have at most 16 rows, got 17": lambda x, w, b: (x.repeat(5, 1)[:17], w, b),
    "weight must have dtype": lambda x, w, b: (x, w.half(), b),
    r"weight must have shape \[any, 64\], got \[24, 60\]": lambda x, w, b: (x, w[:, :60], b),
    "weight must have packed rows": lambda x, w, b: (x[:, :32], w[:, ::2], b),
    "bias must have dtype": lambda x, w, b: (x, w, b.half()),
    r"bias must have shape \[24\], got \[20\]": lambda x, w, b: (x, w, b[:20]),
    "bias must have contiguous memory": lambda x, w, b: (x, w[:12], b[::2]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message: str) -> None:
    """Each check at the door says what was wanted and what came."""
    with pytest.raises(RuntimeError, match=f"thin_linear: {message}"):
        ops.thin_linear(*REFUSED[message](*make(4, 24, 64, torch.float32)))
