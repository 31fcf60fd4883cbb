"""paged_attention on CUDA beyond what holds on every device: graphs, long sequences, numbers out of range."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from op_helpers import assert_error, assert_waits
from test_attention import NO_CHUNK, Case, Chunks, int32, make_case

from nanoinfer import ops
from nanoinfer.row_state import FLAG_STORE, ROW_STATE_WIDTH

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

HALVES = [torch.bfloat16, torch.float16]
QWEN2 = [(14, 2, 64), (12, 2, 128), (28, 4, 128)]
HOPPER = torch.cuda.is_available() and torch.ops.nanoinfer.has_tiles(torch.empty(0, device="cuda"))


@pytest.mark.parametrize("layout", [*QWEN2, (40, 2, 64), (4, 1, 256)])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_many_splits(dtype: torch.dtype, layout: tuple[int, int, int]) -> None:
    """Sequences of more splits than one fit their partial results: alone, with drafts, among short ones."""
    case = make_case([(1, 40000), (4, 9000), (1, 20), (8, 3000)], layout, dtype, "cuda")
    assert_error(case.attend(), case.defined(dtype), case.defined(torch.float64))


FEW_AFTER_MANY: dict[str, Chunks] = {
    "one": [(300, 9000)],
    "seams": [(20, 9000), (300, 4200), (9, 4096), (70, 12288), (1, 5000), (16, 4097), (0, 0)],
    "one_of_many": [*[(1, 70 * i) for i in range(1, 40)], (129, 8320), (40, 40), (0, 0), (9, 3000)],
    "tiny": [(9, 20000)],
    "not_worth_it": [(200, 200), (1, 5000), (30, 700), (9, 9)],
}


def with_whole_items(case: Case) -> torch.Tensor:
    """What the kernel gives that shares nothing out, as with any window; this one hides no key."""
    return replace(case, window=2**20).attend()


@pytest.mark.parametrize("layout", [*QWEN2, (5, 1, 64), (6, 6, 128), (40, 2, 64)])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("mix", FEW_AFTER_MANY)
def test_few_tokens_after_many(mix: str, dtype: torch.dtype, layout: tuple[int, int, int]) -> None:
    """Their keys are shared out to more blocks than there are tiles of rows: no key is lost or counted twice.

    In the last mix a table of many keys leaves the choice to the GPU, which keeps items whole as they are short.
    """
    case = make_case(FEW_AFTER_MANY[mix], layout, dtype, "cuda")
    first = case.attend()
    assert_error(first, case.defined(dtype), case.defined(torch.float64))
    assert all(torch.equal(case.attend(), first) for _ in range(20))
    shared = not torch.equal(first, with_whole_items(case))  # sums in another order
    assert shared == (HOPPER and mix != "not_worth_it")


@pytest.mark.parametrize("dim", [64, 128])
def test_blocks_get_through_many_short_items(dim: int) -> None:
    """Shares of three and four items of one tile each: the warps that copy keys and queries stay in step, call by call.

    One that were a phase behind would wait for ever, or take an item for another.
    """
    case = make_case([(20, 4300), *[(9, 9)] * 200], (2, 2, dim), torch.bfloat16, "cuda")
    first = case.attend()
    assert_error(first, case.defined(torch.bfloat16), case.defined(torch.float64))
    assert torch.equal(first, with_whole_items(case)) != HOPPER
    assert all(torch.equal(case.attend(), first) for _ in range(2000))


@pytest.mark.parametrize("layout", QWEN2)
def test_few_tokens_after_many_sharp_softmax(layout: tuple[int, int, int]) -> None:
    """Nearly all the weight is on one key, and so in one part."""
    case = make_case(FEW_AFTER_MANY["one"], layout, torch.bfloat16, "cuda")
    case = replace(case, q=case.q * 60)
    assert_error(case.attend(), case.defined(torch.bfloat16), case.defined(torch.float64))


def test_few_tokens_after_many_with_a_window() -> None:
    """A window bounds the work of each token, and nothing is shared out."""
    case = make_case(FEW_AFTER_MANY["seams"], (14, 2, 64), torch.bfloat16, "cuda", window=5000)
    assert_error(case.attend(), case.defined(torch.bfloat16), case.defined(torch.float64))


@pytest.mark.parametrize("layout", QWEN2)
def test_chunks_of_a_long_prompt_agree(layout: tuple[int, int, int]) -> None:
    """A prompt as a whole, and in chunks of any length: sums in other orders, the same up to rounding.

    The first 4000 tokens keep their order. The others' results are around 0.02; without one tile they change by 0.002.
    """
    whole = make_case([(9001, 9001)], layout, torch.bfloat16, "cuda")
    expected, begin = whole.attend().float(), 0
    for length in (4000, 96, 9, 2048, 1700, 1023, 25, 100):
        end = begin + length
        lens = {"q_starts": int32([0, length], "cuda"), "kv_lens": int32([end], "cuda")}
        part = replace(whole, q=whole.q[begin:end], **lens).attend()
        assert not part.isnan().any()
        torch.testing.assert_close(part.float(), expected[begin:end], rtol=2**-6, atol=2**-10)
        begin = end
    assert begin == 9001


def test_graph_follows_long_lengths() -> None:
    """A captured step shares keys out where the lengths of the day want it, and not elsewhere."""
    case = make_case([(700, 9000), (1, 700), (300, 12000)], (12, 2, 128), torch.bfloat16, "cuda")
    follows = captured_step(case)
    for lengths, kv_lens in (([1001, 0, 0], [9000, 0, 0]), ([9, 1, 900], [9, 700, 12000]), ([1, 1, 1], [5, 9, 12000]),
                             ([300, 300, 300], [300, 310, 400]), ([0] * 3, [0] * 3), ([11, 0, 9], [8193, 0, 1025]),
                             ([0, 128, 0], [0, 650, 0])):  # fmt: skip
        follows(lengths, kv_lens)


def test_more_chunks_than_a_warp_sees_at_once() -> None:
    """Work is found 32 chunks at a time: nothing is lost or done twice at the seams, nor for empty chunks between."""
    chunks = [(0, 0) if i % 7 == 3 else (1 + i % 3, 5 + 37 * i % 600) for i in range(150)]
    case = make_case(chunks, (14, 2, 64), torch.bfloat16, "cuda")
    assert_error(case.attend(), case.defined(torch.bfloat16), case.defined(torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_repeats_are_bit_equal(dtype: torch.dtype) -> None:
    """200 times the same step, with every kernel at work."""
    case = make_case([(1, 3000), (37, 37), (3, 310), (130, 300), (8, 600)], (14, 2, 64), dtype, "cuda")
    first = case.attend()
    assert all(torch.equal(case.attend(), first) for _ in range(200))


@pytest.mark.parametrize("layout", [(14, 2, 64), (12, 2, 128)])
@pytest.mark.parametrize("padding", [10, 67, 100], ids=["fewer chunks", "as many", "more chunks than tokens"])
def test_long_chunks_among_padding(padding: int, layout: tuple[int, int, int]) -> None:
    """With as many chunks as tokens the decode kernel takes all of them, however long; it is exact all the same."""
    chunks: Chunks = [(60, 700), (1, 40), (9, 2000), *[(0, 0)] * padding]
    case = make_case(chunks, layout, torch.bfloat16, "cuda")
    case = replace(case, q=case.q[:-NO_CHUNK])
    assert len(case.q) == 70
    assert_error(case.attend(), case.defined(torch.bfloat16), case.defined(torch.float64))


def captured(case: Case) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    case.attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.paged_attention(*case.args())
    return graph, out


def captured_step(case: Case) -> Callable[[list[int], list[int]], None]:
    """A captured call, to be replayed with other lengths of its chunks: it has to do what the op does with them."""
    graph, out = captured(case)

    def follows(lengths: list[int], kv_lens: list[int]) -> None:
        starts = torch.tensor([0, *lengths]).cumsum(0)
        case.q_starts.copy_(starts)
        case.kv_lens.copy_(int32(kv_lens, "cuda"))
        graph.replay()
        assert torch.equal(out[: int(starts[-1])], case.attend()), (lengths, kv_lens)
        if sum(lengths):
            assert_error(case.attend(), case.defined(case.q.dtype), case.defined(torch.float64))

    return follows


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("decode", [True, False])
def test_graph_follows_lengths(dtype: torch.dtype, decode: bool) -> None:
    """A captured step, replayed with other lengths and padding chunks, does what the op does with them."""
    chunks: Chunks = [(1, 900), (1, 700), (1, 300), (1, 40)] if decode else [(30, 900), (1, 700), (9, 300), (5, 40)]
    case = make_case(chunks, (12, 2, 128), dtype, "cuda")
    if decode:
        case = replace(case, q=case.q[:-NO_CHUNK])
    follows = captured_step(case)
    for lengths, kv_lens in (([1, 1, 1, 1], [1, 2, 300, 17]), ([1, 1, 0, 0], [899, 257, 0, 0]), ([0] * 4, [0] * 4),
                             ([2, 0, 1, 1], [512, 0, 16, 40]), ([4, 0, 0, 0], [640, 0, 0, 0])):  # fmt: skip
        follows(lengths, kv_lens)


def test_tokens_of_no_chunk_stay_unwritten() -> None:
    """Their memory may belong to what the next kernel has already begun to write."""
    case = make_case([(1, 300), (20, 40)], (14, 2, 64), torch.bfloat16, "cuda")
    graph, out = captured(case)
    out.fill_(7)
    graph.replay()
    assert torch.equal(out[-NO_CHUNK:], torch.full_like(out[-NO_CHUNK:], 7))
    assert not out[:-NO_CHUNK].isnan().any()


def random_step(generator: torch.Generator, rows: int, width: int) -> dict[str, torch.Tensor]:
    """The message of a decode step: some of the rows, each with a new length and a new block table."""
    some = torch.randperm(rows, generator=generator)[: int(torch.randint(rows + 1, (), generator=generator))]
    ends = torch.randint(1, 16 * width, some.shape, generator=generator)
    blocks = torch.randperm(rows * width, generator=generator).view(rows, width)
    chunks, edits = torch.zeros(rows, 4), torch.zeros(rows * width, 3)
    chunks[: len(some)] = torch.stack((some, ends - 1, ends, torch.full_like(some, FLAG_STORE)), 1)
    edits[:] = torch.stack((torch.arange(rows).repeat_interleave(width), torch.arange(width).repeat(rows),
                            blocks.flatten()), 1)  # fmt: skip
    header = torch.tensor([0, rows * width, len(some), len(some)])
    tokens = torch.randint(100, (rows,), generator=generator)
    message = {"header": header, "edits": edits, "chunks": chunks, "new_tokens": tokens}
    return {name: part.int() for name, part in message.items()}


@pytest.mark.parametrize("fused", [True, False])
def test_tables_are_read_early_but_not_too_early(fused: bool) -> None:
    """A captured chain as the engine's, replayed with other rows, lengths and block tables: none is an older step's.

    fused: what stands ahead of attention is one kernel for few rows, or two kernels for more.
    """
    rows, width, heads, kv_heads, dim = 8, 100, 14, 2, 64
    generator = torch.Generator().manual_seed(0)
    random = torch.Generator("cuda").manual_seed(0)
    table = {
        "row_state": (rows + 1, ROW_STATE_WIDTH),
        "block_tables": (rows + 1, width),
        "slot_tokens": (16 * rows * width,),
    }
    sizes = dict.fromkeys(("tokens", "positions", "slots", "kv_lens", "rows", "logit_rows", "sample_rows"), (rows,))
    step = {k: v.cuda() for k, v in random_step(generator, rows, width).items()}
    step["new_rows"] = int32([0], "cuda").expand(1, 1 + ROW_STATE_WIDTH).contiguous()
    batch = {k: torch.zeros(n, dtype=torch.int32, device="cuda")
             for k, n in {**table, **sizes, "q_starts": (rows + 1,)}.items()}  # fmt: skip
    kv = torch.randn(3, rows * width, 2, kv_heads, 16, dim, device="cuda", generator=random).bfloat16()
    weight = torch.randn(100, (heads + 2 * kv_heads) * dim, device="cuda", generator=random).bfloat16()
    angles = torch.randn(16 * width, dim, device="cuda", generator=random)
    project = torch.randn(2 * [weight.shape[1]], device="cuda", generator=random).bfloat16() / 32

    def attend(q: torch.Tensor, layer: torch.Tensor, ready: bool) -> torch.Tensor:
        tables = (batch[name] for name in ("q_starts", "kv_lens", "rows", "block_tables"))
        return ops.paged_attention(q, layer, *tables, dim**-0.5, tables_ready=ready)

    def run() -> list[tuple[torch.Tensor, torch.Tensor]]:
        ops.prepare_batch(**step, **batch, block_size=16)
        x, results = F.embedding(batch["tokens"], weight), []
        for layer in kv:
            x = ops.rms_norm(x, weight[0], 1e-6)
            where = (layer, batch["positions"], batch["slots"], angles)
            if fused:
                q = ops.thin_qkv(x, project, None, *where)
            else:
                q, k, v = x.view(rows, -1, dim).split([heads, kv_heads, kv_heads], 1)
                ops.rotary_store_kv(q, k, v, *where)
            results.append((q, attend(q, layer, ready=True)))
        return results

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for _ in range(300):
        for name, part in random_step(generator, rows, width).items():
            step[name].copy_(part)
        graph.replay()
        count = int(step["header"][2])
        for (q, out), layer in zip(results, kv, strict=True):
            assert torch.equal(out[:count], attend(q, layer, ready=False)[:count]), count


@pytest.mark.parametrize("name", ["q_starts", "kv_lens", "rows", "block_tables"])
@pytest.mark.parametrize("chunks", [[(1, 300), (20, 90)], [(1, 300), (200, 9000)]], ids=["short", "long"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_out_of_range_touch_nothing_outside(dtype: torch.dtype, chunks: Chunks, name: str) -> None:
    """The device's numbers cannot be checked without waiting for it: wrong ones give wrong results, and no fault."""
    case = make_case(chunks, (14, 2, 64), dtype, "cuda")
    right = getattr(case, name)
    for wrong in (2**31 - 1, -(2**31), -1, 10**6):
        some = right.clone()
        some.flatten()[1::2] = wrong  # beside right ones: a chunk that ends behind the last token, or before its begin
        for number in (torch.full_like(right, wrong), some, some.flip(0)):
            ops.paged_attention(*replace(case, **{name: number}).args())
    torch.cuda.synchronize()
    assert_error(case.attend(), case.defined(dtype), case.defined(torch.float64))


