"""ModelRunner: weights, KV cache and the table of requests on one device; launches steps there."""

import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanoinfer import ops
from nanoinfer.batch import Batch
from nanoinfer.engine.request_table import RequestTable, Sections
from nanoinfer.engine.rows import Ints, Step
from nanoinfer.engine.sequence import ToldByPlace
from nanoinfer.engine.special import Special
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
    pool_source: str  # what such a pool comes from, for messages
    max_pool_bytes: int  # limit of such a pool
    max_num_batched_tokens: int  # default tokens of a step
    block_multiple: int  # what block_size must divide by


def device_traits(device: torch.device, dtype: torch.dtype, gpu_memory_utilization: float) -> DeviceTraits:
    if device.type == "cpu":
        source = "a quarter of what is left, without kv_cache_memory_bytes,"
        return DeviceTraits(False, available_host_memory(), 0.25, source, 4 * GIB, 2048, 1)
    free, total = torch.cuda.mem_get_info(device)
    budget = min(free, int(total * gpu_memory_utilization))
    # Half-precision kernels read a block in tiles of 16 tokens.
    source = f"gpu_memory_utilization = {gpu_memory_utilization}"
    return DeviceTraits(True, budget, 1.0, source, budget, 16384, 1 if dtype == torch.float32 else 16)


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
        """K and V of every layer, and the ids of the block's tokens."""
        kv_bytes = self.num_layers * 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize
        return self.block_size * (kv_bytes + torch.int32.itemsize)

    def allocate(self, device: torch.device) -> Tensor:
        shape = (self.num_layers, self.num_blocks, 2, self.num_kv_heads, self.block_size, self.head_dim)
        return torch.empty(shape, dtype=self.dtype, device=device)


@dataclass(frozen=True, slots=True)
class StepShape:
    """What decides the sizes of a step's tensors."""

    num_tokens: int
    num_chunks: int
    num_samples: int

    @classmethod
    def of(cls, step: Step) -> "StepShape":
        return cls(int((step.ends - step.starts).sum()), len(step), int(np.count_nonzero(step.samples)))


EMPTY_STEP = StepShape(0, 0, 0)


@dataclass(frozen=True, slots=True)
class StepHandle:
    """A launched step, and the tokens it samples once they are asked for."""

    step: Step
    sampled: Tensor  # [samples] int32, in host memory
    wait: Callable[[], None]  # until they are there
    special: Special | None = None

    def tokens(self) -> Ints:
        """One token for each chunk that samples, in order; -1 where logits were not finite. Waits for the step."""
        self.wait()
        return self.sampled.numpy()

    def told(self) -> ToldByPlace:
        """Log probabilities asked for, by place among the tokens; those of prompts go to their sequences."""
        return self.special.read() if self.special is not None else {}


