"""The blocks of the KV cache as numbers: who is free, held, cached, or given back but still named by a plan in flight.

Knows block ids, reference counts and the prefix index: no tokens, no requests, no tensors. Ids are 1..num_blocks; 0 is the dump
that padding rows write to and is never given out.
"""

from __future__ import annotations

from operator import itemgetter
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvcache.prefix_index import PrefixIndex
from wire.messages import I32, U8

Blocks: TypeAlias = NDArray[np.intp]  # block ids; numpy indexes with intp twice as fast as with the wire's int32

FREE, HELD, RETIRING, CACHED = range(4)

_LEAST_WINDOW = 1024  # blocks looked at in a scan for free ones; more when few are free
# One block in so many of the pool is evicted at a time, so that a full pool is scanned less often: loses 1 hit in 200 where the
# cache is far too small, else fewer. One in 16 would make the runs of consecutive blocks a third longer, for 1 hit in 10 to 50.
_EVICTED_AHEAD = 256
_MOST_AHEAD = 512  # and no more than so many, which takes about 0.2 ms


class BlockPool:
    """A fixed number of blocks with reference counts. At all times: free + cached + held + retiring == num_blocks.

    held: reference count above 0. retiring: count 0, but a plan in flight still names the block; it is available once that
    plan has returned (`returned`). cached: count 0 and published in the prefix index: available, but used only when nothing is
    free. A cached or retiring block that is shared again is held again.

    Cached blocks are evicted in the order in which they became available; of blocks released together the last of the table
    goes first, so that what stays are prefixes. The order is a log of block ids: an entry counts as long as its block is
    cached and says that this is its entry; what was shared since is skipped when its turn comes.

    Allocation scans forward from where it last stopped (next fit), so that blocks taken together are mostly consecutive.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self.num_cached = 0
        self.num_retiring = 0
        self.ref_counts: I32 = np.zeros(num_blocks + 1, np.int32)
        self.index = PrefixIndex(num_blocks)
        self._states: U8 = np.full(num_blocks + 1, FREE, np.uint8)
        self._states[0] = HELD
        self._cursor = 1
        self._last_step = np.full(num_blocks + 1, -1, np.int64)  # [block] whose plan names it, of all who released it
        self._entry = np.zeros(num_blocks + 1, np.int64)  # [block] its place in the log while cached, its number while retiring
        self._retiring: list[tuple[int, int, Blocks]] = []  # (last step that names them, number of this entry, blocks)
        self._next_entry = 0
        self._log = np.zeros(2 * num_blocks, np.intp)  # cached blocks, the next to be evicted first
        self._log_start = 0
        self._log_end = 0

    @property
    def num_available(self) -> int:
        """What can be allocated."""
        return self.num_free + self.num_cached

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_free - self.num_cached - self.num_retiring

    @property
    def num_shared(self) -> int:
        """Blocks with more than one reference."""
        return int(np.count_nonzero(self.ref_counts > 1))

    def allocate(self, count: int) -> I32:
        """`count` blocks, each with one reference. The caller has checked that num_available >= count."""
        assert 0 <= count <= self.num_available, f"{count} blocks asked, {self.num_available} available"
        if count > self.num_free:
            ahead = min(self.num_cached, self.num_blocks // _EVICTED_AHEAD, _MOST_AHEAD)
            self._evict(max(count - self.num_free, ahead))
        parts, missing, left = [], count, self.num_free
        window = self._states[self._cursor : self._cursor + _LEAST_WINDOW]
        found = (window == FREE).nonzero()[0][:count]
        if len(found) == count > 0:  # as below, for the usual case
            found += self._cursor
            self._cursor = int(found[-1]) + 1 if found[-1] < self.num_blocks else 1
            parts, missing = [found], 0
        while missing:
            window = self._states[self._cursor : self._cursor + max(_LEAST_WINDOW, missing * self.num_blocks // left)]
            found = (window == FREE).nonzero()[0]
            left -= len(found)
            found = found[:missing] + self._cursor
            missing -= len(found)
            parts.append(found)
            self._cursor = int(found[-1]) + 1 if not missing else self._cursor + len(window)
            if self._cursor > self.num_blocks:
                self._cursor = 1
        blocks = parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0, np.intp)
        self._states[blocks] = HELD
        self.ref_counts[blocks] = 1
        self.num_free -= count
        return blocks.astype(np.int32)

    def share(self, blocks: I32) -> None:
        """One more reference to each of these blocks, which are held, cached or retiring. No block twice."""
        at = blocks.astype(np.intp)
        free, _, retiring, cached = np.bincount(self._states[at], minlength=4).tolist()
        assert not free and 0 not in blocks, "a free block holds nothing to share"
        self.num_retiring -= retiring
        self.num_cached -= cached
        self._states[at] = HELD
        self.ref_counts[at] += 1

    def num_cached_of(self, blocks: I32) -> int:
        """How many of these are cached, and so would no longer be available once shared."""
        return int(np.count_nonzero(self._states[blocks] == CACHED))

    def release(self, blocks: I32, last_step: int, returned_step: int) -> None:
        """Drops one reference of each block, given in the order of their table; no block twice. `last_step` is the last step
        whose plan names them for this holder, `returned_step` the latest that has returned. Blocks without a reference retire
        until the last step of all their holders has returned."""
        at = blocks[::-1].astype(np.intp)
        counts = self.ref_counts[at] - 1
        assert counts.min(initial=0) >= 0, "a block was released more often than it was taken"
        self.ref_counts[at] = counts
        last_steps = np.maximum(self._last_step[at], last_step)
        self._last_step[at] = last_steps
        if counts.max(initial=0) > 0:
            unused = counts == 0
            at, last_steps = at[unused], last_steps[unused]
        if last_steps.max(initial=returned_step) > returned_step:
            for step in np.unique(last_steps[last_steps > returned_step]).tolist():
                self._retire(at[last_steps == step], step)
            at = at[last_steps <= returned_step]
        self._settle(at)

    def returned(self, step_id: int) -> None:
        """The results of all steps up to `step_id` have arrived: what only they named is available."""
        due = sorted((entry for entry in self._retiring if entry[0] <= step_id), key=itemgetter(0, 1))
        if not due:
            return
        self._retiring = [entry for entry in self._retiring if entry[0] > step_id]
        blocks = np.concatenate([blocks for _, _, blocks in due])
        entries = np.repeat([number for _, number, _ in due], [len(blocks) for _, _, blocks in due])
        blocks = blocks[(self._states[blocks] == RETIRING) & (self._entry[blocks] == entries)]  # others were shared meanwhile
        self.num_retiring -= len(blocks)
        self._settle(blocks)

    def states(self) -> U8:
        """[num_blocks] of blocks 1..num_blocks: FREE, HELD, RETIRING or CACHED."""
        return self._states[1:].copy()

    def _retire(self, blocks: Blocks, last_step: int) -> None:
        self._states[blocks] = RETIRING
        self._entry[blocks] = self._next_entry
        self._retiring.append((last_step, self._next_entry, blocks))
        self._next_entry += 1
        self.num_retiring += len(blocks)

    def _settle(self, blocks: Blocks) -> None:
        """Nobody names these blocks any more; those published are cached, to be evicted in this order."""
        published = self.index.is_published[blocks]
        unknown, known = blocks[~published], blocks[published]
        self._states[unknown] = FREE
        self.num_free += len(unknown)
        if len(known):
            if self._log_end + len(known) > len(self._log):
                self._compact()
            start, self._log_end = self._log_end, self._log_end + len(known)
            self._log[start : self._log_end] = known
            self._entry[known] = np.arange(start, self._log_end)
            self._states[known] = CACHED
            self.num_cached += len(known)

    def _evict(self, count: int) -> None:
        """Frees the `count` cached blocks that are first in the log."""
        self.num_free += count
        self.num_cached -= count
        while count:
            entries = self._log[self._log_start : min(self._log_start + 2 * count, self._log_end)]
            found = self._live(self._log_start, entries).nonzero()[0][:count]
            count -= len(found)
            self._log_start += int(found[-1]) + 1 if not count else len(entries)
            blocks = entries[found]
            self.index.forget(blocks)
            self._states[blocks] = FREE

    def _compact(self) -> None:
        """Moves what counts in the log to its begin: at most every num_blocks entries, so O(1) for each."""
        entries = self._log[self._log_start : self._log_end]
        live = entries[self._live(self._log_start, entries)]
        self._log_start, self._log_end = 0, len(live)
        self._log[: len(live)] = live
        self._entry[live] = np.arange(len(live))

    def _live(self, start: int, entries: Blocks) -> NDArray[np.bool_]:
        """Which of these entries of the log count, the first being at `start`."""
        live: NDArray[np.bool_] = self._entry[entries] == np.arange(start, start + len(entries))
        live &= self._states[entries] == CACHED
        return live

    def check_invariants(self) -> None:
        """Raises AssertionError when blocks are not conserved, or not where their state says."""
        states, counts = self._states[1:], self.ref_counts[1:]
        assert self._states[0] == HELD and self.ref_counts[0] == 0, "block 0 was given out"
        assert ((counts > 0) == (states == HELD)).all() and counts.min(initial=0) == 0, (
            "held blocks are not those with references"
        )
        free, _, retiring, cached = np.bincount(states, minlength=4).tolist()
        assert free == self.num_free, "free blocks are miscounted"
        assert cached == self.num_cached, "cached blocks are miscounted"
        assert retiring == self.num_retiring, "retiring blocks are miscounted"
        published = self.index.is_published[1:]
        assert not published[states == FREE].any(), "a free block is published"
        assert published[states == CACHED].all(), "a cached block is not published"
        live = self._live(self._log_start, self._log[self._log_start : self._log_end])
        assert np.count_nonzero(live) == self.num_cached, "a cached block is not in the log"
        due = sum(
            np.count_nonzero(self._entry[blocks[self._states[blocks] == RETIRING]] == n) for _, n, blocks in self._retiring
        )
        assert due == self.num_retiring, "a retiring block is forgotten"
        self.index.check_invariants()
