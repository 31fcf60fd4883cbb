"""RequestTable: what a step's message says, and what it leaves out because the device has it."""

import pytest
import torch

from nanoinfer import SamplingParams
from nanoinfer.engine.request_table import RequestTable
from nanoinfer.engine.sequence import Chunk, Sequence
from nanoinfer.row_state import FLAG_SAMPLE, FLAG_STORE


def make_seq(row: int, blocks: list[int], num_tokens: int = 6) -> Sequence:
    tokens = list(range(10, 10 + num_tokens))
    return Sequence("", row, tokens, num_tokens, SamplingParams(), 100, frozenset(), 0, row=row, block_table=blocks)


def make_table(blocks_per_row: int = 4) -> RequestTable:
    return RequestTable(8, blocks_per_row, 64, max_chunks=3, max_tokens=16, device=torch.device("cpu"))


def send(table: RequestTable, *chunks: Chunk) -> list[tuple[list[int], list[list[int]]]]:
    """Header and edits of each message of a step."""
    sent = []
    for _ in table.messages(chunks):
        header = table.host["header"].tolist()
        sent.append((header, table.host["edits"][: header[1]].tolist()))
    return sent


def test_a_row_is_sent_once_and_then_only_its_new_blocks() -> None:
    """A decode step costs four numbers a row."""
    table, seq = make_table(), make_seq(2, [7, 5])
    prefill, decode = Chunk(seq, 0, 6, True, True), Chunk(seq, 6, 7, True, True)
    assert send(table, prefill) == [([1, 2, 1, 6], [[2, 0, 7], [2, 1, 5]])]
    assert send(table, decode) == [([0, 0, 1, 1], [])]
    seq.block_table.append(3)
    assert send(table, decode) == [([0, 1, 1, 1], [[2, 2, 3]])]


def test_a_new_occupant_or_occupancy_is_sent_whole() -> None:
    """The row keeps its number when another request, or the same one after preemption, moves in."""
    table, seq = make_table(), make_seq(2, [7, 5])
    send(table, Chunk(seq, 0, 6, True, True))
    seq.num_preemptions += 1
    assert send(table, Chunk(seq, 0, 6, True, True)) == [([1, 2, 1, 6], [[2, 0, 7], [2, 1, 5]])]
    other = make_seq(2, [1])
    other.index = 77
    assert send(table, Chunk(other, 0, 6, True, True)) == [([1, 1, 1, 6], [[2, 0, 1]])]


@pytest.mark.parametrize(("blocks_per_row", "sizes"), [(1, [3]), (4, [7, 5]), (13, [16, 16, 7])])
def test_edits_that_do_not_fit_go_ahead(blocks_per_row: int, sizes: list[int]) -> None:
    """Each once, in order, in messages without chunks; the last message brings the rest and the step."""
    table = make_table(blocks_per_row)
    seqs = [make_seq(row, [row * blocks_per_row + i for i in range(blocks_per_row)]) for row in range(3)]
    messages = send(table, *(Chunk(seq, 0, 5, False, True) for seq in seqs))
    assert [len(edits) for _, edits in messages] == sizes
    assert [header[2] for header, _ in messages[:-1]] == [0] * (len(messages) - 1)
    assert messages[-1][0][2:] == [3, 15]
    edits = [edit for _, part in messages for edit in part]
    assert edits == [[seq.row, i, block] for seq in seqs for i, block in enumerate(seq.block_table)]


def test_chunks_carry_known_tokens_and_mark_the_one_in_flight() -> None:
    """-1 stands for the row's last token, which the host has not seen."""
    table = make_table()
    prefill, decode = make_seq(0, [0, 1]), make_seq(1, [2, 3])
    send(table, Chunk(prefill, 2, 5, False, True), Chunk(decode, 6, 7, True, False))
    assert table.host["tokens"][:4].tolist() == [12, 13, 14, -1]
    assert table.host["chunks"][:2].tolist() == [[0, 2, 5, FLAG_STORE], [1, 6, 7, FLAG_SAMPLE]]
