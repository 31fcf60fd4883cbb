"""BlockManager alone: what is shared, what is evicted, what is never handed out. Blocks of 4 tokens."""

import pytest

from nanoinfer import SamplingParams
from nanoinfer.engine.block_manager import BlockManager
from nanoinfer.engine.rows import Rows
from nanoinfer.engine.sequence import Sequence

A, B, C = [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]


def make_blocks(num_blocks: int = 8, caching: bool = True) -> BlockManager:
    return BlockManager(num_blocks, 4, caching)


def make_seq(tokens: list[int], salt: str = "") -> Sequence:
    return Sequence("", 0, tokens.copy(), len(tokens), SamplingParams(), 1000, frozenset(), 0, cache_salt=salt)


def admit(blocks: BlockManager, tokens: list[int], salt: str = "") -> Sequence:
    """A sequence whose whole prompt has run."""
    seq = make_seq(tokens, salt)
    assert blocks.admit(seq)
    blocks.publish(seq, len(tokens))
    return seq


def finish(blocks: BlockManager, tokens: list[int], salt: str = "") -> list[int]:
    """A request that has come and gone; the blocks it had."""
    seq = admit(blocks, tokens, salt)
    table = seq.block_table
    blocks.release(seq)
    return table


def num_hits(blocks: BlockManager, tokens: list[int], salt: str = "") -> int:
    """Cached blocks that a prompt finds."""
    seq = make_seq(tokens, salt)
    assert blocks.admit(seq)
    hits = seq.num_shared_tokens // 4
    blocks.release(seq)
    return hits


@pytest.mark.parametrize(("length", "count"), [(1, 1), (3, 1), (4, 2), (7, 2), (8, 3)])
def test_admission_takes_the_prompt_and_one_more(length: int, count: int) -> None:
    """The first generated token has its place, so a request that was admitted can always decode once."""
    seq = admit(make_blocks(), list(range(length)))
    assert len(seq.block_table) == count


def test_what_does_not_fit_takes_nothing() -> None:
    """All or nothing, for admission and growth alike: a half-served request would hold blocks that others need."""
    blocks = make_blocks(num_blocks=3)
    first = admit(blocks, [*A, 0])
    second = make_seq(B)
    assert not blocks.admit(second) and not second.block_table
    assert not blocks.grow(first, 13) and len(first.block_table) == 2
    assert blocks.num_free == 1
    assert blocks.grow(first, 12) and blocks.num_free == 0


def test_equal_prefixes_share_blocks() -> None:
    """As far as whole blocks agree; the rest is private, and so is what comes after."""
    blocks = make_blocks()
    first, second = admit(blocks, [*A, *B, 0]), admit(blocks, [*A, *B, 1])
    assert first.block_table[:2] == second.block_table[:2] and first.block_table[2] != second.block_table[2]
    assert [blocks.ref_counts[block] for block in second.block_table] == [2, 2, 1]
    blocks.release(first)
    assert [blocks.ref_counts[block] for block in second.block_table] == [1, 1, 1]


def test_a_full_hit_leaves_the_last_token_to_run() -> None:
    """Without it there would be no logits to sample from."""
    blocks = make_blocks()
    admit(blocks, A + B)
    seq = make_seq(A + B)
    assert blocks.admit(seq)
    Rows(1).move_in(seq, 0)
    assert (seq.num_shared_tokens, seq.num_scheduled) == (8, 7)


def test_a_key_stands_for_its_whole_prefix() -> None:
    """The same four tokens after another beginning are another block."""
    blocks = make_blocks()
    finish(blocks, A + B)
    assert num_hits(blocks, [*A, *B, 0]) == 2
    assert num_hits(blocks, [*C, *B, 0]) == 0
    assert num_hits(blocks, [*B, 0]) == 0


def test_salts_separate() -> None:
    """Requests see only the cache of their own salt: what others asked cannot be told from hit counts."""
    blocks = make_blocks()
    finish(blocks, A + B, salt="tenant")
    assert num_hits(blocks, [*A, *B, 0]) == 0
    assert num_hits(blocks, [*A, *B, 0], salt="other") == 0
    assert num_hits(blocks, [*A, *B, 0], salt="tenant") == 2


