"""The KV cache's manager: tokens to blocks, and the agreement of pool and tables."""

from __future__ import annotations

import numpy as np
import pytest

from kvcache.manager import KVCacheManager


def slots(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.intp)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (160, 10), (161, 11)])
def test_blocks_for_rounds_up(tokens: int, blocks: int) -> None:
    assert KVCacheManager(1, 16, 1).blocks_for(tokens) == blocks


def test_start_gives_blocks_for_all_tokens_and_no_more() -> None:
    cache = KVCacheManager(10, 4, 2)
    assert cache.start(1, 9).tolist() == [1, 2, 3]
    assert cache.tables.row(1).tolist() == [1, 2, 3] and cache.pool.num_free == 7


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
    assert cache.tables.row(0).tolist() == [1, 5] and cache.tables.row(2).tolist() == [2, 3, 4]
    cache.check_invariants()


def test_release_gives_all_back_once_the_last_plan_has_returned() -> None:
    cache = KVCacheManager(4, 4, 2)
    cache.start(0, 8)
    cache.release(0, last_step=5, returned_step=4)
    assert (cache.pool.num_free, cache.pool.num_retiring) == (2, 2)
    assert cache.tables.row(0).tolist() == []
    cache.check_invariants()
    cache.pool.returned(5)
    assert cache.pool.num_free == 4


def test_a_table_that_disagrees_with_the_reference_counts_is_noticed() -> None:
    cache = KVCacheManager(4, 4, 2)
    cache.start(0, 8)
    cache.tables.ids[0, 1] = 1
    with pytest.raises(AssertionError, match="reference counts differ"):
        cache.check_invariants()
