"""The KV cache's manager: tokens to blocks, sharing and copying, and the agreement of pool and tables."""

from __future__ import annotations

import numpy as np
import pytest

from kvcache.manager import KVCacheManager
from kvcache.prefix_index import hash_blocks, root


def slots(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.intp)


def ids(*blocks: int) -> np.ndarray:
    return np.array(blocks, np.int32)


def digests(*blocks: int) -> list[bytes]:
    return [block.to_bytes(16, "big") for block in blocks]


def rows(cache: KVCacheManager) -> list[list[int]]:
    cache.check_invariants()
    return [cache.tables.row(slot).tolist() for slot in range(len(cache.tables.num_blocks))]


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (160, 10), (161, 11)])
def test_blocks_for_rounds_up(tokens: int, blocks: int) -> None:
    assert KVCacheManager(1, 16, 1).blocks_for(tokens) == blocks


def test_start_gives_blocks_for_all_tokens_and_no_more() -> None:
    cache = KVCacheManager(10, 4, 2)
    assert cache.cost(9) == 3
    cache.start(1, 9)
    assert rows(cache) == [[], [1, 2, 3]] and cache.pool.num_free == 7


def test_a_slot_is_full_when_its_next_token_has_no_place() -> None:
    cache = KVCacheManager(10, 4, 3)
    cache.start(0, 4)
    cache.start(1, 4)
    cache.start(2, 5)
    computed = np.array([3, 4, 4], np.int32)
    assert cache.full(slots(0, 1, 2), computed).tolist() == [False, True, False]
    assert cache.full(slots(2, 1), np.array([8, 3], np.int32)).tolist() == [True, False]


def test_grow_appends_one_block_to_each() -> None:
    cache = KVCacheManager(10, 4, 3)
    cache.start(0, 4)
    cache.start(2, 8)
    assert cache.grow(slots(2, 0)).tolist() == [4, 5]
    assert rows(cache) == [[1, 5], [], [2, 3, 4]]


def test_release_gives_all_back_once_the_last_plan_has_returned() -> None:
    cache = KVCacheManager(4, 4, 2)
    cache.start(0, 8)
    cache.release(0, last_step=5, returned_step=4)
    assert (cache.pool.num_free, cache.pool.num_retiring) == (2, 2)
    assert rows(cache) == [[], []]
    cache.pool.returned(5)
    assert cache.pool.num_free == 4


# --------------------------------------------------------------------------------------------------------- sharing


def test_the_next_request_with_the_same_prompt_starts_on_its_blocks() -> None:
    cache = KVCacheManager(10, 4, 2)
    hashes = hash_blocks(root("m"), np.arange(12, dtype=np.int32), 4)
    cache.start(0, 12)
    cache.publish(cache.tables.row(0), [hashes[:16], hashes[16:32], hashes[32:]])
    found = cache.lookup(hashes, most_blocks=2)
    assert found.tolist() == [1, 2] and cache.cost(13, found) == 2
    cache.start(1, 13, found)
    assert rows(cache) == [[1, 2, 3], [1, 2, 4, 5]]
    assert cache.pool.num_held == 5 and cache.pool.num_shared == 2
    cache.release(0, 0, 0)
    assert rows(cache) == [[], [1, 2, 4, 5]] and cache.pool.num_cached == 1


def test_a_cached_block_costs_as_much_as_a_fresh_one() -> None:
    cache = KVCacheManager(4, 4, 2)
    cache.start(0, 12)
    cache.publish(ids(1, 2), digests(1, 2))
    cache.release(0, 0, 0)
    assert cache.pool.num_available == 4
    assert cache.cost(12, ids(1, 2)) == 3 == cache.cost(12)
    cache.start(1, 12, ids(1, 2))
    assert cache.pool.num_available == 1


def test_a_held_or_retiring_block_costs_nothing() -> None:
    cache = KVCacheManager(6, 4, 3)
    cache.start(0, 8)
    cache.publish(ids(1, 2), digests(1, 2))
    assert cache.cost(12, ids(1, 2)) == 1
    cache.release(0, last_step=3, returned_step=2)
    assert cache.pool.num_available == 4 and cache.cost(12, ids(1, 2)) == 1
    cache.start(1, 12, ids(1, 2))
    assert cache.pool.num_available == 3


