"""Block tables: which blocks hold the keys and values of the sequence in each slot, in order. Numbers only."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from wire.messages import I32

Slots: TypeAlias = NDArray[np.intp]  # rows of the batch; numpy indexes with intp twice as fast as with the wire's uint16


class BlockTables:
    """ids[slot, :num_blocks[slot]] are the blocks of that slot's sequence; the columns grow as sequences get longer."""

    def __init__(self, max_rows: int) -> None:
        self.ids: I32 = np.zeros((max_rows, 64), np.int32)
        self.num_blocks: I32 = np.zeros(max_rows, np.int32)

    def row(self, slot: int) -> I32:
        return self.ids[slot, : self.num_blocks[slot]]

    def start(self, slot: int, blocks: I32) -> None:
        assert self.num_blocks[slot] == 0
        self._widen(len(blocks))
        self.ids[slot, : len(blocks)] = blocks
        self.num_blocks[slot] = len(blocks)

    def append(self, slots: Slots, blocks: I32) -> None:
        """Appends blocks[i] to the table of slots[i]; no slot twice."""
        at = self.num_blocks[slots]
        self._widen(int(at.max(initial=0)) + 1)
        self.ids[slots, at] = blocks
        self.num_blocks[slots] = at + 1

    def clear(self, slot: int) -> I32:
        """Forgets the table; returns the blocks it held."""
        blocks = self.row(slot).copy()
        self.num_blocks[slot] = 0
        return blocks

    def _widen(self, columns: int) -> None:
        rows, width = self.ids.shape
        if columns > width:
            wider = np.zeros((rows, max(columns, 2 * width)), np.int32)
            wider[:, :width] = self.ids
            self.ids = wider
