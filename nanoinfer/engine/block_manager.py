"""BlockManager: who owns which KV block, and which prefixes they hold.

A block is in one of three states: used (reference count > 0), cached (count 0, holds a published prefix, may be
evicted) or empty. Cached and empty blocks wait in one queue, least recently used first.

A published block is an entry under the key (parent entry, the block's tokens): a dict finds it by hash and decides by
equality, and entry ids are never reused, so a key stands for its whole prefix and a collision cannot serve another
prompt's KV.
"""

from array import array
from collections import OrderedDict
from typing import NamedTuple

from nanoinfer.engine.sequence import Sequence

Key = tuple[int | str, bytes]  # (parent entry, or the cache salt for a first block; token ids as int32)


class Entry(NamedTuple):
    id: int
    block: int
    key: Key


class BlockManager:
    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.ref_counts = [0] * num_blocks
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.entries: dict[Key, Entry] = {}
        self.entry_of: list[Entry | None] = [None] * num_blocks
        self.next_entry = 1

    @property
    def num_free(self) -> int:
        return len(self.free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def admit(self, seq: Sequence) -> bool:
        """Take blocks for all tokens of seq plus one, sharing its cached prefix; False, and nothing taken, if short."""
        hits = self._lookup(seq)
        needed = self.blocks_for(len(seq.tokens) + 1) - len(hits)
        idle_hits = sum(self.ref_counts[entry.block] == 0 for entry in hits)
        if needed > self.num_free - idle_hits:
            return False
        for entry in hits:  # before new blocks are taken, which could evict them
            self._use(entry.block)
        seq.block_table = [entry.block for entry in hits] + [self._take() for _ in range(needed)]
        seq.chain = [entry.id for entry in hits]
        seq.num_shared_tokens = len(hits) * self.block_size
        return True

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Extend seq's table to num_tokens positions; False, and nothing taken, if the pool is short."""
        missing = self.blocks_for(num_tokens) - len(seq.block_table)
        if missing > self.num_free:
            return False
        seq.block_table.extend(self._take() for _ in range(missing))
        return True

    def publish(self, seq: Sequence, num_tokens: int) -> None:
        """Make seq's full blocks below num_tokens, all of whose tokens are known, findable by others."""
        if not self.enable_prefix_caching:
            return
        for i in range(len(seq.chain), num_tokens // self.block_size):
            key = self._key(seq, i)
            entry = self.entries.get(key)
            if entry is None:
                entry = Entry(self.next_entry, seq.block_table[i], key)
                self.next_entry += 1
                self.entries[key] = self.entry_of[entry.block] = entry
            # Where another block holds the same prefix, that one stays the published one and ours stays private.
            seq.chain.append(entry.id)

    def unpublish(self, seq: Sequence, start: int) -> None:
        """Withdraw seq's own blocks from position start on: their contents are not what their keys say.

        Entries below them are found through them alone, so they are out of reach as well.
        """
        first = start // self.block_size
        for block in seq.block_table[first:]:
            self._forget(block)
        del seq.chain[first:]

    def forget_prefix(self, seq: Sequence) -> None:
        """Withdraw every published block that a prompt like seq's would find, others' included: one may be poisoned."""
        for entry in self._lookup(seq):
            self._forget(entry.block)

    def release(self, seq: Sequence) -> None:
        """Give back seq's blocks; the end of a prefix goes first, since it is of use to the fewest."""
        for block in reversed(seq.block_table):
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                self.free[block] = None
                if self.entry_of[block] is None:
                    self.free.move_to_end(block, last=False)  # nothing to lose: reuse before any cached block
        seq.block_table, seq.chain, seq.num_shared_tokens = [], [], 0

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix; False, and nothing forgotten, while any block is in use."""
        if self.num_free < self.num_blocks:
            return False
        for block in range(self.num_blocks):
            self._forget(block)
        return True

    def _key(self, seq: Sequence, i: int) -> Key:
        parent = seq.chain[i - 1] if i else seq.cache_salt
        return parent, array("i", seq.tokens[i * self.block_size : (i + 1) * self.block_size]).tobytes()

    def _lookup(self, seq: Sequence) -> list[Entry]:
        """The published entries of seq's leading full blocks, as far as they reach."""
        hits: list[Entry] = []
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:  # those need every position run
            return hits
        parent: int | str = seq.cache_salt
        tokens = array("i", seq.tokens)
        for begin in range(0, len(tokens) - self.block_size + 1, self.block_size):
            entry = self.entries.get((parent, tokens[begin : begin + self.block_size].tobytes()))
            if entry is None:
                break
            hits.append(entry)
            parent = entry.id
        return hits

    def _take(self) -> int:
        block, _ = self.free.popitem(last=False)
        self._forget(block)
        self.ref_counts[block] = 1
        return block

    def _use(self, block: int) -> None:
        self.free.pop(block, None)
        self.ref_counts[block] += 1

    def _forget(self, block: int) -> None:
        entry = self.entry_of[block]
        if entry is not None:
            del self.entries[entry.key]
            self.entry_of[block] = None
