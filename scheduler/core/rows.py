"""The columns: what every step touches for every running row, in numpy arrays indexed by a permanent slot.

No policy and no decisions here; a row is set up, read and cleared by the core.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from kvcache.block_table import Slots
from scheduler.core.request import Request
from wire.messages import I32

# Life of a row. A row that ended or was preempted stays until the last plan that names it has returned.
FREE, RUNNING, PADDING, PREEMPTED, RETIRING = range(5)


class Rows:
    """Struct of arrays, one entry a slot."""

    def __init__(self, max_rows: int, vocab_size: int) -> None:
        self.max_rows = max_rows
        self.state = np.zeros(max_rows, np.uint8)
        self.num_tokens = np.zeros(max_rows, np.int32)  # known, counting the samples of plans in flight
        self.max_tokens = np.zeros(max_rows, np.int32)  # of num_tokens: no sample is planned once it is reached
        self.num_computed = np.zeros(max_rows, np.int32)  # keys and values in the cache, counting plans in flight
        self.num_outputs = np.zeros(max_rows, np.int32)  # output tokens that have arrived
        self.max_outputs = np.zeros(max_rows, np.int32)
        self.last_step = np.full(max_rows, -1, np.int64)  # last plan that names the row
        self.handle = np.zeros(max_rows, np.uint32)
        self.frontend = np.zeros(max_rows, np.int32)
        self.started_ns = np.zeros(max_rows, np.int64)
        self.grown_ns = np.zeros(max_rows, np.int64)  # since then, when a block was appended; summed over those blocks
        self.outputs = np.empty((max_rows, 64), np.int32)  # [slot, :num_outputs]; columns grow
        self.requests: list[Request | None] = [None] * max_rows
        self.stop_ids: list[frozenset[int]] = [frozenset()] * max_rows
        self._num_stops = np.zeros(vocab_size, np.int32)  # [token] rows that have it among their end tokens
        self._free = list(range(max_rows))
        self._order: Slots = np.empty(0, np.intp)  # slots RUNNING or PADDING, by admission
        self._joined: list[int] = []
        self._stale = False

    @property
    def num_free(self) -> int:
        return len(self._free)

    def start(self, request: Request, now: int) -> int:
        """Takes the lowest free slot for the request; returns it."""
        slot = heapq.heappop(self._free)
        count = len(request.outputs)
        self.state[slot] = RUNNING
        self.num_tokens[slot] = request.num_prompt_tokens + count
        self.max_tokens[slot] = request.num_prompt_tokens + request.max_outputs
        self.num_computed[slot] = 0
        self.num_outputs[slot] = count
        self.max_outputs[slot] = request.max_outputs
        self.last_step[slot] = -1
        self.stop_ids[slot] = frozenset(request.header.sampling.stop_token_ids)
        self._num_stops[list(self.stop_ids[slot])] += 1
        self.handle[slot] = request.header.handle
        self.frontend[slot] = request.frontend
        self.started_ns[slot] = now
        self.grown_ns[slot] = 0
        self._widen(count)
        self.outputs[slot, :count] = request.outputs
        self.requests[slot] = request
        request.slot = slot
        self._joined.append(slot)
        return slot

    def in_order(self) -> Slots:
        """Slots that are RUNNING or PADDING, in order of admission."""
        if self._joined or self._stale:
            order = np.concatenate([self._order, np.array(self._joined, np.intp)])
            state = self.state[order]
            self._order = order[(state == RUNNING) | (state == PADDING)]
            self._joined, self._stale = [], False
        return self._order

    def leave(self, slot: int, state: int) -> None:
        """The row leaves the batch; `state` says as what it waits for its last plan."""
        assert state in (PREEMPTED, RETIRING)
        self.state[slot] = state
        self._stale = True

    def pad(self, slot: int) -> None:
        """The row has ended and stays; it gets no further tokens."""
        self.state[slot] = PADDING
        self.max_tokens[slot] = self.num_tokens[slot]

    def append_outputs(self, slots: Slots, tokens: I32) -> I32:
        """One more output token for each row; returns how many each has now."""
        counts = self.num_outputs[slots]
        self._widen(int(counts.max(initial=0)) + 1)
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

    def free(self, slot: int) -> Request:
        """No plan names the row any more: the slot can be taken again. Returns the request that held it."""
        request = self.requests[slot]
        assert request is not None and self.state[slot] in (PREEMPTED, RETIRING)
        self.in_order()  # forget the slot there before somebody else takes it
        self.state[slot] = FREE
        self.requests[slot] = None
        self._num_stops[list(self.stop_ids[slot])] -= 1
        heapq.heappush(self._free, slot)
        return request

    def _widen(self, columns: int) -> None:
        rows, width = self.outputs.shape
        if columns > width:
            wider = np.empty((rows, max(columns, 2 * width)), np.int32)
            wider[:, :width] = self.outputs
            self.outputs = wider
