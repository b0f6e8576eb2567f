"""The block pool: exact ids, reference counts, when a released block may be taken again, and the order of eviction."""

from __future__ import annotations

import numpy as np
import pytest

from kvcache import block_pool
from kvcache.block_pool import CACHED, FREE, HELD, RETIRING, BlockPool


def ids(*blocks: int) -> np.ndarray:
    return np.array(blocks, np.int32)


def digests(*blocks: int) -> list[bytes]:
    """Any, another one for each."""
    return [block.to_bytes(16, "big") for block in blocks]


def counts(pool: BlockPool) -> tuple[int, int, int, int]:
    pool.check_invariants()
    assert np.bincount(pool.states(), minlength=4).tolist() == [
        pool.num_free,
        pool.num_held,
        pool.num_retiring,
        pool.num_cached,
    ]
    assert pool.num_available == pool.num_free + pool.num_cached
    return pool.num_free, pool.num_held, pool.num_retiring, pool.num_cached


def pool_of_tables(num_blocks: int, *tables: tuple[int, ...]) -> BlockPool:
    """Everything is taken, and the blocks of these tables are published."""
    pool = BlockPool(num_blocks)
    pool.allocate(num_blocks)
    for table in tables:
        pool.index.publish(ids(*table), digests(*table))
    return pool


def cached_pool(num_blocks: int, *tables: tuple[int, ...]) -> BlockPool:
    """These tables were published and released, one after the other; everything else is held."""
    pool = pool_of_tables(num_blocks, *tables)
    for table in tables:
        pool.release(ids(*table), 0, 0)
    return pool


def evicted(pool: BlockPool) -> list[int]:
    """The cached blocks, in the order in which they are given out when nothing is free."""
    assert pool.num_free == 0
    order = [int(pool.allocate(1)[0]) for _ in range(pool.num_cached)]
    assert counts(pool)[3] == 0
    return order


# ----------------------------------------------------------------------------------------------------- allocation


def test_blocks_are_given_out_from_one_upwards_and_never_block_zero() -> None:
    pool = BlockPool(4)
    assert pool.allocate(4).tolist() == [1, 2, 3, 4]
    assert counts(pool) == (0, 4, 0, 0)


def test_allocating_nothing_gives_nothing() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(0)
    assert blocks.tolist() == [] and blocks.dtype == np.int32 and pool.num_free == 1


def test_blocks_are_int32_as_on_the_wire() -> None:
    assert BlockPool(3).allocate(2).dtype == np.int32


def test_a_pool_may_be_empty() -> None:
    pool = BlockPool(0)
    assert counts(pool) == (0, 0, 0, 0) and pool.num_available == 0
    assert pool.allocate(0).tolist() == [] and pool.states().tolist() == []
    pool.release(ids(), 3, 1)
    pool.returned(5)


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


@pytest.mark.parametrize("window", [1, 2, 4, 1000])
def test_a_pool_larger_than_the_scan_window_gives_every_block_once(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_pool, "_LEAST_WINDOW", window)
    pool = BlockPool(11)
    assert pool.allocate(3).tolist() == [1, 2, 3]
    assert pool.allocate(8).tolist() == list(range(4, 12))
    pool.release(ids(2, 11), 0, 0)
    assert pool.allocate(1).tolist() == [2]
    assert pool.allocate(1).tolist() == [11]
    pool.release(ids(2, 4, 11), 0, 0)
    assert pool.allocate(3).tolist() == [2, 4, 11]
    assert counts(pool) == (0, 11, 0, 0)


def test_more_than_is_available_is_our_mistake() -> None:
    pool = BlockPool(3)
    pool.allocate(2)
    with pytest.raises(AssertionError, match="2 blocks asked, 1 available"):
        pool.allocate(2)


# --------------------------------------------------------------------------------------------- release and retiring


def test_a_block_is_free_at_once_when_its_last_plan_has_returned() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    pool.release(blocks, last_step=3, returned_step=3)
    assert counts(pool) == (2, 0, 0, 0)


def test_a_block_retires_until_the_last_plan_naming_it_returns() -> None:
    pool = BlockPool(3)
    first, second = pool.allocate(1), pool.allocate(1)
    pool.release(first, last_step=4, returned_step=3)
    pool.release(second, last_step=5, returned_step=3)
    assert counts(pool) == (1, 0, 2, 0)
    assert pool.states().tolist() == [RETIRING, RETIRING, FREE]
    pool.returned(3)
    assert counts(pool) == (1, 0, 2, 0)
    pool.returned(4)
    assert counts(pool) == (2, 0, 1, 0)
    pool.returned(4)
    assert counts(pool) == (2, 0, 1, 0)
    pool.returned(6)
    assert counts(pool) == (3, 0, 0, 0)


