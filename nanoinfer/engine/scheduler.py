"""Scheduler: which tokens run in the next step, and what their results mean for each sequence.

`waiting` and `running` are in order of arrival. A step holds the decodes first, then prefill chunks of running
sequences, then newly admitted ones, within a budget of tokens. When blocks run out, the latest arrival gives its own
up and is computed again later.
"""

from bisect import insort
from collections.abc import Sequence as Seq
from operator import attrgetter

from nanoinfer.engine.block_manager import BlockManager
from nanoinfer.engine.sequence import Chunk, Sequence, Status

_arrival = attrgetter("index")


class Scheduler:
    def __init__(self, blocks: BlockManager, max_num_seqs: int, max_num_batched_tokens: int, num_rows: int) -> None:
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.free_rows = list(reversed(range(num_rows)))
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def schedule(self) -> list[Chunk]:
        """The next step's chunks; empty when nothing can run before a launched step is committed."""
        chunks: list[Chunk] = []
        budget, num_waiting = self.max_num_batched_tokens, len(self.waiting)
        decodes = [seq for seq in self.running if seq.remaining == 1]
        prefills = [seq for seq in self.running if seq.remaining > 1]
        for seq in decodes + prefills:
            if budget and seq.status is Status.RUNNING and self._make_room(seq):
                chunks.append(self._chunk(seq, budget))
                budget -= chunks[-1].end - chunks[-1].start
        if len(self.waiting) > num_waiting:  # preempted just now: admitting would take the blocks straight back
            return chunks
        while budget and (admitted := self._admit()):
            chunks.append(self._chunk(admitted, budget))
            budget -= chunks[-1].end - chunks[-1].start
        return chunks

    def _make_room(self, seq: Sequence) -> bool:
        """Blocks for seq's next token, at the expense of the latest arrival; False if that is seq itself."""
        while not self.blocks.grow(seq, seq.length):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _admit(self) -> Sequence | None:
        """Start the first in line. One with a token still in flight must receive it first."""
        if not self.waiting or len(self.running) >= self.max_num_seqs or not self.free_rows:
            return None
        seq = self.waiting[0]
        if seq.in_flight or not self.blocks.admit(seq):
            return None
        del self.waiting[0]
        insort(self.running, seq, key=_arrival)
        seq.status, seq.row = Status.RUNNING, self.free_rows.pop()
        if seq.num_preemptions == 0:
            seq.num_cached_tokens = seq.num_scheduled
        return seq

    def _chunk(self, seq: Sequence, budget: int) -> Chunk:
        start = seq.num_scheduled
        end = min(seq.length, start + budget)
        chunk = Chunk(seq, start, end, sample=end == seq.length, store=start >= seq.num_shared_tokens)
        seq.num_scheduled = end
        seq.in_flight += 1
        seq.pending += chunk.sample
        # Prompt blocks can be shared from now on: every kernel of a step stores before it reads. Generated ones wait
        # for their commit, since their tokens are not known before.
        self.blocks.publish(seq, min(end, seq.num_prompt_tokens))
        return chunk

    def commit(self, chunks: Seq[Chunk], tokens: Seq[int]) -> list[Sequence]:
        """Take back a step's sampled tokens, one for each chunk that samples; the sequences that it finished."""
        sampled, finished = iter(tokens), []
        for chunk in chunks:
            seq = chunk.seq
            seq.in_flight -= 1
            token = next(sampled) if chunk.sample else None
            if seq.status is Status.RUNNING:
                seq.num_committed = chunk.end
                self.blocks.publish(seq, chunk.end)
            else:
                self._free_row(seq)
            # A sequence that ended while this was in flight drops its surplus token; a preempted one still takes it.
            if token is not None and seq.status is not Status.FINISHED and self._append(seq, token):
                finished.append(seq)
        return finished

    def _append(self, seq: Sequence, token: int) -> bool:
        """Take one sampled token; True when it is the last one."""
        seq.pending -= 1
        if token < 0:
            self.blocks.forget_prefix(seq)
            self._finish(seq, "error", error="the model's logits for this request are not finite")
            return True
        seq.tokens.append(token)
        if token in seq.stop_ids:
            seq.stop_reason = token if token in (seq.params.stop_token_ids or ()) else None
            self._finish(seq, "stop")
        elif len(seq.tokens) >= seq.max_length:
            self._finish(seq, "length")
        return seq.status is Status.FINISHED

    def abort(self, seq: Sequence) -> None:
        """End seq now, whatever its state; a token in flight is dropped when it arrives."""
        if seq.status is not Status.FINISHED:
            self._finish(seq, "abort")

    def fail(self, chunks: Seq[Chunk], error: str) -> list[Sequence]:
        """A step did not happen: its sequences end with `error`, and what it was to write is withdrawn."""
        failed = []
        for chunk in chunks:
            seq = chunk.seq
            self._withdraw(chunk)
            if seq.status is not Status.FINISHED:
                self._finish(seq, "error", error=error)
                failed.append(seq)
            self._free_row(seq)
        return failed

    def roll_back(self, chunks: Seq[Chunk]) -> None:
        """A step built on a failed one is void: its sequences that are still alive start over."""
        for chunk in chunks:
            self._withdraw(chunk)
            if chunk.seq.status is Status.RUNNING:
                self._preempt(chunk.seq)
            self._free_row(chunk.seq)

    def _withdraw(self, chunk: Chunk) -> None:
        seq = chunk.seq
        seq.in_flight -= 1
        seq.pending -= chunk.sample
        if chunk.store and seq.status is Status.RUNNING:
            self.blocks.unpublish(seq, chunk.start)

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._give_up(seq, Status.WAITING)
        seq.num_preemptions += 1
        seq.num_scheduled = seq.num_committed = 0
        insort(self.waiting, seq, key=_arrival)

    def _finish(self, seq: Sequence, reason: str, error: str | None = None) -> None:
        (self.running if seq.status is Status.RUNNING else self.waiting).remove(seq)
        self._give_up(seq, Status.FINISHED)
        seq.finish_reason, seq.error = reason, error

    def _give_up(self, seq: Sequence, status: Status) -> None:
        if seq.in_flight:  # its launched steps may yet fail, and then nobody knows which blocks they were to fill
            self.blocks.unpublish(seq, max(seq.num_committed, seq.num_shared_tokens))
        self.blocks.release(seq)
        seq.status = status
        self._free_row(seq)

    def _free_row(self, seq: Sequence) -> None:
        """Hand the row back once no launched step names it and seq does not run."""
        if seq.row >= 0 and seq.in_flight == 0 and seq.status is not Status.RUNNING:
            self.free_rows.append(seq.row)
            seq.row = -1
