"""Every kernel against its definition in plain torch: numbers, memory it must not touch, arguments it must refuse."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_helpers import DTYPES, INT_CANARY, RedZone, assert_error, bits, in_wider_rows, make_rows
from torch import Tensor

from nanoinfer import ops, reference, row_state
from nanoinfer.check import EXAMPLES, int32
from nanoinfer.row_state import ROW_STATE_WIDTH

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Below, at, above and far above a vector; what does not divide by one; Qwen2's.
dims = pytest.mark.parametrize("dim", [1, 7, 16, 33, 64, 896, 1000])


def seeded(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@dims
@dtypes
def test_rms_norm(device: str, dtype: torch.dtype, dim: int) -> None:
    """Accurate for every width, from rows of a wider buffer as well."""
    x, weight = (
        in_wider_rows(seeded(70, dim, dtype=dtype, device=device)),
        seeded(dim, dtype=dtype, device=device, seed=1),
    )
    truth = reference.rms_norm(x.double(), weight.double(), 1e-6)
    assert_error(ops.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6), truth)


def test_rms_norm_of_zeros_is_zero(device: str) -> None:
    """eps keeps a row of zeros, as of padding, from becoming NaN."""
    out = ops.rms_norm(torch.zeros(2, 64, device=device), torch.ones(64, device=device), 1e-6)
    assert torch.equal(out, torch.zeros_like(out))


@dims
@dtypes
def test_add_rms_norm(device: str, dtype: torch.dtype, dim: int) -> None:
    """The residual is the rounded sum, bit for bit, and the result is the norm of what was stored."""
    zone = RedZone()
    x, weight = (
        in_wider_rows(seeded(70, dim, dtype=dtype, device=device)),
        seeded(dim, dtype=dtype, device=device, seed=1),
    )
    before = seeded(70, dim, dtype=dtype, device=device, seed=2)
    residual = zone.copy(before)
    out = ops.add_rms_norm(x, residual, weight, 1e-6)
    zone.check()
    assert torch.equal(residual, x + before)
    assert torch.equal(out, ops.rms_norm(residual, weight, 1e-6))


@dims
@dtypes
def test_silu_and_mul(device: str, dtype: torch.dtype, dim: int) -> None:
    """Accurate also where e^-x overflows or vanishes."""
    x = in_wider_rows(
        seeded(70, 2 * dim, dtype=dtype, device=device) * torch.linspace(0.1, 60, 70).to(device, dtype)[:, None]
    )
    truth = reference.silu_and_mul(x.double())
    assert_error(ops.silu_and_mul(x), reference.silu_and_mul(x), truth)


def test_silu_keeps_nan(device: str) -> None:
    """A NaN must reach the logits, where it fails its request; it must not turn into a number on the way."""
    x = torch.ones(1, 64, device=device)
    x[0, 5] = torch.nan
    assert ops.silu_and_mul(x).isnan().nonzero().tolist() == [[0, 5]]


def make_angles(rotary_dim: int, device: str) -> Tensor:
    angles = torch.arange(50.0)[:, None] * torch.logspace(0, -3, rotary_dim // 2)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)


heads = pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (128, 128), (2, 2), (40, 40), (80, 32), (6, 0)])


@heads
@pytest.mark.parametrize("interleaved", [False, True])
@dtypes
def test_rotary(device: str, dtype: torch.dtype, head_dim: int, rotary_dim: int, interleaved: bool) -> None:
    """Both pairings, whole heads and the first part of them; numbers beside the head's are left alone."""
    x = seeded(33, 3, head_dim, dtype=dtype, device=device)
    positions = (torch.arange(33, dtype=torch.int32, device=device) * 7) % 50
    cos_sin = make_angles(rotary_dim, device)
    truth, plain, got = x.double(), x.clone(), in_wider_rows(x)
    wide = got._base
    before = wide.clone()
    for rotate, out in ((reference.rotary, truth), (reference.rotary, plain), (ops.rotary, got)):
        rotate(out, positions, cos_sin, interleaved)
    assert_error(got, plain, truth)
    assert torch.equal(bits(got[..., rotary_dim:]), bits(x[..., rotary_dim:]))
    before[:, 1] = got
    assert torch.equal(bits(wide), bits(before))