def test_of_what_has_retired_nothing_is_left() -> None:
    pool = BlockPool(4)
    for step in range(1, 100):
        pool.release(pool.allocate(3), last_step=step, returned_step=step - 1)
        pool.returned(step)
    assert not pool._retiring and counts(pool) == (4, 0, 0, 0)


def test_a_retiring_block_is_not_given_out() -> None:
    pool = BlockPool(3)
    pool.release(pool.allocate(3)[:2], last_step=1, returned_step=0)
    assert pool.num_available == 0
    pool.returned(1)
    assert pool.allocate(2).tolist() == [1, 2]


def test_a_shared_block_stays_held_until_its_last_reference_goes() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.share(blocks)
    assert pool.ref_counts.tolist() == [0, 2, 0] and pool.num_shared == 1
    pool.release(blocks, last_step=9, returned_step=0)
    assert counts(pool) == (1, 1, 0, 0) and pool.num_shared == 0
    pool.release(blocks, last_step=9, returned_step=0)
    assert counts(pool) == (1, 0, 1, 0)


def test_only_those_blocks_of_a_table_become_free_that_nobody_else_holds() -> None:
    pool = BlockPool(4)
    pool.share(pool.allocate(4)[1:3])
    pool.release(ids(1, 2, 3, 4), 0, 0)
    assert pool.states().tolist() == [FREE, HELD, HELD, FREE]


def test_a_block_retires_until_the_plans_of_all_its_holders_have_returned() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    pool.share(blocks[:1])
    pool.release(blocks, last_step=5, returned_step=3)
    pool.release(blocks[:1], last_step=3, returned_step=3)
    assert pool.states().tolist() == [RETIRING, RETIRING], "plan 5 names it, for the one that left first"
    pool.returned(4)
    assert counts(pool) == (0, 0, 2, 0)
    pool.returned(5)
    assert counts(pool) == (2, 0, 0, 0)


def test_blocks_of_one_table_may_retire_at_different_steps() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(4)
    for last_step, some in ((6, blocks[:2]), (5, blocks[1:3])):
        pool.share(some)
        pool.release(some, last_step, 4)
    pool.release(blocks, last_step=4, returned_step=4)
    assert pool.states().tolist() == [RETIRING, RETIRING, RETIRING, FREE]
    pool.returned(5)
    assert pool.states().tolist() == [RETIRING, RETIRING, FREE, FREE]
    pool.returned(6)
    assert counts(pool) == (4, 0, 0, 0)


def test_releasing_more_often_than_taking_is_our_mistake() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.release(blocks, 0, 0)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(blocks, 0, 0)


# ------------------------------------------------------------------------------------------------ cached and shared


def test_published_blocks_are_cached_and_the_others_free() -> None:
    pool = pool_of_tables(4, (1, 2))
    pool.release(ids(1, 2, 3), 0, 0)
    assert pool.states().tolist() == [CACHED, CACHED, FREE, HELD]
    assert counts(pool) == (1, 1, 0, 2) and pool.num_available == 3


def test_a_retiring_block_is_cached_when_its_plan_returns() -> None:
    pool = pool_of_tables(2, (1,))
    pool.release(ids(1, 2), last_step=1, returned_step=0)
    assert counts(pool) == (0, 0, 2, 0)
    pool.returned(1)
    assert pool.states().tolist() == [CACHED, FREE]


def test_free_blocks_go_before_cached_ones() -> None:
    pool = cached_pool(4, (1, 2))
    pool.release(ids(3, 4), 0, 0)
    assert pool.allocate(2).tolist() == [3, 4]
    assert len(pool.index) == 2
    assert pool.allocate(1).tolist() == [2]


def test_no_more_is_evicted_than_is_missing() -> None:
    pool = cached_pool(5, (1, 2, 3))
    pool.release(ids(4), 0, 0)
    assert pool.allocate(2).tolist() == [3, 4]
    assert counts(pool) == (0, 3, 0, 2) and len(pool.index) == 2
    assert pool.index.lookup(b"".join(digests(1, 2, 3)), 3).tolist() == [1, 2]


def test_of_one_table_the_last_block_is_evicted_first() -> None:
    assert evicted(cached_pool(5, (2, 5, 1, 4))) == [4, 1, 5, 2]


def test_the_least_recently_released_table_is_evicted_first() -> None:
    assert evicted(cached_pool(6, (4, 1), (3, 2), (5, 6))) == [1, 4, 2, 3, 6, 5]


