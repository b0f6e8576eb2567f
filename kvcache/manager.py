"""The KV cache as the scheduler sees it: blocks per slot, counted in tokens. No requests, no policy, no tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvcache.block_pool import BlockPool
from kvcache.block_table import BlockTables, Slots
from wire.messages import I32

_NONE: I32 = np.empty(0, np.int32)


class KVCacheManager:
    """Block pool, prefix index and block tables of one worker group, and host blocks for what is swapped out. Slots are rows of
    the batch."""

    def __init__(self, num_blocks: int, block_size: int, max_rows: int, num_host_blocks: int = 0) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self.host = BlockPool(num_host_blocks)
        self.tables = BlockTables(max_rows)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def lookup(self, digests: bytes, most_blocks: int) -> I32:
        """Blocks that hold the longest known prefix of this chain, at most so many. Changes nothing."""
        return self.pool.index.lookup(digests, most_blocks)

    def cost(self, num_tokens: int, shared: I32 = _NONE, copies_last: bool = False) -> int:
        """By how much num_available falls when a slot starts so, and its last shared block is copied."""
        return self.blocks_for(num_tokens) - len(shared) + copies_last + self.pool.num_cached_of(shared)

    def start(self, slot: int, num_tokens: int, shared: I32 = _NONE) -> None:
        """Gives the empty slot blocks for `num_tokens` tokens: the shared ones, then others. The caller has asked `cost`."""
        self.pool.share(shared)  # first, so that they are not evicted for the others
        others = self.pool.allocate(self.blocks_for(num_tokens) - len(shared))
        self.tables.start(slot, np.concatenate([shared, others]) if len(shared) else others)

    def copy_on_write(self, slot: int, index: int, last_step: int, returned_step: int) -> tuple[int, int]:
        """Another block for entry `index` of the slot's table: (from, to), for the plan `last_step` that copies the content."""
        old = self.tables.ids[slot, index : index + 1].copy()
        new = self.pool.allocate(1)
        self.tables.ids[slot, index] = new[0]
        self.pool.release(old, last_step, returned_step)
        return int(old[0]), int(new[0])

    def publish(self, blocks: I32, digests: Sequence[bytes]) -> None:
        """These held blocks are full and computed, and hash to these digests. One whose digest is taken stays unknown."""
        assert (self.pool.ref_counts[blocks] > 0).all(), "a block that nobody holds is published"
        self.pool.index.publish(blocks, digests)

    def full(self, slots: Slots, num_computed: I32) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Which of these slots need one more block for the token after their `num_computed` first ones."""
        return num_computed >= self.tables.num_blocks[slots] * self.block_size

    def grow(self, slots: Slots) -> I32:
        """One more block for each slot; the caller has checked that they are available. Returns the blocks, in that order."""
        blocks = self.pool.allocate(len(slots))
        self.tables.append(slots, blocks)
        return blocks

    def release(self, slot: int, last_step: int, returned_step: int) -> None:
        """Gives back the slot's blocks; they are available when `last_step`, the last plan that names them, has returned."""
        self.pool.release(self.tables.clear(slot), last_step, returned_step)

    def num_freed_by(self, slots: Slots) -> int:
        """Blocks that nobody holds once these slots are released: shared ones only if all who hold them are."""
        if not len(slots):
            return 0
        blocks, counts = np.unique(np.concatenate([self.tables.row(slot) for slot in slots.tolist()]), return_counts=True)
        return int(np.count_nonzero(self.pool.ref_counts[blocks] == counts))

    def check_invariants(self) -> None:
        """Raises AssertionError unless blocks are conserved and every reference count equals the tables that hold it."""
        self.pool.check_invariants()
        self.host.check_invariants()
        counts = np.zeros_like(self.pool.ref_counts)
        for slot in np.flatnonzero(self.tables.num_blocks):
            np.add.at(counts, self.tables.row(int(slot)), 1)
        assert (counts == self.pool.ref_counts).all(), "reference counts differ from the tables"
