"""A request as the core knows it, and the one table of its life."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import numpy as np

from wire import AddHeader, RequestStats
from wire.messages import I32


class State(enum.Enum):
    WAITING = "waiting"  # accepted, never in the batch
    RUNNING = "running"  # holds a row
    PREEMPTED = "preempted"  # lost its row and blocks, waits to compute its tokens again
    ENDED = "ended"


TRANSITIONS: dict[State, frozenset[State]] = {
    State.WAITING: frozenset({State.RUNNING, State.ENDED}),
    State.RUNNING: frozenset({State.PREEMPTED, State.ENDED}),
    State.PREEMPTED: frozenset({State.RUNNING, State.ENDED}),
    State.ENDED: frozenset(),
}


@dataclass(slots=True, eq=False)
class Request:
    """One request with one output. What changes every step while it runs stands in its row's columns, not here."""

    header: AddHeader
    frontend: int  # which front end it came from
    sequence_id: int  # counts up per core; orders requests by arrival
    prompt: I32  # [num_prompt_tokens]
    max_outputs: int  # output tokens at which it ends with LENGTH
    state: State = State.WAITING
    outputs: I32 = field(default_factory=lambda: np.empty(0, np.int32))  # emitted so far; while RUNNING in the row
    slot: int = -1  # row it holds; kept after preemption until the last plan naming it has returned
    crashes: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    block_ns: int = 0
    admitted_ns: int = -1  # first admission
    first_token_ns: int = -1
    ended_ns: int = -1
    preempted_since_ns: int = -1
    preempted_ns: int = 0
    preempted_first_ns: int = 0  # the part of it before the first token

    @property
    def request_id(self) -> str:
        return self.header.request_id

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt)

    def become(self, state: State) -> None:
        assert state in TRANSITIONS[self.state], f"{self.request_id}: {self.state.value} can't become {state.value}"
        self.state = state

    def tokens(self) -> I32:
        """All tokens known: prompt, then outputs emitted so far."""
        return np.concatenate([self.prompt, self.outputs])

    def preempted_until(self, now: int) -> int:
        """Nanoseconds that it has waited after preemptions."""
        return self.preempted_ns + (now - self.preempted_since_ns if self.preempted_since_ns >= 0 else 0)

    def stats(self, num_outputs: int) -> RequestStats:
        """Of a request that has ended."""
        first = self.first_token_ns
        arrival = self.header.arrival_ns
        admitted = self.admitted_ns if self.admitted_ns >= 0 else self.ended_ns
        return RequestStats(
            prompt_tokens=self.num_prompt_tokens,
            output_tokens=num_outputs,
            recomputed_tokens=self.recomputed_tokens,
            preemptions=self.preemptions,
            queued_ns=max(0, admitted - arrival),
            prefill_ns=max(0, first - admitted) if first >= 0 else 0,
            decode_ns=max(0, self.ended_ns - first - (self.preempted_ns - self.preempted_first_ns)) if first >= 0 else 0,
            preempted_ns=self.preempted_ns,
            first_token_ns=max(0, first - arrival) if first >= 0 else 0,
            block_ns=self.block_ns,
        )
