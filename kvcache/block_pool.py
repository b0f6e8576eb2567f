"""The blocks of the KV cache as numbers: who is free, held, or freed but still named by a plan in flight.

Knows block ids and reference counts only: no tokens, no requests, no tensors. Ids are 1..num_blocks; 0 is the dump that
padding rows write to and is never given out.
"""

from __future__ import annotations

import numpy as np

from wire.messages import I32

_WINDOW = 4096  # entries looked at in one scan for free blocks; bounds the cost of a step on a pool of any size


class BlockPool:
    """A fixed number of blocks with reference counts. At all times: free + held + retiring == num_blocks.

    held: reference count above 0. retiring: count 0, but a plan in flight still names the block; it is free again once that
    plan has returned (`returned`). Allocation scans forward from where it last stopped (next fit), so that blocks taken
    together are mostly consecutive.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 1
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self.num_retiring = 0
        self.ref_counts = np.zeros(num_blocks + 1, np.int32)
        self._is_free = np.ones(num_blocks + 1, np.bool_)
        self._is_free[0] = False
        self._cursor = 1
        self._retiring: list[tuple[int, I32]] = []  # (last step that names them, blocks)

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_free - self.num_retiring

    def allocate(self, count: int) -> I32:
        """`count` free blocks, each with one reference. The caller has checked that num_free >= count."""
        assert 0 <= count <= self.num_free, f"{count} blocks asked, {self.num_free} free"
        parts, missing = [], count
        while missing:
            window = self._is_free[self._cursor : self._cursor + _WINDOW]
            found = window.nonzero()[0][:missing] + self._cursor
            missing -= len(found)
            parts.append(found)
            self._cursor = int(found[-1]) + 1 if not missing else self._cursor + len(window)
            if self._cursor > self.num_blocks:
                self._cursor = 1
        blocks = np.concatenate(parts) if parts else np.empty(0, np.intp)
        self._is_free[blocks] = False
        self.ref_counts[blocks] = 1
        self.num_free -= count
        return blocks.astype(np.int32)

    def release(self, blocks: I32, last_step: int, returned_step: int) -> None:
        """Drops one reference of each block. Those without any left retire until `last_step`, the last step whose plan names
        them, has returned; `returned_step` is the latest that has. No block may stand twice in `blocks`."""
        self.ref_counts[blocks] -= 1
        assert (self.ref_counts[blocks] >= 0).all(), "a block was released more often than it was taken"
        unused = blocks[self.ref_counts[blocks] == 0]
        if last_step <= returned_step:
            self._free(unused)
        else:
            self._retiring.append((last_step, unused))
            self.num_retiring += len(unused)

    def returned(self, step_id: int) -> None:
        """The results of all steps up to `step_id` have arrived: what only they named is free."""
        due = [blocks for last_step, blocks in self._retiring if last_step <= step_id]
        if due:
            self._retiring = [entry for entry in self._retiring if entry[0] > step_id]
            for blocks in due:
                self.num_retiring -= len(blocks)
                self._free(blocks)

    def _free(self, blocks: I32) -> None:
        self._is_free[blocks] = True
        self.num_free += len(blocks)

    def check_invariants(self) -> None:
        """Raises AssertionError when blocks are not conserved."""
        retiring = np.concatenate([blocks for _, blocks in self._retiring] or [np.empty(0, np.int32)])
        held = self.ref_counts > 0
        assert not self._is_free[0] and self.ref_counts[0] == 0, "block 0 was given out"
        assert not (held & self._is_free).any(), "a held block is free"
        assert not held[retiring].any() and not self._is_free[retiring].any(), "a retiring block is held or free"
        assert len(np.unique(retiring)) == len(retiring) == self.num_retiring, "retiring blocks are miscounted"
        assert int(self._is_free.sum()) == self.num_free, "free blocks are miscounted"
        assert int(held.sum()) + self.num_free + self.num_retiring == self.num_blocks, "blocks are not conserved"