def test_a_shared_prefix_outlives_both_tails() -> None:
    pool = pool_of_tables(6, (1, 2, 3), (4, 5))
    pool.share(ids(1, 2))  # tables 1 2 3 and 1 2 4 5
    pool.release(ids(1, 2, 3), 0, 0)
    pool.release(ids(1, 2, 4, 5), 0, 0)
    assert evicted(pool) == [3, 5, 4, 2, 1]


def test_of_blocks_that_retired_the_first_to_become_available_is_evicted_first() -> None:
    pool = pool_of_tables(6, (1, 2), (3, 4), (5, 6))
    pool.release(ids(1, 2), last_step=6, returned_step=4)
    pool.release(ids(3, 4), last_step=5, returned_step=4)
    pool.release(ids(5, 6), last_step=4, returned_step=4)
    pool.returned(5)
    pool.returned(6)
    assert evicted(pool) == [6, 5, 4, 3, 2, 1]


def test_many_steps_that_return_at_once_are_as_if_one_by_one() -> None:
    pool = pool_of_tables(6, (1, 2), (3, 4), (5, 6))
    pool.release(ids(1, 2), last_step=6, returned_step=4)
    pool.release(ids(3, 4), last_step=5, returned_step=4)
    pool.release(ids(5, 6), last_step=5, returned_step=4)
    pool.returned(9)
    assert evicted(pool) == [4, 3, 6, 5, 2, 1]


def test_a_hit_makes_a_cached_block_held_again() -> None:
    pool = cached_pool(3, (1, 2, 3))
    assert pool.num_cached_of(ids(1, 2)) == 2
    pool.share(ids(1, 2))
    assert pool.states().tolist() == [HELD, HELD, CACHED] and pool.ref_counts.tolist() == [0, 1, 1, 0]
    assert counts(pool) == (0, 2, 0, 1) and pool.num_cached_of(ids(1, 2, 3)) == 1


def test_a_block_hit_in_between_is_evicted_as_late_as_it_was_released_last() -> None:
    pool = cached_pool(4, (1, 2), (3, 4))
    pool.share(ids(1, 2))
    pool.release(ids(1, 2), 0, 0)
    assert evicted(pool) == [4, 3, 2, 1]


def test_a_hit_on_a_retiring_block_ends_its_retirement() -> None:
    pool = pool_of_tables(2, (1, 2))
    pool.release(ids(1, 2), last_step=1, returned_step=0)
    assert pool.num_cached_of(ids(1, 2)) == 0, "not available now, so nothing is lost"
    pool.share(ids(1))
    assert counts(pool) == (0, 1, 1, 0)
    pool.returned(1)
    assert pool.states().tolist() == [HELD, CACHED] and pool.ref_counts.tolist() == [0, 1, 0]
    pool.release(ids(1), last_step=2, returned_step=1)
    assert pool.states().tolist() == [RETIRING, CACHED]
    pool.returned(2)
    assert evicted(pool) == [2, 1]


def test_a_block_that_retires_twice_for_the_same_step_is_counted_once() -> None:
    pool = pool_of_tables(3, (1, 2, 3))
    pool.release(ids(1, 2), last_step=1, returned_step=0)
    pool.share(ids(1))
    pool.release(ids(1), last_step=1, returned_step=0)
    pool.release(ids(3), last_step=1, returned_step=0)
    assert counts(pool) == (0, 0, 3, 0)
    pool.returned(1)
    assert counts(pool) == (0, 0, 0, 3)
    assert evicted(pool) == [2, 1, 3], "by the last release"


def test_a_hit_on_a_retiring_block_still_waits_for_the_plan_that_named_it() -> None:
    pool = pool_of_tables(1, (1,))
    pool.release(ids(1), last_step=7, returned_step=5)
    pool.share(ids(1))
    pool.release(ids(1), last_step=-1, returned_step=5)
    assert pool.states().tolist() == [RETIRING], "its second holder was in no plan, but plan 7 is in flight"
    pool.returned(7)
    assert pool.states().tolist() == [CACHED]


def test_eviction_skips_what_was_hit_since() -> None:
    pool = cached_pool(6, (1, 2, 3, 4, 5, 6))
    pool.share(ids(1, 3, 5))
    pool.release(ids(3), 0, 0)
    assert evicted(pool) == [6, 4, 2, 3]


def test_an_evicted_block_is_no_longer_found() -> None:
    pool = cached_pool(3, (1, 2, 3))
    pool.allocate(2)
    assert pool.index.lookup(b"".join(digests(1, 2, 3)), 3).tolist() == [1]
    pool.index.publish(ids(3), digests(2))
    assert pool.index.lookup(b"".join(digests(1, 2)), 3).tolist() == [1, 3]
    pool.check_invariants()


