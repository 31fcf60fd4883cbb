"""tile_linear: exact enough however it is cut, a row depends on itself alone, and `linear` follows its table."""

from collections.abc import Callable
from itertools import pairwise, product

import pytest
import torch
from op_helpers import assert_error, assert_waits
from test_thin_linear import make, poisoned
from torch import Tensor

from nanoinfer import ops, reference
from nanoinfer.tiles import THIN_UP_TO, TILES, Tiles

HALVES = [torch.bfloat16, torch.float16]
COLS = {False: (40, 48, 56, 64, 96), True: (80, 144, 160)}
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
on_gpu = [pytest.param("cuda", marks=gpu)]


def run(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool, tiles: Tiles) -> Tensor:
    return ops.tile_linear(x, weight, None if gated else bias, gated, *tiles)


def assert_accurate(x: Tensor, weight: Tensor, bias: Tensor, gated: bool, tiles: Tiles) -> None:
    bias = None if gated else bias
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    plain = reference.tile_linear(x, weight, bias, gated, *tiles)
    assert_error(run(x, weight, bias, gated, tiles), plain, reference.tile_linear(*wide, gated, *tiles))


@pytest.mark.parametrize("device", on_gpu)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_error_is_at_most_twice_torchs(device: str, dtype: torch.dtype, gated: bool) -> None:
    """Every cut, with rows, columns and inputs that fill their tiles and ones that do not."""
    for cols, (tiles, split, blocks) in product(COLS[gated], ((1, 1, 2), (1, 8, 1), (2, 3, 1), (3, 1, 1), (1, 4, 2))):
        for rows, out_dim, dim in ((17, 208, 896), (64, 160, 72), (65, 320, 1288), (200, 176, 640)):
            assert_accurate(*make(rows, out_dim, dim, dtype, device), gated, Tiles(cols, tiles, split, blocks))


@pytest.mark.parametrize("device", on_gpu)
@pytest.mark.parametrize("shape", TILES, ids=str)
def test_every_entry_of_the_table_runs(device: str, shape: tuple[int, int, bool]) -> None:
    """At the most rows it is for, where its memory is shortest, and at the fewest."""
    outputs, inputs, gated = shape
    sizes, fewest = ((256, inputs), (outputs, inputs), (outputs,)), THIN_UP_TO.get(shape, ops.THIN_ROWS) + 1
    x, weight, bias = (torch.randn(size, device=device).bfloat16() for size in sizes)
    for most, tiles in TILES[shape]:
        for rows in (fewest, most) if tiles else ():
            assert_accurate(x[:rows], weight / inputs**0.5, bias, gated, tiles)
        fewest = most + 1


@pytest.mark.parametrize("device", on_gpu)
@pytest.mark.parametrize("gated", [False, True])
def test_a_row_depends_on_itself_alone(device: str, gated: bool) -> None:
    """Bit-equal among other rows, any number of them within a cut, and from run to run while other work goes on."""
    noise, other = torch.randn(2048, 2048, device=device), torch.cuda.Stream()
    for tiles in (Tiles(COLS[gated][0], 1, 4, 2), Tiles(COLS[gated][-1], 2, 1, 1), Tiles(COLS[gated][0], 3, 2, 1)):
        x, weight, bias = make(150, 896, 4864, torch.bfloat16, device)
        whole = run(x, weight, bias, gated, tiles)
        for rows in (9, 17, 40, 63, 64, 65, 128, 129):
            with torch.cuda.stream(other):
                noise @ noise
            assert torch.equal(run(x[:rows], weight, bias, gated, tiles), whole[:rows]), (tiles, rows)
        assert torch.equal(run(x.flip(0), weight, bias, gated, tiles), whole.flip(0)), tiles


@pytest.mark.parametrize("device", on_gpu)
def test_reads_its_arguments_alone(device: str) -> None:
    """x and weight may be views with NaN on all sides; those whose rows no copy can take are right all the same."""
    for rows, out_dim, dim in ((17, 48, 64), (70, 136, 200), (33, 9, 33)):
        x, weight, bias = make(rows, out_dim, dim, torch.bfloat16, device)
        tiles = Tiles(40, 1, 2, 1)
        assert_accurate(poisoned(x), poisoned(weight), bias, False, tiles)
        assert_accurate(x[:1].expand(rows, dim), weight, bias, False, tiles)  # its rows overlap
        frame = torch.full((rows + 2, dim + 24 - dim % 8), torch.nan, dtype=x.dtype, device=device)
        frame[1:-1, 8 : 8 + dim] = x
        assert_accurate(frame[1:-1, 8 : 8 + dim], weight, bias, False, tiles)


