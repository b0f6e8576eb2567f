"""Block tables: what stands in which column, and that they grow."""

from __future__ import annotations

import numpy as np
import pytest

from kvcache.block_table import BlockTables


def slots(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.intp)


def ids(*blocks: int) -> np.ndarray:
    return np.array(blocks, np.int32)


def test_a_row_keeps_its_blocks_in_order() -> None:
    tables = BlockTables(3)
    tables.start(1, ids(7, 3))
    tables.append(slots(1), ids(5))
    assert tables.row(1).tolist() == [7, 3, 5]
    assert tables.row(0).tolist() == tables.row(2).tolist() == []


def test_append_gives_each_slot_its_own_block() -> None:
    tables = BlockTables(3)
    tables.start(0, ids(1))
    tables.start(2, ids(2, 3))
    tables.append(slots(2, 0), ids(8, 9))
    assert tables.row(0).tolist() == [1, 9] and tables.row(2).tolist() == [2, 3, 8]


def test_appending_nothing_changes_nothing() -> None:
    tables = BlockTables(1)
    tables.append(slots(), ids())
    assert tables.row(0).tolist() == []


def test_clear_returns_what_was_held_and_forgets_it() -> None:
    tables = BlockTables(2)
    tables.start(0, ids(4, 5))
    held = tables.clear(0)
    tables.start(0, ids(6))
    assert held.tolist() == [4, 5], "a copy: the next sequence in the slot does not write into it"
    assert tables.row(0).tolist() == [6]


@pytest.mark.parametrize("count", [63, 64, 65, 1000])
def test_columns_grow_with_the_longest_sequence_and_keep_the_others(count: int) -> None:
    tables = BlockTables(2)
    tables.start(1, ids(42))
    tables.start(0, np.arange(1, count + 1, dtype=np.int32))
    for block in range(count + 1, count + 70):
        tables.append(slots(0), ids(block))
    assert tables.row(0).tolist() == list(range(1, count + 70))
    assert tables.row(1).tolist() == [42]


def test_starting_a_slot_that_holds_blocks_is_our_mistake() -> None:
    tables = BlockTables(1)
    tables.start(0, ids(1))
    with pytest.raises(AssertionError):
        tables.start(0, ids(2))
