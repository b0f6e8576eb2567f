"""The block pool: exact ids, reference counts, and when a freed block may be taken again."""

from __future__ import annotations

import numpy as np
import pytest

from kvcache import block_pool
from kvcache.block_pool import BlockPool


def ids(*blocks: int) -> np.ndarray:
    return np.array(blocks, np.int32)


def test_blocks_are_given_out_from_one_upwards_and_never_block_zero() -> None:
    pool = BlockPool(4)
    assert pool.allocate(4).tolist() == [1, 2, 3, 4]
    assert (pool.num_free, pool.num_held, pool.num_retiring) == (0, 4, 0)


def test_allocating_nothing_gives_nothing() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(0)
    assert blocks.tolist() == [] and blocks.dtype == np.int32 and pool.num_free == 1


def test_allocation_goes_on_where_it_stopped_and_wraps_around() -> None:
    pool = BlockPool(5)
    assert pool.allocate(2).tolist() == [1, 2]
    pool.release(ids(1, 2), 0, 0)
    assert pool.allocate(2).tolist() == [3, 4], "not the ones just freed: blocks taken together stay consecutive"
    assert pool.allocate(3).tolist() == [5, 1, 2]


def test_allocation_skips_what_is_held() -> None:
    pool = BlockPool(6)
    pool.allocate(6)
    pool.release(ids(2, 4, 5), 0, 0)
    assert pool.allocate(3).tolist() == [2, 4, 5]


def test_a_pool_larger_than_the_scan_window_gives_every_block_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_pool, "_WINDOW", 4)
    pool = BlockPool(11)
    assert pool.allocate(3).tolist() == [1, 2, 3]
    assert sorted(pool.allocate(8).tolist()) == list(range(4, 12))
    pool.release(ids(2, 11), 0, 0)
    assert sorted(pool.allocate(2).tolist()) == [2, 11]
    pool.check_invariants()


def test_more_than_is_free_is_our_mistake() -> None:
    pool = BlockPool(3)
    pool.allocate(2)
    with pytest.raises(AssertionError, match="2 blocks asked, 1 free"):
        pool.allocate(2)


def test_a_block_is_free_at_once_when_its_last_plan_has_returned() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    pool.release(blocks, last_step=3, returned_step=3)
    assert (pool.num_free, pool.num_retiring) == (2, 0)


def test_a_block_retires_until_the_last_plan_naming_it_returns() -> None:
    pool = BlockPool(3)
    first, second = pool.allocate(1), pool.allocate(1)
    pool.release(first, last_step=4, returned_step=3)
    pool.release(second, last_step=5, returned_step=3)
    assert (pool.num_free, pool.num_held, pool.num_retiring) == (1, 0, 2)
    pool.check_invariants()
    pool.returned(4)
    assert (pool.num_free, pool.num_retiring) == (2, 1)
    pool.returned(4)
    assert (pool.num_free, pool.num_retiring) == (2, 1)
    pool.returned(6)
    assert (pool.num_free, pool.num_retiring) == (3, 0)
    pool.check_invariants()


def test_a_shared_block_stays_held_until_its_last_reference_goes() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.ref_counts[blocks] += 1
    pool.release(blocks, last_step=9, returned_step=0)
    assert (pool.num_held, pool.num_retiring) == (1, 0)
    pool.release(blocks, last_step=9, returned_step=0)
    assert (pool.num_held, pool.num_retiring) == (0, 1)


def test_releasing_more_often_than_taking_is_our_mistake() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.release(blocks, 0, 0)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(blocks, 0, 0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda pool: pool.ref_counts.__setitem__(0, 1), "block 0"),
        (lambda pool: pool._is_free.__setitem__(1, True), "held block is free"),
        (lambda pool: pool._retiring.append((7, ids(1))), "retiring block is held"),
        (lambda pool: setattr(pool, "num_retiring", 1), "retiring blocks are miscounted"),
        (lambda pool: setattr(pool, "num_free", 1), "free blocks are miscounted"),
        (lambda pool: pool.ref_counts.__setitem__(1, 0), "not conserved"),
    ],
)
def test_every_way_to_lose_a_block_is_noticed(spoil, message: str) -> None:
    pool = BlockPool(4)
    pool.allocate(2)
    pool.check_invariants()
    spoil(pool)
    with pytest.raises(AssertionError, match=message):
        pool.check_invariants()
