"""The real engine around a model that has no weights and trusts nothing.

The model's K and V of a token are a hash of the whole prefix: the hash it reads from the slot before, and the token.
Its next token is a hash of that. What a request must generate, and what every slot that it reads must hold, follows
from its prompt alone (`Truth`), so each step compares the two: a block reused too early, shared wrongly, written
twice, or a table row that is out of date shows in the step in which it happens.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from engine_invariants import check_drained, check_engine, check_launch, check_nothing_published
from torch import Tensor

from nanoinfer import SamplingParams
from nanoinfer.batch import Batch
from nanoinfer.engine.llm_engine import LLMEngine
from nanoinfer.engine.model_runner import CacheShape, DeviceTraits, ModelRunner, StepHandle
from nanoinfer.engine.request_table import row_values
from nanoinfer.engine.requests import Limits
from nanoinfer.engine.rows import Chunk, Ints, Step
from nanoinfer.engine.sequence import Sequence, Status, ToldByPlace
from nanoinfer.engine.startup import Parts
from nanoinfer.engine_config import EngineConfig
from nanoinfer.outputs import RequestOutput
from nanoinfer.row_state import LENGTH, SEED_HI, SEED_LO

VOCAB = 12
EOS = 11
GARBAGE = 1  # in a slot of a step that failed; no hash is that small


def extend(prefix: int, token: int) -> int:
    """The hash of a prefix and one more token; 0 or the salt's number stands for the empty prefix."""
    return hash((prefix, token))


def next_token(prefix: int) -> int:
    return prefix % VOCAB


@dataclass(frozen=True)
class Truth:
    """What one request must do, from its prompt alone."""

    stream: list[int]  # token at each position as the device knows it, going on past the request's end
    hashes: list[int]  # of the prefix up to and with each position
    output: list[int]
    finish_reason: str


def tell_truth(prompt: Seq[int], root: int, max_length: int, stop_ids: Seq[int], nan_at: int) -> Truth:
    """root: number of the cache salt; nan_at: length at which the logits are NaN, 0 for never."""
    stream, hashes, ends = list(prompt), list[int](), list[tuple[int, str]]()
    for position in range(max_length):
        hashes.append(extend(hashes[-1] if hashes else root, stream[position]))
        length = position + 1
        if length < len(prompt):
            continue
        if length == nan_at < max_length:
            ends.append((length, "error"))
        token = 0 if length == nan_at else next_token(hashes[-1])  # the row's last token is 0 after a NaN
        stream.append(token)
        if length != nan_at and token in stop_ids:
            ends.append((length + 1, "stop"))
    length, reason = min([*ends, (max_length, "length")], key=lambda end: end[0])
    return Truth(stream, hashes, stream[len(prompt) : length], reason)


class FakeModel:
    """Reads and writes `kv` [slots] of hashes through the Batch, as attention would, and checks what it reads."""

    def __init__(self, num_slots: int, block_size: int) -> None:
        self.kv = np.zeros(num_slots, dtype=np.int64)  # no hash is 0
        self.block_size = block_size
        self.row_state = self.slot_tokens = np.zeros(0, dtype=np.int32)  # the table's own, set by the runner
        self.expected: list[tuple[Chunk, Truth]] = []  # the step as the host means it
        self.lost = False  # a launched step has failed, and the host has yet to hear of it

    def __call__(self, batch: Batch, kv: Seq[Tensor]) -> Tensor:
        logits = np.full((len(batch.tokens), VOCAB), -1.0, dtype=np.float32)
        slots = batch.slots.numpy()
        if self.lost:
            self.kv[slots[slots >= 0]] = GARBAGE
            return torch.from_numpy(logits)
        self._store(batch)
        starts, lengths, rows = (t.tolist() for t in (batch.q_starts, batch.kv_lens, batch.rows))
        for r, (chunk, truth) in enumerate(self.expected):
            begin, end = starts[r], starts[r + 1]
            assert (rows[r], lengths[r], end - begin) == (chunk.seq.row, chunk.end, chunk.end - chunk.start)
            assert self.row_state[rows[r], LENGTH] == chunk.end
            assert batch.tokens[begin:end].tolist() == truth.stream[chunk.start : chunk.end], "input tokens"
            assert ((slots[begin:end] >= 0) == chunk.store).all(), "stored into a shared block, or not stored"
            read = self._slots(batch, rows[r], lengths[r])
            assert self.kv[read].tolist() == truth.hashes[: chunk.end], "attention reads another prefix's KV"
            assert self.slot_tokens[read].tolist() == truth.stream[: chunk.end], "slot_tokens differ from the KV"
            nan = self.row_state[rows[r], SEED_LO] == chunk.end
            logits[end - 1, next_token(int(self.kv[read[-1]]))] = np.nan if nan else 1
        return torch.from_numpy(logits)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden

    def _store(self, batch: Batch) -> None:
        """All stores of a step come before its reads; within a chunk each hash builds on the one before."""
        slots = batch.slots.tolist()
        stored = [slot for slot in slots if slot >= 0]
        assert len(set(stored)) == len(stored), "one slot is written twice in a step"
        starts = batch.q_starts.tolist()
        for chunk, row in enumerate(batch.rows.tolist()):
            for i in range(starts[chunk], starts[chunk + 1]):
                position = int(batch.positions[i])
                if slots[i] >= 0:
                    before = self._slots(batch, row, position)[-1:]
                    prefix = int(self.kv[before[0]]) if position else int(self.row_state[row, SEED_HI])
                    self.kv[slots[i]] = extend(prefix, int(batch.tokens[i]))

    def _slots(self, batch: Batch, row: int, length: int) -> np.ndarray:
        """Slots of positions 0 to length - 1 by the device's table."""
        blocks = batch.block_tables[row].numpy().astype(np.int64)
        return (blocks[:, None] * self.block_size + np.arange(self.block_size)).ravel()[:length]


