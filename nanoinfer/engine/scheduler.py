"""Scheduler: which tokens run in the next step, and what their results mean for each sequence.

`waiting` and `running` are in order of arrival. A step holds the decodes first, then prefill chunks of running
sequences, then newly admitted ones, within a budget of tokens. When blocks run out, the latest arrival gives its own
up and is computed again later.

What every running sequence needs in every step is done for all at once on the columns of `rows`; the loops are over
those that need more: a block, a preemption, a prefill, an end.
"""

from bisect import insort
from operator import attrgetter
from time import monotonic

import numpy as np

from nanoinfer.engine.block_manager import BlockManager
from nanoinfer.engine.rows import Ints, Rows, Step, indices
from nanoinfer.engine.sequence import Sequence, Status, ToldByPlace

_arrival = attrgetter("index")


class Scheduler:
    def __init__(self, blocks: BlockManager, max_num_seqs: int, max_num_batched_tokens: int, num_rows: int) -> None:
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.rows = Rows(num_rows)
        self.free_rows = list(reversed(range(num_rows)))
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.running_rows: Ints | None = None  # of `running`, in its order; None: it has changed
        self.num_generated = self.num_admitted = self.num_cached = 0  # tokens: sampled, of prompts, found in the cache

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def schedule(self) -> Step | None:
        """The next step; None when nothing can run before a launched step is committed."""
        num_waiting = len(self.waiting)
        decodes = self._decodes()
        # Preempted just now: admitting would take the blocks straight back.
        admit = len(self.waiting) == num_waiting
        rows, ends = decodes, self.rows.length[decodes]
        if prefills := self._prefills(self.max_num_batched_tokens - len(decodes), admit):
            rows, ends = np.concatenate((np.stack((rows, ends)), np.array(prefills, dtype=np.int32).T), axis=1)
        return self.rows.advance(rows, ends) if len(rows) else None

    def _decodes(self) -> Ints:
        """Rows with a single token to run, which is for most the one that was sampled last, with blocks for it."""
        table, rows = self.rows, self._rows_of_running()
        length = table.length[rows]
        rows = rows[(length - table.scheduled[rows] == 1) & (length < table.max_length[rows])]
        rows = rows[~(table.waits[rows] & (table.in_flight[rows] > 0))]
        for row in rows[table.length[rows] > table.num_blocks[rows] * self.blocks.block_size].tolist():
            if table.running[row]:  # else it has just given way to an earlier one
                self._make_room(table.seqs[row])
        ready: Ints = rows[table.running[rows]]
        for row in ready[table.scheduled[ready] < table.prompt_length[ready]].tolist():
            self.blocks.publish(table.seqs[row], int(table.length[row]))
        return ready

    def _prefills(self, budget: int, admit: bool) -> list[tuple[int, int]]:
        """(row, end) of prompts: those that run already, then new ones."""
        table, rows = self.rows, self._rows_of_running()
        begun = iter(table.seqs[rows[table.length[rows] - table.scheduled[rows] > 1]].tolist())
        found = list[tuple[int, int]]()
        while budget > 0 and (seq := next(begun, None) or (self._admit() if admit else None)):
            end = min(seq.length, seq.num_scheduled + budget)
            budget -= end - seq.num_scheduled
            found.append((seq.row, end))
            # Its blocks can be shared from now on: every kernel of a step stores before it reads. Those that decoding
            # fills wait for their commit, since their tokens are not known before.
            self.blocks.publish(seq, end)
        return found

    def _rows_of_running(self) -> Ints:
        if self.running_rows is None:
            self.running_rows = np.array([seq.row for seq in self.running], dtype=np.int32)
        return self.running_rows

    def _make_room(self, seq: Sequence) -> None:
        """Blocks for seq's next token, at the expense of the latest arrival, which may be seq itself."""
        while not self.blocks.grow(seq, seq.length):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return
        self.rows.num_blocks[seq.row] = len(seq.block_table)

    def _admit(self) -> Sequence | None:
        """Start the first in line. One with a token still in flight must receive it first."""
        if not self.waiting or len(self.running) >= self.max_num_seqs or not self.free_rows:
            return None
        seq = self.waiting[0]
        if seq.in_flight or not self.blocks.admit(seq):
            return None
        del self.waiting[0]
        insort(self.running, seq, key=_arrival)
        self.running_rows, seq.status = None, Status.RUNNING
        self.rows.move_in(seq, self.free_rows.pop())
        if not seq.scheduled_time:
            seq.num_cached_tokens, seq.scheduled_time = seq.num_scheduled, monotonic()
            self.num_admitted += seq.num_prompt_tokens
            self.num_cached += seq.num_cached_tokens
        return seq

    def commit(self, step: Step, tokens: Ints, told: ToldByPlace | None = None) -> list[Sequence]:
        """Take back a step's sampled tokens, one for each chunk that samples; the sequences that it finished.

        told: log probabilities of some of them, by their place among the tokens.
        """
        table, size = self.rows, self.blocks.block_size
        table.in_flight[step.rows] -= 1
        running = table.running[step.rows]
        table.committed[step.rows[running]] = step.ends[running]
        for i in indices(running & (step.ends // size > step.starts // size)):
            self.blocks.publish(step.seqs[i], int(step.ends[i]))
        finished = self._take(step, tokens, told or {})
        for i in indices(~running):
            self._free_row(step.seqs[i])
        return finished

    def _take(self, step: Step, tokens: Ints, told: ToldByPlace) -> list[Sequence]:
        """Append each sampled token to its sequence; those for which it was the last.

        A sequence that ended while this was in flight drops its surplus token; a preempted one still takes it.
        """
        table, rows, ends = self.rows, step.rows[step.samples], step.ends[step.samples]
        seqs = [step.seqs[i] for i in indices(step.samples)]
        takes = table.unfinished[rows] & (tokens >= 0)
        for i, token in zip(indices(takes), tokens[takes].tolist(), strict=True):
            seqs[i].tokens.append(token)
        for i, (logprobs, own) in told.items():
            if takes[i]:
                seqs[i].logprobs.append(logprobs)
                seqs[i].cumulative_logprob += own
        self.num_generated += int(np.count_nonzero(takes))
        for i in indices(ends == table.prompt_length[rows]):
            seqs[i].first_token_time = monotonic()
        stops = (table.stop_ids[rows] == tokens[:, None]).any(axis=1)
        last = table.unfinished[rows] & (stops | (tokens < 0) | (ends + 1 >= table.max_length[rows]))
        finished = [seqs[i] for i in indices(last)]
        for seq, token in zip(finished, tokens[last].tolist(), strict=True):
            self._end(seq, token)
        return finished

    def _end(self, seq: Sequence, token: int) -> None:
        """Finish seq, whose last sampled token this is."""
        if token < 0:
            self.blocks.forget_prefix(seq)
            why = "the model's logits for this request are not finite"
            self._finish(seq, "error", error=seq.error or (f"{why}, or its options leave no id" if seq.rules else why))
        elif token in seq.stop_ids:
            seq.stop_reason = token if token in (seq.params.stop_token_ids or ()) else None
            self._finish(seq, "stop")
        else:
            self._finish(seq, "length")

    def stop(self, seq: Sequence, reason: str) -> None:
        """End seq at a stop string, which its last known token completes; it may just have ended for another reason."""
        if seq.status is not Status.FINISHED:
            self._finish(seq, "stop")
        seq.finish_reason, seq.stop_reason = "stop", reason

    def abort(self, seq: Sequence) -> None:
        """End seq now, whatever its state; a token in flight is dropped when it arrives."""
        if seq.status is not Status.FINISHED:
            self._finish(seq, "abort")

    def fail(self, step: Step, error: str) -> list[Sequence]:
        """A step did not happen: its sequences end with `error`, and what it was to write is withdrawn."""
        self._withdraw(step)
        failed = [seq for seq in step.seqs if seq.status is not Status.FINISHED]
        for seq in failed:
            self._finish(seq, "error", error=error)
        for seq in step.seqs:
            self._free_row(seq)
        return failed

    def roll_back(self, step: Step) -> None:
        """A step built on a failed one is void: its sequences that are still alive start over."""
        self._withdraw(step)
        for seq in step.seqs:
            if seq.status is Status.RUNNING:
                self._preempt(seq)
            self._free_row(seq)

    def _withdraw(self, step: Step) -> None:
        self.rows.in_flight[step.rows] -= 1
        for seq, start, _, _, store in step.chunks():
            if store and seq.status is Status.RUNNING:
                self.blocks.unpublish(seq, start)

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._give_up(seq, Status.WAITING)
        seq.num_preemptions += 1
        insort(self.waiting, seq, key=_arrival)

    def _finish(self, seq: Sequence, reason: str, error: str | None = None) -> None:
        (self.running if seq.status is Status.RUNNING else self.waiting).remove(seq)
        self._give_up(seq, Status.FINISHED)
        seq.finish_reason, seq.error, seq.finished_time = reason, error, monotonic()

    def _give_up(self, seq: Sequence, status: Status) -> None:
        if seq.in_flight:  # its launched steps may yet fail, and then nobody knows which blocks they were to fill
            self.blocks.unpublish(seq, max(seq.num_committed, seq.num_shared_tokens))
        self.blocks.release(seq)
        seq.status, self.running_rows = status, None
        if seq.row >= 0:
            self.rows.running[seq.row] = False
            self.rows.unfinished[seq.row] = status is Status.WAITING
        self._free_row(seq)

    def _free_row(self, seq: Sequence) -> None:
        """Hand the row back once no launched step names it and seq does not run."""
        if seq.row >= 0 and seq.in_flight == 0 and seq.status is not Status.RUNNING:
            self.free_rows.append(seq.row)
            self.rows.move_out(seq)
