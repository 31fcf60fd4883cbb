"""Small arguments for every op on which, together, every CUDA kernel runs: see sanitize.py.

All is made on the CPU, from the same seed for each group. A kernel counts as several where a dtype or a size is a
parameter of its template; each of these runs at least once on a Hopper, but what sanitize.py names.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import torch
from op_helpers import DTYPES, make_rows
from test_attention import Case as Attention
from test_attention import Chunks, int32, make_case
from test_cuda import random_message
from test_penalties import one_bucket, paged, penalized_rows
from test_sample import SETTINGS
from test_tall_gated_linear import CUTS
from test_thin_linear import make
from test_tile_linear import COLS, HALVES
from torch import Tensor

from nanoinfer.check import EXAMPLES, SHORT, Arguments

Layout = tuple[int, int, int]  # query heads, KV heads, head dimension


class Case(NamedTuple):
    """One call of an op; its arguments by name."""

    op: str
    label: str
    arguments: Arguments


# Per head dimension a group of up to 8 heads, and one of more.
LAYOUTS: list[Layout] = [
    (4, 2, 32), (12, 1, 32), (14, 2, 64), (10, 1, 64), (5, 1, 96), (10, 1, 96), (12, 2, 128), (9, 1, 128), (3, 1, 256),
    (9, 1, 256),
]  # fmt: skip
# One, two and three splits of 512 keys, with one token and with several; an empty chunk; long ones, old keys or none.
MIXED: Chunks = [(1, 1100), (1, 3), (0, 0), (5, 600), (90, 90), (20, 300)]
SHORT_MIXED: Chunks = [(1, 300), (0, 0), (3, 60), (12, 12)]  # float32 knows neither splits nor long chunks


def attend(label: str, case: Attention, tables_ready: bool = False) -> Case:
    layout = f"{case.q.shape[1]}/{case.kv.shape[2]}/{case.q.shape[2]}"
    arguments = {**vars(case), "q": case.q.contiguous(), "tables_ready": tables_ready}  # q: not in wider rows
    return Case("paged_attention", f"{SHORT[case.q.dtype]} {layout} {label}, window {case.window}", arguments)


def attention() -> Iterator[Case]:
    """Steps of all kinds of chunks: every kernel but those for few long ones, of each dimension and dtype with and
    without a window."""
    for i, (turn, dtype) in product(range(len(LAYOUTS)), enumerate(HALVES)):
        window, block_size = ((0, 16), (100, 64))[(i + turn) % 2]
        yield attend("mixed", make_case(MIXED, LAYOUTS[i], dtype, block_size=block_size, window=window))
    for i, layout in enumerate(LAYOUTS[::2]):
        yield attend("mixed", make_case(SHORT_MIXED, layout, torch.float32, block_size=4, window=20 * (i % 2)))


def crowd(lengths: Sequence[int], kv_lens: Sequence[int], layout: Layout, dtype: torch.dtype) -> Attention:
    """Many chunks, all of one sequence, to be small."""
    case = make_case([(1, max(kv_lens))], layout, dtype)
    return replace(
        case, q=torch.randn(sum(lengths), layout[0], layout[2]).to(dtype),
        q_starts=torch.tensor([0, *lengths]).cumsum(0).int(), kv_lens=int32(kv_lens, "cpu"),
        rows=int32([0] * len(lengths), "cpu"),
    )  # fmt: skip


def long() -> Iterator[Case]:
    """More splits than are merged in one turn; more chunks, and items of a block, than are looked at in one turn."""
    for i, layout in enumerate(LAYOUTS):  # each dimension in both dtypes
        yield attend("ten splits", make_case([(1, 5000), (3, 5000)], layout, HALVES[i % 2]), tables_ready=True)
    lengths = [9 if i % 10 == 5 else 1 for i in range(140)]
    kv_lens = [600 if i % 20 == 0 else 9 + 17 * i % 70 for i in range(140)]
    for dim, dtype in ((32, torch.float16), (64, torch.bfloat16), (128, torch.float16)):
        yield attend("140 chunks", crowd(lengths, kv_lens, (64, 64, dim), dtype))
    yield from shares()


# Few long chunks, of sequences whose tables have room for 1,792 keys or more, which blocks share out tile by tile on a
# Hopper where that pays: parts of an item in its middle and at its ends, whole items between, items of two tiles of
# rows. Where it does not pay, blocks of the same kernel take whole items; here, of 34 heads, more items than blocks.
SHARED: Chunks = [(20, 4300), (9, 300), (40, 40), (1, 700)]
WHOLE = ([200, 1, 30, 9], [200, 1800, 700, 9])
# Three items and more for each of 132 blocks, whole ones and shares: places in shared memory are used again.
AGAIN: Chunks = [(300, 300), (1, 9)]
SHARED_AGAIN: Chunks = [(20, 4300), *[(9, 9)] * 200]


def shares() -> Iterator[Case]:
    for dtype, dim in product(HALVES, (64, 128)):
        yield attend("shared", make_case(SHARED, (8, 2, dim), dtype))
        yield attend("one shared", make_case([(200, 5200)], (4, 1, dim), dtype))
        yield attend("whole", crowd(*WHOLE, (34, 34, dim), dtype))
    for dtype, dim in zip(HALVES, (64, 128), strict=True):
        again = make_case(AGAIN, (140, 140, dim), dtype)
        yield attend("items again", again)
        wide = torch.nn.functional.pad(again.block_tables, (0, 112))
        yield attend("items again, wide table", replace(again, block_tables=wide))
        yield attend("shares again", make_case(SHARED_AGAIN, (2, 2, dim), dtype))
        yield attend("40 chunks, shared", crowd([*[1] * 37, 20, 1, 9], [*[30] * 37, 4300, 9, 300], (8, 2, dim), dtype))


# Rows, outputs, inputs. Up to 8 rows or more, with 8 or 16 weight rows a block; inputs that vectors fit or not.
THIN = [(3, 40, 1536), (3, 41, 1541), (3, 128, 896), (3, 77, 453), (12, 128, 896), (12, 77, 453)]
THIN_PLANS = [
    (12, 40, 1536), (12, 40, 2048), (3, 1072, 2048), (12, 4240, 64), (3, 2128, 8192), (12, 8464, 64), (3, 65552, 32),
]  # fmt: skip  # and what else plan_thin_linear says, but for 4 warps that have as many weights as lm_head's
THIN_GATED = [(3, 144, 200), (3, 38, 453), (12, 144, 200), (12, 38, 453)]


def thin() -> Iterator[Case]:
    """Rows of up to 16; float32 has a kernel of its own."""
    cases = [*product(DTYPES, THIN), *product([torch.bfloat16], THIN_PLANS)]
    for i, (dtype, shape) in enumerate(cases):
        x, weight, bias = make(*shape, dtype)
        some = {"bias": bias if i % 4 > 1 else None, "float_out": i % 3 == 0}
        yield Case("thin_linear", f"{SHORT[dtype]} {shape}", {"x": x, "weight": weight, **some})
    for dtype, shape in [*product(HALVES, THIN_GATED), (torch.bfloat16, (12, 80, 1536)), (torch.float32, (3, 80, 64))]:
        x, weight, _ = make(*shape, dtype)
        yield Case("thin_gated_linear", f"{SHORT[dtype]} {shape}", {"x": x, "weight": weight})
    for dtype, (rows, dim), bias in product(DTYPES, ((3, 200), (3, 453), (12, 200), (12, 453)), (True, False)):
        yield Case(
            "thin_qkv",
            f"{SHORT[dtype]} {rows} {dim}{' bias' if bias else ''}",
            qkv_arguments(rows, dim, (3, 1, 20), dtype, bias),
        )
    wide = qkv_arguments(12, 32, (4096, 1, 16), torch.bfloat16)  # of blocks that have fewer threads than pairs
    yield Case("thin_qkv", "bf16 12 32 wide", wide)


def qkv_arguments(rows: int, dim: int, layout: Layout, dtype: torch.dtype, bias: bool = True) -> Arguments:
    """x and what becomes of it; where there are rows enough, one has no slot."""
    q_heads, kv_heads, head_dim = layout
    x, weight, some = make(rows, (q_heads + 2 * kv_heads) * head_dim, dim, dtype)
    slots = torch.randperm(24, dtype=torch.int32)[:rows]
    slots[2:3] = -1
    kv = torch.randn(6, 2, kv_heads, 4, head_dim).to(dtype)
    return {
        "x": x, "weight": weight, "bias": some if bias else None, "kv": kv,
        "positions": torch.randint(50, (rows,)).int(), "slots": slots, "cos_sin": torch.randn(50, head_dim),
    }  # fmt: skip


# Tiles, split, blocks; rows, outputs, inputs: whole, and split. Rings are filled once, or go round; the last tile is
# never full.
TILE = {
    torch.bfloat16: [((1, 1, 2), (17, 208, 72)), ((1, 8, 1), (70, 208, 1288))],
    torch.float16: [((3, 1, 1), (200, 208, 1288)), ((2, 3, 1), (100, 208, 640))],
}


def tile_case(dtype: torch.dtype, gated: bool, cols: int, cut: Sequence[int], shape: Sequence[int]) -> Case:
    x, weight, bias = make(*shape, dtype)
    how = dict(zip(("tiles", "split", "blocks"), cut, strict=True))
    label = f"{SHORT[dtype]} {shape} {'gated ' if gated else ''}{cols} {cut}"
    arguments = {"x": x, "weight": weight, "bias": None if gated or cut[0] == 2 else bias, "gated": gated, "cols": cols}
    return Case("tile_linear", label, {**arguments, **how})


def tile() -> Iterator[Case]:
    """Every width, whole and split; more parts than there are inputs for; then what other kernels do in its place."""
    for dtype, gated in product(HALVES, (False, True)):
        for cols, (cut, shape) in product(COLS[gated], TILE[dtype]):
            yield tile_case(dtype, gated, cols, cut, shape)
    yield tile_case(torch.bfloat16, False, 64, (1, 4, 2), (17, 208, 72))
    yield tile_case(torch.float32, True, 80, (1, 1, 1), (20, 48, 64))
    yield tile_case(torch.bfloat16, False, 40, (1, 1, 1), (33, 9, 33))


def gated() -> Iterator[Case]:
    """Every width with every cluster; every width with several tiles a block, on up to 132 multiprocessors."""
    few, many = (300, 272, 520), (2100, 2816, 200)
    cases = [(torch.bfloat16, cut, few) for cut in CUTS]
    for i in range(0, len(CUTS), 3):
        cases.append((torch.float16, CUTS[i + i // 3 % 3], few))
        cases.append((HALVES[i % 2], CUTS[i + (i // 3 + 1) % 3], many))
    for dtype, cut, shape in [*cases, (torch.float32, CUTS[0], (20, 48, 64))]:
        x, weight, _ = make(*shape, dtype)
        arguments = {"x": x, "weight": weight, **cut._asdict()}
        yield Case("tall_gated_linear", f"{SHORT[dtype]} {shape} {tuple(cut)}", arguments)


def logits_of(kind: str, rows: int, columns: int) -> Tensor:
    logits = torch.randn(rows, columns) * 4
    if kind == "equal":
        return torch.full_like(logits, -7.25)  # more candidates than their list has room for
    if kind == "far":
        return logits + 2**20  # bins hold single logits
    if kind == "not finite":
        logits[::4, 0], logits[1::4, -1], logits[2::4], logits[4] = torch.nan, torch.inf, -torch.inf, torch.nan
    return logits


def sampling() -> Iterator[Case]:
    """Rows of all settings and one of padding: vocabularies of a slice and of two, rows aligned for vectors or not."""
    state, rows = make_rows(len(SETTINGS)), len(SETTINGS) + 1
    for i, setting in enumerate(SETTINGS.values()):
        state[i] = make_rows(len(SETTINGS), *setting)[i]
    two_slices = product((10240, 10241), ("normal", "equal", "far", "not finite"))
    for vocab, kind in ((500, "normal"), (501, "not finite"), *two_slices):
        arguments = {
            "logits": logits_of(kind, rows, vocab), "sample_rows": torch.arange(rows).int().flip(0),
            "row_state": state, "tokens": int32([-7] * rows, "cpu"), "vocab_size": vocab,
        }  # fmt: skip
        yield Case("sample", f"{vocab} {kind} logits", arguments)
    yield from penalties()
    yield from logprobs()


def penalties() -> Iterator[Case]:
    """A small row; two windows of ids; ids that fit in the table of counts only in many passes."""
    for label, vocab, ids, length in (
        ("37 ids", 37, torch.arange(37), 50), ("two windows", 2**18 + 3, torch.arange(2**18 - 9, 2**18 + 3), 50),
        ("ids of one bucket", 151936, one_bucket(151936), 1500),
    ):  # fmt: skip
        lengths = [(0, length), (1, length), (20, length), (length, length), (3, 7), (0, length)]
        histories = [ids[torch.randint(len(ids), (length,))].tolist() for _, length in lengths]
        tables, slot_tokens = paged(histories, 4)
        arguments = {
            "logits": torch.randn(7, vocab), "sample_rows": int32([4, 6, 0, 5, 2, 1, 3], "cpu"),
            "row_state": penalized_rows(lengths), "block_tables": tables, "slot_tokens": slot_tokens, "block_size": 4,
        }  # fmt: skip
        yield Case("penalize", label, arguments)


def logprobs() -> Iterator[Case]:
    """One slice of a row and several, aligned or not; rows named and not; some ids wanted and none."""
    some_rows = int32([6, 0, 3, 3, 1, 2, 5], "cpu")
    for kind, vocab, columns, count, rows in (
        ("normal", 50, 63, 5, None), ("normal", 9001, 9004, 5, some_rows), ("normal", 20000, 20000, 32, None),
        ("normal", 20000, 20013, 0, some_rows), ("equal", 9001, 9013, 32, None), ("not finite", 9004, 9004, 8, None),
    ):  # fmt: skip
        arguments = {"logits": logits_of(kind, 7, columns), "rows": rows, "tokens": torch.arange(-1, 6).int()}
        label = f"{count} of {vocab} {kind} logits, {columns} columns"
        yield Case("tell_logprobs", label, {**arguments, "vocab_size": vocab, "count": count})


def rows_of(dtype: torch.dtype) -> Iterator[Case]:
    """Norms and silu: rows that vectors fit and ones that they do not, of one turn of the block and of two."""
    for dim in (70, 896, 517, 4104):
        x, residual, weight = (torch.randn(size).to(dtype) for size in ((3, dim), (3, dim), (dim,)))
        arguments = {"x": x, "weight": weight, "eps": 1e-6}
        if dim > 500 or dtype == torch.bfloat16:
            yield Case("rms_norm", f"{SHORT[dtype]} {dim}", arguments)
            yield Case("add_rms_norm", f"{SHORT[dtype]} {dim}", {**arguments, "residual": residual})
        yield Case("silu_and_mul", f"{SHORT[dtype]} {dim}", {"x": torch.randn(3, 2 * dim).to(dtype)})


def positions_of(dtype: torch.dtype) -> Iterator[Case]:
    """Rotation and store, as one and alone: heads that vectors fit and ones that they do not, rotated in part."""
    for (dim, part), interleaved in product(((66, 30), (64, 32)), (False, True)):
        q, k, v, kv = (torch.randn(size).to(dtype) for size in ((3, 14, dim), *[(3, 2, dim)] * 2, (4, 2, 2, 4, dim)))
        turn = {"positions": int32([0, 3, 7], "cpu"), "cos_sin": torch.randn(8, part), "interleaved": interleaved}
        store = {"k": k, "v": v, "kv": kv, "slots": int32([0, -1, 15], "cpu")}
        label = f"{SHORT[dtype]} {part} of {dim}{' interleaved' if interleaved else ''}"
        yield Case("rotary_store_kv", label, {"q": q, **store, **turn})
        if dtype == torch.bfloat16:  # the same kernel, of which they use a part
            yield Case("rotary", label, {"x": q, **turn})
            yield Case("store_kv", f"{SHORT[dtype]} {dim}", store)


def small() -> Iterator[Case]:
    """What needs no shared memory, or nearly; and a message of more chunks than its kernel has threads."""
    for dtype in DTYPES:
        yield from rows_of(dtype)
        yield from positions_of(dtype)
    yield Case("prepare_batch", "new row, edit, two chunks", EXAMPLES["prepare_batch"]())
    yield Case("prepare_batch", "40 chunks, 300 tokens", random_message(40, 300))
    yield Case("prepare_batch", "1100 chunks, 1500 tokens", random_message(1100, 1500))


GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    "attention": attention, "long": long, "thin": thin, "tile": tile, "gated": gated, "sampling": sampling,
    "small": small,
}  # fmt: skip


def cases_of(group: str) -> Iterator[Case]:
    torch.manual_seed(0)
    return GROUPS[group]()