@dataclass(frozen=True)
class LostStep:
    """A launched step whose tokens never arrive."""

    step: Step

    def tokens(self) -> Ints:
        raise RuntimeError("injected: the step is lost")

    def told(self) -> ToldByPlace:
        raise AssertionError("tokens come first")


class FakeRunner(ModelRunner):
    """A ModelRunner whose next launch can be made to fail, leaving garbage wherever the step was to write."""

    model: FakeModel

    def __init__(self, engine: "FakeEngine", num_rows: int, max_model_len: int) -> None:
        cache = engine.cache
        super().__init__(
            FakeModel(cache.num_blocks * cache.block_size, cache.block_size), cache, vocab_size=VOCAB,
            num_rows=num_rows, max_chunks=min(engine.config.max_num_seqs, engine.budget), max_tokens=engine.budget,
            blocks_per_row=-(-max_model_len // cache.block_size), device=torch.device("cpu"),
        )  # fmt: skip
        self.engine = engine
        self.violation: AssertionError | None = None
        self.fault: str | None = None  # "before" or "after" the launch, or "tokens": when they are asked for
        self.model.row_state, self.model.slot_tokens = self.table.row_state.numpy(), self.table.slot_tokens.numpy()

    def launch(self, step: Step) -> StepHandle | LostStep:
        try:
            return self._launch(step)
        except AssertionError as error:  # the loop would take it for a failed step
            self.violation = error
            raise

    def _launch(self, step: Step) -> StepHandle | LostStep:
        chunks = step.chunks()
        fault, self.fault = self.fault, None
        check_launch(self.engine, chunks)
        self.engine.history.append([(chunk.seq.request_id, chunk.start, chunk.end) for chunk in chunks])
        behind_a_lost_step, self.model.lost = self.model.lost, self.model.lost or fault is not None
        if fault and not (fault == "tokens" and behind_a_lost_step):  # such a step is void before its tokens are due
            self.engine.doomed.update(chunk.seq.request_id for chunk in chunks)
        if fault == "before":
            raise RuntimeError("injected: nothing was launched")
        self.model.expected = [(chunk, self.engine.truths[chunk.seq.request_id]) for chunk in chunks]
        handle = super().launch(step)
        if fault == "after":
            raise RuntimeError("injected: the launch failed half-way")
        if not self.model.lost:  # the columns that a step does not advance are the request's
            for seq in (chunk.seq for chunk in chunks):
                assert (self.model.row_state[seq.row, LENGTH + 1 :] == row_values(seq)[LENGTH + 1 :]).all()
        return LostStep(step) if fault == "tokens" else handle

    def recover(self) -> None:
        """The lost step is known of. Of the table nothing can be relied on."""
        self.model.lost = False
        self.table.row_state.fill_(-1)
        self.table.block_tables.fill_(self.engine.cache.num_blocks - 1)


class FakeEngine(LLMEngine):
    """LLMEngine as it is, started without a checkpoint; checks itself at every launch, step and output."""

    def __init__(
        self, num_blocks: int = 16, block_size: int = 4, *, max_num_seqs: int = 4, budget: int = 64,
        max_model_len: int | None = None, caching: bool = True, steps_ahead: int = 0, rows: int | None = None,
    ) -> None:  # fmt: skip
        self.cache = CacheShape(1, num_blocks, 1, block_size, 1, torch.float32)
        self.budget = budget
        self.truths: dict[str, Truth] = {}
        self.all: list[Sequence] = []
        self.live: list[Sequence] = []  # those of them that are unfinished, or named by a launched step
        self.history: list[list[tuple[str, int, int]]] = []  # of each step its chunks: request, start, end
        self.doomed: set[str] = set()  # ids that were in a step that failed
        self.entry_hashes: dict[int, int | None] = {}  # prefix cache entry -> hash of the prefix that it stands for
        self.table_lengths: dict[tuple[int, int], int] = {}  # (sequence, occupancy) -> blocks
        self.last_tables: dict[str, tuple[int, list[int]]] = {}  # request -> occupancy and blocks at its last launch
        pool_tokens = num_blocks * block_size
        limits = Limits(VOCAB, max_model_len or pool_tokens, pool_tokens)
        with patch("nanoinfer.engine.llm_engine.start", partial(self._start, limits)):
            super().__init__(
                "fake", max_num_seqs=max_num_seqs, enable_prefix_caching=caching, async_scheduling=bool(steps_ahead)
            )
        self.rows = frozenset(self.scheduler.free_rows[:rows])
        self.scheduler.free_rows = sorted(self.rows)
        self.first_new_entry = self.blocks.next_entry  # entries from here on were published by the present step
        self.sound = True  # no check has failed

    def _start(self, limits: Limits, config: EngineConfig, num_rows: int) -> Parts:
        self.config = config
        runner = FakeRunner(self, num_rows, limits.max_model_len)
        model_config = SimpleNamespace(eos_token_ids=(EOS,))
        traits = DeviceTraits(False, 0, 0.0, "", 0, 0, 1)
        return Parts(model_config, None, Path(), runner, traits, self.cache, limits, self.budget)  # type: ignore[arg-type]

    def add(
        self, prompt: Seq[int], max_tokens: int = 8, *, stop: Seq[int] = (), ignore_eos: bool = True, salt: int = 0,
        nan: int = 0,
    ) -> Sequence:  # fmt: skip
        """Queue a request. nan: its nan-th output token comes from logits that are not finite; 0 for none."""
        nan_at = len(prompt) + nan - 1 if nan else 0
        params = SamplingParams(
            temperature=0, max_tokens=max_tokens, stop_token_ids=stop, ignore_eos=ignore_eos, detokenize=False,
            seed=salt << 32 | nan_at,  # the model reads both from the row: a stale row gives wrong tokens
        )  # fmt: skip
        request_id = self.add_request({"prompt_token_ids": prompt, "cache_salt": f"{salt}" * bool(salt)}, params)
        (seq,) = self.replies[request_id].seqs
        ends = [*stop] if ignore_eos else [*stop, EOS]
        max_length = min(len(prompt) + max_tokens, self.limits.max_model_len)
        self.truths[request_id] = tell_truth(prompt, salt, max_length, ends, nan_at)
        self.all.append(seq)
        self.live.append(seq)
        return seq

    def step(self) -> list[RequestOutput]:
        self.sound = False
        outputs = super().step()
        if self.runner.violation:
            raise self.runner.violation
        if self.runner.model.lost and not self.loop.launched:
            self.runner.recover()
        for output in outputs:
            self._check_output(output)
        check_engine(self)
        self.live = [seq for seq in self.live if seq.in_flight or seq.status is not Status.FINISHED]
        self.first_new_entry = self.blocks.next_entry
        self.sound = True
        return outputs

    def _check_output(self, output: RequestOutput) -> None:
        truth, got = self.truths[output.request_id], output.outputs[0]
        assert output.finished and output.request_id not in self.replies
        if "injected" in str(output.error):
            assert got.finish_reason == "error" and output.request_id in self.doomed
            assert got.token_ids == truth.output[: len(got.token_ids)]
        else:
            assert (got.token_ids, got.finish_reason) == (truth.output, truth.finish_reason), output.error
            assert (output.error is not None) == (truth.finish_reason == "error")
            if output.error:
                check_nothing_published(self, output.request_id)

    def drain(self) -> list[RequestOutput]:
        """Run to the end, within the steps that arrival order allows, and see that everything came back."""
        # The earliest request moves on in every other step at least, by a token or more.
        bound = 2 + sum(2 * (seq.max_length + 2) for seq in self.live)
        outputs = list[RequestOutput]()
        while self.has_unfinished_requests():
            assert bound > 0, f"no progress: {list(self.replies)}"
            outputs += self.step()
            bound -= 1
        check_drained(self)
        return outputs
