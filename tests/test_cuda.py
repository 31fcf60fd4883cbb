"""What only CUDA can get wrong: graphs, padding, values out of range, large sizes, the order of threads."""

import re
from collections.abc import Callable

import pytest
import torch
from op_helpers import RedZone, assert_waits, bits, make_rows
from test_ops import REFUSED, argument_names
from torch import Tensor

from nanoinfer import ops, reference
from nanoinfer.check import EXAMPLES, int32
from nanoinfer.row_state import FLAG_SAMPLE, FLAG_STORE, LAST_TOKEN, LENGTH, PROMPT_LENGTH

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
COMPILED = sorted(name for name, device in ops.COMPILED if device == "CUDA")
VOCAB = 151936
DTYPES = [torch.bfloat16, torch.float16]


def on_cuda(arguments: dict) -> dict:
    return {k: v.cuda() if isinstance(v, Tensor) else v for k, v in arguments.items()}


def call(name: str, arguments: dict) -> Tensor | None:
    return getattr(torch.ops.nanoinfer, name)(*(arguments[k] for k in argument_names(name)))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)


def test_every_op_has_a_kernel() -> None:
    """Otherwise the tests of this file would pass on plain torch, and prove nothing."""
    assert set(COMPILED) >= set(ops.SCHEMAS) - {"paged_attention"}


def another_example(name: str) -> dict:
    """Arguments with the shapes of EXAMPLES[name] and other numbers."""
    arguments = EXAMPLES[name]()
    if name == "prepare_batch":
        arguments["header"] = int32(0, 1, 1, 2)
        arguments["chunks"] = int32([1, 4, 6, FLAG_SAMPLE], [9, 9, 9, 9], [9, 9, 9, 9])
        arguments["edits"][0] = int32(1, 1, 3)
    if name == "penalize":  # one row without penalties, one without any output yet
        arguments["row_state"][0], arguments["row_state"][1, PROMPT_LENGTH] = make_rows(1)[0], 3
    return arguments


@pytest.mark.parametrize("name", COMPILED)
def test_captured_once_replayed_with_other_numbers(name: str) -> None:
    """A launch depends on shapes alone: what a graph captured with one step's numbers is right for another's."""
    static, other = on_cuda(EXAMPLES[name]()), on_cuda(another_example(name))
    expected = {k: v.clone() if isinstance(v, Tensor) else v for k, v in other.items()}
    expected_out = call(name, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(name, static)
    for key, value in other.items():
        if isinstance(value, Tensor):
            static[key].copy_(value)
    graph.replay()
    for key, value in expected.items():
        if isinstance(value, Tensor):
            assert torch.equal(bits(static[key]), bits(value)), key
    assert expected_out is None or torch.equal(bits(out), bits(expected_out))


# What a refusal says where the mistake is a number in device memory, which an op cannot read before it launches.
IN_MEMORY = re.compile(
    r"(positions|slots|sample_rows)\\\[|length of row|position \d of row|token at position|temperature|top_p|min_p"
    r"|number of (new rows|edits|chunks|tokens)|tokens as the header|of (new row|edit|chunk|token) \d|sampled chunks"
)


def spoilt(name: str, changes: dict) -> dict:
    """Arguments of an op's example on CUDA, some replaced, as in test_ops.py."""
    arguments = on_cuda(EXAMPLES[name]())
    for key, change in changes.items():
        new = change(arguments[key]) if callable(change) else change
        arguments[key] = new.cuda() if isinstance(new, Tensor) and not new.is_cuda else new
    return arguments


@pytest.mark.parametrize(("name", "changes", "message"), [case for case in REFUSED if not IN_MEMORY.search(case[2])])
def test_bad_shapes_are_refused(name: str, changes: dict, message: str) -> None:
    """The same checks, in the same words, as on the CPU."""
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, name)(**spoilt(name, changes))


@pytest.mark.parametrize(("name", "changes", "message"), [case for case in REFUSED if IN_MEMORY.search(case[2])])
def test_numbers_out_of_range_touch_nothing_outside(name: str, changes: dict, message: str) -> None:
    """What cannot be refused is left out: not a byte beside the arguments changes."""
    zone = RedZone()
    arguments = {k: zone.copy(v) if isinstance(v, Tensor) else v for k, v in spoilt(name, changes).items()}
    getattr(ops, name)(**arguments)
    torch.cuda.synchronize()
    zone.check()