REFUSED = {
    "q must have dtype": lambda c: replace(c, q=c.q.double()),
    "kv must have dtype": lambda c: replace(c, kv=c.kv.half()),
    "kv must have contiguous memory": lambda c: replace(c, kv=c.kv[:, :, :, ::2]),
    "head_dim must be 32, 64, 96, 128 or 256, got 48": lambda c: replace(
        c, q=c.q[..., :48].contiguous(), kv=c.kv[..., :48].contiguous()
    ),
    "the heads of q must be a multiple of those of kv, got 5 and 2": lambda c: replace(c, q=c.q[:, :5]),
    "block size of kv must be a power of two from 16 on, got 8": lambda c: replace(
        c, kv=c.kv[:, :, :, :8].contiguous()
    ),
    "scale must be positive and finite, got 0": lambda c: replace(c, scale=0.0),
    "window must be 0 or more, got -1": lambda c: replace(c, window=-1),
    "q must have tokens at multiples of 16 bytes": lambda c: replace(
        c, q=torch.zeros(7, 385, dtype=c.q.dtype, device="cuda")[:, 1:].unflatten(1, (6, 64))
    ),
    "kv_lens must have device cuda:0, got cpu": lambda c: replace(c, kv_lens=c.kv_lens.cpu()),
    "block_tables must have dtype": lambda c: replace(c, block_tables=c.block_tables.long()),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message: str) -> None:
    """Each check at the door says what was wanted and what came."""
    case = make_case([(3, 12), (1, 5)], (6, 2, 64), torch.bfloat16, "cuda")
    with pytest.raises(RuntimeError, match=f"paged_attention: {message}"):
        REFUSED[message](case).attend()


