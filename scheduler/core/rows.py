"""The columns: what every step touches for every running row, in numpy arrays indexed by a permanent slot.

No policy and no decisions here; a row is set up, read and cleared by the core.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from kvcache.block_table import Slots
from kvcache.prefix_index import DIGEST, DIGEST_BYTES
from scheduler.core.request import Sequence
from wire.messages import I32

# Life of a row. A row that ended or was preempted stays until the last plan that names it has returned.
FREE, RUNNING, PADDING, PREEMPTED, RETIRING = range(5)

NEVER = np.iinfo(np.int32).max  # in next_publish: no block of this row goes to the prefix index any more


class Rows:
    """Struct of arrays, one entry a slot."""

    def __init__(self, max_rows: int, vocab_size: int) -> None:
        self.max_rows = max_rows
        self.state = np.zeros(max_rows, np.uint8)
        self.num_tokens = np.zeros(max_rows, np.int32)  # known, counting the samples of plans in flight
        self.max_tokens = np.zeros(max_rows, np.int32)  # of num_tokens, at its end
        self.limit = np.zeros(max_rows, np.int32)  # at most max_tokens, and as far as its reader lets it: no sample beyond
        self.num_computed = np.zeros(max_rows, np.int32)  # keys and values in the cache, counting plans in flight
        self.start_computed = np.zeros(max_rows, np.int32)  # num_computed when it was admitted
        self.num_outputs = np.zeros(max_rows, np.int32)  # output tokens that have arrived
        self.max_outputs = np.zeros(max_rows, np.int32)
        self.taken = np.zeros(max_rows, np.int32)  # output tokens that the reader took
        self.num_published = np.zeros(max_rows, np.int32)  # blocks that went to the prefix index, or could not
        self.next_publish = np.full(max_rows, NEVER, np.int32)  # output tokens at which the next block is full and computed
        self.digests = np.zeros((max_rows, 8), DIGEST)  # [slot, :num_hashed] of full blocks; columns grow
        self.num_hashed = np.zeros(max_rows, np.int32)
        self.last_step = np.full(max_rows, -1, np.int64)  # last plan that names the row
        self.priority = np.zeros(max_rows, np.int8)
        self.tenant = np.zeros(max_rows, np.int32)
        self.is_protected = np.zeros(max_rows, np.bool_)  # holds blocks for all its tokens, and is preempted for nobody
        self.is_aged = np.zeros(max_rows, np.bool_)  # is not preempted to let a higher class in
        self.handle = np.zeros(max_rows, np.uint32)
        self.frontend = np.zeros(max_rows, np.int32)
        self.started_ns = np.zeros(max_rows, np.int64)
        self.grown_ns = np.zeros(max_rows, np.int64)  # since then, when a block was appended; summed over those blocks
        self.outputs = np.empty((max_rows, 64), np.int32)  # [slot, :num_outputs]; columns grow
        self._most_outputs = 0  # at least as many as any row has
        self.sequences: list[Sequence | None] = [None] * max_rows
        self.stop_ids: list[frozenset[int]] = [frozenset()] * max_rows
        self._num_stops = np.zeros(vocab_size, np.int32)  # [token] rows that have it among their end tokens
        self._num_of_class = [0] * 4  # rows RUNNING
        self._free = list(range(max_rows))
        self._order: Slots = np.empty(0, np.intp)  # slots RUNNING or PADDING, by admission
        self._joined: list[int] = []
        self._stale = False

    @property
    def num_free(self) -> int:
        return len(self._free)

    def start(self, sequence: Sequence, num_computed: int, window: int, now: int) -> int:
        """Takes the lowest free slot for the sequence; returns it. window: tokens that its reader may be behind."""
        slot = heapq.heappop(self._free)
        request, count = sequence.request, len(sequence.outputs)
        num_prompt = request.num_prompt_tokens
        self.state[slot] = RUNNING
        self.num_tokens[slot] = num_prompt + count
        self.max_tokens[slot] = num_prompt + request.max_outputs
        self.limit[slot] = num_prompt + min(request.max_outputs, sequence.taken + window)
        self.num_computed[slot] = self.start_computed[slot] = num_computed
        self.num_outputs[slot] = count
        self.max_outputs[slot] = request.max_outputs
        self.taken[slot] = sequence.taken
        self.num_published[slot] = 0
        self.next_publish[slot] = NEVER
        self.num_hashed[slot] = 0
        self.add_digests(slot, sequence.digests)
        self.last_step[slot] = -1
        self.priority[slot] = request.header.priority
        self.tenant[slot] = request.tenant
        self.is_protected[slot] = False
        self.is_aged[slot] = sequence.is_aged
        self.stop_ids[slot] = frozenset(request.header.sampling.stop_token_ids)
        self._num_stops[list(self.stop_ids[slot])] += 1
        self.handle[slot] = request.header.handle + sequence.output_index
        self.frontend[slot] = request.frontend
        self.started_ns[slot] = now
        self.grown_ns[slot] = 0
        self._widen(count)
        self._most_outputs = max(self._most_outputs, count)
        self.outputs[slot, :count] = sequence.outputs
        self.sequences[slot] = sequence
        sequence.slot = slot
        self._num_of_class[request.header.priority] += 1
        self._joined.append(slot)
        return slot

    def sequence(self, slot: int) -> Sequence:
        """Who holds the row, or held it and waits for its last plan."""
        sequence = self.sequences[slot]
        assert sequence is not None
        return sequence

    def in_order(self) -> Slots:
        """Slots that are RUNNING or PADDING, in order of admission."""
        if self._joined or self._stale:
            order = np.concatenate([self._order, np.array(self._joined, np.intp)])
            state = self.state[order]
            self._order = order[(state == RUNNING) | (state == PADDING)]
            self._joined, self._stale = [], False
        return self._order

    def has_below(self, priority: int) -> bool:
        """Whether a row of a lower class is RUNNING."""
        return any(self._num_of_class[:priority])

    def leave(self, slot: int, state: int) -> None:
        """The row leaves the batch; `state` says as what it waits for its last plan."""
        assert state in (PREEMPTED, RETIRING)
        if self.state[slot] == RUNNING:
            self._num_of_class[self.priority[slot]] -= 1
        self.state[slot] = state
        self._stale = True

    def pad(self, slot: int) -> None:
        """The row has ended and stays; it gets no further tokens."""
        self.state[slot] = PADDING
        self.next_publish[slot] = NEVER
        self._num_of_class[self.priority[slot]] -= 1
        self.max_tokens[slot] = self.limit[slot] = self.num_tokens[slot]

    def append_outputs(self, slots: Slots, tokens: I32) -> I32:
        """One more output token for each row; returns how many each has now."""
        counts = self.num_outputs[slots]
        self._most_outputs += 1
        if self._most_outputs > self.outputs.shape[1]:
            self._widen(int(counts.max(initial=0)) + 1)
            self._most_outputs = int(self.num_outputs.max()) + 1
        self.outputs[slots, counts] = tokens
        counts += 1
        self.num_outputs[slots] = counts
        return counts

    def stopped(self, slots: Slots, tokens: I32) -> NDArray[np.bool_]:
        """Which rows drew one of their end tokens. Looks closer only where a token ends anybody's output."""
        hit = np.zeros(len(slots), np.bool_)
        for i in self._num_stops[tokens].nonzero()[0].tolist():
            hit[i] = int(tokens[i]) in self.stop_ids[int(slots[i])]
        return hit

    def take(self, slot: int, count: int, window: int) -> None:
        """The reader took `count` more output tokens."""
        self.taken[slot] = min(int(self.taken[slot]) + count, int(self.num_outputs[slot]))
        num_prompt = int(self.max_tokens[slot] - self.max_outputs[slot])
        self.limit[slot] = num_prompt + min(int(self.max_outputs[slot]), int(self.taken[slot]) + window)

    def free(self, slot: int) -> Sequence:
        """No plan names the row any more: the slot can be taken again. Returns the sequence that held it."""
        sequence = self.sequences[slot]
        assert sequence is not None and self.state[slot] in (PREEMPTED, RETIRING)
        self.in_order()  # forget the slot there before somebody else takes it
        self.state[slot] = FREE
        self.sequences[slot] = None
        self._num_stops[list(self.stop_ids[slot])] -= 1
        heapq.heappush(self._free, slot)
        return sequence

    def add_digests(self, slot: int, digests: bytes) -> None:
        """Of the next full blocks, one after the other."""
        first, count = int(self.num_hashed[slot]), len(digests) // DIGEST_BYTES
        self.reserve_digests(first + count)
        self.digests[slot, first : first + count] = np.frombuffer(digests, DIGEST)
        self.num_hashed[slot] = first + count

    def reserve_digests(self, columns: int) -> None:
        rows, width = self.digests.shape
        if columns > width:
            wider = np.zeros((rows, max(columns, 2 * width)), DIGEST)
            wider[:, :width] = self.digests
            self.digests = wider

    def _widen(self, columns: int) -> None:
        rows, width = self.outputs.shape
        if columns > width:
            wider = np.empty((rows, max(columns, 2 * width)), np.int32)
            wider[:, :width] = self.outputs
            self.outputs = wider