def test_devices_do_not_mix() -> None:
    """An address of the host's in a kernel would end the process."""
    with pytest.raises(RuntimeError, match="weight must have device cuda:0, got cpu"):
        ops.rms_norm(torch.ones(2, 8, device="cuda"), torch.ones(8), 1e-6)


def random_message(chunks: int, tokens: int) -> dict:
    """A message of `chunks` chunks and `tokens` tokens in all, each row of the table with blocks of its own."""
    block_size, generator = 16, torch.Generator().manual_seed(chunks)
    cuts = torch.randperm(tokens - 1, generator=generator)[: chunks - 1].sort().values + 1
    lengths = torch.diff(cuts, prepend=torch.tensor([0]), append=torch.tensor([tokens]))
    blocks = int(lengths.max()) // block_size + 2
    starts = torch.randint(0, block_size, (chunks,), generator=generator)
    rows, flags = torch.randperm(chunks, generator=generator), torch.randint(0, 4, (chunks,), generator=generator)
    message = torch.stack((rows, starts, starts + lengths, flags), dim=1).int()
    room = {"tokens": tokens, "positions": tokens, "slots": tokens, "q_starts": chunks + 1} | dict.fromkeys(
        ("kv_lens", "rows", "logit_rows", "sample_rows"), chunks
    )
    return dict(
        header=int32(0, 0, chunks, tokens), new_rows=torch.zeros(1, 17, dtype=torch.int32), edits=int32([0, 0, 0]),
        chunks=message, new_tokens=torch.randint(-1, 99, (tokens,), generator=generator, dtype=torch.int32),
        row_state=make_rows(chunks), slot_tokens=torch.zeros((chunks + 1) * blocks * block_size, dtype=torch.int32),
        block_tables=torch.randperm((chunks + 1) * blocks, generator=generator).int().view(-1, blocks),
        **{name: torch.zeros(size + 3, dtype=torch.int32) for name, size in room.items()}, block_size=block_size,
    )  # fmt: skip


@pytest.mark.parametrize(("chunks", "tokens"), [(1, 16384), (256, 256), (1024, 16384), (2500, 5000)])
def test_prepare_batch_at_full_size(chunks: int, tokens: int) -> None:
    """One long chunk, a decode step, a full mixed step, and more chunks than the block has threads."""
    expected = random_message(chunks, tokens)
    got = on_cuda(expected)
    ops.prepare_batch(**got)
    reference.prepare_batch(**expected)
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert torch.equal(got[name].cpu(), value), name


# (temperature, top_k, top_p, min_p); rows of one batch have them in turn.
MIXED = [
    (0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.6, 50, 0.95, 0.0), (1.0, 0, 0.95, 0.0), (0.7, 0, 1.0, 0.05),
    (1.0, 5000, 0.9, 0.0), (2.0, 0, 0.9999, 0.0), (0.8, 20, 0.8, 0.01),
]  # fmt: skip


def mixed_rows(count: int) -> Tensor:
    state = make_rows(count)
    for i in range(count):
        state[i] = make_rows(count, *MIXED[i % len(MIXED)])[i]
    return state


def drawn(logits: Tensor, row_state: Tensor) -> tuple[Tensor, Tensor]:
    state, rows = row_state.to(logits.device), len(logits)
    tokens = torch.empty(rows, dtype=torch.int32, device=logits.device)
    ops.sample(logits, torch.arange(rows, dtype=torch.int32, device=logits.device), state, tokens, logits.shape[1])
    return tokens.cpu(), state.cpu()