def test_only_full_blocks_below_the_length_are_found() -> None:
    """Of six tokens, one block."""
    blocks = make_blocks()
    finish(blocks, A + B[:2])
    assert num_hits(blocks, A + B) == 1


def test_without_caching_nothing_is_shared() -> None:
    blocks = make_blocks(caching=False)
    finish(blocks, A + B)
    assert num_hits(blocks, A + B) == 0 and not blocks.entries


def test_empty_blocks_go_before_cached_ones() -> None:
    """A cached block is worth something, an empty one is not."""
    blocks = make_blocks(num_blocks=4)
    cached = finish(blocks, [*A, 0])[0]
    for count in (1, 2, 3):
        seq = make_seq([20 + count] * (4 * count - 1))
        assert blocks.admit(seq) and cached not in seq.block_table
        blocks.release(seq)
    assert num_hits(blocks, A) == 1


def test_the_least_recently_used_prefix_is_evicted_first() -> None:
    """And of a prefix its end: without its beginning it could not be found anyway."""
    blocks = make_blocks(num_blocks=5)
    finish(blocks, A + B)
    finish(blocks, C)
    assert num_hits(blocks, A + B) == 2  # used again just now
    seq = make_seq(list(range(20, 31)))
    assert blocks.admit(seq)  # three blocks: one that is empty, another that was used for generation, then C
    blocks.release(seq)
    assert num_hits(blocks, A + B) == 2
    assert num_hits(blocks, C) == 0
    seq = make_seq(list(range(40, 55)))
    assert blocks.admit(seq)  # four blocks: B goes, A stays
    blocks.release(seq)
    assert num_hits(blocks, A + B) == 1


def test_hits_are_not_evicted_to_make_room_for_their_own_request() -> None:
    """Idle hits count as free, but not for the request that uses them."""
    blocks = make_blocks(num_blocks=3)
    finish(blocks, A + B)
    seq = make_seq(A + B + C)
    assert not blocks.admit(seq)
    seq = make_seq(A + B + C[:3])
    assert blocks.admit(seq)
    assert seq.num_shared_tokens == 8 and len(set(seq.block_table)) == 3


def test_of_two_equal_blocks_one_is_published() -> None:
    """Both requests generated the same: the second's block stays private, what follows it still joins the chain."""
    blocks = make_blocks()
    first, second = admit(blocks, A[:3]), admit(blocks, A[:3])
    for seq in (first, second):
        seq.tokens += [4, *B]
        assert blocks.grow(seq, 8)
        blocks.publish(seq, 4)
    assert first.chain == second.chain and first.block_table[0] != second.block_table[0]
    blocks.publish(second, 8)
    blocks.release(first)
    seq = make_seq(A + B)
    assert blocks.admit(seq)
    assert seq.block_table[1] == second.block_table[1]


def test_withdrawn_blocks_hide_what_follows_them() -> None:
    """Entries are found through their parents alone; publishing the parent again does not bring them back."""
    blocks = make_blocks()
    first = admit(blocks, A)
    second = admit(blocks, A + B)  # its second block hangs on the first one's
    blocks.unpublish(first, 0)
    assert num_hits(blocks, A + B) == 0
    blocks.release(first)
    blocks.release(second)
    finish(blocks, A)
    assert num_hits(blocks, A + B) == 1


def test_a_reused_block_loses_its_entry() -> None:
    """Or a later prompt would find somebody else's K and V under its own key."""
    blocks = make_blocks(num_blocks=2)
    finish(blocks, A)
    finish(blocks, B + C[:3])
    assert num_hits(blocks, A) == 0


def test_reset_waits_for_requests() -> None:
    """What a running request reads cannot be forgotten; afterwards everything is."""
    blocks = make_blocks()
    seq = admit(blocks, A + B)
    assert not blocks.reset_prefix_cache() and num_hits(blocks, A + B) == 2
    blocks.release(seq)
    assert blocks.reset_prefix_cache() and num_hits(blocks, A + B) == 0
    assert blocks.num_free == 8
