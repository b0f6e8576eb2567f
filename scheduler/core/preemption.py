"""Who loses its row when blocks are short, and whether its keys and values are computed again or swapped. Pure functions."""

from __future__ import annotations

import numpy as np

from kvcache.block_table import Slots
from scheduler.core.rows import RUNNING, Rows


def candidates(rows: Rows, *, tenant: int = -1, below: int | None = None) -> Slots:
    """Rows that may be preempted, by admission; of one tenant only, or (below: a class, 0 for none) to let somebody in: then
    those of a class below, but not who was admitted by age or is about to end, and any whose reader has stopped reading."""
    order = rows.in_order()
    may = (rows.state[order] == RUNNING) & ~rows.is_protected[order]
    if tenant >= 0:
        may &= rows.tenant[order] == tenant
    if below is not None:
        may &= (rows.priority[order] < below) & ~rows.is_aged[order] & (rows.num_tokens[order] < rows.max_tokens[order])
        may |= (rows.state[order] == RUNNING) & ~is_reading(rows, order)
    slots: Slots = order[may]
    return slots


def ending(rows: Rows) -> Slots:
    """Rows whose last token is being sampled."""
    order = rows.in_order()
    slots: Slots = order[(rows.state[order] == RUNNING) & (rows.num_tokens[order] >= rows.max_tokens[order])]
    return slots


def victim(rows: Rows, slots: Slots) -> int:
    """Of these rows, by admission, the one to preempt: not one that is about to end; if possible one whose reader has stopped
    reading; of the lowest class; that loses least work (tokens computed); admitted last."""
    ending = rows.num_tokens[slots] >= rows.max_tokens[slots]
    reading = is_reading(rows, slots)
    order = np.lexsort((-np.arange(len(slots)), rows.num_computed[slots], rows.priority[slots], reading, ending))
    return int(slots[order[0]])


def is_reading(rows: Rows, slots: Slots) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Whether its reader keeps up, so that the row may go on."""
    reading: np.ndarray[tuple[int], np.dtype[np.bool_]] = (rows.num_tokens[slots] < rows.limit[slots]) | (
        rows.limit[slots] == rows.max_tokens[slots]
    )
    return reading


def swap_pays(num_blocks: int, swap_block_ns: int, recompute_ns: int) -> bool:
    """Whether writing so many blocks to host memory and back costs less than computing their tokens again. Unknown costs (0)
    are no reason to swap."""
    return 0 < 2 * num_blocks * swap_block_ns < recompute_ns
