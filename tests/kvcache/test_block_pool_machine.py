"""Block pool and tables against a naive model: any order of starting, growing, ending, planning and returning."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcache.manager import KVCacheManager

SLOTS = 6


class BlockPoolMachine(RuleBasedStateMachine):
    """The model holds plain lists and sets: tables per slot, who is free, and until which step a freed block is named."""

    @initialize(num_blocks=st.integers(1, 24), block_size=st.integers(1, 5))
    def set_up(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.cache = KVCacheManager(num_blocks, block_size, SLOTS)
        self.free = set(range(1, num_blocks + 1))
        self.tables: dict[int, list[int]] = {}
        self.last_step: dict[int, int] = {}  # of each slot: the last plan that names it
        self.retiring: dict[int, int] = {}  # block -> last step that names it
        self.cursor = 1
        self.next_step = 0
        self.returned = -1

    def take(self, count: int) -> list[int]:
        """Next fit, one block at a time."""
        taken: list[int] = []
        while len(taken) < count:
            if self.cursor in self.free:
                self.free.remove(self.cursor)
                taken.append(self.cursor)
            self.cursor = self.cursor % self.num_blocks + 1
        return taken

    @rule(slot=st.integers(0, SLOTS - 1), num_tokens=st.integers(1, 40))
    def start(self, slot: int, num_tokens: int) -> None:
        need = -(-num_tokens // self.block_size)
        if slot in self.tables or need > len(self.free):
            return
        self.tables[slot] = self.take(need)
        self.last_step[slot] = self.next_step - 1
        assert self.cache.start(slot, num_tokens).tolist() == self.tables[slot]

    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        some = data.draw(st.lists(st.sampled_from(sorted(self.tables)), unique=True) if self.tables else st.just([]))
        some = some[: len(self.free)]
        blocks = self.take(len(some))
        for slot, block in zip(some, blocks, strict=True):
            self.tables[slot].append(block)
        assert self.cache.grow(np.array(some, np.intp)).tolist() == blocks

    @precondition(lambda self: self.next_step - self.returned - 1 < 2)
    @rule(data=st.data())
    def plan(self, data: st.DataObject) -> None:
        for slot in self.tables:
            if data.draw(st.booleans()):
                self.last_step[slot] = self.next_step
        self.next_step += 1

    @precondition(lambda self: self.returned < self.next_step - 1)
    @rule()
    def step_returns(self) -> None:
        self.returned += 1
        self.cache.pool.returned(self.returned)
        due = {block for block, last in self.retiring.items() if last <= self.returned}
        self.free |= due
        self.retiring = {block: last for block, last in self.retiring.items() if block not in due}

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.tables)))
        last = self.last_step.pop(slot)
        blocks = self.tables.pop(slot)
        self.cache.release(slot, last, self.returned)
        if last <= self.returned:
            self.free |= set(blocks)
        else:
            self.retiring |= dict.fromkeys(blocks, last)

    @rule(slot=st.integers(0, SLOTS - 1), computed=st.integers(0, 60))
    def full_tells_whether_the_next_token_has_a_place(self, slot: int, computed: int) -> None:
        blocks = len(self.tables.get(slot, []))
        expected = computed // self.block_size >= blocks
        assert self.cache.full(np.array([slot]), np.array([computed], np.int32)).tolist() == [expected]

    @invariant()
    def agrees_with_the_model(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check_invariants()
        pool = self.cache.pool
        assert set(np.flatnonzero(pool._is_free).tolist()) == self.free
        assert set(np.flatnonzero(pool.ref_counts).tolist()) == {block for table in self.tables.values() for block in table}
        assert (pool.num_free, pool.num_retiring) == (len(self.free), len(self.retiring))
        assert pool.num_held == sum(map(len, self.tables.values()))
        for slot in range(SLOTS):
            assert self.cache.tables.row(slot).tolist() == self.tables.get(slot, [])


class LongBlockPoolMachine(BlockPoolMachine):
    pass


TestBlockPool = BlockPoolMachine.TestCase
TestBlockPool.settings = settings(max_examples=300, stateful_step_count=40, deadline=None, derandomize=True, database=None)
TestBlockPoolForLong = pytest.mark.slow(LongBlockPoolMachine.TestCase)
TestBlockPoolForLong.settings = settings(
    max_examples=800, stateful_step_count=80, deadline=None, database=None, print_blob=True
)