@pytest.mark.parametrize("kind", ["normal", "peaked", "ties", "equal"])
def test_sampled_tokens_are_the_cpus(kind: str) -> None:
    """At a real vocabulary, rows with filters and without in one batch, also where a bin holds a whole vocabulary."""
    logits = random(64, VOCAB)
    if kind == "peaked":
        logits.view(-1)[:: VOCAB // 40] += 12
    elif kind == "ties":
        logits = (logits * 4).round() / 4
    elif kind == "equal":
        logits = torch.full_like(logits, -7.25)
    state = mixed_rows(len(logits))
    for got, expected in zip(drawn(logits, state), drawn(logits.cpu(), state), strict=True):
        assert torch.equal(got, expected)


def test_padding_is_left_alone() -> None:
    """The last row belongs to no request: it draws nothing, loses nothing, and its state stays."""
    logits, state = random(3, VOCAB), make_rows(2, top_k=5, penalty=1.5, presence=1.0).cuda()
    before, logits_before = state.clone(), logits.clone()
    rows, tokens = int32(2, 2, 2).cuda(), int32(7, 7, 7).cuda()
    ops.penalize(logits, rows, state, int32([0], [0], [0]).cuda(), int32(1, 2, 3, 4).cuda(), 4)
    ops.sample(logits, rows, state, tokens, VOCAB)
    assert tokens.tolist() == [-1, -1, -1]
    assert torch.equal(state, before) and torch.equal(logits, logits_before)


def test_results_repeat_to_the_bit() -> None:
    """200 runs of whatever adds floats or uses atomics, while other work keeps the order of blocks changing."""
    logits, state = random(40, VOCAB), mixed_rows(40)
    x, weight, scale = (random(*s, dtype=torch.bfloat16) for s in ((16, 4864), (896, 4864), (4864,)))
    slot_tokens, tables = torch.arange(41 * 1024, dtype=torch.int32, device="cuda") % 500, torch.arange(41 * 64).int()
    penalties = make_rows(40, penalty=1.3, presence=0.3, frequency=0.1).cuda()
    penalties[:, LENGTH] = 1000
    rows, noise, other = torch.arange(40, dtype=torch.int32, device="cuda"), random(2048, 2048), torch.cuda.Stream()

    def run() -> list[Tensor]:
        penalized = logits[:, :999].contiguous()
        ops.penalize(penalized, rows, penalties, tables.cuda().view(41, 64), slot_tokens, 16)
        linear = ops.thin_linear(x, weight, None, True)
        return [*drawn(logits, state), penalized, linear, ops.rms_norm(x, scale, 1e-6)]

    first = run()
    for _ in range(200):
        with torch.cuda.stream(other):
            noise @ noise
        for got, expected in zip(run(), first, strict=True):
            assert torch.equal(bits(got), bits(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_thin_linear_depends_on_itself_alone(dtype: torch.dtype) -> None:
    """Bit-equal alone and among any number of rows, at sizes that split a sum over warps and at one that does not."""
    for out_dim, dim in ((896, 896), (896, 4864), (40000, 896), (77, 453)):
        x, weight = random(16, dim, dtype=dtype), random(out_dim, dim, dtype=dtype, seed=1)
        alone = torch.cat([ops.thin_linear(row[None], weight, None, True) for row in x])
        for rows in (2, 7, 8, 9, 16):
            assert torch.equal(ops.thin_linear(x[:rows], weight, None, True), alone[:rows]), (out_dim, dim, rows)


def test_kernels_that_overlap_wait_for_what_they_read() -> None:
    """A kernel is on the GPU before the one ahead of it has ended: a chain of all kinds, as with a halt after each."""
    dim, rows = 896, 4
    x, scale, narrow = (random(*s, dtype=torch.bfloat16) for s in ((rows, dim), (dim,), (dim, 2 * dim)))
    up, positions, angles = random(4 * dim, dim, dtype=torch.bfloat16), int32(3, 1, 0, 2).cuda(), random(4, 64)

    def chain(after: Callable[[], None]) -> Tensor:
        h, residual = x, torch.zeros_like(x)
        for i in range(30):
            h = ops.add_rms_norm(h, residual, scale * (1 + i % 3), 1e-6)  # by a foreign kernel just before
            after()
            h = ops.thin_linear(h, up)
            after()
            ops.rotary(h.view(rows, -1, 64), positions, angles)
            after()
            h = ops.silu_and_mul(h * 1 if i % 3 == 0 else h)  # and a kernel that is not ours
            after()
            fresh = ops.rms_norm(narrow, scale.repeat(2), 1e-6) * 1  # weights that a foreign kernel has just written
            h = ops.thin_linear(h, fresh)
            after()
        return torch.cat((h, residual))

    assert_waits(chain, replays=50)


BEYOND = 2**31 + 2**20  # elements, more than 32 bits count


def test_rows_beyond_32_bits() -> None:
    """Elementwise ops on more than 2^31 numbers: the last rows are as right as the first."""
    dim = 3584
    x = torch.randn(BEYOND // dim, dim, device="cuda", dtype=torch.bfloat16)
    weight = random(dim, dtype=torch.bfloat16)
    norm, silu = ops.rms_norm(x, weight, 1e-6), ops.silu_and_mul(x)
    for rows in (slice(0, 2), slice(-2, None)):
        assert torch.equal(norm[rows], ops.rms_norm(x[rows], weight, 1e-6))
        assert torch.equal(silu[rows], ops.silu_and_mul(x[rows]))
    positions, angles = torch.ones(len(x), dtype=torch.int32, device="cuda"), random(2, 128)
    expected = x[-2:].clone().view(2, 28, 128)
    ops.rotary(expected, positions[:2], angles)
    ops.rotary(x.view(-1, 28, 128), positions, angles)
    assert torch.equal(x[-2:].view(2, 28, 128), expected)


def test_slots_and_weights_beyond_32_bits() -> None:
    """A cache and a weight matrix of more than 2^31 numbers."""
    k, v = random(3, 2, 128, dtype=torch.bfloat16), random(3, 2, 128, dtype=torch.bfloat16, seed=1)
    kv = torch.zeros(BEYOND // 8192, 2, 2, 16, 128, device="cuda", dtype=torch.bfloat16)
    slots = kv.shape[0] * 16
    ops.store_kv(k, v, kv, int32(slots - 1, 0, slots // 2).cuda())
    for block, offset, row in ((-1, 15, 0), (0, 0, 1), (slots // 32, slots // 2 % 16, 2)):
        assert torch.equal(kv[block, 0, :, offset], k[row]) and torch.equal(kv[block, 1, :, offset], v[row])
    assert int(kv.count_nonzero()) == int(k.count_nonzero() + v.count_nonzero())
    x, weight = random(1, 3584, dtype=torch.bfloat16), kv.view(-1)[: BEYOND // 3584 * 3584].view(-1, 3584)
    weight[-1] = x[0]
    whole, last = ops.thin_linear(x, weight, None, True), ops.thin_linear(x, weight[-1:], None, True)
    torch.testing.assert_close(whole[:, -1:], last, rtol=1e-4, atol=0)  # another order of additions


def test_logits_beyond_32_bits() -> None:
    """More rows of logits than 2^31 numbers hold, greedy: each takes its own largest."""
    rows = BEYOND // VOCAB
    logits = torch.zeros(rows, VOCAB, device="cuda")
    largest = torch.arange(rows, device="cuda") * 7919 % VOCAB
    logits[torch.arange(rows, device="cuda"), largest] = 1
    tokens, state = drawn(logits, make_rows(rows, temperature=0.0))
    assert torch.equal(tokens, largest.cpu().int())
    assert torch.equal(state[:rows, LAST_TOKEN], tokens)


def test_vocabularies_have_a_limit() -> None:
    """One block looks at all parts of a row at the end; a row with more parts than that has threads is refused."""
    with pytest.raises(RuntimeError, match="vocab_size must be at most 524288 on CUDA, got 524289"):
        drawn(torch.zeros(1, 524289, device="cuda"), make_rows(1))


def test_rows_have_a_limit() -> None:
    """Norms and products count along a row in 32 bits; a row for which that is too few is refused."""
    x, weight = (torch.empty(*s, device="cuda", dtype=torch.bfloat16) for s in ((0, 2**30 + 1), (1,)))
    with pytest.raises(RuntimeError, match="x must have at most 1073741824 columns, got 1073741825"):
        ops.rms_norm(x, weight, 1e-6)
    with pytest.raises(RuntimeError, match="x must have at most 1073741824 columns, got 1073741825"):
        ops.thin_linear(x, x)


def test_stores_of_a_step_are_seen_by_its_tokens() -> None:
    """prepare_batch applies new rows and edits before chunks: a chunk of a row that is new, in a block that is new."""
    arguments = on_cuda(EXAMPLES["prepare_batch"]())
    arguments["chunks"][0] = int32(0, 0, 1, FLAG_STORE | FLAG_SAMPLE)
    arguments["header"] = int32(1, 1, 1, 1).cuda()
    arguments["new_tokens"][0] = -1
    ops.prepare_batch(**arguments)
    assert arguments["tokens"][0] == 1 + LAST_TOKEN and arguments["slots"][0] == 4 * 4
    assert arguments["row_state"][0, LENGTH] == 1
