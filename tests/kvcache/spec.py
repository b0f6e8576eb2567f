"""The rules of the KV cache's blocks as a program: slow, one block at a time, with nothing counted that can be derived.

A `World` is a block pool with a few sequences on it and with what the device would hold in every block. What state a block is
in follows from three facts: which tables hold it, which plans in flight name it, which content the index has it under. `Pair`
does the same things to a world and to a real manager, and compares all that can be seen from outside.
"""

from __future__ import annotations

import pickle
from collections.abc import Hashable, Iterable, Iterator
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np

from kvcache.manager import KVCacheManager

FREE, HELD, RETIRING, CACHED = range(4)
DEPTH = 2  # plans in flight

Tokens = tuple[int, ...]
Action = tuple[str, tuple[Any, ...]]  # a method of Pair and its arguments


@lru_cache(100_000)
def digest(prefix: Tokens) -> bytes:
    """Stands for the hash of the block that ends here."""
    return blake2b(repr(prefix).encode(), digest_size=16).digest()


class World:
    """Sequences in slots, their tables, and the plans in flight. All sequences give the token 0 as their output."""

    def __init__(
        self, num_blocks: int, block_size: int, num_slots: int, prompts: Iterable[Tokens], longest: int, ahead: int = 0
    ):
        self.num_blocks, self.block_size, self.num_slots = num_blocks, block_size, num_slots
        self.prompts, self.longest = tuple(prompts), longest
        self.ahead = ahead  # blocks evicted at a time, if there are so many
        self.tables: dict[int, list[int]] = {}
        self.tokens: dict[int, Tokens] = {}  # of each slot: all that is known
        self.computed: dict[int, int] = {}
        self.published: dict[int, int] = {}  # of each slot: its first blocks that were offered to the index
        self.in_flight: list[frozenset[int]] = []  # blocks named by each plan in flight, the oldest first
        self.pending: frozenset[int] = frozenset()  # blocks that the next plan names already, as it copies some
        self.content: dict[int, Tokens] = {}  # of each block: the sequence up to the last token written there
        self.index: dict[Tokens, int] = {}
        self.unused: list[int] = []  # retiring blocks, in the order in which they were given back
        self.lru: list[int] = []  # cached blocks, in the order of eviction
        self.cursor = 1
        self.seen: set[str] = set()  # what has happened, for those who want to know that a test means something

    # ----------------------------------------------------------------------------------------------- what follows

    def references(self, block: int) -> int:
        return sum(table.count(block) for table in self.tables.values())

    def state(self, block: int) -> int:
        if self.references(block):
            return HELD
        if any(block in named for named in [*self.in_flight, self.pending]):
            return RETIRING
        return CACHED if block in self.index.values() else FREE

    def blocks(self, *states: int) -> list[int]:
        return [block for block in range(1, self.num_blocks + 1) if self.state(block) in states]

    @property
    def num_available(self) -> int:
        return len(self.blocks(FREE, CACHED))

    def lookup(self, tokens: Tokens) -> list[int]:
        """All but the last token at most: one is always computed."""
        found: list[int] = []
        for end in range(self.block_size, len(tokens), self.block_size):
            if tokens[:end] not in self.index:
                break
            found.append(self.index[tokens[:end]])
        return found

    def cost(self, num_tokens: int, shared: list[int], copies_last: bool = False) -> int:
        fresh = -(-num_tokens // self.block_size) - len(shared)
        return fresh + copies_last + sum(self.state(block) == CACHED for block in shared)

    # ------------------------------------------------------------------------------------------------------ verbs

    def take(self) -> int:
        """One block: free ones round and round, evicting only when there are none."""
        while self.state(self.cursor) != FREE:
            self.cursor = self.cursor % self.num_blocks + 1
        block, self.cursor = self.cursor, self.cursor % self.num_blocks + 1
        self.content.pop(block, None)
        return block

    def make_room(self, count: int) -> None:
        missing = count - len(self.blocks(FREE))
        if missing > 0:
            self.seen.add("evicted")
            for block in self.lru[: max(missing, self.ahead)]:
                self.lru.remove(block)
                self.index = {prefix: other for prefix, other in self.index.items() if other != block}

    def start(self, slot: int, tokens: Tokens, shared: list[int], num_computed: int) -> None:
        self.seen |= {("", "shared held", "hit retiring", "hit cached")[self.state(block)] for block in shared}
        self.unused = [block for block in self.unused if block not in shared]
        self.lru = [block for block in self.lru if block not in shared]
        self.tables[slot] = list(shared)
        count = -(-len(tokens) // self.block_size) - len(shared)
        self.make_room(count)
        for _ in range(count):
            self.tables[slot].append(self.take())
        self.tokens[slot], self.computed[slot], self.published[slot] = tokens, num_computed, num_computed // self.block_size

    def copy(self, slot: int) -> tuple[int, int]:
        """Another block for the last one of the table, with the same content."""
        self.make_room(1)
        old, new = self.tables[slot][-1], self.take()
        self.seen.add("copied")
        self.pending |= {old, new, *self.tables[slot]}
        self.content[new] = self.content[old][: self.computed[slot]]
        self.tables[slot][-1] = new
        self._given_back([old])
        return old, new

    def compute(self, slots: tuple[int, ...]) -> None:
        """A plan: the rest of each prompt, or one token each."""
        growing = [slot for slot in slots if self.computed[slot] == len(self.tables[slot]) * self.block_size]
        self.make_room(len(growing))
        for slot in growing:
            self.tables[slot].append(self.take())
        for slot in slots:
            self.read(slot)
        for slot in slots:
            if self.computed[slot] == len(self.tokens[slot]):
                self.tokens[slot] += (0,)
            while self.computed[slot] < len(self.tokens[slot]):
                self.write(slot)
        self.in_flight.append(self.pending.union(*(self.tables[slot] for slot in slots)))
        self.pending = frozenset()

    def read(self, slot: int) -> None:
        """What has been computed of the sequence is in its blocks."""
        for start, block in zip(range(0, self.computed[slot], self.block_size), self.tables[slot], strict=False):
            end = min(start + self.block_size, self.computed[slot])
            assert self.content.get(block) == self.tokens[slot][:end], f"block {block} of slot {slot} holds something else"

    def write(self, slot: int) -> None:
        at = self.computed[slot]
        block = self.tables[slot][at // self.block_size]
        assert self.references(block) == 1, f"slot {slot} writes to block {block}, which others hold"
        assert block not in self.index.values(), f"slot {slot} writes to block {block}, which others may find"
        self.content[block] = self.tokens[slot][: at + 1]
        self.computed[slot] += 1

    def publish(self, slot: int) -> list[int]:
        """The blocks that have become full, each offered once."""
        offered = self.tables[slot][self.published[slot] : self.computed[slot] // self.block_size]
        for block in offered:
            if self.index.setdefault(self.content[block], block) != block:
                self.seen.add("duplicate")
        self.published[slot] += len(offered)
        return offered

    def release(self, slot: int) -> None:
        del self.tokens[slot], self.computed[slot], self.published[slot]
        self._given_back(self.tables.pop(slot))

    def step_returns(self) -> None:
        del self.in_flight[0]
        self._settle()

    def _given_back(self, table: list[int]) -> None:
        self.unused += [block for block in reversed(table) if not self.references(block)]
        self._settle()

    def _settle(self) -> None:
        """What nobody names any more is available, and cached if it can be found."""
        self.lru += [block for block in self.unused if self.state(block) == CACHED]
        self.unused = [block for block in self.unused if self.state(block) == RETIRING]

    # ------------------------------------------------------------------------------------------------------- laws

    def check(self) -> None:
        assert sorted(self.lru) == self.blocks(CACHED)
        assert sorted(self.unused) == self.blocks(RETIRING)
        assert len(set(self.index.values())) == len(self.index)
        for prefix, block in self.index.items():
            assert self.content[block] == prefix, f"block {block} is found under what it does not hold"
        for table in self.tables.values():
            assert len(set(table)) == len(table)

    def key(self) -> Hashable:
        """Equal for worlds with the same future."""
        return (
            tuple(sorted((slot, tuple(table), self.tokens[slot], self.computed[slot]) for slot, table in self.tables.items())),
            tuple(self.in_flight),
            self.pending,
            tuple(sorted((block, content) for block, content in self.content.items() if self.state(block) != FREE)),
            tuple(sorted(self.index.items())),
            tuple(self.unused),
            tuple(self.lru),
            self.cursor,
        )


class Pair:
    """A world and a real manager that do the same."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.real = KVCacheManager(world.num_blocks, world.block_size, world.num_slots)
        self.done: list[Action] = []
        self.next_step = 0
        self.last_steps: dict[int, int] = {}  # of each slot: the last plan that names it

    @property
    def returned_step(self) -> int:
        return self.next_step - len(self.world.in_flight) - 1

    def actions(self) -> Iterator[Action]:
        """All that can be done now."""
        world = self.world
        empty = next((slot for slot in range(world.num_slots) if slot not in world.tables), None)
        if empty is not None:
            for number, prompt in enumerate(world.prompts):
                if world.cost(len(prompt), world.lookup(prompt)) <= world.num_available:
                    yield "start", (empty, number)
            for slot in sorted(world.tables):
                if world.computed[slot] > 1 and world.cost(*self._fork(slot)) <= world.num_available:
                    yield "fork", (empty, slot)
        for slot in sorted(world.tables):
            yield "release", (slot,)
        if world.in_flight:
            yield "step_returns", ()
        if len(world.in_flight) < DEPTH:
            ready = [slot for slot in sorted(world.tables) if world.computed[slot] < world.longest]
            for mask in range(1, 1 << len(ready)):
                some = tuple(slot for bit, slot in enumerate(ready) if mask >> bit & 1)
                if sum(self._is_full(slot) for slot in some) <= world.num_available:
                    yield "compute", (some,)

    def do(self, action: Action) -> None:
        self.done.append(action)
        name, arguments = action
        try:
            getattr(self, name)(*arguments)
            self.compare()
        except AssertionError as error:
            error.add_note(f"after {self.done}")
            raise

    def start(self, slot: int, number: int) -> None:
        prompt, size = self.world.prompts[number], self.world.block_size
        shared = self.world.lookup(prompt)
        cost, available = self.world.cost(len(prompt), shared), self.world.num_available
        self.world.start(slot, prompt, shared, len(shared) * size)
        digests = b"".join(digest(prompt[:end]) for end in range(size, len(prompt) + 1, size))
        found = self.real.lookup(digests, (len(prompt) - 1) // size)
        assert found.tolist() == shared
        assert self.real.cost(len(prompt), found) == cost
        self.real.start(slot, len(prompt), found)
        assert available - self.real.pool.num_available == cost, "the cost was another one"
        self.last_steps[slot] = -1

    def fork(self, slot: int, source: int) -> None:
        """A sibling of this one that computes its last token again, for another one to follow."""
        num_tokens, shared, copies_last = self._fork(source)
        cost, available = self.world.cost(num_tokens, shared, copies_last), self.world.num_available
        blocks = self.real.tables.row(source)[: len(shared)].copy()
        self.world.start(slot, self.world.tokens[source][:num_tokens], shared, num_tokens - 1)
        assert self.real.cost(num_tokens, blocks, copies_last) == cost
        self.real.start(slot, num_tokens, blocks)
        self.last_steps[slot] = -1
        if copies_last:
            copied = self.world.copy(slot)
            assert self.real.copy_on_write(slot, len(shared) - 1, self.next_step, self.returned_step) == copied
            self.last_steps[slot] = self.next_step
        assert available - self.real.pool.num_available == cost, "the cost was another one"

    def compute(self, slots: tuple[int, ...]) -> None:
        world, real = self.world, self.real
        full = [self._is_full(slot) for slot in slots]
        computed = np.array([world.computed[slot] for slot in slots], np.int32)
        world.compute(slots)
        at = np.array(slots, np.intp)
        assert real.full(at, computed).tolist() == full
        blocks = real.grow(at[np.array(full, np.bool_)])
        assert blocks.tolist() == [world.tables[slot][-1] for slot, grows in zip(slots, full, strict=True) if grows]
        offered = [block for slot in slots for block in world.publish(slot)]
        real.publish(np.array(offered, np.int32), [digest(world.content[block]) for block in offered])
        self.last_steps |= dict.fromkeys(slots, self.next_step)
        self.next_step += 1

    def release(self, slot: int) -> None:
        self.world.release(slot)
        self.real.release(slot, self.last_steps.pop(slot), self.returned_step)

    def step_returns(self) -> None:
        self.world.step_returns()
        self.real.pool.returned(self.returned_step)

    def all_return(self) -> None:
        """As after the loss of a worker: at once."""
        while self.world.in_flight:
            self.world.step_returns()
        self.real.pool.returned(self.returned_step)

    def compare(self) -> None:
        world, real, pool = self.world, self.real, self.real.pool
        world.check()
        real.check_invariants()
        blocks = range(1, world.num_blocks + 1)
        states = [world.state(block) for block in blocks]
        assert pool.states().tolist() == states
        assert [pool.num_free, pool.num_held, pool.num_retiring, pool.num_cached] == [states.count(state) for state in range(4)]
        assert pool.num_available == world.num_available
        references = [world.references(block) for block in blocks]
        assert pool.ref_counts.tolist() == [0, *references]
        assert pool.num_shared == sum(count > 1 for count in references)
        for slot in range(world.num_slots):
            assert real.tables.row(slot).tolist() == world.tables.get(slot, [])
        assert len(pool.index) == len(world.index)
        for prefix, block in world.index.items():
            assert real.lookup(digest(prefix), 1).tolist() == [block]

    def _fork(self, slot: int) -> tuple[int, list[int], bool]:
        """(tokens, shared blocks, whether the last one is copied) of a sibling of this sequence."""
        num_tokens = self.world.computed[slot]
        shared = self.world.tables[slot][: -(-(num_tokens - 1) // self.world.block_size)]
        return num_tokens, shared, (num_tokens - 1) % self.world.block_size != 0

    def _is_full(self, slot: int) -> bool:
        return self.world.computed[slot] == len(self.world.tables[slot]) * self.world.block_size


def explore(world: World, depth: int) -> tuple[int, int, set[str]]:
    """Every sequence of at most `depth` actions from here, each state once: (states, actions done, what happened in them).

    Two states are one when the world's future is the same, and the real log has as many void entries.
    """
    begin = Pair(world)
    level, known, num_actions, seen = [pickle.dumps(begin)], {world.key()}, 0, set[str]()
    for _ in range(depth):
        following = []
        for state in level:
            for action in list(pickle.loads(state).actions()):
                pair = pickle.loads(state)
                pair.do(action)
                num_actions += 1
                pool = pair.real.pool
                key = (pair.world.key(), pool._log_end - pool._log_start - pool.num_cached)
                if key not in known:
                    known.add(key)
                    following.append(pickle.dumps(pair))
                    seen |= pair.world.seen
        level = following
        if not level:
            break
    return len(known), num_actions, seen
