"""tall_gated_linear: as exact as its two halves, the same bits however it is cut, and `gated_linear` takes it."""

from collections.abc import Callable

import pytest
import torch
from op_helpers import assert_error, assert_waits, bits
from test_thin_linear import make, poisoned
from torch import Tensor

from nanoinfer import ops, reference
from nanoinfer.tiles import TALL, GatedTiles, gated_tiles, measured_tiles

HALVES = [torch.bfloat16, torch.float16]
CUTS = [
    GatedTiles(cols, down, across, band)
    for cols in (128, 160, 192, 224, 256)
    for down, across, band in ((1, 1, 1), (2, 1, 3), (1, 2, 8))
]
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
on_gpu = [pytest.param("cuda", marks=gpu)]


def aligned(x: Tensor) -> Tensor:
    """As `poisoned`, rows at multiples of 16 bytes."""
    frame = torch.full((x.shape[0] + 2, x.shape[1] + 24 - x.shape[1] % 8), torch.nan, dtype=x.dtype, device=x.device)
    frame[1:-1, 8 : 8 + x.shape[1]] = x
    return frame[1:-1, 8 : 8 + x.shape[1]]


def assert_accurate(x: Tensor, weight: Tensor, cut: GatedTiles) -> Tensor:
    plain = reference.tall_gated_linear(x, weight, *cut)
    out = ops.tall_gated_linear(x, weight, *cut)
    assert_error(out, plain, reference.tall_gated_linear(x.double(), weight.double(), *cut))
    return out


@pytest.mark.parametrize("device", on_gpu)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_cut_gives_the_same_accurate_bits(device: str, dtype: torch.dtype) -> None:
    """Rows, columns and inputs that fill their tiles and ones that do not; a tile a block, and several."""
    for rows, out_dim, dim in ((1, 8, 8), (257, 264, 520), (300, 136, 72), (1000, 1216, 904), (2100, 1408, 448)):
        x, weight, _ = make(rows, 2 * out_dim, dim, dtype, device)
        first = assert_accurate(x, weight, CUTS[0])
        for cut in CUTS[1:]:
            assert torch.equal(bits(ops.tall_gated_linear(x, weight, *cut)), bits(first)), (rows, cut)


@pytest.mark.parametrize("device", on_gpu)
def test_a_row_depends_on_itself_alone(device: str) -> None:
    """Bit-equal among other rows, any number of them, and from run to run while other work goes on."""
    noise, other = torch.randn(2048, 2048, device=device), torch.cuda.Stream()
    x, weight, _ = make(2000, 2 * 1216, 896, torch.bfloat16, device)
    whole = ops.tall_gated_linear(x, weight, *CUTS[-2])
    for rows in (1, 63, 129, 257, 700, 1999):
        with torch.cuda.stream(other):
            noise @ noise
        assert torch.equal(ops.tall_gated_linear(x[:rows], weight, *gated_tiles(1216, rows)), whole[:rows])
    assert torch.equal(ops.tall_gated_linear(x.flip(0), weight, *CUTS[-2]), whole.flip(0))


@pytest.mark.parametrize("device", on_gpu)
def test_reads_its_arguments_alone(device: str) -> None:
    """x and weight may be views with NaN on all sides; those whose rows no copy can take are right all the same."""
    for rows, out_dim, dim in ((300, 136, 200), (130, 9, 33)):
        x, weight, _ = make(rows, 2 * out_dim, dim, torch.bfloat16, device)
        for cut in CUTS[-3:]:
            assert_accurate(poisoned(x), poisoned(weight), cut)
            assert_accurate(aligned(x), aligned(weight), cut)


@pytest.mark.parametrize("device", on_gpu)
def test_infinities_and_nan_stay_in_their_row(device: str) -> None:
    """What is not finite reaches the results that read it, and no other."""
    x, weight, _ = make(300, 2 * 136, 136, torch.bfloat16, device)
    x[2, 69], x[299, 0], weight[11, 0], weight[136 + 20, 5] = torch.nan, torch.nan, torch.inf, torch.nan
    finite = torch.isfinite(ops.tall_gated_linear(x, weight, *CUTS[-2]))
    expected = torch.isfinite(reference.tall_gated_linear(x, weight, *CUTS[-2]))
    assert torch.equal(finite, expected) and not finite[2].any() and not finite[:, 20].any()
    assert finite[[0, 1, *range(3, 299)]][:, [*range(11), *range(12, 20), *range(21, 136)]].all()


