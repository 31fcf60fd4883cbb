"""Attention alone: decode steps, whole prompts, and chunks of prompts whose beginning is in the cache.

A chain of layers, each with KV of its own: more of it than caches hold, as in a model's step. On a GPU the chain is a
graph, so that launches do not count, and layers overlap as far as their kernels let them.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from nanoinfer import ops
from nanoinfer.bench.machine import timed
from nanoinfer.bench.ops import BLOCK_SIZE, OpTime, noise
from nanoinfer.bench.target import SHAPES

CHAIN_BYTES = 6e8  # of KV in all layers of a chain, at least: ten times an H200's second cache
CHAIN_LAYERS = (4, 24)  # at least, at most
REPLAYS = {"cpu": 1, "cuda": 8}  # of a chain at a time: to start the first and to see the last end takes some 15 us
TABLE_WIDTH = 32_768 // BLOCK_SIZE  # an engine's for Qwen2.5, at least


@dataclass(frozen=True, slots=True)
class Chunks:
    """Chunk i is the last q_lens[i] of kv_lens[i] positions."""

    q_lens: list[int]
    kv_lens: list[int]


def _decodes(*contexts: int) -> Chunks:
    return Chunks([1] * len(contexts), list(contexts))


def _prompts(count: int, length: int) -> Chunks:
    return Chunks([length] * count, [length] * count)


def _drawn(count: int, low: int, high: int) -> list[int]:
    """Lengths whose logarithms are spread evenly."""
    rng = random.Random(0)
    return [round(math.exp(rng.uniform(math.log(low), math.log(high)))) for _ in range(count)]


CASES = {
    "decode 1 x 1k": _decodes(1024),
    "decode 32 x 1k": _decodes(*[1024] * 32),
    "decode 256 x 1k": _decodes(*[1024] * 256),
    "decode 32 x 4k": _decodes(*[4096] * 32),
    "decode 1 x 128k": _decodes(131_072),
    "decode 64 x 128 to 16k": _decodes(*_drawn(64, 128, 16_384)),
    "prompts 32 x 512": _prompts(32, 512),
    "prompts 8 x 2k": _prompts(8, 2048),
    "prompts 4 x 4k": _prompts(4, 4096),
    "prompts 2 x 8k": _prompts(2, 8192),
    "prompt 1 x 8k": _prompts(1, 8192),
    "last 2k of 8k": Chunks([2048], [8192]),
    "last 512 of 8k": Chunks([512], [8192]),
}


def measure(shape: str, device: torch.device, dtype: torch.dtype, repeats: int) -> list[OpTime]:
    """Every case, with the heads of a model; microseconds a layer."""
    return [_measure_case(shape, name, chunks, device, dtype, repeats) for name, chunks in CASES.items()]


def _measure_case(
    shape: str, name: str, chunks: Chunks, device: torch.device, dtype: torch.dtype, repeats: int
) -> OpTime:
    hidden, _, _, heads, kv_heads, *_ = SHAPES[shape]
    head_dim = hidden // heads
    q = noise(sum(chunks.q_lens), heads, head_dim, device=device, dtype=dtype)
    tables, num_blocks = _tables(chunks, device)
    block_bytes = 2 * kv_heads * BLOCK_SIZE * head_dim * dtype.itemsize
    layers = min(max(math.ceil(CHAIN_BYTES / (num_blocks * block_bytes)), CHAIN_LAYERS[0]), CHAIN_LAYERS[1])
    kv = noise(layers, num_blocks, 2, kv_heads, BLOCK_SIZE, head_dim, device=device, dtype=dtype)

    def chain() -> None:
        for layer_kv in kv:
            ops.paged_attention(q, layer_kv, *tables, head_dim**-0.5, tables_ready=True)

    run, replays = (_as_graph(chain) if device.type == "cuda" else chain), REPLAYS[device.type]
    run()
    times = (timed(lambda: [run() for _ in range(replays)], device.type) for _ in range(repeats))
    seconds = median(times) / (layers * replays)
    cached = sum(chunks.kv_lens) * 2 * kv_heads * head_dim * dtype.itemsize
    pairs = sum(q * (kv - (q - 1) / 2) for q, kv in zip(chunks.q_lens, chunks.kv_lens, strict=True))
    num_bytes, flops = cached + 2 * q.numel() * dtype.itemsize, 4 * heads * head_dim * pairs
    compiled = ("paged_attention", device.type.upper()) in ops.COMPILED
    return OpTime(
        shape, name, "paged_attention", compiled, 1e6 * seconds, num_bytes / seconds / 1e9, flops / seconds / 1e12
    )


def _tables(chunks: Chunks, device: torch.device) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], int]:
    """q_starts, kv_lens, rows and block_tables, blocks in random order; the number of blocks."""
    counts = [-(-length // BLOCK_SIZE) for length in chunks.kv_lens]
    block_tables = torch.zeros(len(counts) + 1, max(TABLE_WIDTH, *counts), dtype=torch.int32)
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).split(counts)
    for row, blocks in enumerate(order):
        block_tables[row, : len(blocks)] = blocks
    q_starts = torch.tensor([0, *chunks.q_lens]).cumsum(0)
    tables = q_starts, torch.tensor(chunks.kv_lens), torch.arange(len(counts)), block_tables
    q_starts, kv_lens, rows, block_tables = (table.to(device, torch.int32) for table in tables)
    return (q_starts, kv_lens, rows, block_tables), sum(counts)


def _as_graph(call: Callable[[], None]) -> Callable[[], None]:
    call()  # loads kernels, which capturing must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