def test_what_is_shared_is_not_evicted_for_the_rest_of_the_table() -> None:
    cache = KVCacheManager(4, 4, 2)
    cache.start(0, 16)
    cache.publish(ids(1, 2, 3, 4), digests(1, 2, 3, 4))
    cache.release(0, 0, 0)
    cache.start(1, 16, ids(3, 4))
    assert rows(cache) == [[], [3, 4, 1, 2]]
    assert cache.lookup(b"".join(digests(3, 4)), 2).tolist() == [3, 4] and len(cache.pool.index) == 2


def test_a_copy_on_write_replaces_one_block_of_one_table() -> None:
    cache = KVCacheManager(5, 4, 2)
    cache.start(0, 7)
    assert cache.cost(7, ids(1, 2), True) == 1
    cache.start(1, 7, ids(1, 2))
    assert cache.copy_on_write(1, 1, last_step=3, returned_step=1) == (2, 3)
    assert rows(cache) == [[1, 2], [1, 3]]
    assert cache.pool.ref_counts.tolist() == [0, 2, 1, 1, 0, 0] and cache.pool.num_available == 2


def test_a_block_that_is_copied_stays_until_the_plan_that_copies_it_has_returned() -> None:
    cache = KVCacheManager(3, 4, 2)
    cache.start(0, 3)
    cache.start(1, 3, ids(1))
    cache.copy_on_write(1, 0, last_step=3, returned_step=1)
    cache.release(0, last_step=1, returned_step=1)
    assert rows(cache) == [[], [2]] and cache.pool.num_retiring == 1
    cache.pool.returned(3)
    assert cache.pool.num_retiring == 0 and cache.pool.num_free == 2


def test_eight_outputs_hold_the_prompt_once() -> None:
    """1,000 tokens are 62 full blocks and 8 tokens; each sibling copies the last block and no other."""
    cache = KVCacheManager(200, 16, 8)
    cache.start(0, 1000)
    for slot in range(1, 8):
        shared = cache.tables.row(0).copy()
        assert cache.cost(1000, shared, True) == 1
        cache.start(slot, 1000, shared)
        cache.copy_on_write(slot, 62, last_step=0, returned_step=-1)
    assert cache.pool.num_held == 63 + 7 and cache.pool.num_shared == 62
    assert all(row[:62] == list(range(1, 63)) for row in rows(cache))
    assert len({row[62] for row in rows(cache)}) == 8
    for slot in range(8):
        cache.release(slot, 0, 0)
    assert rows(cache) == [[]] * 8 and cache.pool.num_free == 200


def test_publishing_a_block_that_nobody_holds_is_our_mistake() -> None:
    cache = KVCacheManager(3, 4, 2)
    cache.start(0, 4)
    with pytest.raises(AssertionError, match="nobody holds"):
        cache.publish(ids(1, 2), digests(1, 2))


# ------------------------------------------------------------------------------------------------------ host blocks


def test_host_blocks_are_counted_apart() -> None:
    cache = KVCacheManager(3, 4, 2, num_host_blocks=2)
    cache.start(0, 12)
    assert cache.host.allocate(2).tolist() == [1, 2] and cache.host.num_available == 0
    cache.host.release(ids(1, 2), last_step=4, returned_step=3)
    assert cache.host.num_retiring == 2
    cache.host.returned(4)
    assert cache.host.num_available == 2 and cache.pool.num_held == 3
    cache.check_invariants()


def test_without_host_blocks_none_is_available() -> None:
    cache = KVCacheManager(3, 4, 2)
    assert cache.host.num_available == cache.host.num_blocks == 0
    cache.check_invariants()


# ------------------------------------------------------------------------------------------------------- invariants


def test_a_table_that_disagrees_with_the_reference_counts_is_noticed() -> None:
    cache = KVCacheManager(4, 4, 2)
    cache.start(0, 8)
    cache.tables.ids[0, 1] = 1
    with pytest.raises(AssertionError, match="reference counts differ"):
        cache.check_invariants()


@pytest.mark.parametrize("part", ["pool", "host"])
def test_a_miscounted_pool_is_noticed(part: str) -> None:
    cache = KVCacheManager(4, 4, 2, num_host_blocks=2)
    getattr(cache, part).num_free -= 1
    with pytest.raises(AssertionError, match="miscounted"):
        cache.check_invariants()
