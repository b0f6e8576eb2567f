"""Pool, index, tables and manager against their specification, on random paths through worlds of all sizes."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from kvcache import block_pool
from tests.kvcache.spec import Pair, World


class KVCacheMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()

    @initialize(
        num_blocks=st.integers(1, 24),
        block_size=st.integers(1, 4),
        num_slots=st.integers(1, 5),
        prompts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12).map(tuple), min_size=1, max_size=6),
        ahead=st.sampled_from([2, 5, 1000]),
        window=st.sampled_from([1, 3, 1024]),
    )
    def set_up(self, num_blocks: int, block_size: int, num_slots: int, prompts: list, ahead: int, window: int) -> None:
        self.patch.setattr(block_pool, "_EVICTED_AHEAD", ahead)
        self.patch.setattr(block_pool, "_LEAST_WINDOW", window)
        self.pair = Pair(World(num_blocks, block_size, num_slots, prompts, longest=20, ahead=num_blocks // ahead))

    def teardown(self) -> None:
        self.patch.undo()

    @rule(data=st.data())
    def act(self, data: st.DataObject) -> None:
        actions = list(self.pair.actions())
        if actions:
            self.pair.do(data.draw(st.sampled_from(actions)))

    @precondition(lambda self: self.pair.world.in_flight)
    @rule()
    def all_steps_return(self) -> None:
        self.pair.do(("all_return", ()))


class LongKVCacheMachine(KVCacheMachine):
    pass


TestKVCache = KVCacheMachine.TestCase
TestKVCache.settings = settings(max_examples=100, stateful_step_count=50, deadline=None, derandomize=True, database=None)
TestKVCacheForLong = pytest.mark.slow(LongKVCacheMachine.TestCase)
TestKVCacheForLong.settings = settings(
    max_examples=1000, stateful_step_count=100, deadline=None, database=None, print_blob=True
)