def make_cache(blocks: int, heads: int, block_size: int, head_dim: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.full((blocks, 2, heads, block_size, head_dim), torch.nan, dtype=dtype, device=device)


@pytest.mark.parametrize(("block_size", "head_dim"), [(1, 64), (4, 7), (16, 128)])
@dtypes
def test_store_kv(device: str, dtype: torch.dtype, block_size: int, head_dim: int) -> None:
    """Copies every bit to its slot; -1 stores nothing; the rest of the cache keeps its poison."""
    zone = RedZone()
    slots = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:20].int().to(device)
    slots[[3, 19]] = -1
    k, v = (in_wider_rows(seeded(20, 2, head_dim, dtype=dtype, device=device, seed=i)) for i in (1, 2))
    empty = make_cache(48 // block_size, 2, block_size, head_dim, dtype, device)
    kv, expected = zone.copy(empty), empty.clone()
    ops.store_kv(k, v, kv, slots)
    reference.store_kv(k, v, expected, slots)
    zone.check()
    assert torch.equal(bits(kv), bits(expected))


@heads
@pytest.mark.parametrize("interleaved", [False, True])
@dtypes
def test_rotary_store_kv(device: str, dtype: torch.dtype, head_dim: int, rotary_dim: int, interleaved: bool) -> None:
    """Bit for bit what rotary and store_kv do one after the other; k and v stay as they are."""
    zone = RedZone()
    q = seeded(33, 6, head_dim, dtype=dtype, device=device)
    k, v = (in_wider_rows(seeded(33, 2, head_dim, dtype=dtype, device=device, seed=i)) for i in (1, 2))
    positions = torch.arange(33, dtype=torch.int32, device=device)
    slots = positions.flip(0) + 3
    slots[4] = -1
    cos_sin = make_angles(rotary_dim, device)
    fused_q, kv, k_before = zone.copy(q), zone.copy(make_cache(10, 2, 4, head_dim, dtype, device)), k._base.clone()
    ops.rotary_store_kv(fused_q, k, v, kv, positions, slots, cos_sin, interleaved)
    zone.check()
    assert torch.equal(bits(k._base), bits(k_before))
    expected, rotated = make_cache(10, 2, 4, head_dim, dtype, device), k.clone()
    ops.rotary(q, positions, cos_sin, interleaved)
    ops.rotary(rotated, positions, cos_sin, interleaved)
    ops.store_kv(rotated, v, expected, slots)
    assert torch.equal(fused_q, q)
    assert torch.equal(bits(kv), bits(expected))


@dtypes
def test_results_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    """Threads split rows and never a sum, so their number changes no bit."""
    x, weight = seeded(300, 1000, dtype=dtype), seeded(1000, dtype=dtype)
    q, positions, cos_sin = seeded(300, 14, 64, dtype=dtype), torch.arange(300).int() % 50, make_angles(64, "cpu")
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        rotated = q.clone()
        ops.rotary(rotated, positions, cos_sin)
        results.append((ops.rms_norm(x, weight, 1e-6), ops.silu_and_mul(x), rotated))
    torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_no_rows_at_all(device: str) -> None:
    """A step may have no row of a kind; that is not an error."""
    nothing = torch.empty(0, 64, device=device)
    assert ops.rms_norm(nothing, torch.ones(64, device=device), 1e-6).shape == (0, 64)
    assert ops.silu_and_mul(nothing).shape == (0, 32)


@st.composite
def messages(draw: st.DrawFn) -> dict[str, Tensor | int]:
    """A valid message for a table of some rows, each with its own blocks, and arrays with room for more than it has."""
    block_size, blocks, num_rows = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    rows = draw(st.permutations(range(num_rows)))
    tables = torch.arange((num_rows + 1) * blocks, dtype=torch.int32).view(num_rows + 1, blocks)
    new = [
        (row, *draw(st.lists(st.integers(0, 9), min_size=16, max_size=16)))
        for row in draw(st.sets(st.sampled_from(rows)))
    ]
    # An edit names a block of its own: two positions at one slot would leave open which token it holds.
    edits = [
        (row, draw(st.integers(0, blocks - 1)), tables.numel() + row) for row in draw(st.sets(st.sampled_from(rows)))
    ]
    chunks, tokens = [], []
    for row in rows[: draw(st.integers(0, num_rows))]:
        end = draw(st.integers(1, blocks * block_size))
        start = draw(st.integers(0, end - 1))
        chunks.append((row, start, end, draw(st.integers(0, 3))))
        tokens += draw(st.lists(st.integers(-1, 99), min_size=end - start, max_size=end - start))
    padding = draw(st.integers(0, 2))

    def padded(values: list, width: int) -> Tensor:
        filler = [(INT_CANARY,) * width] * padding
        return torch.tensor(values + filler, dtype=torch.int32).view(-1, width)

    sizes = {"tokens": len(tokens), "positions": len(tokens), "slots": len(tokens), "q_starts": len(chunks) + 1}
    sizes |= {"kv_lens": len(chunks), "rows": len(chunks), "logit_rows": len(chunks), "sample_rows": len(chunks)}
    return dict(
        header=int32(len(new), len(edits), len(chunks), len(tokens)), new_rows=padded(new, 1 + ROW_STATE_WIDTH),
        edits=padded(edits, 3), chunks=padded(chunks, 4), new_tokens=padded([(t,) for t in tokens], 1).flatten(),
        row_state=make_rows(num_rows), block_tables=tables,
        slot_tokens=torch.full(((tables.numel() + num_rows) * block_size,), INT_CANARY, dtype=torch.int32),
        **{name: torch.full((size + padding,), INT_CANARY, dtype=torch.int32) for name, size in sizes.items()},
        block_size=block_size,
    )  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(message=messages())
def test_prepare_batch(message: dict[str, Tensor | int]) -> None:
    """For any message, the table and every entry of the Batch, padding included, are the reference's."""
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        zone = RedZone()
        got = {k: zone.copy(v.to(device)) if isinstance(v, Tensor) else v for k, v in message.items()}
        expected = {k: v.clone() if isinstance(v, Tensor) else v for k, v in message.items()}
        ops.prepare_batch(**got)
        reference.prepare_batch(**expected)
        zone.check()
        for name, value in expected.items():
            if isinstance(value, Tensor):
                assert torch.equal(got[name].cpu(), value), name


def spoil(name: str, **changes: object) -> dict:
    """Arguments of an op's example, some replaced; a function is applied to the example's own value."""
    arguments = EXAMPLES[name]()
    for key, change in changes.items():
        arguments[key] = change(arguments[key]) if callable(change) else change
    return arguments


def at(index: object, value: float) -> object:
    """A change that sets one entry."""

    def change(tensor: Tensor) -> Tensor:
        tensor[index] = value
        return tensor

    return change


def gap(tensor: Tensor) -> Tensor:
    """The same numbers, a number apart."""
    return torch.stack((tensor, tensor), dim=-1)[..., 0]


# op, what is wrong, what the message must say.
REFUSED = [
    ("rms_norm", {"x": torch.randn(70)}, r"rms_norm: x must have shape \[any, any\], got \[70\]"),
    ("rms_norm", {"x": torch.ones(3, 70).double()}, "x must have dtype Float or BFloat16 or Half, got Double"),
    ("rms_norm", {"x": gap}, "x must have packed rows"),
    ("rms_norm", {"weight": torch.randn(9)}, r"weight must have shape \[70\], got \[9\]"),
    ("rms_norm", {"weight": torch.ones(70).half()}, "weight must have dtype Float, got Half"),
    ("rms_norm", {"weight": gap}, "weight must have contiguous memory"),
    ("add_rms_norm", {"residual": torch.ones(3, 9)}, r"residual must have shape \[3, 70\], got \[3, 9\]"),
    ("add_rms_norm", {"residual": torch.ones(3, 70).half()}, "residual must have dtype Float, got Half"),
    ("add_rms_norm", {"residual": gap}, "residual must have packed rows"),
    ("silu_and_mul", {"x": torch.ones(3, 5)}, "even number of columns .* got 5"),
    ("silu_and_mul", {"x": torch.ones(3, 4).int()}, "x must have dtype .* got Int"),
    ("silu_and_mul", {"x": gap}, "x must have packed rows"),
    ("rotary", {"x": torch.ones(3, 16)}, r"x must have shape \[any, any, any\]"),
    ("rotary", {"x": gap}, "x must have packed rows"),
    ("rotary", {"positions": int32(0, 1)}, r"positions must have shape \[3\], got \[2\]"),
    ("rotary", {"positions": torch.zeros(3).long()}, "positions must have dtype Int, got Long"),
    ("rotary", {"positions": at(1, 8)}, r"positions\[1\] must be in \[0, 8\), got 8"),
    ("rotary", {"positions": at(2, -1)}, r"positions\[2\] must be in \[0, 8\), got -1"),
    ("rotary", {"cos_sin": torch.ones(8, 18)}, "even number of columns up to the 16 .* got 18"),
    ("rotary", {"cos_sin": torch.ones(8, 3)}, "even number of columns .* got 3"),
    ("rotary", {"cos_sin": torch.ones(8)}, r"cos_sin must have shape \[any, any\]"),
    ("rotary", {"cos_sin": torch.ones(8, 16).half()}, "cos_sin must have dtype Float, got Half"),
    ("store_kv", {"k": torch.ones(3, 32)}, r"k must have shape \[any, any, any\]"),
    ("store_kv", {"v": torch.ones(3, 1, 16)}, r"v must have shape \[3, 2, 16\], got \[3, 1, 16\]"),
    ("store_kv", {"v": torch.ones(3, 2, 16).half()}, "v must have dtype Float, got Half"),
    ("store_kv", {"v": gap}, "v must have packed rows"),
    ("store_kv", {"kv": torch.ones(4, 2, 2, 4, 8)}, r"kv must have shape \[any, 2, 2, any, 16\]"),
    ("store_kv", {"kv": torch.ones(4, 2, 2, 4, 16).half()}, "kv must have dtype Float, got Half"),
    ("store_kv", {"kv": lambda kv: kv.transpose(2, 3).contiguous().transpose(2, 3)}, "kv must have contiguous memory"),
    ("store_kv", {"slots": int32(0)}, r"slots must have shape \[3\], got \[1\]"),
    ("store_kv", {"slots": at(2, 16)}, r"slots\[2\] must be in \[-1, 16\), got 16"),
    ("store_kv", {"slots": at(0, -2)}, r"slots\[0\] must be in \[-1, 16\), got -2"),
    ("rotary_store_kv", {"q": torch.ones(2, 4, 16)}, r"k must have shape \[2, any, 16\], got \[3, 2, 16\]"),
    ("rotary_store_kv", {"q": torch.ones(3, 4, 16).half()}, "k must have dtype Half, got Float"),
    ("rotary_store_kv", {"q": gap}, "q must have packed rows"),
    ("rotary_store_kv", {"slots": at(0, 16)}, r"slots\[0\] must be in \[-1, 16\), got 16"),
    ("rotary_store_kv", {"positions": at(0, 8)}, r"positions\[0\] must be in \[0, 8\), got 8"),
    ("penalize", {"logits": torch.ones(2, 50).half()}, "logits must have dtype Float, got Half"),
    ("penalize", {"logits": gap}, "logits must have packed rows"),
    ("penalize", {"sample_rows": int32(0)}, r"sample_rows must have shape \[2\], got \[1\]"),
    ("penalize", {"sample_rows": int32(0, 3)}, r"sample_rows\[1\] must be in \[0, 3\), got 3"),
    ("penalize", {"row_state": torch.zeros(3, 8).int()}, r"row_state must have shape \[any, 16\]"),
    ("penalize", {"row_state": at((0, row_state.LENGTH), 5)}, r"length of row 0 must be in \[0, 4\], got 5"),
    ("penalize", {"row_state": at((0, row_state.PROMPT_LENGTH), 4)}, r"prompt length of row 0 .* in \[0, 3\], got 4"),
    ("penalize", {"row_state": at((1, row_state.PROMPT_LENGTH), -9)}, r"prompt length of row 1 must be in .* got -9"),
    ("penalize", {"block_tables": int32([0], [1])}, r"block_tables must have shape \[3, any\]"),
    ("penalize", {"block_tables": int32([0], [2], [0])}, r"position 0 of row 1 must be at a slot in \[0, 8\), got 8"),
    ("penalize", {"slot_tokens": at(2, 50)}, r"token at position 2 of row 0 must be in \[0, 50\), got 50"),
    ("penalize", {"block_size": 0}, "block_size must be at least 1, got 0"),
    ("sample", {"logits": torch.ones(2, 50).half()}, "logits must have dtype Float, got Half"),
    ("sample", {"logits": gap}, "logits must have packed rows"),
    ("sample", {"sample_rows": int32(0, -1)}, r"sample_rows\[1\] must be in \[0, 3\), got -1"),
    ("sample", {"row_state": torch.zeros(3, 16)}, "row_state must have dtype Int, got Float"),
    ("sample", {"tokens": int32(0)}, r"tokens must have shape \[2\], got \[1\]"),
    ("sample", {"vocab_size": 51}, r"vocab_size must be in \[1, 50\], the columns of logits, got 51"),
    ("sample", {"vocab_size": 0}, r"vocab_size must be in \[1, 50\]"),
    ("sample", {"row_state": make_rows(2, temperature=-1.0)}, "temperature >= 0"),
    ("sample", {"row_state": make_rows(2, top_p=0.0)}, "0 < top_p <= 1"),
    ("sample", {"row_state": make_rows(2, min_p=1.5)}, "0 <= min_p <= 1"),
    ("prepare_batch", {"header": int32(1, 1, 2)}, r"header must have shape \[4\]"),
    ("prepare_batch", {"header": int32(1, 1, 2, 4).long()}, "header must have dtype Int, got Long"),
    ("prepare_batch", {"header": int32(3, 1, 2, 4)}, r"number of new rows must be in \[0, 2\], got 3"),
    ("prepare_batch", {"header": int32(-1, 1, 2, 4)}, r"number of new rows must be in \[0, 2\], got -1"),
    ("prepare_batch", {"header": int32(1, 3, 2, 4)}, r"number of edits must be in \[0, 2\], got 3"),
    ("prepare_batch", {"header": int32(1, 1, 4, 4)}, r"number of chunks must be in \[0, 3\], got 4"),
    ("prepare_batch", {"header": int32(1, 1, 2, 6)}, r"number of tokens must be in \[0, 5\], got 6"),
    ("prepare_batch", {"header": int32(1, 1, 2, 5)}, "as many tokens as the header says, 5, got 4"),
    ("prepare_batch", {"new_rows": at((0, 0), 3)}, r"row of new row 0 must be in \[0, 3\), got 3"),
    ("prepare_batch", {"edits": at((0, 0), -1)}, r"row of edit 0 must be in \[0, 3\), got -1"),
    ("prepare_batch", {"edits": at((0, 1), 3)}, r"index of edit 0 must be in \[0, 3\), got 3"),
    ("prepare_batch", {"edits": at((0, 2), 5)}, r"block of edit 0 must be in \[0, 5\), got 5"),
    ("prepare_batch", {"chunks": at((0, 0), 3)}, r"row of chunk 0 must be in \[0, 3\), got 3"),
    ("prepare_batch", {"chunks": at((0, 1), -1)}, r"start of chunk 0 must be in \[0, 12\), got -1"),
    ("prepare_batch", {"chunks": at((1, 2), 5)}, r"end of chunk 1 must be in \[6, 13\), got 5"),
    ("prepare_batch", {"chunks": at((1, 2), 13)}, r"end of chunk 1 must be in \[6, 13\), got 13"),
    ("prepare_batch", {"chunks": at((1, 3), 4)}, r"flags of chunk 1 must be in \[0, 4\), got 4"),
    ("prepare_batch", {"new_tokens": at(0, -2)}, r"id of token 0 must be in \[-1, .*, got -2"),
    ("prepare_batch", {"block_tables": at((1, 1), 5)}, r"block of chunk 1 must be in \[0, 5\), got 5"),
    ("prepare_batch", {"block_tables": at((1, 1), -1)}, r"block of chunk 1 must be in \[0, 5\), got -1"),
    ("prepare_batch", {"logit_rows": int32(), "sample_rows": int32()}, r"sampled chunks must be in \[0, 0\], got 1"),
    ("prepare_batch", {"positions": int32(0)}, r"positions must have shape \[5\], got \[1\]"),
    ("prepare_batch", {"q_starts": int32(0)}, r"q_starts must have shape \[4\], got \[1\]"),
    ("prepare_batch", {"row_state": make_rows(2)}, r"block_tables must have shape \[3, any\], got \[4, 3\]"),
    ("prepare_batch", {"slot_tokens": gap}, "slot_tokens must have contiguous memory"),
    ("prepare_batch", {"block_size": 0}, "block_size must be at least 1, got 0"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_bad_arguments_are_refused(name: str, changes: dict, message: str) -> None:
    """A kernel checks what it is given before it touches memory, and says what it wanted and what came."""
    arguments = spoil(name, **changes)
    before = {k: bits(v).clone() for k, v in arguments.items() if isinstance(v, Tensor)}
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, name)(**arguments)
    for key, value in before.items():
        assert torch.equal(bits(arguments[key]), value), f"{key} was written all the same"


def test_an_edit_may_replace_a_bad_block() -> None:
    """A table's entry counts as it will be after this step's edits."""
    arguments = spoil("prepare_batch", block_tables=at((0, 0), -1))
    ops.prepare_batch(**arguments)
    assert arguments["slots"].tolist() == [16, 17, 18, 5, -1]


@pytest.mark.parametrize("name", sorted(ops.SCHEMAS))
def test_every_op_keeps_torchs_rules(device: str, name: str) -> None:
    """Schemas tell the truth about what is written, and shapes can be had without running anything."""
    move = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in EXAMPLES[name]().items()}
    torch.library.opcheck(getattr(torch.ops.nanoinfer, name).default, tuple(move[k] for k in argument_names(name)))


def argument_names(name: str) -> list[str]:
    return [argument.name for argument in getattr(torch.ops.nanoinfer, name).default._schema.arguments]


@pytest.mark.parametrize("name", sorted(ops.SCHEMAS))
def test_wrapper_reference_and_schema_agree(name: str) -> None:
    """Three places name an op's arguments; a swapped pair would be a silent mistake."""
    assert list(inspect.signature(getattr(ops, name)).parameters) == argument_names(name)
    assert list(inspect.signature(getattr(reference, name)).parameters) == argument_names(name)


def test_kernels_and_python_name_the_same_columns() -> None:
    """csrc/row_state.h repeats row_state.py, which C++ cannot read."""
    header = (Path(__file__).parent.parent / "csrc" / "row_state.h").read_text()
    in_header = {name: int(value) for name, value in re.findall(r"constexpr int k(\w+) = (\d+);", header)}
    in_python = {
        "".join(part.capitalize() for part in name.split("_")): value
        for name, value in vars(row_state).items()
        if name.isupper()
    }
    assert in_header == in_python
