"""thin_qkv: the bits of its two halves, as exact as plain torch, nothing else in the cache, and `qkv` takes it."""

from collections.abc import Callable

import pytest
import torch
from kernel_cases import qkv_arguments
from op_helpers import DTYPES, assert_error, assert_waits, bits
from test_cuda import random_message
from test_tall_gated_linear import HALVES, aligned, on_gpu
from test_thin_linear import ALL_ROWS, poisoned
from torch import Tensor

from nanoinfer import ops, reference
from nanoinfer.check import Arguments
from nanoinfer.row_state import FLAG_STORE

# Inputs; query heads, KV heads, head dimension: Qwen2.5's, then what does not fill tiles or vectors.
SHAPES = [
    (896, (14, 2, 64)),
    (1536, (12, 2, 128)),
    (3584, (28, 4, 128)),
    (200, (3, 1, 20)),
    (77, (2, 1, 6)),
    (64, (1, 1, 2)),
    (32, (4096, 1, 16)),  # so many rows of weights that a block has fewer threads than pairs
]


def on(device: str, arguments: Arguments) -> Arguments:
    return {k: v.to(device, copy=True) if isinstance(v, Tensor) else v for k, v in arguments.items()}


def two_halves(x: Tensor, weight: Tensor, bias: Tensor | None, kv: Tensor, *where: Tensor) -> Tensor:
    heads = ops.thin_linear(x, weight, bias).unflatten(1, (-1, kv.shape[4]))
    q, k, v = heads.split([heads.shape[1] - 2 * kv.shape[2], kv.shape[2], kv.shape[2]], dim=1)
    ops.rotary_store_kv(q, k, v, kv, *where)
    return q


@pytest.mark.parametrize("device", on_gpu)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_are_those_of_its_two_halves(device: str, dtype: torch.dtype, shape: tuple[int, tuple[int, ...]]) -> None:
    """In all of the cache, too; also where a position or a slot is out of range."""
    for rows in ALL_ROWS:
        fused = on(device, qkv_arguments(rows, *shape, dtype, bias=rows % 3 > 0))
        if rows % 4 == 0:
            fused["positions"][0], fused["positions"][1], fused["slots"][-1] = -1, 50, 24
        apart = on(device, fused)
        assert torch.equal(bits(ops.thin_qkv(**fused)), bits(two_halves(*apart.values()))), rows
        assert torch.equal(bits(fused["kv"]), bits(apart["kv"])), rows


@pytest.mark.parametrize("device", on_gpu)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_error_is_at_most_twice_torchs(device: str, dtype: torch.dtype) -> None:
    for rows, (dim, layout) in ((1, SHAPES[0]), (8, SHAPES[1]), (9, SHAPES[3]), (16, SHAPES[0])):
        got = on(device, qkv_arguments(rows, dim, layout, dtype))
        plain = on(device, got)
        truth = {k: v.double() if v.is_floating_point() else v for k, v in on(device, plain).items()}
        assert_error(ops.thin_qkv(**got), reference.thin_qkv(**plain), reference.thin_qkv(**truth))
        assert_error(got["kv"], plain["kv"], truth["kv"])


@pytest.mark.parametrize("device", on_gpu)
def test_a_row_depends_on_itself_alone(device: str) -> None:
    """Bit-equal queries, keys and values alone and among any number of other rows."""
    per_row = ("x", "positions", "slots")
    for dim, layout in (SHAPES[0], SHAPES[3]):
        whole = on(device, qkv_arguments(ops.THIN_ROWS, dim, layout, torch.bfloat16))

        def some(rows: slice, whole: Arguments = whole) -> tuple[Tensor, Tensor]:
            part = on(device, {k: v[rows] if k in per_row else v for k, v in whole.items()})
            return ops.thin_qkv(**part), part["kv"]

        alone = [some(slice(i, i + 1)) for i in range(ops.THIN_ROWS)]
        kv = whole["kv"]
        for i in ALL_ROWS:
            kv = torch.where(alone[i - 1][1] != whole["kv"], alone[i - 1][1], kv)  # what the first i rows leave there
            queries, together = some(slice(i))
            assert torch.equal(queries, torch.cat([q for q, _ in alone[:i]])), i
            assert torch.equal(together, kv), i