@pytest.mark.parametrize("device", on_gpu)
def test_infinities_and_nan_stay_in_their_row(device: str) -> None:
    """What is not finite reaches the results that read it, and no other."""
    x, weight, _ = make(70, 80, 136, torch.bfloat16, device)
    x[2, 69], x[69, 0], weight[11, 0] = torch.nan, torch.inf, torch.inf
    for split in (1, 2):
        finite = torch.isfinite(ops.tile_linear(x, weight, None, False, 48, 1, split, 1))
        expected = torch.ones(70, 80, dtype=torch.bool)
        expected[2], expected[69], expected[:, 11] = False, False, False
        assert torch.equal(finite.cpu(), expected)


@pytest.mark.parametrize("device", on_gpu)
def test_waits_for_what_it_reads(device: str) -> None:
    """A kernel is on the GPU before the one ahead of it has ended: a chain of them, as with a halt after each."""
    dim, rows = 896, 40
    x, scale = torch.randn(rows, dim, device=device).bfloat16(), torch.ones(dim, device=device).bfloat16()
    _, up, _ = make(1, 4 * dim, dim, torch.bfloat16, device)
    _, down, _ = make(2, dim, 2 * dim, torch.bfloat16, device)

    def chain(after: Callable[[], None]) -> Tensor:
        h, residual = x, torch.zeros_like(x)
        for i in range(30):
            h = ops.add_rms_norm(h, residual, scale, 1e-6)
            after()
            h = ops.tile_linear(h * 1 if i % 3 == 0 else h, up, None, True, 80, 1, 1, 2)  # or after a foreign kernel
            after()
            h = ops.tile_linear(h, down, None, False, 56, 1, 4, 1)
            after()
        return torch.cat((h, residual))

    assert_waits(chain, replays=50)


def test_empty_sizes(device: str) -> None:
    """No rows, no outputs and no inputs are sizes like others; a sum of nothing is the bias."""
    for rows, out_dim, dim in ((0, 8, 32), (40, 0, 32), (30, 8, 0)):
        x, bias = torch.ones(rows, dim, device=device).half(), torch.arange(float(out_dim), device=device).half()
        out = ops.tile_linear(x, x.new_ones(out_dim, dim), bias, False, 40, 1, 2, 1)
        assert torch.equal(out, bias.expand(rows, out_dim)) if dim == 0 else out.shape == (rows, out_dim)


REFUSED = {
    "x must have shape": lambda x, w, b: (x[0], w, b, False, 40, 1, 1, 1),
    "weight must have dtype": lambda x, w, b: (x, w.half(), b, False, 40, 1, 1, 1),
    "cols must be 40, 48, 56, 64 or 96, got 80": lambda x, w, b: (x, w, b, False, 80, 1, 1, 1),
    "gated, cols must be 80, 144 or 160, got 40": lambda x, w, b: (x, w, None, True, 40, 1, 1, 1),
    "gated, there must be no bias": lambda x, w, b: (x, w, b, True, 80, 1, 1, 1),
    "even number of rows, got 23": lambda x, w, b: (x, w[:23], None, True, 80, 1, 1, 1),
    "tiles must be 1 to 3, got 4": lambda x, w, b: (x, w, b, False, 40, 4, 1, 1),
    "split must be 1 to 8, got 9": lambda x, w, b: (x, w, b, False, 40, 1, 9, 1),
    "blocks must be 1 or 2, got 0": lambda x, w, b: (x, w, b, False, 40, 1, 1, 0),
}


@pytest.mark.parametrize("device", on_gpu)
@pytest.mark.parametrize("message", REFUSED)
def test_refused(device: str, message: str) -> None:
    """Each check at the door says what was wanted and what came."""
    with pytest.raises(RuntimeError, match=f"tile_linear: .*{message}"):
        ops.tile_linear(*REFUSED[message](*make(20, 24, 64, torch.bfloat16, device)))


@pytest.mark.parametrize("shape", TILES, ids=str)
def test_the_table_makes_sense(shape: tuple[int, int, bool]) -> None:
    """Growing numbers of rows, beyond thin_linear's, and cuts that the op takes."""
    limits = [THIN_UP_TO.get(shape, ops.THIN_ROWS), *(most for most, _ in TILES[shape])]
    assert all(less < more for less, more in pairwise(limits)) and limits[-1] <= 256
    for tiles in filter(None, dict(TILES[shape]).values()):
        assert tiles.cols in COLS[shape[2]]
        assert 1 <= tiles.tiles <= 3 and 1 <= tiles.split <= 8 and tiles.blocks in (1, 2)


