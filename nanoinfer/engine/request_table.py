"""RequestTable: the device's table of running requests, and the one message a step that edits it.

The host writes each step's message into a flat int32 buffer whose sections start at fixed offsets; `prepare_batch`
applies it on the device. What the device already has is never sent again: a decode step costs four numbers a row.
"""

import math
from collections.abc import Iterator
from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanoinfer.engine.sequence import Chunk, Sequence
from nanoinfer.row_state import (
    FLAG_SAMPLE,
    FLAG_STORE,
    LAST_TOKEN,
    LENGTH,
    MIN_P,
    REPETITION_PENALTY,
    ROW_STATE_WIDTH,
    SEED_HI,
    SEED_LO,
    TEMPERATURE,
    TOP_K,
    TOP_P,
)

Ints = npt.NDArray[np.int32]
Edit = tuple[int, int, int]  # row, index in its block table, block


def row_values(seq: Sequence) -> Ints:
    """A new row's columns, floats by their bits."""
    state = np.zeros(ROW_STATE_WIDTH, dtype=np.int32)
    floats, seeds = state.view(np.float32), state.view(np.uint32)
    params = seq.params
    state[LAST_TOKEN], state[LENGTH] = seq.tokens[-1], len(seq.tokens)
    seeds[SEED_LO], seeds[SEED_HI] = seq.seed & 0xFFFFFFFF, seq.seed >> 32 & 0xFFFFFFFF
    floats[TEMPERATURE], floats[TOP_P] = params.sampled_temperature, params.top_p
    floats[MIN_P], floats[REPETITION_PENALTY] = params.min_p, params.repetition_penalty
    state[TOP_K] = max(params.top_k, 0)
    return state


class RequestTable:
    """Rows 0 to num_rows - 1 are requests'; row num_rows is nobody's, for padding."""

    def __init__(
        self, num_rows: int, blocks_per_row: int, num_slots: int, max_chunks: int, max_tokens: int, device: torch.device
    ) -> None:
        self.row_state = torch.zeros(num_rows + 1, ROW_STATE_WIDTH, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros(num_rows + 1, blocks_per_row, dtype=torch.int32, device=device)
        self.slot_tokens = torch.zeros(num_slots, dtype=torch.int32, device=device)
        # A step may bring up to a whole table of new blocks for a row; what does not fit goes ahead in messages of
        # its own, so that the usual message stays small.
        self.max_edits = blocks_per_row + max_chunks
        self.shapes = {
            "header": (4,),
            "new_rows": (max_chunks, 1 + ROW_STATE_WIDTH),
            "edits": (self.max_edits, 3),
            "chunks": (max_chunks, 4),
            "tokens": (max_tokens,),
        }
        self.message = torch.zeros(sum(map(math.prod, self.shapes.values())), dtype=torch.int32)
        self.sections = self.views(self.message)
        self.host: dict[str, Ints] = {name: section.numpy() for name, section in self.sections.items()}
        # What the device knows of each row: the occupancy it was made for, and how many of its blocks were sent.
        self.owner: list[tuple[int, int] | None] = [None] * num_rows
        self.sent_blocks = [0] * num_rows

    def views(self, message: Tensor) -> dict[str, Tensor]:
        """The sections of a flat message, this one's or a copy elsewhere."""
        parts = message.split([math.prod(shape) for shape in self.shapes.values()])
        return {name: part.view(shape) for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)}

    def messages(self, chunks: Seq[Chunk]) -> Iterator[bool]:
        """Write a step's message into the buffer, to be applied before the next one is asked for; True for the last.

        Usually that is the only one. More table edits than a message holds go ahead, without chunks.
        """
        new = [chunk.seq for chunk in chunks if self._moved_in(chunk.seq)]
        edits = [edit for chunk in chunks for edit in self._new_blocks(chunk.seq)]
        while len(edits) > self.max_edits:
            self.host["edits"][:] = edits[: self.max_edits]
            self.host["header"][:] = 0, self.max_edits, 0, 0
            yield False
            edits = edits[self.max_edits :]
        if edits:
            self.host["edits"][: len(edits)] = edits
        for i, seq in enumerate(new):
            self.host["new_rows"][i, 0], self.host["new_rows"][i, 1:] = seq.row, row_values(seq)
        self.host["header"][:] = len(new), len(edits), len(chunks), self._write_chunks(chunks)
        yield True

    def _moved_in(self, seq: Sequence) -> bool:
        """Whether seq's row is new to the device in seq's present occupancy."""
        occupancy = (seq.index, seq.num_preemptions)
        if self.owner[seq.row] == occupancy:
            return False
        self.owner[seq.row], self.sent_blocks[seq.row] = occupancy, 0
        return True

    def _new_blocks(self, seq: Sequence) -> list[Edit]:
        """The blocks of seq that its row on the device lacks."""
        sent = self.sent_blocks[seq.row]
        self.sent_blocks[seq.row] = len(seq.block_table)
        return [(seq.row, sent + k, block) for k, block in enumerate(seq.block_table[sent:])]

    def _write_chunks(self, chunks: Seq[Chunk]) -> int:
        begin = 0
        for i, chunk in enumerate(chunks):
            flags = FLAG_SAMPLE * chunk.sample + FLAG_STORE * chunk.store
            self.host["chunks"][i] = chunk.seq.row, chunk.start, chunk.end, flags
            begin = self._write_tokens(chunk, begin)
        return begin

    def _write_tokens(self, chunk: Chunk, begin: int) -> int:
        """The chunk's known tokens, -1 for one that only the device has."""
        end = begin + chunk.end - chunk.start
        known = chunk.seq.tokens[chunk.start : chunk.end]
        self.host["tokens"][begin : begin + len(known)] = known
        self.host["tokens"][begin + len(known) : end] = -1
        return end
