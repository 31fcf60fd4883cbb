"""Rows: the scheduler's books of the requests that run, a column for each fact; Step: what of them runs next.

A step touches every running request. In columns that is a few numpy operations for all of them together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from nanoinfer.engine.sequence import Sequence

Ints = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]

NO_TOKEN = -2  # fills up a row of stop_ids: neither a token nor the -1 of logits that are not finite


class Chunk(NamedTuple):
    """Run tokens [start, end) of seq."""

    seq: Sequence
    start: int
    end: int
    sample: bool  # the token after `end` is wanted
    store: bool  # False: the position lies in a shared block and is recomputed for its logits only


def indices(where: Flags) -> list[int]:
    """Indices of what is set. numpy's own flatnonzero is Python: a step asks nine times, which took it 8 us more."""
    return where.nonzero()[0].tolist()


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A chunk of each of some sequences, in columns, as it was when scheduled. Decodes come first."""

    seqs: list[Sequence]
    rows: Ints
    occupancies: Ints
    num_blocks: Ints  # in the sequence's table
    starts: Ints
    ends: Ints
    samples: Flags
    stores: Flags
    special: Flags  # more is wanted than tokens: see `special.py`

    def __len__(self) -> int:
        return len(self.seqs)

    def chunks(self) -> list[Chunk]:
        columns = (self.starts.tolist(), self.ends.tolist(), self.samples.tolist(), self.stores.tolist())
        return [Chunk(*chunk) for chunk in zip(self.seqs, *columns, strict=True)]


class Rows:
    """One row for each request that runs, or whose last launched step is still in flight.

    Row numbers are those of the device's table of requests (`request_table.py`).
    """

    def __init__(self, num_rows: int) -> None:
        def column() -> Ints:
            return np.zeros(num_rows, dtype=np.int32)

        self.seqs = np.full(num_rows, None, dtype=object)
        self.running = np.zeros(num_rows, dtype=np.bool_)  # holds blocks; else it waits for a commit alone
        self.unfinished = np.zeros(num_rows, dtype=np.bool_)  # takes the tokens that come for it
        self.occupancy = column()  # counts who moved in, so that the device's table can tell one from another
        self.length = column()  # all tokens, those in flight included
        self.scheduled = column()  # tokens whose KV is written once every launched step is done
        self.committed = column()  # tokens whose KV is written
        self.in_flight = column()  # launched chunks that are not yet committed
        self.num_blocks = column()
        self.num_shared = column()  # positions below this lie in blocks that others may read: never written
        self.prompt_length = column()
        self.max_length = column()
        self.special_until = column()  # chunks that start below this are special
        self.waits = np.zeros(num_rows, dtype=np.bool_)  # decodes only when the host knows all of its tokens
        self.stop_ids = np.full((num_rows, 4), NO_TOKEN, dtype=np.int32)

    def move_in(self, seq: Sequence, row: int) -> None:
        """Give an admitted sequence its row."""
        seq.rows, seq.row = self, row
        self.seqs[row], self.running[row], self.unfinished[row] = seq, True, True
        self.occupancy[row] += 1
        self.length[row], self.prompt_length[row] = len(seq.tokens), seq.num_prompt_tokens
        self.max_length[row], self.num_shared[row] = seq.max_length, seq.num_shared_tokens
        # The last token always runs, for its logits; in a shared block it is recomputed and not stored.
        self.scheduled[row] = self.committed[row] = min(seq.num_shared_tokens, len(seq.tokens) - 1)
        self.special_until[row] = seq.special_until
        self.waits[row] = seq.rules is not None and seq.rules.needs_tokens
        self.in_flight[row], self.num_blocks[row] = 0, len(seq.block_table)
        if (missing := len(seq.stop_ids) - self.stop_ids.shape[1]) > 0:
            self.stop_ids = np.pad(self.stop_ids, ((0, 0), (0, missing)), constant_values=NO_TOKEN)
        self.stop_ids[row] = NO_TOKEN
        self.stop_ids[row, : len(seq.stop_ids)] = list(seq.stop_ids)

    def move_out(self, seq: Sequence) -> None:
        self.seqs[seq.row] = None
        seq.row = -1

    def advance(self, rows: Ints, ends: Ints) -> Step:
        """Enter chunks from where each row stands to `ends` into the books; the step that runs them."""
        starts = self.scheduled[rows]
        samples = ends == self.length[rows]
        step = Step(
            self.seqs[rows].tolist(), rows, self.occupancy[rows], self.num_blocks[rows], starts, ends, samples,
            starts >= self.num_shared[rows], starts < self.special_until[rows],
        )  # fmt: skip
        self.scheduled[rows] = ends
        self.in_flight[rows] += 1
        self.length[rows] += samples
        return step
