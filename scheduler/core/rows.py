"""The columns: what every step touches for every running row, in numpy arrays indexed by a permanent slot.

No policy and no decisions here; a row is set up, read and cleared by the core.
"""

from __future__ import annotations

import heapq

import numpy as np

from scheduler.core.request import Request
from wire.messages import I32, U16

# Life of a row. A row that ended or was preempted stays until the last plan that names it has returned.
FREE, RUNNING, PADDING, PREEMPTED, RETIRING = range(5)

_STOP_COLUMNS = 8  # end tokens compared for all rows at once; a request with more is looked at by itself


class Rows:
    """Struct of arrays, one entry a slot."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.state = np.zeros(max_rows, np.uint8)
        self.num_tokens = np.zeros(max_rows, np.int32)  # known, counting the samples of plans in flight
        self.num_computed = np.zeros(max_rows, np.int32)  # keys and values in the cache, counting plans in flight
        self.num_outputs = np.zeros(max_rows, np.int32)  # output tokens that have arrived
        self.max_outputs = np.zeros(max_rows, np.int32)
        self.num_planned = np.zeros(max_rows, np.int32)  # output tokens arrived or being sampled in flight
        self.last_step = np.full(max_rows, -1, np.int64)  # last plan that names the row
        self.stop_ids = np.full((max_rows, _STOP_COLUMNS), -1, np.int32)
        self.handle = np.zeros(max_rows, np.uint32)
        self.frontend = np.zeros(max_rows, np.int32)
        self.block_ns = np.zeros(max_rows, np.int64)
        self.outputs = np.empty((max_rows, 64), np.int32)  # [slot, :num_outputs]; columns grow
        self.requests: list[Request | None] = [None] * max_rows
        self.many_stop_ids: dict[int, frozenset[int]] = {}  # slot -> all its end tokens
        self.has_many_stop_ids = np.zeros(max_rows, np.bool_)  # more end tokens than fit the columns: see many_stop_ids
        self._free = list(range(max_rows))
        self._order: U16 = np.empty(0, np.uint16)  # slots RUNNING or PADDING, by admission
        self._joined: list[int] = []
        self._stale = False

    @property
    def num_free(self) -> int:
        return len(self._free)

    def start(self, request: Request) -> int:
        """Takes the lowest free slot for the request; returns it."""
        slot = heapq.heappop(self._free)
        count = len(request.outputs)
        stops = request.header.sampling.stop_token_ids
        self.state[slot] = RUNNING
        self.num_tokens[slot] = request.num_prompt_tokens + count
        self.num_computed[slot] = 0
        self.num_outputs[slot] = self.num_planned[slot] = count
        self.max_outputs[slot] = request.max_outputs
        self.last_step[slot] = -1
        self.stop_ids[slot] = -1
        self.stop_ids[slot, : min(len(stops), _STOP_COLUMNS)] = stops[:_STOP_COLUMNS]
        self.has_many_stop_ids[slot] = len(stops) > _STOP_COLUMNS
        if self.has_many_stop_ids[slot]:
            self.many_stop_ids[slot] = frozenset(stops)
        self.handle[slot] = request.header.handle
        self.frontend[slot] = request.frontend
        self.block_ns[slot] = 0
        self._widen(count)
        self.outputs[slot, :count] = request.outputs
        self.requests[slot] = request
        request.slot = slot
        self._joined.append(slot)
        return slot

    def in_order(self) -> U16:
        """Slots that are RUNNING or PADDING, in order of admission."""
        if self._joined or self._stale:
            order = np.concatenate([self._order, np.array(self._joined, np.uint16)]).astype(np.uint16)
            state = self.state[order]
            self._order = order[(state == RUNNING) | (state == PADDING)]
            self._joined, self._stale = [], False
        return self._order

    def leave(self, slot: int, state: int) -> None:
        """The row leaves the batch; `state` says as what it waits for its last plan."""
        assert state in (PREEMPTED, RETIRING)
        self.state[slot] = state
        self._stale = True

    def append_outputs(self, slots: U16, tokens: I32) -> None:
        at = self.num_outputs[slots]
        self._widen(int(at.max(initial=0)) + 1)
        self.outputs[slots, at] = tokens
        self.num_outputs[slots] += 1

    def stopped(self, slots: U16, tokens: I32) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Which rows drew one of their end tokens."""
        hit: np.ndarray[tuple[int], np.dtype[np.bool_]] = (self.stop_ids[slots] == tokens[:, None]).any(axis=1)
        for i in np.flatnonzero(self.has_many_stop_ids[slots]).tolist():
            hit[i] = int(tokens[i]) in self.many_stop_ids[int(slots[i])]
        return hit

    def free(self, slot: int) -> Request:
        """No plan names the row any more: the slot can be taken again. Returns the request that held it."""
        request = self.requests[slot]
        assert request is not None and self.state[slot] in (PREEMPTED, RETIRING)
        self.in_order()  # forget the slot there before somebody else takes it
        self.state[slot] = FREE
        self.requests[slot] = None
        self.many_stop_ids.pop(slot, None)
        heapq.heappush(self._free, slot)
        return request

    def _widen(self, columns: int) -> None:
        rows, width = self.outputs.shape
        if columns > width:
            wider = np.empty((rows, max(columns, 2 * width)), np.int32)
            wider[:, :width] = self.outputs
            self.outputs = wider
