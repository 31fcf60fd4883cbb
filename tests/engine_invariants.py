"""What holds of the scheduler's books at every launch, after every step, and at the end.

`engine` is a FakeEngine throughout (`fake_engine.py`), whose model says what each slot of the KV cache holds.
"""

from array import array
from collections import Counter
from typing import TYPE_CHECKING

from nanoinfer.engine.block_manager import Entry
from nanoinfer.engine.rows import NO_TOKEN, Chunk
from nanoinfer.engine.sequence import Sequence, Status

if TYPE_CHECKING:
    from fake_engine import FakeEngine


def check_launch(engine: "FakeEngine", chunks: list[Chunk]) -> None:
    """A step as scheduled: within its limits, every chunk of use, blocks for exactly what is to come."""
    assert 0 < len(chunks) <= len(engine.scheduler.running) <= engine.config.max_num_seqs
    assert len({chunk.seq.index for chunk in chunks}) == len(chunks), "a sequence has two chunks in one step"
    assert sum(chunk.end - chunk.start for chunk in chunks) <= engine.budget
    for chunk in chunks:
        seq = chunk.seq
        assert seq.status is Status.RUNNING
        assert chunk.start < chunk.end == seq.num_scheduled
        assert chunk.end < seq.max_length, "computed for a token that nobody asked for"
        assert chunk.sample == (chunk.end == seq.length - chunk.sample), "sampled too early, or not at all"
        _check_table_length(engine, chunk)
        engine.last_tables[seq.request_id] = seq.num_preemptions, seq.block_table.copy()
        if chunk.store:
            _check_unshared(engine, seq, chunk.start, chunk.end)
    _check_progress(engine, chunks)


