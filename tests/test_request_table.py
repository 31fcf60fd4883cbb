"""RequestTable: what a step's message says, and what it leaves out because the device has it."""

import numpy as np
import pytest
import torch

from nanoinfer import SamplingParams
from nanoinfer.engine.request_table import RequestTable
from nanoinfer.engine.rows import Rows
from nanoinfer.engine.sequence import Sequence
from nanoinfer.row_state import FLAG_SAMPLE, FLAG_STORE


class Host:
    """Requests in rows of the books, and the messages that steps of them send."""

    def __init__(self, blocks_per_row: int = 4) -> None:
        self.rows = Rows(8)
        self.table = RequestTable(8, blocks_per_row, 64, max_chunks=3, max_tokens=16, device=torch.device("cpu"))
        self.message = torch.zeros(self.table.message_size, dtype=torch.int32)
        self.sections = self.table.arrays(self.message)

    def move_in(self, row: int, blocks: list[int], num_tokens: int = 6) -> Sequence:
        tokens = list(range(10, 10 + num_tokens))
        seq = Sequence("", row, tokens, num_tokens, SamplingParams(), 100, frozenset(), 0, block_table=blocks)
        self.rows.move_in(seq, row)
        return seq

    def grow(self, seq: Sequence, block: int) -> None:
        seq.block_table.append(block)
        self.rows.num_blocks[seq.row] += 1

    def send(self, chunks: dict[int, int]) -> list[tuple[list[int], list[list[int]]]]:
        """Run each row on to a length; header and edits of each message of that step."""
        rows, ends = (np.array(list(values), dtype=np.int32) for values in (chunks.keys(), chunks.values()))
        sent = []
        self.message.fill_(-9)  # as an earlier step left it
        for size, _ in self.table.messages(self.rows.advance(rows, ends), self.sections):
            message = self.message.clone()
            message[size:] = -7  # not sent
            parts = self.table.arrays(message)
            header = parts["header"].tolist()
            used = dict(zip(("new_rows", "edits", "chunks", "tokens"), header, strict=True))
            assert all((parts[name][:count] == self.sections[name][:count]).all() for name, count in used.items())
            sent.append((header, parts["edits"][: header[1]].tolist()))
        return sent


def test_a_row_is_sent_once_and_then_only_its_new_blocks() -> None:
    """A decode step costs four numbers a row."""
    host = Host()
    seq = host.move_in(2, [7, 5])
    assert host.send({2: 6}) == [([1, 2, 1, 6], [[2, 0, 7], [2, 1, 5]])]
    assert host.send({2: 7}) == [([0, 0, 1, 1], [])]
    host.grow(seq, 3)
    assert host.send({2: 8}) == [([0, 1, 1, 1], [[2, 2, 3]])]


def test_a_new_occupant_is_sent_whole() -> None:
    """The row keeps its number when another request, or the same one after preemption, moves in."""
    host = Host()
    host.move_in(2, [7, 5])
    host.send({2: 6})
    host.move_in(2, [1])
    assert host.send({2: 6}) == [([1, 1, 1, 6], [[2, 0, 1]])]


@pytest.mark.parametrize(("blocks_per_row", "sizes"), [(1, [3]), (4, [7, 5]), (13, [16, 16, 7])])
def test_edits_that_do_not_fit_go_ahead(blocks_per_row: int, sizes: list[int]) -> None:
    """Each once, in order, in messages without chunks; the last message brings the rest and the step."""
    host = Host(blocks_per_row)
    seqs = [host.move_in(row, [row * blocks_per_row + i for i in range(blocks_per_row)]) for row in range(3)]
    messages = host.send({0: 5, 1: 5, 2: 5})
    assert [len(edits) for _, edits in messages] == sizes
    assert [header[2] for header, _ in messages[:-1]] == [0] * (len(messages) - 1)
    assert messages[-1][0][2:] == [3, 15]
    edits = [edit for _, part in messages for edit in part]
    assert edits == [[seq.row, i, block] for seq in seqs for i, block in enumerate(seq.block_table)]


def test_chunks_carry_known_tokens_and_mark_the_last_one() -> None:
    """-1 stands for the row's last token: the device has it, and the host perhaps not yet."""
    host = Host()
    host.move_in(0, [0, 1])
    host.move_in(1, [2, 3])
    host.send({0: 2, 1: 6})
    host.send({1: 7, 0: 5})
    assert host.sections["tokens"][:4].tolist() == [-1, 12, 13, 14]
    assert host.sections["chunks"][:2].tolist() == [[1, 6, 7, FLAG_SAMPLE | FLAG_STORE], [0, 2, 5, FLAG_STORE]]
    host.send({0: 6})
    assert host.sections["tokens"][:1].tolist() == [-1]
    host.move_in(3, [1])
    host.send({3: 1})  # one token of a prompt, which is not the last
    assert host.sections["tokens"][:1].tolist() == [10]
