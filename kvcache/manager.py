"""The KV cache as the scheduler sees it: blocks per slot, counted in tokens. No requests, no policy, no tensors."""

from __future__ import annotations

import numpy as np

from kvcache.block_pool import BlockPool
from kvcache.block_table import BlockTables, Slots
from wire.messages import I32


class KVCacheManager:
    """Block pool and block tables of one worker group. Slots are rows of the batch."""

    def __init__(self, num_blocks: int, block_size: int, max_rows: int) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self.tables = BlockTables(max_rows)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def start(self, slot: int, num_tokens: int) -> I32:
        """Gives the empty slot blocks for `num_tokens` tokens. The caller has checked that they are free."""
        blocks = self.pool.allocate(self.blocks_for(num_tokens))
        self.tables.start(slot, blocks)
        return blocks

    def full(self, slots: Slots, num_computed: I32) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Which of these slots need one more block for the token after their `num_computed` first ones."""
        return num_computed >= self.tables.num_blocks[slots] * self.block_size

    def grow(self, slots: Slots) -> I32:
        """One more block for each slot; the caller has checked that they are free. Returns the blocks, in that order."""
        blocks = self.pool.allocate(len(slots))
        self.tables.append(slots, blocks)
        return blocks

    def release(self, slot: int, last_step: int, returned_step: int) -> None:
        """Gives back the slot's blocks; they are free when `last_step`, the last plan that names them, has returned."""
        self.pool.release(self.tables.clear(slot), last_step, returned_step)

    def check_invariants(self) -> None:
        """Raises AssertionError unless blocks are conserved and every reference count equals the tables that hold it."""
        self.pool.check_invariants()
        counts = np.zeros_like(self.pool.ref_counts)
        for slot in np.flatnonzero(self.tables.num_blocks):
            np.add.at(counts, self.tables.row(int(slot)), 1)
        assert (counts == self.pool.ref_counts).all(), "reference counts differ from the tables"
