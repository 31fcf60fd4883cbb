"""CudaRunner: steps on a GPU, captured where their shape repeats, launched ahead of the host, read back on the side.

A step of decodes alone has one token a chunk, so its number of chunks says all of its shape. Rounded up to a bucket, it
is captured as two CUDA graphs: `forward` (apply the message, run the model, logits) and `sample` (choose, advance the
table). What some requests want done to their logits is done between the two, by `special.py`; what they want told comes
after both. Lengths, rows and slots are read from the device's memory, so a graph serves every later step of its bucket.
Without graphs the same kernels run on the same shapes, hence the same tokens.

Of a step with a prompt's chunk in it, tokens and chunks are rounded up, and the model is captured when such a shape
comes for the second time; its few logits and tokens are launched one by one. More than CHUNK_TOKENS tokens are never
rounded: they are long enough to hide their launches, which take the host 6 ms at 0.5B and 15 ms at 7B.

Three streams: one computes; one brings sampled tokens to the host while the next step already runs; one brings that
step's message to the device while the one before still runs. There it is moved to where the graphs read it: a copy from
the host between two steps keeps the second waiting for 9 us, one on the device for 2.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanoinfer import ops
from nanoinfer.batch import Batch
from nanoinfer.engine.model_runner import EMPTY_STEP, CacheShape, Model, ModelRunner, StepHandle, StepShape
from nanoinfer.engine.request_table import Sections
from nanoinfer.engine.rows import Rows, Step
from nanoinfer.engine.sequence import Sequence
from nanoinfer.engine.special import PROMPT_ROWS, Special
from nanoinfer.engine.step_shapes import bucket_ladder, chunk_shapes
from nanoinfer.sampling_params import SamplingParams

logger = logging.getLogger("nanoinfer")

# A slot of the ring is written again when its step is long over: one is in flight, one is being committed.
RING = 3
# Of GPU memory for a layer in a graph, without its tensors: on an H200 20 graphs of 24 layers took 14 MB, of 28 layers
# 4. The driver takes it in pieces for several graphs, so capturing one or two does not show it.
GRAPH_LAYER_BYTES = 2**15


@dataclass(frozen=True, slots=True)
class RingSlot:
    """A step's memory that the device copies from and to on its own: of the host, pinned, but for `staged`."""

    message: Tensor
    sections: Sections  # of the message
    staged: Tensor  # it again, on the device
    sent: torch.cuda.Event  # it is there
    tokens: Tensor  # [chunks] int32
    computed: torch.cuda.Event  # the step is over, but for its tokens' way to the host
    arrived: torch.cuda.Event  # they are there


@dataclass(frozen=True, slots=True)
class StepGraphs:
    forward: torch.cuda.CUDAGraph
    logits: Tensor  # [bucket, V], there from the one until the next step's: see `borrow`
    sample: torch.cuda.CUDAGraph


@dataclass(frozen=True, slots=True)
class ChunkGraph:
    forward: torch.cuda.CUDAGraph
    hidden: Tensor  # [tokens, hidden], there until another step's graph runs: see `borrow`