@pytest.mark.parametrize("device", on_gpu)
def test_reads_its_arguments_alone(device: str) -> None:
    """x and weight may be views with NaN on all sides, whether or not vectors fit their rows."""
    for dim, layout in (SHAPES[0], SHAPES[4]):
        arguments = on(device, qkv_arguments(5, dim, layout, torch.bfloat16))
        expected = ops.thin_qkv(**arguments)
        for framed in (poisoned, aligned):
            views = {k: framed(arguments[k]) for k in ("x", "weight")}
            assert torch.equal(ops.thin_qkv(**{**arguments, **views}), expected), framed


@pytest.mark.parametrize("device", on_gpu)
def test_waits_for_what_it_reads(device: str) -> None:
    """x, positions and slots may be what the kernel just before writes."""
    arguments = on(device, qkv_arguments(4, *SHAPES[0], torch.bfloat16))
    step, scale = on(device, random_message(4, 4)), torch.ones(896, device=device).bfloat16()
    row, flags = torch.arange(4), torch.full((4,), FLAG_STORE)
    # Of a token each, at another position and slot every time.
    chunks = [torch.stack((row, row + i, row + i + 1, flags), 1).int().to(device) for i in range(8)]
    read = {name: step[name][:4] for name in ("positions", "slots")}
    rest = {k: arguments[k] for k in ("weight", "bias", "cos_sin")}

    def chain(after: Callable[[], None]) -> Tensor:
        h, kv = arguments["x"], torch.zeros(40, 2, 2, 4, 64, device=device).bfloat16()
        for i in range(30):
            h = ops.rms_norm(h * 1 if i % 3 == 0 else h, scale, 1e-6)  # or after a foreign kernel
            after()
            if i % 2 == 0:
                ops.prepare_batch(**{**step, "chunks": chunks[i // 2 % 8]})
                after()
            fresh = {"bias": rest["bias"] * (2 + i)} if i % 3 == 1 else {}  # which a foreign kernel has just written
            h = ops.thin_qkv(h, kv=kv, **read, **{**rest, **fresh}).flatten(1)
            after()
        return torch.cat((h.flatten(), kv.flatten()))

    assert_waits(chain, replays=50)


@pytest.mark.parametrize("device", on_gpu)
@pytest.mark.parametrize("op", ["thin_qkv", "rotary_store_kv"])
def test_blocks_beyond_30_bits(device: str, op: str) -> None:
    """Twice the number of a slot's block is counted in 64 bits."""
    arguments = on(device, qkv_arguments(2, 32, (1, 1, 2), torch.bfloat16))
    kv = arguments["kv"] = torch.zeros(2**30 + 4, 2, 1, 1, 2, dtype=torch.bfloat16, device=device)
    slots = arguments["slots"] = torch.tensor([2**30 + 3, 5], dtype=torch.int32, device=device)
    ops.thin_qkv(**arguments) if op == "thin_qkv" else two_halves(*arguments.values())
    assert int(kv[slots.long()].count_nonzero()) == int(kv.count_nonzero()) == 8


def test_empty_sizes(device: str) -> None:
    """No rows; no inputs, whose sum is the bias; no heads for queries, or none but these; a cache without slots."""
    whole = on(device, qkv_arguments(3, 40, (2, 1, 20), torch.float16))
    none, few = whole["x"][:, :0], whole["weight"][:, :0]
    changes = [
        {k: whole[k][:0] for k in ("x", "positions", "slots")}, {"x": none, "weight": few},
        {"weight": whole["weight"][40:], "bias": whole["bias"][40:]},
        {"weight": whole["weight"][:40], "bias": whole["bias"][:40], "kv": whole["kv"][:, :, :0]},
        {"kv": whole["kv"][:0], "slots": torch.full_like(whole["slots"], -1)},
    ]  # fmt: skip
    for change in changes:
        arguments, halves = (on(device, whole | change) for _ in range(2))
        assert torch.equal(ops.thin_qkv(**arguments), two_halves(*halves.values()))
        assert torch.equal(arguments["kv"], halves["kv"])


def test_opcheck(device: str) -> None:
    """Schema, fake and kernel agree."""
    arguments = on(device, qkv_arguments(3, 40, (2, 1, 20), torch.bfloat16))
    torch.library.opcheck(torch.ops.nanoinfer.thin_qkv.default, tuple(arguments.values()))


REFUSED: dict[str, Callable[[Arguments], Arguments]] = {
    "x must have at most 16 rows, got 17": lambda a: {"x": a["x"].repeat(9, 1)[:17]},
    "weight must have rows for whole heads, 2 of 20 for kv among them, got 79": lambda a: {
        "weight": a["weight"][1:], "bias": a["bias"][1:],
    },
    "weight must have rows for whole heads, .* got 20": lambda a: {"weight": a["weight"][:20], "bias": a["bias"][:20]},
    "weight must have at most 1073741824 rows, got 1073741840": lambda a: {
        "x": a["x"][:, :0], "weight": a["weight"].new_empty(2**30 + 16, 0), "bias": None,
    },
    r"bias must have shape \[80\], got \[79\]": lambda a: {"bias": a["bias"][1:]},
    r"kv must have shape \[any, 2, any, any, any\]": lambda a: {"kv": a["kv"][0]},
    "kv must have heads of an even size, got 0": lambda a: {"kv": a["kv"][..., :0], "cos_sin": a["cos_sin"][:, :0]},
    "kv must have heads of an even size, got 19": lambda a: {
        "kv": a["kv"][..., :19].contiguous(), "cos_sin": a["cos_sin"][:, :19].contiguous(),
    },
    r"positions must have shape \[2\], got \[1\]": lambda a: {"positions": a["positions"][:1]},
    "slots must have dtype Int, got Long": lambda a: {"slots": a["slots"].long()},
    r"cos_sin must have shape \[any, 20\], got \[50, 18\]": lambda a: {"cos_sin": a["cos_sin"][:, :18].contiguous()},
}  # fmt: skip


@pytest.mark.parametrize("device", on_gpu)
@pytest.mark.parametrize("message", REFUSED)
def test_refused(device: str, message: str) -> None:
    """Each check at the door says what was wanted and what came."""
    arguments = on(device, qkv_arguments(2, 40, (2, 1, 20), torch.bfloat16))
    with pytest.raises(RuntimeError, match=f"thin_qkv: {message}"):
        ops.thin_qkv(**arguments | REFUSED[message](arguments))


@pytest.mark.parametrize("rows", [0, 3])
def test_qkv_does_without_the_kernel(monkeypatch, device: str, rows: int) -> None:
    """Of no rows as well: nothing but the shape of the queries is left."""
    monkeypatch.setattr(ops, "COMPILED", ops.COMPILED - {("thin_qkv", device.upper())})
    monkeypatch.delattr(ops, "thin_qkv")
    arguments = on(device, qkv_arguments(3, 200, (3, 1, 20), torch.bfloat16))
    arguments |= {k: arguments[k][:rows] for k in ("x", "positions", "slots")}
    before = arguments["kv"].clone()
    assert ops.qkv(**arguments).shape == (rows, 3, 20)
    assert torch.equal(arguments["kv"], before) == (rows == 0)


@pytest.mark.parametrize("rows", [3, 20])
def test_qkv_is_the_same_with_and_without_it(monkeypatch, device: str, rows: int) -> None:
    """By number of rows and dtype, and only where all of a head is rotated; one op after the other elsewhere."""
    asked, kernel = [], ops.thin_qkv
    monkeypatch.setattr(ops, "thin_qkv", lambda *args: asked.append(args[0].dtype) or kernel(*args))
    monkeypatch.setattr(ops, "COMPILED", ops.COMPILED | {("thin_qkv", device.upper())})
    for dtype in (torch.bfloat16, torch.float32):
        arguments = on(device, qkv_arguments(rows, 200, (3, 1, 20), dtype))
        plain = on(device, arguments)
        heads = ops.linear(plain["x"], plain["weight"], plain["bias"]).view(rows, -1, 20)
        q, k, v = heads.split([3, 1, 1], dim=1)
        ops.rotary_store_kv(q, k, v, *list(plain.values())[3:])
        torch.testing.assert_close(ops.qkv(**arguments), q)
        torch.testing.assert_close(arguments["kv"], plain["kv"])
        partly = {"cos_sin": arguments["cos_sin"][:, :18].contiguous()}
        q = q.clone().copy_(ops.linear(plain["x"], plain["weight"], plain["bias"]).view(rows, -1, 20)[:, :3])
        ops.rotary(q, plain["positions"], partly["cos_sin"])
        torch.testing.assert_close(ops.qkv(**arguments | partly), q)
    assert asked == ([torch.bfloat16] if rows == 3 else [])