class ModelRunner:
    """Runs a step when it is launched, as a CPU does; CudaRunner launches it ahead."""

    # Rows of logits at once. Up to so many, a CPU gives unrounded float32 logits in half precision as well; more rows
    # would go through the library's product, which rounds them, and ties would then depend on the batch.
    logit_rows = ops.THIN_ROWS

    def __init__(
        self, model: Model, cache: CacheShape, *, vocab_size: int, num_rows: int, max_chunks: int, max_tokens: int,
        blocks_per_row: int, device: torch.device,
    ) -> None:  # fmt: skip
        self.model = model
        self.block_size = cache.block_size
        self.vocab_size = vocab_size
        self.device = device
        self.max_chunks = max_chunks
        self.kv = cache.allocate(device)
        self.kv_layers = self.kv.unbind(0)
        num_slots = cache.num_blocks * cache.block_size
        self.table = RequestTable(num_rows, blocks_per_row, num_slots, max_chunks, max_tokens, device)
        self.message = torch.zeros(self.table.message_size, dtype=torch.int32, device=device)
        self.sections = self.table.views(self.message)
        sizes = {"tokens": max_tokens, "positions": max_tokens, "slots": max_tokens, "q_starts": max_chunks + 1}
        sizes |= dict.fromkeys(("kv_lens", "rows", "logit_rows", "sample_rows"), max_chunks)
        self.buffers = {name: torch.zeros(size, dtype=torch.int32, device=device) for name, size in sizes.items()}
        self.sampled = torch.zeros(max_chunks, dtype=torch.int32, device=device)

    def launch(self, step: Step) -> StepHandle:
        """Start one step; returns without waiting for it where the device works on its own."""
        shape = StepShape.of(step)
        with torch.inference_mode():
            batch = self.batch(shape)
            for _, last in self.table.messages(step, self.written):
                self.apply(batch if last else self.batch(EMPTY_STEP))
            special = self.special(step)
            self.sample(batch, self.model(batch, self.kv_layers), special)
            if special is not None:
                special.fetch(lambda tensor: tensor)
        return StepHandle(step, self.sampled[: shape.num_samples].clone(), wait=lambda: None, special=special)

    @cached_property
    def written(self) -> Sections:
        """The message as the host writes it, where it is in the host's memory."""
        return self.table.arrays(self.message)

    def special(self, step: Step) -> Special | None:
        return Special(step, self.vocab_size, self.upload) if step.special.any() else None

    def upload(self, array: npt.NDArray[Any]) -> Tensor:
        """A copy on the device, made without waiting for it."""
        return torch.from_numpy(array)

    def batch(self, shape: StepShape) -> Batch:
        """Views of the step's buffers, of the sizes that `shape` says."""
        tokens, chunks, samples = shape.num_tokens, shape.num_chunks, shape.num_samples
        sizes = {
            "tokens": tokens, "positions": tokens, "slots": tokens, "q_starts": chunks + 1,
            "kv_lens": chunks, "rows": chunks, "logit_rows": samples, "sample_rows": samples,
        }  # fmt: skip
        views = {name: self.buffers[name][:size] for name, size in sizes.items()}
        return Batch(**views, block_tables=self.table.block_tables)

    def apply(self, batch: Batch) -> None:
        """Let the device edit its table by the message, and write the step's batch."""
        table, message = self.table, self.sections
        ops.prepare_batch(
            message["header"], message["new_rows"], message["edits"], message["chunks"], message["tokens"],
            table.row_state, table.block_tables, table.slot_tokens,
            batch.tokens, batch.positions, batch.slots, batch.q_starts, batch.kv_lens, batch.rows,
            batch.logit_rows, batch.sample_rows, self.block_size,
        )  # fmt: skip

    def sample(self, batch: Batch, hidden: Tensor, special: Special | None = None) -> None:
        """Logits of the rows that want a successor, a slice at a time, and their next tokens into `sampled`."""
        if special is not None:
            special.tell_prompts(hidden, self.model.logits, self.logit_rows)
        for begin in range(0, batch.logit_rows.shape[0], self.logit_rows):
            part = slice(begin, begin + self.logit_rows)
            logits = self.model.logits(hidden.index_select(0, batch.logit_rows[part]))
            if special is not None:
                special.before(logits, begin)
            self.choose(logits, batch, part)
            if special is not None:
                special.after(self.sampled[: batch.logit_rows.shape[0]][part])

    def choose(self, logits: Tensor, batch: Batch, part: slice) -> None:
        """The next tokens of one slice of sampled rows, from their logits; the table advanced by them."""
        table, rows = self.table, batch.sample_rows[part]
        ops.penalize(logits, rows, table.row_state, table.block_tables, table.slot_tokens, self.block_size)
        tokens = self.sampled[: batch.sample_rows.shape[0]][part]
        ops.sample(logits, rows, table.row_state, tokens, self.vocab_size)

    def warm_up(self) -> None:
        """Whatever has to happen once so that steps are fast; on a CPU there is nothing of the kind."""

    def check_device(self) -> None:
        """Raise where the device cannot run anything any more; a CPU always can."""

    def close(self) -> None:
        """Let go of the weights and the cache."""
        del self.model, self.kv, self.kv_layers
