"""ModelRunner: weights, KV cache and the table of requests on one device; launches steps there."""

import logging
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nanoinfer import ops
from nanoinfer.batch import Batch
from nanoinfer.engine.request_table import RequestTable
from nanoinfer.engine.sequence import Chunk
from nanoinfer.layers.sampler import sample_tokens
from nanoinfer.utils.memory import available_host_memory

logger = logging.getLogger("nanoinfer")


class Model(Protocol):
    def __call__(self, batch: Batch, kv: Seq[Tensor]) -> Tensor: ...
    def logits(self, hidden: Tensor) -> Tensor: ...


GIB = 2**30


@dataclass(frozen=True, slots=True)
class DeviceTraits:
    """How an engine differs between kinds of device."""

    asynchronous: bool  # a launched step runs on while the host goes on
    free_bytes: int  # memory that weights and KV pool may take
    pool_share: float  # of what the weights leave, for a KV pool of no stated size
    max_pool_bytes: int  # limit of such a pool
    max_num_batched_tokens: int  # default tokens of a step
    block_multiple: int  # what block_size must divide by


def device_traits(device: torch.device, dtype: torch.dtype, gpu_memory_utilization: float) -> DeviceTraits:
    if device.type == "cpu":
        return DeviceTraits(False, available_host_memory(), 0.25, 4 * GIB, 2048, 1)
    free, total = torch.cuda.mem_get_info(device)
    budget = min(free, int(total * gpu_memory_utilization))
    # Half-precision kernels read a block in tiles of 16 tokens.
    return DeviceTraits(True, budget, 1.0, budget, 16384, 1 if dtype == torch.float32 else 16)


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What the KV pool holds: layers x blocks x (K, V) x kv_heads x block_size x head_dim."""

    num_layers: int
    num_blocks: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.block_size * self.head_dim * self.dtype.itemsize

    def allocate(self, device: torch.device) -> Tensor:
        shape = (self.num_layers, self.num_blocks, 2, self.num_kv_heads, self.block_size, self.head_dim)
        return torch.empty(shape, dtype=self.dtype, device=device)


@dataclass(frozen=True, slots=True)
class StepHandle:
    """A launched step: its chunks, and the tokens it samples once they are asked for."""

    chunks: list[Chunk]
    sampled: Tensor

    def tokens(self) -> list[int]:
        """One token for each chunk that samples, in order; -1 where logits were not finite. Waits for the step."""
        return self.sampled.tolist()


class ModelRunner:
    def __init__(
        self, model: Model, cache: CacheShape, *, vocab_size: int, num_rows: int, max_chunks: int, max_tokens: int,
        blocks_per_row: int, device: torch.device,
    ) -> None:  # fmt: skip
        self.model = model
        self.block_size = cache.block_size
        self.vocab_size = vocab_size
        self.kv = cache.allocate(device)
        self.kv_layers = self.kv.unbind(0)
        num_slots = cache.num_blocks * cache.block_size
        self.table = RequestTable(num_rows, blocks_per_row, num_slots, max_chunks, max_tokens, device)
        sizes = {"tokens": max_tokens, "positions": max_tokens, "slots": max_tokens, "q_starts": max_chunks + 1}
        sizes |= dict.fromkeys(("kv_lens", "rows", "logit_rows", "sample_rows"), max_chunks)
        self.buffers = {name: torch.zeros(size, dtype=torch.int32, device=device) for name, size in sizes.items()}

    def launch(self, chunks: list[Chunk]) -> StepHandle:
        """Start one step; returns without waiting for it where the device works on its own."""
        with torch.inference_mode():
            batch = self._prepare(chunks)
            hidden = self.model(batch, self.kv_layers)
            sampled = torch.empty_like(batch.sample_rows)
            sample_tokens(
                self.model, hidden, batch, self.table.row_state, self.table.slot_tokens, sampled,
                vocab_size=self.vocab_size, block_size=self.block_size,
                penalties=any(chunk.sample and chunk.seq.params.repetition_penalty != 1 for chunk in chunks),
            )  # fmt: skip
        return StepHandle(chunks, sampled)

    def _prepare(self, chunks: list[Chunk]) -> Batch:
        num_tokens = sum(chunk.end - chunk.start for chunk in chunks)
        batch = self._batch(num_tokens, len(chunks), sum(chunk.sample for chunk in chunks))
        for last in self.table.messages(chunks):
            self._send(batch if last else self._batch(0, 0, 0))
        return batch

    def _batch(self, num_tokens: int, num_chunks: int, num_samples: int) -> Batch:
        """Views of the step's buffers, sized to the step."""
        sizes = {
            "tokens": num_tokens, "positions": num_tokens, "slots": num_tokens, "q_starts": num_chunks + 1,
            "kv_lens": num_chunks, "rows": num_chunks, "logit_rows": num_samples, "sample_rows": num_samples,
        }  # fmt: skip
        views = {name: self.buffers[name][:size] for name, size in sizes.items()}
        return Batch(**views, block_tables=self.table.block_tables)

    def _send(self, batch: Batch) -> None:
        message, table = self.table.sections, self.table
        ops.prepare_batch(
            message["header"], message["new_rows"], message["edits"], message["chunks"], message["tokens"],
            table.row_state, table.block_tables, table.slot_tokens,
            batch.tokens, batch.positions, batch.slots, batch.q_starts, batch.kv_lens, batch.rows,
            batch.logit_rows, batch.sample_rows, self.block_size,
        )  # fmt: skip

    def close(self) -> None:
        """Let go of the weights and the cache."""
        del self.model, self.kv, self.kv_layers