def test_linear_follows_the_table(monkeypatch) -> None:
    """By shape, number of rows and dtype; the library's product where the table has nothing, or there is no kernel."""
    asked = []
    monkeypatch.setattr(ops, "tile_linear", lambda x, weight, bias, *how: asked.append((len(x), *how)))
    monkeypatch.setattr(ops, "_has_tiles", lambda device: True)
    weight, wide = torch.ones(896, 896).bfloat16(), torch.ones(9728, 896).bfloat16()
    for rows, dtype in ((16, torch.bfloat16), (17, torch.bfloat16), (96, torch.float32), (256, torch.bfloat16)):
        ops.linear(torch.ones(rows, 896, dtype=dtype), weight.to(dtype))
    ops.linear(torch.ones(20, 896).bfloat16(), weight, float_out=True)
    ops.linear(torch.ones(20, 896).bfloat16(), weight[:880])
    ops.gated_linear(torch.ones(60, 896).bfloat16(), wide)
    table, gated = TILES[896, 896, False], TILES[9728, 896, True]
    assert asked == [(17, False, *table[0][1]), (256, False, *table[-1][1]), (60, True, *gated[0][1])]
    monkeypatch.setattr(ops, "_has_tiles", lambda device: False)
    assert torch.equal(ops.linear(torch.ones(17, 896).bfloat16(), weight), torch.full((17, 896), 896.0).bfloat16())


@pytest.mark.parametrize("has_tiles", [False, True])
def test_thin_products_end_where_the_table_says(monkeypatch, has_tiles: bool) -> None:
    """At 4 or 8 rows for some weights, where there is a kernel for more; else at THIN_ROWS."""
    monkeypatch.setattr(ops, "_has_tiles", lambda device: has_tiles)
    monkeypatch.setattr(ops, "COMPILED", {(op, "CPU") for op in ("thin_linear", "thin_gated_linear", "thin_qkv")})
    number = torch.zeros(1, 1, dtype=torch.bfloat16)
    for (outputs, inputs, gated), most in [*THIN_UP_TO.items(), ((896, 896, False), ops.THIN_ROWS)]:
        weight, end = number.expand(outputs, inputs), most if has_tiles else ops.THIN_ROWS
        for op in ["thin_gated_linear"] if gated else ["thin_linear", "thin_qkv"]:
            taken = [ops.takes_thin(op, number.expand(rows, inputs), weight) for rows in range(1, 20)]
            assert taken == [rows <= end for rows in range(1, 20)], (op, outputs, inputs)
        assert not ops.takes_thin(op, number.float().expand(1, inputs), weight)


def test_tiles_take_large_weights_from_9_rows_on(monkeypatch) -> None:
    """But not where sums are wanted as floats, which tile_linear does not give."""
    asked = []
    monkeypatch.setattr(ops, "_has_tiles", lambda device: True)
    monkeypatch.setattr(ops, "COMPILED", {(op, "CPU") for op in ("thin_linear", "thin_gated_linear")})
    for op in ("thin_linear", "thin_gated_linear", "tile_linear"):
        monkeypatch.setattr(ops, op, lambda x, *rest, op=op: asked.append((op, len(x))))
    number = torch.ones(1, 1, dtype=torch.bfloat16)
    for rows in (8, 9, 16):
        ops.linear(number.expand(rows, 4864), number.expand(896, 4864))
        ops.gated_linear(number.expand(rows, 1536), number.expand(17920, 1536))
        ops.linear(number.expand(rows, 4864), number.expand(896, 4864), float_out=True)
    for at, rows in ((0, 8), (3, 9), (6, 16)):
        kinds = ("thin_linear", "thin_gated_linear") if rows == 8 else ("tile_linear", "tile_linear")
        assert asked[at : at + 3] == [(kinds[0], rows), (kinds[1], rows), ("thin_linear", rows)]


@pytest.mark.parametrize("rows", [3, 40])
def test_gated_linear_is_linear_and_silu(device: str, rows: int) -> None:
    """Few rows and many, with a kernel for both or one after the other."""
    x, weight, _ = make(rows, 9728, 896, torch.bfloat16, device)
    plain = reference.silu_and_mul(reference.thin_linear(x, weight, None, False))
    truth = reference.tile_linear(x.double(), weight.double(), None, True, 80, 1, 1, 1)
    assert_error(ops.gated_linear(x, weight), plain, truth)