class CudaRunner(ModelRunner):
    """capture: steps are replayed from graphs: decodes alone from the start, others from the second of a shape on."""

    logit_rows = 1024  # at once: 594 MiB for 151,936 ids

    def __init__(
        self, model: Model, cache: CacheShape, *, capture: bool, vocab_size: int, num_rows: int, max_chunks: int,
        max_tokens: int, blocks_per_row: int, device: torch.device,
    ) -> None:  # fmt: skip
        super().__init__(
            model, cache, vocab_size=vocab_size, num_rows=num_rows, max_chunks=max_chunks, max_tokens=max_tokens,
            blocks_per_row=blocks_per_row, device=device,
        )  # fmt: skip
        self.capture = capture
        self.buckets = bucket_ladder(min(max_chunks, self.logit_rows))
        self.graphs: dict[int, StepGraphs] = {}
        self.chunk_shapes = chunk_shapes(max_tokens, max_chunks)
        self.chunk_graphs: dict[StepShape, ChunkGraph] = {}
        self.launched_shapes: set[StepShape] = set()  # with chunks: their kernels are loaded, so they can be captured
        self.pool = torch.cuda.graph_pool_handle()
        self.stream, self.copy_stream, self.send_stream = (torch.cuda.Stream(device) for _ in range(3))
        self.ring = [self._new_slot() for _ in range(RING)]
        for stream in (self.stream, self.send_stream):  # use what was just made or filled on another
            stream.wait_stream(torch.cuda.current_stream(device))
        self.num_launched = 0
        self.fetched = torch.cuda.Event()  # the last step's tokens are, so that `sampled` may be written again

    def _new_slot(self) -> RingSlot:
        message = torch.zeros(self.table.message_size, dtype=torch.int32, pin_memory=True)
        tokens = torch.zeros(self.max_chunks, dtype=torch.int32, pin_memory=True)
        sent, computed, arrived = (torch.cuda.Event() for _ in range(3))
        sections, staged = self.table.arrays(message), torch.empty_like(self.message)
        return RingSlot(message, sections, staged, sent, tokens, computed, arrived)

    def launch(self, step: Step) -> StepHandle:
        slot = self.ring[self.num_launched % RING]
        slot.arrived.synchronize()  # long ago, unless that step's handle was dropped; if it failed, check_device waited
        self.num_launched += 1
        shape = StepShape.of(step)
        # torch.cuda.stream(...) does the same in Python, in 10 us, not 1; but this may not be nested in itself.
        with torch.inference_mode(), self.stream:
            self._send(step, slot)
            special = self.special(step)
            self._run(shape, special)
            return self._read_back(step, slot, shape.num_samples, special)

    def _send(self, step: Step, slot: RingSlot) -> None:
        """The step's message to the device: one, and one more for each load of edits that goes ahead."""
        for size, last in self.table.messages(step, slot.sections):
            with self.send_stream:
                slot.staged[:size].copy_(slot.message[:size], non_blocking=True)
                slot.sent.record(self.send_stream)
            self.stream.wait_event(slot.sent)
            self.message[:size].copy_(slot.staged[:size])
            if not last:
                self.apply(self.batch(EMPTY_STEP))
                self.stream.synchronize()  # the message is written again, as is `staged`

    def _run(self, shape: StepShape, special: Special | None) -> None:
        bucket = self._bucket(shape)
        if graphs := self.graphs.get(bucket):
            graphs.forward.replay()
            if special is not None:
                special.before(graphs.logits, 0)
            self.stream.wait_event(self.fetched)
            graphs.sample.replay()
            if special is not None:
                special.after(self.sampled[:bucket])
            return
        if bucket:
            shape = StepShape(bucket, bucket, bucket)
            hidden = self._forward(self.batch(shape))
        else:
            hidden = self._run_chunks(shape)
        self.stream.wait_event(self.fetched)
        self.sample(self.batch(shape), hidden, special)

    def _run_chunks(self, shape: StepShape) -> Tensor:
        """Hidden states of a step that is not of decodes alone, with rows of padding behind them."""
        rounded = self._rounded(shape)
        if rounded is None:
            return self._forward(self.batch(shape))
        if self.capture and rounded in self.launched_shapes and rounded not in self.chunk_graphs:
            self._try_capture(rounded)
        if graph := self.chunk_graphs.get(rounded):
            graph.forward.replay()
            return graph.hidden
        hidden = self._forward(self.batch(rounded))
        self.launched_shapes.add(rounded)
        return hidden

    def _try_capture(self, shape: StepShape) -> None:
        """Capture a step while others are served, for which there may be no memory: then it still can be launched."""
        try:
            self._capture_chunks(shape)
        except RuntimeError as error:  # what torch raises for whatever the driver says
            self.capture = False
            logger.warning("no more steps are captured, as this failed for one of %s: %r", shape, error)

    def _rounded(self, shape: StepShape) -> StepShape | None:
        """The smallest of `chunk_shapes` that has room for it; None: it is larger than they are."""
        tokens, chunks = shape.num_tokens, shape.num_chunks
        room = (each for each in self.chunk_shapes if each.num_tokens >= tokens and each.num_chunks >= chunks)
        return next(room, None)

    def _bucket(self, shape: StepShape) -> int:
        """The number of requests that a step of decodes alone is rounded up to; 0: it has another shape."""
        if shape.num_tokens != shape.num_samples:
            return 0
        return next((size for size in self.buckets if size >= shape.num_tokens), 0)

    def _forward(self, batch: Batch) -> Tensor:
        self.apply(batch)
        return self.model(batch, self.kv_layers)

    def warm_up(self) -> None:
        """Capture every bucket, largest first: the memory of its tensors then serves the smaller ones. For the same
        reason the largest step with chunks comes here, and the others as they are needed.

        At the start rather than when a bucket is first used: with 24 buckets and about 10 ms for each, that was a tenth
        of the time of a workload that uses all of them once.
        """
        began = time.perf_counter()
        for shape in self.chunk_shapes[-1:] if self.capture else []:
            self.capture_chunks(shape)
        for bucket in reversed(self.buckets if self.capture else []):
            self.capture_step(bucket)
        if self.graphs:
            took = time.perf_counter() - began
            logger.info("captured decode steps of %d sizes in %.2f s", len(self.graphs), took)

    def capture_step(self, bucket: int) -> None:
        """Capture the step of `bucket` requests, after running one of nobody's: capturing must not load kernels."""
        with torch.inference_mode(), self.stream:
            self.message.zero_()
            batch = self.batch(StepShape(bucket, bucket, bucket))
            self.sample(batch, self._forward(batch))
            self.graphs[bucket] = self._capture(batch)

    def capture_chunks(self, shape: StepShape) -> None:
        """The same for a step with a prompt's chunk."""
        with torch.inference_mode(), self.stream:
            self.message.zero_()
            self._forward(self.batch(shape))
            self._capture_chunks(shape)

    def _capture_chunks(self, shape: StepShape) -> None:
        with self._captured() as forward:
            hidden = self._forward(self.batch(shape))
        self.chunk_graphs[shape] = ChunkGraph(forward, borrow(hidden))

    def _capture(self, batch: Batch) -> StepGraphs:
        with self._captured() as forward:
            logits = self.model.logits(self._forward(batch))  # of every row: each chunk is one token, which samples
        with self._captured() as sample:
            self.choose(logits, batch, slice(None))
        # The memory of `logits` now serves the next capture as well: graphs of one pool never run at the same time.
        return StepGraphs(forward, borrow(logits), sample)

    @contextmanager
    def _captured(self) -> Iterator[torch.cuda.CUDAGraph]:
        """A graph of what is launched inside. Capturing ends with the block, also where that fails."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
        try:
            yield graph
        finally:
            graph.capture_end()

    def _read_back(self, step: Step, slot: RingSlot, num_samples: int, special: Special | None) -> StepHandle:
        slot.computed.record(self.stream)  # named: to find the current one takes 5 us
        self.copy_stream.wait_event(slot.computed)
        with self.copy_stream:
            tokens = slot.tokens[:num_samples]
            tokens.copy_(self.sampled[:num_samples], non_blocking=True)
            if special is not None:
                special.fetch(_to_host)
            slot.arrived.record(self.copy_stream)
        self.fetched = slot.arrived
        return StepHandle(step, tokens, slot.arrived.synchronize, special)

    def upload(self, array: npt.NDArray[Any]) -> Tensor:
        # torch keeps pinned memory for later until the copy from it is over.
        return torch.from_numpy(array).pin_memory().to(self.device, non_blocking=True)

    def check_device(self) -> None:
        torch.cuda.synchronize(self.kv.device)  # after an illegal access every later call fails as well

    def close(self) -> None:
        with suppress(RuntimeError):  # a lost device has nothing to wait for
            self.check_device()
        self.graphs.clear()
        self.chunk_graphs.clear()
        super().close()
        torch.cuda.empty_cache()  # for whoever asks the driver what is free, as the next engine does


def _to_host(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def borrow(tensor: Tensor) -> Tensor:
    """A tensor of the same memory with no hold on it.

    What a `forward` graph wrote there can be read until a graph of another step runs: its own `sample` graph, captured
    while the tensor was held, writes elsewhere. Held for longer, the logits of 30 buckets would be 30 blocks of their
    own, gigabytes; let go of, they share one. The pool itself lasts as long as its graphs.
    """
    assert tensor.is_contiguous()
    shape, address = (*tensor.shape[:-1], tensor.shape[-1] * tensor.itemsize), tensor.data_ptr()
    memory = {"shape": shape, "strides": None, "typestr": "|u1", "data": (address, False), "version": 2}
    bytes_ = torch.as_tensor(SimpleNamespace(__cuda_array_interface__=memory), device=tensor.device)
    return bytes_.view(tensor.dtype)


def make_runner(
    model: Model, cache: CacheShape, *, enforce_eager: bool, vocab_size: int, num_rows: int, max_chunks: int,
    max_tokens: int, blocks_per_row: int, device: torch.device,
) -> ModelRunner:  # fmt: skip
    """The runner for a device."""
    sizes = {"vocab_size": vocab_size, "num_rows": num_rows, "max_chunks": max_chunks, "max_tokens": max_tokens}
    if device.type == "cpu":
        return ModelRunner(model, cache, blocks_per_row=blocks_per_row, device=device, **sizes)
    missing = [name for name in ops.SCHEMAS if (name, "CUDA") not in ops.COMPILED]
    if missing:  # plain torch reads lengths back to the host, which a graph cannot
        logger.warning("no CUDA graphs: these ops run on plain torch: %s", ", ".join(missing))
    capture = not enforce_eager and not missing
    return CudaRunner(model, cache, capture=capture, blocks_per_row=blocks_per_row, device=device, **sizes)


def measure_step_bytes(runner: ModelRunner, max_tokens: int, max_model_len: int) -> int:
    """GPU memory that the largest steps of their kinds and all captured ones take and keep, in bytes."""
    assert isinstance(runner, CudaRunner)
    before = torch.cuda.mem_get_info()[0]
    length = min(max_tokens, max_model_len - 1)
    plain = SamplingParams()
    told = SamplingParams(logprobs=0, prompt_logprobs=0, repetition_penalty=2.0)  # of logits that change: they are kept
    for lengths, params in (
        ([length] * min(max_tokens // length, runner.max_chunks), plain),
        ([1] * runner.max_chunks, told),
        ([min(length, PROMPT_ROWS + 1)], told),
    ):
        runner.launch(_lone_step(lengths, params, runner.block_size)).tokens()
    graphs = 0
    if runner.capture:  # the tensors of all others will lie where those of the largest do
        for shape in reversed(runner.chunk_shapes[-2:]):
            runner.capture_chunks(shape)
        for bucket in reversed(runner.buckets[-2:]):
            runner.capture_step(bucket)
        torch.cuda.synchronize()
        graphs = len(runner.chunk_shapes) + len(runner.buckets)
    return before - torch.cuda.mem_get_info()[0] + graphs * len(runner.kv_layers) * GRAPH_LAYER_BYTES


def _lone_step(lengths: list[int], params: SamplingParams, block_size: int) -> Step:
    """Whole prompts of requests that exist for a measurement, all of them in block 0."""
    rows = Rows(len(lengths))
    for row, length in enumerate(lengths):
        seq = Sequence("", row, [0] * length, length, params, length + 1, frozenset(), 0)
        seq.block_table = [0] * -(-length // block_size)
        rows.move_in(seq, row)
    return rows.advance(np.arange(len(lengths), dtype=np.int32), np.array(lengths, dtype=np.int32))
