"""paged_attention: exact enough, and a query's result depends on its own sequence alone.

To the last bit, but for long chunks on Hopper behind many keys, which test_attention_cuda.py sees to.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_helpers import DTYPES, RedZone, assert_error, bits, in_wider_rows
from torch import Tensor

from nanoinfer import ops, reference

Chunks = Sequence[tuple[int, int]]  # query tokens, and tokens of the sequence up to the last of them

MIXES: dict[str, Chunks] = {
    "decode": [(1, 1), (1, 64), (1, 65), (1, 513), (1, 1100), (1, 31), (1, 512), (1, 200)],
    "prefill": [(130, 130), (64, 64), (7, 7), (1, 1)],
    "chunked": [(40, 600), (100, 228), (1, 129), (8, 1032)],
    "mixed": [(1, 700), (1, 3), (0, 0), (5, 600), (90, 90), (20, 30), (0, 0)],
}
LAYOUTS = {  # query heads, KV heads, head dimension
    "qwen2_0.5b": (14, 2, 64), "qwen2_1.5b": (12, 2, 128), "qwen2_7b": (28, 4, 128), "one_to_one": (4, 4, 64),
    "one_for_all": (5, 1, 96), "small_heads": (8, 2, 32), "large_heads": (3, 1, 256),
}  # fmt: skip
NO_CHUNK = 3  # tokens at the end that belong to none, as of a padded step


@dataclass(frozen=True)
class Case:
    """A step's arguments, in the op's order."""

    q: Tensor
    kv: Tensor
    q_starts: Tensor
    kv_lens: Tensor
    rows: Tensor
    block_tables: Tensor
    scale: float
    window: int = 0

    def args(self) -> tuple[Tensor | float | int, ...]:
        return tuple(vars(self).values())

    def attend(self) -> Tensor:
        """Results of the tokens that belong to a chunk."""
        return ops.paged_attention(*self.args())[: int(self.q_starts[-1])]

    def defined(self, dtype: torch.dtype) -> Tensor:
        """The same by definition, computed in dtype."""
        same = replace(self, q=self.q.to(dtype), kv=self.kv.to(dtype))
        return reference.paged_attention(*same.args())[: int(self.q_starts[-1])]


def int32(values: Sequence[int], device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def make_case(
    chunks: Chunks, layout: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu", block_size: int = 16,
    window: int = 0, seed: int = 0,
) -> Case:  # fmt: skip
    """Random numbers in random blocks of a cache that is NaN elsewhere; q a view of wider rows, NaN as well."""
    heads, kv_heads, dim = layout
    numbers, places = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    width = 1 + max(-(-kv_len // block_size) for _, kv_len in chunks)
    blocks, rows = len(chunks) * width, torch.randperm(len(chunks), generator=places)
    tables = torch.randperm(blocks, generator=places).view(len(chunks), width)
    kv = torch.full((blocks, 2, kv_heads, block_size, dim), torch.nan, dtype=dtype)
    for row, (_, kv_len) in zip(rows, chunks, strict=True):
        positions = torch.arange(kv_len)
        # Advanced indices around a slice come first: [kv_len, 2, kv_heads, dim].
        kv[tables[row, positions // block_size], :, :, positions % block_size] = torch.randn(
            kv_len, 2, kv_heads, dim, generator=numbers
        ).to(dtype)
    lengths = torch.tensor([0] + [length for length, _ in chunks])
    q = torch.full((int(lengths.sum()) + NO_CHUNK, heads, dim), torch.nan, dtype=dtype)
    q[:-NO_CHUNK] = torch.randn(q[:-NO_CHUNK].shape, generator=numbers).to(dtype)
    kv_lens = int32([kv_len for _, kv_len in chunks], device)
    return Case(
        in_wider_rows(q.to(device)), RedZone().copy(kv.to(device)), lengths.cumsum(0).int().to(device), kv_lens,
        rows.int().to(device), tables.int().to(device), dim**-0.5, window,
    )  # fmt: skip


def split_case(case: Case) -> list[Case]:
    """Each chunk as a step of its own."""
    starts = case.q_starts.tolist()
    return [
        replace(case, q=case.q[a:b], q_starts=case.q_starts.new_tensor([0, b - a]), kv_lens=case.kv_lens[r : r + 1],
                rows=case.rows[r : r + 1])
        for r, (a, b) in enumerate(itertools.pairwise(starts))
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mix", MIXES)
def test_error_is_at_most_twice_torchs(device: str, mix: str, layout: str, dtype: torch.dtype) -> None:
    """Every mix of chunks, layout of heads and dtype; block sizes and windows in turn."""
    turn = list(MIXES).index(mix) + list(LAYOUTS).index(layout) + DTYPES.index(dtype)
    block_size, window = [(1, 0), (16, 100), (16, 0), (256, 64), (256, 0), (4, 1)][turn % 6]
    if device == "cuda" and dtype != torch.float32:
        block_size = max(block_size, 16)  # smaller ones are refused
    case = make_case(MIXES[mix], LAYOUTS[layout], dtype, device, block_size, window)
    assert_error(case.attend(), case.defined(dtype), case.defined(torch.float64))


@pytest.mark.parametrize("window", [0, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_request_does_not_notice_others(device: str, dtype: torch.dtype, window: int) -> None:
    """Bit-equal results alone and in a mixed step."""
    case = make_case(MIXES["mixed"], (14, 2, 64), dtype, device, window=window)
    alone = torch.cat([part.attend() for part in split_case(case)])
    assert torch.equal(case.attend(), alone)


@pytest.mark.parametrize("window", [0, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_of_a_prompt_do_not_matter(device: str, dtype: torch.dtype, window: int) -> None:
    """Bit-equal results for a prompt as a whole and in chunks of any length; on CPUs, token by token as well."""
    whole = make_case([(610, 610)], (6, 2, 64), dtype, device, window=window)
    expected, begin = whole.attend(), 0
    # On CUDA chunks of up to 8 tokens have a kernel of their own, which adds up in another order.
    lengths = (1, 63, 1, 200, 247, *[1] * 4, 93, 1) if device == "cpu" else (9, 65, 10, 200, 247, 79)
    for length in lengths:
        end = begin + length
        part = replace(whole, q=whole.q[begin:end], q_starts=int32([0, length], device), kv_lens=int32([end], device))
        assert torch.equal(part.attend(), expected[begin:end]), (begin, end)
        begin = end
    assert begin == 610


@pytest.mark.parametrize("mix", ["decode", "mixed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_results(dtype: torch.dtype, mix: str) -> None:
    """Bit-equal for one, two and three threads."""
    case = make_case(MIXES[mix], (4, 2, 64), dtype)
    threads = torch.get_num_threads()
    try:
        results = [torch.set_num_threads(count) or case.attend() for count in (1, 2, 3)]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_block_size_does_not_change_results(device: str) -> None:
    """Where a token lies is not part of the arithmetic."""
    cases = (make_case(MIXES["chunked"], (4, 2, 64), torch.float32, device, size) for size in (1, 2, 16, 256))
    first, *others = (case.attend() for case in cases)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sharp_softmax(device: str, dtype: torch.dtype) -> None:
    """Scores in the hundreds neither overflow nor vanish: nearly all the weight is on one key."""
    case = make_case(MIXES["chunked"], (4, 2, 64), dtype, device)
    case = replace(case, q=case.q * 60)
    assert_error(case.attend(), case.defined(dtype), case.defined(torch.float64))


def test_nan_stays_in_its_request(device: str) -> None:
    """NaN in a request's keys or values, or in a token's query, comes out there and nowhere else."""
    case = make_case([(1, 300), (70, 70), (1, 40)], (4, 2, 64), torch.float32, device)
    case.q[5] = torch.nan  # token 4 of the chunk of 70
    case.kv[case.block_tables[case.rows[0], 2].long(), 1, 0, 7] = torch.nan  # a value of the first KV head
    wrong = case.attend().isnan().any(-1)
    expected = torch.zeros_like(wrong)
    expected[0, :2], expected[5] = True, True
    assert torch.equal(wrong, expected)


def test_steps_without_tokens(device: str) -> None:
    """Padding chunks name rows and lengths that mean nothing; a step may consist of them."""
    case = make_case([(0, 0), (0, 0)], (4, 2, 64), torch.float32, device)
    assert case.attend().shape == (0, 4, 64)
    none = replace(case, q=case.q[:0], q_starts=case.q_starts[:1], kv_lens=case.kv_lens[:0], rows=case.rows[:0])
    assert none.attend().shape == (0, 4, 64)


def test_arguments_stay_as_they_are(device: str) -> None:
    """Bit for bit, and so does what lies around the cache."""
    case = make_case(MIXES["mixed"], (4, 2, 64), torch.bfloat16, device)
    zone = RedZone()
    case = replace(case, kv=zone.copy(case.kv))
    before = [arg.clone() for arg in case.args() if isinstance(arg, Tensor)]
    case.attend()
    zone.check()
    after = [arg for arg in case.args() if isinstance(arg, Tensor)]
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(after, before, strict=True))


def test_opcheck(device: str) -> None:
    """Schema, fake and kernel agree."""
    case = make_case([(3, 20), (1, 5)], (4, 2, 64), torch.bfloat16, device)
    case = replace(case, q=case.q[:-NO_CHUNK], kv=case.kv.nan_to_num())
    torch.library.opcheck(torch.ops.nanoinfer.paged_attention.default, case.args())


lengths = st.tuples(st.integers(0, 40), st.integers(0, 700)).map(lambda pair: (pair[0], sum(pair)))


@given(
    st.lists(lengths, min_size=1, max_size=6),
    st.sampled_from([(4, 4, 32), (6, 1, 64), (14, 2, 64)]),
    st.sampled_from(DTYPES),
    st.sampled_from([1, 4, 16, 128]),
    st.integers(0, 600),
    st.integers(0, 2**31),
)
@settings(max_examples=50, deadline=None)
def test_any_step(
    chunks: Chunks, layout: tuple[int, int, int], dtype: torch.dtype, block_size: int, window: int, seed: int
) -> None:
    """Chunk by chunk the same bits as alone, and as exact as the dtype's rounding allows."""
    case = make_case(chunks, layout, dtype, "cpu", block_size, window, seed)
    out, parts = case.attend(), split_case(case)
    assert torch.equal(out, torch.cat([part.attend() for part in parts]))
    # Few results may all be exact in plain torch by chance, so the yardstick is a bound of its own: weights rounded to
    # dtype, the result too, and a float32 score as wrong as 600 of its roundings.
    error = (out.double() - case.defined(torch.float64)).abs().max() if len(out) else 0.0
    assert error <= 8 * torch.finfo(dtype).eps + 600 * torch.finfo(torch.float32).eps