def test_a_hit_block_loses_its_entry_only_when_evicted() -> None:
    pool = cached_pool(2, (1, 2))
    pool.share(ids(1, 2))
    assert len(pool.index) == 2
    pool.release(ids(1, 2), 0, 0)
    assert counts(pool) == (0, 0, 0, 2)


@pytest.mark.parametrize("block", [0, 2])
def test_sharing_a_free_block_is_our_mistake(block: int) -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="holds nothing to share"):
        pool.share(ids(1, block))


def test_sharing_nothing_changes_nothing() -> None:
    pool = BlockPool(2)
    pool.share(ids())
    assert counts(pool) == (2, 0, 0, 0) and pool.num_cached_of(ids()) == 0


def test_many_hits_leave_no_trace_in_the_order() -> None:
    pool = cached_pool(8, (1, 2, 3), (4, 5), (6, 7, 8))
    for _ in range(50):
        pool.share(ids(4, 5))
        pool.release(ids(4, 5), 0, 0)
        assert counts(pool) == (0, 0, 0, 8)
    assert evicted(pool) == [3, 2, 1, 8, 7, 6, 5, 4]


def test_the_log_stays_in_its_bounds_and_keeps_the_order() -> None:
    """Against a plain list, through many compactions."""
    rng = np.random.default_rng(0)
    pool = cached_pool(20, tuple(range(1, 21)))
    order = list(range(20, 0, -1))
    for _ in range(300):
        some = rng.permutation(20)[: rng.integers(1, 8)].astype(np.int32) + 1
        pool.share(some)
        pool.release(some, 0, 0)
        order = [block for block in order if block not in some] + some[::-1].tolist()
    assert evicted(pool) == order


def test_some_blocks_are_evicted_ahead_in_a_large_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_pool, "_EVICTED_AHEAD", 4)
    pool = cached_pool(8, (1, 2, 3, 4, 5))
    assert pool.allocate(1).tolist() == [4]
    assert counts(pool) == (1, 4, 0, 3) and pool.states()[4] == FREE
    assert pool.allocate(1).tolist() == [5]
    assert counts(pool) == (0, 5, 0, 3)
    assert pool.allocate(3).tolist() == [1, 2, 3]


def test_no_more_is_evicted_ahead_than_is_cached_or_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_pool, "_EVICTED_AHEAD", 1)
    pool = cached_pool(8, (1, 2, 3))
    pool.allocate(1)
    assert counts(pool) == (2, 6, 0, 0)
    monkeypatch.setattr(block_pool, "_MOST_AHEAD", 2)
    pool = cached_pool(8, (1, 2, 3))
    pool.allocate(1)
    assert counts(pool) == (1, 6, 0, 1)


# ------------------------------------------------------------------------------------------------------ invariants


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda pool: pool.ref_counts.__setitem__(0, 1), "block 0"),
        (lambda pool: pool._states.__setitem__(0, FREE), "block 0"),
        (lambda pool: pool._states.__setitem__(1, FREE), "references"),
        (lambda pool: pool.ref_counts.__setitem__(1, 0), "references"),
        (lambda pool: pool.ref_counts.__setitem__(5, 1), "references"),
        (lambda pool: pool.ref_counts.__setitem__(6, -1), "references"),
        (lambda pool: setattr(pool, "num_free", 2), "free blocks are miscounted"),
        (lambda pool: setattr(pool, "num_cached", 1), "cached blocks are miscounted"),
        (lambda pool: setattr(pool, "num_retiring", 2), "retiring blocks are miscounted"),
        (lambda pool: pool.index.publish(ids(6), digests(6)), "a free block is published"),
        (lambda pool: pool.index.forget(np.array([4])), "a cached block is not published"),
        (lambda pool: setattr(pool, "_log_start", 1), "not in the log"),
        (lambda pool: pool._entry.__setitem__(3, 7), "not in the log"),
        (lambda pool: pool._retiring.clear(), "a retiring block is forgotten"),
        (lambda pool: pool._retiring.append(pool._retiring[0]), "a retiring block is forgotten"),
        (lambda pool: pool.index._block_of.clear(), "digests and blocks"),
    ],
)
def test_every_way_to_lose_a_block_is_noticed(spoil, message: str) -> None:
    pool = BlockPool(6)  # 1 2 held, 3 4 cached, 5 retiring, 6 free
    pool.index.publish(pool.allocate(5)[2:4], digests(3, 4))
    pool.release(ids(3, 4), 0, 0)
    pool.release(ids(5), last_step=1, returned_step=0)
    assert counts(pool) == (1, 2, 1, 2)
    spoil(pool)
    with pytest.raises(AssertionError, match=message):
        pool.check_invariants()
