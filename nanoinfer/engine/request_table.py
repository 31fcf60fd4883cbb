"""RequestTable: the device's table of running requests, and the one message a step that edits it.

A message is a flat int32 buffer whose sections start at fixed offsets. The host writes it, and `prepare_batch` applies
it on the device. What the device already has is never sent again: a decode step costs four numbers a row.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from nanoinfer.engine.rows import Ints, Step, indices
from nanoinfer.engine.sequence import Sequence
from nanoinfer.row_state import (
    FLAG_SAMPLE,
    FLAG_STORE,
    FREQUENCY_PENALTY,
    LAST_TOKEN,
    LENGTH,
    MIN_P,
    PRESENCE_PENALTY,
    PROMPT_LENGTH,
    REPETITION_PENALTY,
    ROW_STATE_WIDTH,
    SEED_HI,
    SEED_LO,
    TEMPERATURE,
    TOP_K,
    TOP_P,
)

Edit = tuple[int, int, int]  # row, index in its block table, block
Sections = dict[str, Ints]  # of a message, in the host's memory


def row_values(seq: Sequence) -> Ints:
    """A new row's columns, floats by their bits."""
    state = np.zeros(ROW_STATE_WIDTH, dtype=np.int32)
    floats, seeds = state.view(np.float32), state.view(np.uint32)
    params = seq.params
    state[LAST_TOKEN], state[LENGTH] = seq.tokens[-1], len(seq.tokens)
    seeds[SEED_LO], seeds[SEED_HI] = seq.seed & 0xFFFFFFFF, seq.seed >> 32 & 0xFFFFFFFF
    floats[TEMPERATURE], floats[TOP_P] = params.sampled_temperature, params.top_p
    floats[MIN_P], floats[REPETITION_PENALTY] = params.min_p, params.repetition_penalty
    floats[PRESENCE_PENALTY], floats[FREQUENCY_PENALTY] = params.presence_penalty, params.frequency_penalty
    state[TOP_K], state[PROMPT_LENGTH] = max(params.top_k, 0), seq.num_prompt_tokens
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
        # In this order what most steps use is one piece, and a small one: no rows are new, and tokens are few.
        self.shapes = {
            "header": (4,),
            "chunks": (max_chunks, 4),
            "edits": (self.max_edits, 3),
            "tokens": (max_tokens,),
            "new_rows": (max_chunks, 1 + ROW_STATE_WIDTH),
        }
        self.message_size = sum(map(math.prod, self.shapes.values()))
        self.upto_tokens = self.message_size - max_chunks * (1 + ROW_STATE_WIDTH) - max_tokens
        # What the device knows of each row: whose it is, and how many of its blocks were sent.
        self.occupancy = np.zeros(num_rows, dtype=np.int32)
        self.sent_blocks = np.zeros(num_rows, dtype=np.int32)

    def views(self, message: Tensor) -> dict[str, Tensor]:
        """The sections of a flat message."""
        parts = message.split([math.prod(shape) for shape in self.shapes.values()])
        return {name: part.view(shape) for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)}

    def arrays(self, message: Tensor) -> Sections:
        """The same of one in the host's memory."""
        return {name: section.numpy() for name, section in self.views(message).items()}

    def messages(self, step: Step, into: Sections) -> Iterator[tuple[int, bool]]:
        """Write a step's message, to be applied before the next one is asked for.

        Yields how many numbers of the flat buffer it takes, and whether it is the last one. Usually that is the only
        one. More table edits than a message holds go ahead, without chunks.
        """
        new = self._moved_in(step)
        edits = self._new_blocks(step)
        while len(edits) > self.max_edits:
            into["edits"][:] = edits[: self.max_edits]
            into["header"][:] = 0, self.max_edits, 0, 0
            yield self.upto_tokens, False
            edits = edits[self.max_edits :]
        if edits:
            into["edits"][: len(edits)] = edits
        for i, seq in enumerate(new):
            into["new_rows"][i, 0], into["new_rows"][i, 1:] = seq.row, row_values(seq)
        num_tokens = _write_tokens(step, into["tokens"])
        into["header"][:] = len(new), len(edits), len(step), num_tokens
        _write_chunks(step, into["chunks"])
        yield self.message_size if new else self.upto_tokens + num_tokens, True

    def _moved_in(self, step: Step) -> list[Sequence]:
        """The sequences whose rows the device does not know as theirs."""
        new = self.occupancy[step.rows] != step.occupancies
        self.occupancy[step.rows] = step.occupancies
        self.sent_blocks[step.rows[new]] = 0
        return [step.seqs[i] for i in indices(new)]

    def _new_blocks(self, step: Step) -> list[Edit]:
        """The blocks that the rows on the device lack."""
        edits = list[Edit]()
        for i in indices(step.num_blocks > self.sent_blocks[step.rows]):
            row, sent = int(step.rows[i]), int(self.sent_blocks[step.rows[i]])
            edits += [(row, sent + k, block) for k, block in enumerate(step.seqs[i].block_table[sent:])]
        self.sent_blocks[step.rows] = step.num_blocks
        return edits


def _write_chunks(step: Step, chunks: Ints) -> None:
    columns = chunks[: len(step)].T
    columns[:3] = step.rows, step.starts, step.ends
    columns[3] = FLAG_SAMPLE * step.samples + FLAG_STORE * step.stores


def _write_tokens(step: Step, tokens: Ints) -> int:
    """The chunks' tokens; -1 for a row's last token, which the device has, and the host perhaps not yet."""
    sizes = step.ends - step.starts
    ends = sizes.cumsum()
    tokens[: ends[-1]] = -1
    for i in indices((sizes > 1) | ~step.samples):
        tokens[ends[i] - sizes[i] : ends[i]] = step.seqs[i].tokens[step.starts[i] : step.ends[i]]
    return int(ends[-1])