@pytest.mark.parametrize("rows", [3, 20])
def test_products_wait_for_attention(rows: int) -> None:
    """Of few rows and of more: x is what merge, or decode attention where it has no splits, writes just before.

    The products' weights are read earlier, and so is the next layer's tables.
    """
    heads, kv_heads, dim, width = 14, 2, 64, 128
    random = torch.Generator("cuda").manual_seed(0)
    kv = torch.randn(rows * width, 2, kv_heads, 16, dim, device="cuda", generator=random).bfloat16()
    x = torch.randn(rows, heads * dim, device="cuda", generator=random).bfloat16()
    qkv, o = (torch.randn(n, heads * dim, device="cuda", generator=random).bfloat16() / 30 for n in (1152, 896))
    lengths = torch.tensor([16 * width - 1 if i % 3 else 100 for i in range(rows)])
    tables = torch.arange(rows * width).view(rows, width)
    slots = tables[:, 0] * 16 + lengths - 1
    q_starts, kv_lens, order, tables, positions, slots = (
        part.int().cuda() for part in (torch.arange(rows + 1), lengths, torch.arange(rows), tables, lengths - 1, slots)
    )
    angles = torch.randn(16 * width, dim, device="cuda", generator=random)

    def chain(after: Callable[[], None]) -> torch.Tensor:
        h, residual = x * 1, x * 1
        for _ in range(20):
            q = ops.qkv(h, qkv, None, kv, positions, slots, angles)
            after()
            out = ops.paged_attention(q, kv, q_starts, kv_lens, order, tables, dim**-0.5, tables_ready=True)
            after()
            h = ops.linear(out.flatten(1), o)
            after()
            h = ops.add_rms_norm(h, residual, x[0], 1e-6)
            after()
        return torch.cat((h, residual))

    assert_waits(chain, replays=100)