def _check_table_length(engine: "FakeEngine", chunk: Chunk) -> None:
    """Admission takes the blocks of all tokens plus one; after that a table grows block by block, as needed."""
    seq, size = chunk.seq, engine.cache.block_size
    occupancy = (seq.index, seq.num_preemptions)
    admitted = engine.table_lengths.get(occupancy, -(-(len(seq.tokens) + 1) // size))
    engine.table_lengths[occupancy] = max(admitted, -(-chunk.end // size))
    assert len(seq.block_table) == engine.table_lengths[occupancy]


def _check_unshared(engine: "FakeEngine", seq: Sequence, start: int, end: int) -> None:
    """What a step writes was in nobody else's hands when the step began."""
    for i in range(start // engine.cache.block_size, -(-end // engine.cache.block_size)):
        entry = engine.blocks.entry_of[seq.block_table[i]]
        assert entry is None or entry.id >= engine.first_new_entry, "a published block is written again"


def _check_progress(engine: "FakeEngine", chunks: list[Chunk]) -> None:
    """First come, first served: all that run move on, and nobody runs who came after somebody who waits."""
    waiting, running = engine.scheduler.waiting, engine.scheduler.running
    served = {chunk.seq.index for chunk in chunks}
    for seq in running:
        at_end = seq.length == seq.max_length  # its last token is in flight
        assert at_end or seq.index in served, "a running request stands still"
    assert not waiting or running[-1].index < waiting[0].index, "a later arrival has overtaken an earlier one"


def check_engine(engine: "FakeEngine") -> None:
    """Between steps every block, row, entry and token is accounted for."""
    _check_blocks(engine)
    _check_entries(engine)
    _check_queues(engine)
    _check_in_flight(engine)
    for seq in engine.live:
        _check_sequence(engine, seq)


def _check_blocks(engine: "FakeEngine") -> None:
    """Free and used blocks partition the pool; a reference count is the number of tables that hold the block."""
    blocks = engine.blocks
    held = Counter(block for seq in engine.live for block in seq.block_table)
    assert [held[block] for block in range(blocks.num_blocks)] == blocks.ref_counts
    assert set(blocks.free) == {block for block in range(blocks.num_blocks) if not held[block]}
    for seq in engine.live:
        assert len(set(seq.block_table)) == len(seq.block_table), "a table holds a block twice"


def _check_entries(engine: "FakeEngine") -> None:
    """Keys and blocks match one to one, and a published block holds what its key says, back to the salt."""
    blocks, size, model = engine.blocks, engine.cache.block_size, engine.runner.model
    assert blocks.enable_prefix_caching or not blocks.entries
    assert len(blocks.entries) == sum(entry is not None for entry in blocks.entry_of)
    for key, entry in sorted(blocks.entries.items(), key=lambda item: item[1].id):
        assert entry.key == key and blocks.entry_of[entry.block] is entry
        assert len(key[1]) == size * array("i").itemsize, "a block is published before it is full"
        stands_for = engine.entry_hashes.setdefault(entry.id, _key_hash(engine, entry))
        # What a lost step has published is withdrawn as soon as the loss is known.
        if stands_for is not None and not model.lost:
            assert model.kv[(entry.block + 1) * size - 1] == stands_for, "a key of another prefix's KV"


def _key_hash(engine: "FakeEngine", entry: Entry) -> int | None:
    """Hash of the prefix that an entry's key stands for; None where its parent is gone, and it out of reach."""
    parent, tokens = entry.key
    prefix = engine.entry_hashes.get(parent) if isinstance(parent, int) else int(parent or 0)
    for token in array("i", tokens):
        prefix = None if prefix is None else hash((prefix, token))
    return prefix


def _check_queues(engine: "FakeEngine") -> None:
    """Both queues are in order of arrival, and hold exactly the unfinished requests."""
    waiting, running = engine.scheduler.waiting, engine.scheduler.running
    for queue, status in ((waiting, Status.WAITING), (running, Status.RUNNING)):
        assert all(seq.status is status for seq in queue)
        assert [seq.index for seq in queue] == sorted({seq.index for seq in queue})
    assert {seq.index for seq in waiting + running} == {seq.index for seq in engine.sequences}
    rows = engine.scheduler.free_rows + [seq.row for seq in engine.live if seq.row >= 0]
    assert sorted(rows) == sorted(engine.rows), "rows are lost or owned twice"
    if not engine.runner.model.lost:
        assert not engine.doomed & engine.replies.keys(), "a request outlives the step that failed it"


def _check_in_flight(engine: "FakeEngine") -> None:
    """The host's two lengths: what is launched is what the handles in flight say."""
    launched = [chunk for handle in engine.loop.launched for chunk in handle.step.chunks()]
    assert len(engine.loop.launched) <= engine.loop.steps_ahead
    in_flight = Counter(chunk.seq.index for chunk in launched)
    pending = Counter(chunk.seq.index for chunk in launched if chunk.sample)
    for seq in engine.live:
        assert seq.in_flight == in_flight[seq.index]
        if seq.status is not Status.FINISHED:
            assert seq.pending == pending[seq.index]


def _check_sequence(engine: "FakeEngine", seq: Sequence) -> None:
    """Tokens are the truth so far; a row is kept while it runs or a launched step names it; so are its blocks."""
    truth = engine.truths[seq.request_id]
    assert seq.tokens == truth.stream[: len(seq.tokens)]
    assert len(seq.output_tokens) <= len(truth.output)
    running = seq.status is Status.RUNNING
    assert (seq.row >= 0) == (running or seq.in_flight > 0)
    if seq.row >= 0:
        _check_row(engine, seq)
    assert seq.num_cached_tokens < seq.num_prompt_tokens and (
        engine.blocks.enable_prefix_caching or not seq.num_cached_tokens
    )
    if not running:
        assert not seq.block_table and not seq.chain and not seq.num_shared_tokens
        return
    size = engine.cache.block_size
    assert seq.num_committed <= seq.num_scheduled <= seq.length <= seq.max_length
    assert seq.in_flight or seq.num_committed == seq.num_scheduled
    assert -(-seq.num_scheduled // size) <= len(seq.block_table) <= -(-(seq.length + 1) // size)
    for block in seq.block_table[seq.num_scheduled // size :]:  # still to be written
        assert engine.blocks.ref_counts[block] == 1 and engine.blocks.entry_of[block] is None, (
            "a partial block is shared"
        )


def _check_row(engine: "FakeEngine", seq: Sequence) -> None:
    """The columns repeat what the objects say, where a step needs it for all at once."""
    table, row = engine.scheduler.rows, seq.row
    assert seq.rows is table and table.seqs[row] is seq
    assert table.running[row] == (seq.status is Status.RUNNING)
    assert table.unfinished[row] == (seq.status is not Status.FINISHED)
    if seq.status is Status.RUNNING:
        assert (table.num_blocks[row], table.num_shared[row]) == (len(seq.block_table), seq.num_shared_tokens)
    assert (table.prompt_length[row], table.max_length[row]) == (seq.num_prompt_tokens, seq.max_length)
    assert {int(token) for token in table.stop_ids[row]} - {NO_TOKEN} == seq.stop_ids


def check_nothing_published(engine: "FakeEngine", request_id: str) -> None:
    """Blocks that led to logits that are not finite may hold such values: nobody is to find them."""
    seq = engine.all[int(request_id)]
    preemptions, table = engine.last_tables[request_id]
    if preemptions == seq.num_preemptions:  # else its blocks had been given up before the token arrived
        found = {entry.block for entry in engine.blocks._lookup(seq)}
        assert not found & set(table)


def check_drained(engine: "FakeEngine") -> None:
    """With nothing left to do everything is back."""
    assert not engine.sequences and not engine.scheduler.has_unfinished() and not engine.loop.launched
    assert engine.blocks.num_free == engine.blocks.num_blocks
    assert set(engine.scheduler.free_rows) == engine.rows
    assert all(seq.status is Status.FINISHED and seq.finish_reason for seq in engine.all)