@pytest.mark.parametrize("device", on_gpu)
def test_waits_for_what_it_reads(device: str) -> None:
    """A chain of kernels that overlap gives what it gives with a halt after each."""
    dim, rows = 896, 700
    x, scale = torch.randn(rows, dim, device=device).bfloat16(), torch.ones(dim, device=device).bfloat16()
    _, up, _ = make(1, 2 * dim, dim, torch.bfloat16, device)

    def chain(after: Callable[[], None]) -> Tensor:
        h, residual = x, torch.zeros_like(x)
        for i in range(20):
            h = ops.add_rms_norm(h, residual, scale, 1e-6)
            after()
            h = ops.tall_gated_linear(h * 1 if i % 3 == 0 else h, up, *CUTS[i % len(CUTS)])
            after()
        return torch.cat((h, residual))

    assert_waits(chain, replays=30)


def test_empty_sizes(device: str) -> None:
    """No rows, no outputs and no inputs are sizes like others; a sum of nothing is 0."""
    for rows, out_dim, dim in ((0, 8, 32), (40, 0, 32), (30, 8, 0)):
        x = torch.ones(rows, dim, device=device).half()
        out = ops.tall_gated_linear(x, x.new_ones(2 * out_dim, dim), *CUTS[0])
        assert out.shape == (rows, out_dim) and not out.any()


REFUSED = {
    "x must have shape": lambda x, w: (x[0], w, 128, 1, 1, 1),
    "weight must have dtype": lambda x, w: (x, w.half(), 128, 1, 1, 1),
    "even number of rows, got 23": lambda x, w: (x, w[:23], 128, 1, 1, 1),
    "cols must be 128, 160, 192, 224 or 256, got 64": lambda x, w: (x, w, 64, 1, 1, 1),
    "down and across must be 1, 1 or 2, 1 or 1, 2, got 2, 2": lambda x, w: (x, w, 128, 2, 2, 1),
    "band must be positive, got 0": lambda x, w: (x, w, 128, 1, 1, 0),
}


@pytest.mark.parametrize("device", on_gpu)
@pytest.mark.parametrize("message", REFUSED)
def test_refused(device: str, message: str) -> None:
    """Each check at the door says what was wanted and what came."""
    with pytest.raises(RuntimeError, match=f"tall_gated_linear: .*{message}"):
        ops.tall_gated_linear(*REFUSED[message](*make(20, 24, 64, torch.bfloat16, device)[:2]))


@pytest.mark.parametrize("outputs", [4864, 8960, 18944])
def test_the_width_fits_the_rows(outputs: int) -> None:
    """No other width has its last block through earlier; 256 where there are many tiles."""
    assert gated_tiles(outputs, 16384).cols == 256
    for rows in (257, 512, 1000, 2048):
        cut = gated_tiles(outputs, rows)
        assert cut in {GatedTiles(cols, 2, 1, 8) for cols in (128, 160, 192, 224, 256)}


@pytest.mark.parametrize("shape", TALL, ids=str)
def test_few_rows_take_it_where_measured(shape: tuple[int, int], monkeypatch) -> None:
    """Its ranges are numbers of rows that `tile_linear`, which is asked first, leaves alone."""
    monkeypatch.setattr(ops, "_has_tiles", lambda device: True)
    weight = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    for where, cut in TALL[shape]:
        for rows in (where[0], where[-1]):
            assert measured_tiles(*shape, True, rows) is None and rows <= ops.TALL_ROWS
            assert ops.tall_tiles(torch.empty(rows, shape[1], dtype=torch.bfloat16, device="meta"), weight) == cut


@pytest.mark.parametrize("device", on_gpu)
@pytest.mark.parametrize("shape", TALL, ids=str)
def test_cuts_of_few_rows_are_accurate(device: str, shape: tuple[int, int]) -> None:
    """At the sizes that they were measured for."""
    for where, cut in TALL[shape]:
        for rows in (where[0], where[-1]):
            x, weight, _ = make(rows, *shape, torch.bfloat16, device)
            assert_accurate(x, weight, cut)


def test_gated_linear_takes_it(monkeypatch) -> None:
    """By number of rows, dtype and shape; the library's product elsewhere, or where there is no kernel."""
    asked = []
    monkeypatch.setattr(ops, "tall_gated_linear", lambda x, weight, *cut: asked.append((len(x), *cut)))
    monkeypatch.setattr(ops, "_has_tiles", lambda device: True)
    weight = torch.ones(32, 64).bfloat16()
    for rows, dtype in ((ops.TALL_ROWS, torch.bfloat16), (600, torch.float32), (600, torch.float16)):
        ops.gated_linear(torch.ones(rows, 64, dtype=dtype), weight.to(dtype))
    ops.gated_linear(torch.ones(600, 64).bfloat16(), weight[:24])
    assert asked == [(600, *gated_tiles(16, 600))]
    monkeypatch.setattr(ops, "_has_tiles", lambda device: False)
    out = ops.gated_linear(torch.ones(600, 64).bfloat16(), weight)
    assert len(asked) == 1 and torch.equal(out, torch.full((600, 16), 4096.0).bfloat16())