REFUSED = {
    "q must have dtype": lambda c: replace(c, q=c.q.double()),
    r"q must have shape \[any, any, any\]": lambda c: replace(c, q=c.q[0]),
    "q must have packed rows": lambda c: replace(c, q=c.q[..., ::2]),
    "kv must have dtype": lambda c: replace(c, kv=c.kv.half()),
    r"kv must have shape \[any, 2, any, any, 64\]": lambda c: replace(c, kv=c.kv[..., :32]),
    "kv must have packed rows": lambda c: replace(c, kv=c.kv[:, :, ::2], q=c.q[:, :3]),
    "head_dim must be a multiple of 32 up to 256, got 48": lambda c: replace(
        c, q=c.q[..., :48].contiguous(), kv=c.kv[..., :48].contiguous()
    ),
    "the heads of q must be a multiple of those of kv, got 5 and 2": lambda c: replace(c, q=c.q[:, :5]),
    "kv must have a block size of 1 or more, got 0": lambda c: replace(c, kv=c.kv[:, :, :, :0]),
    "scale must be positive and finite, got 0": lambda c: replace(c, scale=0.0),
    "scale must be positive and finite, got nan": lambda c: replace(c, scale=float("nan")),
    "window must be 0 or more, got -1": lambda c: replace(c, window=-1),
    "q_starts must have dtype": lambda c: replace(c, q_starts=c.q_starts.long()),
    r"q_starts must have shape \[3\], got \[2\]": lambda c: replace(c, q_starts=c.q_starts[:2]),
    "kv_lens must have dtype": lambda c: replace(c, kv_lens=c.kv_lens.long()),
    r"kv_lens must have shape \[any\]": lambda c: replace(c, kv_lens=c.kv_lens[None]),
    "rows must have dtype": lambda c: replace(c, rows=c.rows.long()),
    r"rows must have shape \[2\], got \[1\]": lambda c: replace(c, rows=c.rows[:1]),
    "block_tables must have dtype": lambda c: replace(c, block_tables=c.block_tables.long()),
    r"block_tables must have shape \[any, any\]": lambda c: replace(c, block_tables=c.block_tables[0]),
    "block_tables must have packed rows": lambda c: replace(c, block_tables=c.block_tables.T),
    "q_starts must ascend from 0 to at most 7, got -1 and 3 for chunk 0": lambda c: replace(
        c, q_starts=int32([-1, 3, 4], "cpu")
    ),
    "q_starts must ascend from 0 to at most 7, got 3 and 2 for chunk 1": lambda c: replace(
        c, q_starts=int32([0, 3, 2], "cpu")
    ),
    "q_starts must ascend from 0 to at most 7, got 3 and 8 for chunk 1": lambda c: replace(
        c, q_starts=int32([0, 3, 8], "cpu")
    ),
    r"rows\[1\] must be in \[0, 2\), got 2": lambda c: replace(c, rows=int32([0, 2], "cpu")),
    r"rows\[0\] must be in \[0, 2\), got -1": lambda c: replace(c, rows=int32([-1, 1], "cpu")),
    r"kv_lens\[0\] must be at least the chunk's 3 tokens and at most the block table's 32, got 2": lambda c: replace(
        c, kv_lens=int32([2, 5], "cpu")
    ),
    r"kv_lens\[1\] must be at least the chunk's 1 tokens and at most the block table's 32, got 33": lambda c: replace(
        c, kv_lens=int32([12, 33], "cpu")
    ),
    r"block_tables\[0\]\[0\] must be in \[0, 4\), got 4": lambda c: replace(
        c, rows=int32([0, 0], "cpu"), block_tables=int32([[4, 0], [1, 2]], "cpu")
    ),
    r"block_tables\[1\]\[0\] must be in \[0, 4\), got -1": lambda c: replace(
        c, rows=int32([1, 1], "cpu"), block_tables=int32([[0, 1], [-1, 2]], "cpu")
    ),
}


@pytest.mark.skipif(("paged_attention", "CPU") not in ops.COMPILED, reason="plain torch checks less")
@pytest.mark.parametrize("message", REFUSED)
def test_refused(message: str) -> None:
    """Each check at the door says what was wanted and what came."""
    case = make_case([(3, 12), (1, 5)], (6, 2, 64), torch.float32)
    with pytest.raises(RuntimeError, match=f"paged_attention: {message}"):
        REFUSED[message](case).attend()
