"""Every op alone, at a real model's sizes: time, GB/s, TFLOP/s, and the share of what the machine can do.

Not every op is in every step: of few rows thin_qkv takes the place of a linear and rotary_store_kv; rotary, store_kv
and silu_and_mul stand alone only where no other op does their work.

Between two runs of an op a buffer twice the size of the largest cache is written, since in a model's step an op's
weights and KV come from memory too.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanoinfer import ops
from nanoinfer.batch import Batch
from nanoinfer.bench.machine import Limits, timed
from nanoinfer.bench.target import SHAPES
from nanoinfer.row_state import (
    FLAG_SAMPLE,
    FLAG_STORE,
    FREQUENCY_PENALTY,
    LENGTH,
    REPETITION_PENALTY,
    ROW_STATE_WIDTH,
    TEMPERATURE,
    TOP_K,
    TOP_P,
)

Ints = npt.NDArray[np.int32]

BLOCK_SIZE = 16
MAX_FLUSH_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class OpTime:
    """One op in one step of one model."""

    shape: str
    step: str
    op: str
    compiled: bool
    microseconds: float
    gb_per_s: float
    tflop_per_s: float

    def share_of(self, limits: Limits) -> float:
        """Of the time the op takes, what the hardware needs; 0 where neither memory nor arithmetic limits it."""
        return max(self.gb_per_s / limits.read_gb_per_s, self.tflop_per_s / limits.tflop_per_s)


@dataclass(frozen=True, slots=True)
class Case:
    """An op ready to run; bytes and arithmetic that it cannot do without."""

    op: str
    call: Callable[[], object]
    num_bytes: float = 0.0
    flops: float = 0.0
    label: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """The tensors of a step: `rows` chunks of `length` tokens that end at position `context`."""

    rows: int
    length: int
    context: int
    batch: Batch
    row_state: Tensor
    slot_tokens: Tensor
    prepare: Callable[[], None]  # the message of an ordinary step, applied again

    @property
    def num_tokens(self) -> int:
        return self.rows * self.length


def make_step(rows: int, length: int, context: int, device: torch.device) -> Step:
    """Rows that sample, with their blocks in random order and room to go on for a while."""
    per_row, count = context // BLOCK_SIZE + 8, rows * length

    def zeros(*size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int32, device=device)

    def apply(header: Tensor) -> None:
        ops.prepare_batch(
            header, new_rows, edits, chunks, tokens, row_state, block_tables, slot_tokens,
            batch.tokens, batch.positions, batch.slots, batch.q_starts, batch.kv_lens, batch.rows,
            batch.logit_rows, batch.sample_rows, BLOCK_SIZE,
        )  # fmt: skip

    row_state, block_tables = zeros(rows + 1, ROW_STATE_WIDTH), zeros(rows + 1, per_row)
    slot_tokens = zeros(rows * per_row * BLOCK_SIZE)
    batch = Batch(
        zeros(count), zeros(count), zeros(count), zeros(rows + 1), zeros(rows), zeros(rows), zeros(rows), zeros(rows),
        block_tables,
    )  # fmt: skip
    new_rows, edits = (torch.from_numpy(part).to(device) for part in (_new_rows(rows, context), _edits(rows, per_row)))
    flags = FLAG_SAMPLE | FLAG_STORE
    chunks = torch.tensor([[row, context - length, context, flags] for row in range(rows)], dtype=torch.int32).to(
        device
    )
    tokens = zeros(count)
    first, usual = torch.tensor([[rows, len(edits), rows, count], [0, 0, rows, count]], dtype=torch.int32).to(device)
    apply(first)
    return Step(rows, length, context, batch, row_state, slot_tokens, partial(apply, usual))


def _new_rows(rows: int, context: int) -> Ints:
    """(row, its initial state) of rows that use every sampling parameter."""
    state = np.zeros((rows, 1 + ROW_STATE_WIDTH), dtype=np.int32)
    columns, floats = state[:, 1:], state.view(np.float32)[:, 1:]
    state[:, 0], columns[:, LENGTH], columns[:, TOP_K] = np.arange(rows), context, 50
    floats[:, TEMPERATURE], floats[:, TOP_P], floats[:, REPETITION_PENALTY] = 0.6, 0.95, 1.1
    return state


def _edits(rows: int, per_row: int) -> Ints:
    """(row, index, block) for all blocks of all rows."""
    order = np.random.default_rng(0).permutation(rows * per_row)
    return np.stack([order // per_row, order % per_row, np.arange(rows * per_row)], axis=1).astype(np.int32)


def noise(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random numbers of limited number, repeated: a 7B model's lm_head would take seconds to draw."""
    size = int(np.prod(shape))
    drawn = torch.randn(min(size, 2**20 + 7), device=device).to(dtype)
    return drawn.repeat(-(-size // drawn.numel()))[:size].view(shape)


def cases(shape: str, step: Step, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Every op at the sizes of a model's layer. Reads and writes count each tensor once."""
    hidden, inner, _, heads, kv_heads, vocab, _ = SHAPES[shape]
    count, size, head_dim = step.num_tokens, dtype.itemsize, hidden // heads

    def made(*dims: int) -> Tensor:
        return noise(*dims, device=device, dtype=dtype)

    x, residual, weight, gates = made(count, hidden), made(count, hidden), made(hidden), made(count, 2 * inner)
    stream = count * hidden * size
    yield Case("prepare_batch", step.prepare)
    yield Case("rms_norm", lambda: ops.rms_norm(x, weight, 1e-6), 2 * stream)
    yield Case("add_rms_norm", lambda: ops.add_rms_norm(x, residual, weight, 1e-6), 4 * stream)
    yield Case("silu_and_mul", lambda: ops.silu_and_mul(gates), 3 * count * inner * size)
    yield from _attention_cases(step, heads, kv_heads, head_dim, made)
    parts = {
        "qkv": (hidden, (heads + 2 * kv_heads) * head_dim, count), "o": (hidden, hidden, count),
        "gate_up": (hidden, 2 * inner, count), "down": (inner, hidden, count), "lm_head": (hidden, vocab, step.rows),
    }  # fmt: skip
    for label, (inputs, outputs, rows) in parts.items():
        yield _linear_case(label, made(rows, inputs), made(outputs, inputs))
    yield from _sampling_cases(step, noise(step.rows, vocab, device=device, dtype=torch.float32), vocab)


def _attention_cases(
    step: Step, heads: int, kv_heads: int, head_dim: int, made: Callable[..., Tensor]
) -> Iterator[Case]:
    batch, count = step.batch, step.num_tokens
    q, k, v = made(count, heads, head_dim), made(count, kv_heads, head_dim), made(count, kv_heads, head_dim)
    kv = made(step.slot_tokens.numel() // BLOCK_SIZE, 2, kv_heads, BLOCK_SIZE, head_dim)
    angles = torch.rand(step.context, head_dim, device=q.device)
    queries, keys = q.numel() * q.element_size(), k.numel() * k.element_size()
    cached = step.rows * step.context * 2 * kv_heads * head_dim * q.element_size()
    pairs = step.rows * step.length * (step.context - (step.length - 1) / 2)
    yield Case("rotary", lambda: ops.rotary(q, batch.positions, angles), 2 * queries)
    yield Case("store_kv", lambda: ops.store_kv(k, v, kv, batch.slots), 4 * keys)
    yield Case(
        "rotary_store_kv",
        lambda: ops.rotary_store_kv(q, k, v, kv, batch.positions, batch.slots, angles),
        2 * queries + 4 * keys,
    )
    tables = (batch.q_starts, batch.kv_lens, batch.rows, batch.block_tables)
    yield Case(
        "paged_attention", lambda: ops.paged_attention(q, kv, *tables, head_dim**-0.5),
        2 * queries + cached, 4 * heads * head_dim * pairs,
    )  # fmt: skip
    x = made(count, heads * head_dim)
    weight = made((heads + 2 * kv_heads) * head_dim, heads * head_dim)
    if ops.takes_thin("thin_qkv", x, weight):  # in place of a linear and rotary_store_kv
        moved = (weight.numel() + x.numel()) * x.element_size() + queries + 2 * keys
        yield Case(
            "thin_qkv", lambda: ops.thin_qkv(x, weight, None, kv, batch.positions, batch.slots, angles),
            moved, 2 * count * weight.numel(),
        )  # fmt: skip


def _product(x: Tensor, weight: Tensor, gated: bool, wide: bool) -> str:
    """What `ops.linear` or `ops.gated_linear` takes for x and weight."""
    thin = "thin_gated_linear" if gated else "thin_linear"
    if ops.takes_thin(thin, x, weight, wide):
        return thin
    if not wide and ops.best_tiles(x, weight, gated):
        return "tile_linear"
    if gated and ops.tall_tiles(x, weight):
        return "tall_gated_linear"
    return "thin_linear" if ops.takes_thin("thin_linear", x, weight) else "linear"


def _linear_case(label: str, x: Tensor, weight: Tensor) -> Case:
    """As the model calls it: a kernel of ours where that is faster, the library's matrix product elsewhere."""
    rows, (outputs, inputs) = x.shape[0], weight.shape
    gated, wide = label == "gate_up", label == "lm_head"
    moved = (weight.numel() + x.numel() + rows * outputs // (1 + gated)) * x.element_size()
    call = partial(ops.gated_linear, x, weight) if gated else partial(ops.linear, x, weight, float_out=wide)
    name = _product(x, weight, gated, wide)
    return Case(name, call, moved, 2 * rows * inputs * outputs, f"{label}, silu" if gated else label)


def _sampling_cases(step: Step, logits: Tensor, vocab: int) -> Iterator[Case]:
    rows, plain = step.batch.sample_rows, step.row_state.clone()
    plain[:, TOP_K], plain.view(torch.float32)[:, TOP_P] = 0, 1.0
    chosen = torch.empty_like(rows)
    read = logits.numel() * logits.element_size()
    tables = (step.batch.block_tables, step.slot_tokens)
    yield Case("penalize", lambda: ops.penalize(logits, rows, step.row_state, *tables, BLOCK_SIZE))
    counted, ids = step.row_state.clone(), torch.randint_like(step.slot_tokens, vocab)
    floats = counted.view(torch.float32)
    floats[:, REPETITION_PENALTY], floats[:, FREQUENCY_PENALTY] = 1.0, 0.5
    yield Case(
        "penalize", lambda: ops.penalize(logits, rows, counted, tables[0], ids, BLOCK_SIZE), label="output counted"
    )
    yield Case("sample", lambda: ops.sample(logits, rows, plain, chosen, vocab), read)
    filtered = step.row_state.clone()
    yield Case("sample", lambda: ops.sample(logits, rows, filtered, chosen, vocab), read, label="top-k, top-p")
    yield Case("tell_logprobs", lambda: ops.tell_logprobs(logits, None, chosen, vocab, 5), read, label="5 likeliest")


def flush_bytes(device: torch.device) -> int:
    """Twice the largest cache."""
    if device.type == "cuda":  # and long enough for the host to have sent the op while the device still writes
        return max(2 * torch.cuda.get_device_properties(device).L2_cache_size, 2**30)
    sizes = [int(file.read_text().strip().removesuffix("K")) * 1024
             for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]  # fmt: skip
    return min(2 * max(sizes, default=2**27), MAX_FLUSH_BYTES)


def median_seconds(call: Callable[[], object], buffer: Tensor, repeats: int) -> float:
    """Of an op's runs, each with cold caches; on a GPU between two events, so that the launch does not count."""
    for _ in range(2):
        call()
    if buffer.device.type == "cpu":
        return median(_cold(call, buffer) for _ in range(repeats))
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        buffer.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) / 1e3)
    return median(times)


def _cold(call: Callable[[], object], buffer: Tensor) -> float:
    buffer.zero_()
    return timed(call, "cpu")


def measure(shape: str, step: Step, name: str, device: torch.device, dtype: torch.dtype, repeats: int) -> list[OpTime]:
    """All ops in one step, called `name`, of a model."""
    buffer = torch.empty(flush_bytes(device), dtype=torch.uint8, device=device)
    rows = []
    for case in cases(shape, step, device, dtype):
        seconds = median_seconds(case.call, buffer, repeats)
        compiled = (case.op, device.type.upper()) in ops.COMPILED
        rows.append(
            OpTime(
                shape, name, f"{case.op} {case.label}".strip(), compiled, 1e6 * seconds,
                case.num_bytes / seconds / 1e9, case.flops / seconds / 1e12,
            )
        )  # fmt: skip
    return rows


def table(rows: Sequence[OpTime], limits: Limits) -> list[list[str]]:
    header = ["model", "step", "op", "kernel", "us", "GB/s", "TFLOP/s", "of limit"]
    return [header] + [
        [row.shape, row.step, row.op, "ours" if row.compiled else "torch", f"{row.microseconds:,.1f}",
         f"{row.gb_per_s:,.1f}", f"{row.tflop_per_s:,.2f}",
         f"{row.share_of(limits):.0%}" if row.share_of(limits) else "-"]
        for row in rows
    ]  # fmt: skip
