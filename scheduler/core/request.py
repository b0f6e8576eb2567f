"""A request as the core knows it, its outputs, and the one table of an output's life."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import numpy as np

from wire import AddHeader, Preemption, RequestStats
from wire.messages import I32

_EMPTY: I32 = np.empty(0, np.int32)


class State(enum.Enum):
    HELD = "held"  # waits for a sibling to compute the prompt that they share
    WAITING = "waiting"  # in the queue, never in the batch
    RUNNING = "running"  # holds a row
    PREEMPTED = "preempted"  # lost its row, in the queue to come back
    PARKED = "parked"  # preempted, and its reader does not take its tokens: in no queue until he does
    ENDED = "ended"


TRANSITIONS: dict[State, frozenset[State]] = {
    State.HELD: frozenset({State.WAITING, State.ENDED}),
    State.WAITING: frozenset({State.RUNNING, State.HELD, State.ENDED}),
    State.RUNNING: frozenset({State.PREEMPTED, State.PARKED, State.ENDED}),
    State.PREEMPTED: frozenset({State.RUNNING, State.ENDED}),
    State.PARKED: frozenset({State.PREEMPTED, State.ENDED}),
    State.ENDED: frozenset(),
}
QUEUED = (State.WAITING, State.PREEMPTED)


@dataclass(slots=True, eq=False)
class Request:
    """What a client asked for: one prompt, one or more outputs."""

    header: AddHeader
    frontend: int  # which front end it came from
    number: int  # counts up per core: the order of arrival
    prompt: I32  # [num_prompt_tokens]; empty once all has ended
    tenant: int  # index in Tenants
    max_outputs: int  # output tokens at which an output ends with LENGTH
    digests: bytes  # of the prompt's full blocks, 16 bytes each; empty: past the prefix cache
    accepted_ns: int
    sequences: list[Sequence] = field(default_factory=list)  # one for each output
    num_running: int = 0  # of its sequences
    num_live: int = 0  # of its sequences, not ended
    num_prompt_tokens: int = field(init=False)
    crashes: int = 0  # failed steps and lost workers while it was computed, since it last got past one
    crashes_alone: int = 0  # of these, while nobody else was

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.prompt)

    @property
    def request_id(self) -> str:
        return self.header.request_id

    def forget_tokens(self) -> None:
        """Ended and remembered only for what it was."""
        self.prompt, self.digests = _EMPTY, b""
        for sequence in self.sequences:
            sequence.outputs, sequence.digests = _EMPTY, b""

    def forget_outputs(self) -> None:
        """Ended and remembered no more: a request and its sequences know each other, and would wait for the collector."""
        self.sequences = []

    def most_blocks(self, block_size: int) -> int:
        """That an output of it may come to hold; 0 where its length is what the pool leaves."""
        return -(-(self.num_prompt_tokens + self.max_outputs - 1) // block_size) if self.header.max_tokens else 0

    def live(self) -> list[Sequence]:
        """Its outputs that have not ended."""
        return [sequence for sequence in self.sequences if sequence.state is not State.ENDED]


@dataclass(slots=True, eq=False)
class Sequence:
    """One output of a request: what the scheduler moves. What changes every step while it runs stands in its row's columns."""

    request: Request
    output_index: int
    sequence_id: int  # counts up per core; orders sequences by arrival
    order_ns: int  # inside a tenant the smallest goes first
    state: State = State.WAITING
    outputs: I32 = field(default_factory=lambda: _EMPTY)  # emitted so far; while RUNNING in the row
    taken: int = 0  # of these, tokens that the reader took; while RUNNING in the row
    digests: bytes = b""  # of its full blocks, as far as they were made; while it holds a row, the row has them
    crash_point: int = 0  # tokens computed, counting plans in flight, when the worker was lost; 0: it has got past that
    slot: int = -1  # row it holds; kept after preemption until the last plan naming it has returned
    lost_tokens: int = 0  # computed when it was preempted
    host_blocks: I32 | None = None  # where its keys and values are while it is swapped out
    swap_step: int = -1  # the plan that swaps them out
    is_aged: bool = False  # admitted because nobody had waited longer: no higher class takes its place
    preemptions: int = 0
    preempted_by: list[Preemption] = field(default_factory=list)
    cached_tokens: int = 0
    recomputed_tokens: int = 0
    block_ns: int = 0
    admitted_ns: int = -1  # first admission
    first_token_ns: int = -1
    ended_ns: int = -1
    preempted_since_ns: int = -1
    preempted_ns: int = 0
    preempted_first_ns: int = 0  # the part of it before the first token
    end_reason: str = ""
    first_step: int = -1  # the plan that it was first admitted to
    last_step: int = -1  # the last plan that named it, once it has ended
    num_ended_outputs: int = 0  # output tokens that it had at its end

    @property
    def header(self) -> AddHeader:
        return self.request.header

    @property
    def request_id(self) -> str:
        return self.request.header.request_id

    @property
    def handle(self) -> int:
        return self.request.header.handle + self.output_index

    @property
    def tenant(self) -> int:
        return self.request.tenant

    @property
    def priority(self) -> int:
        return self.request.header.priority

    @property
    def num_prompt_tokens(self) -> int:
        return self.request.num_prompt_tokens

    @property
    def num_queued_tokens(self) -> int:
        """Prompt tokens for which it counts in the queue: one output of a request does, the others share its blocks."""
        return 0 if self.output_index else self.request.num_prompt_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens known; only while it holds no row."""
        return self.request.num_prompt_tokens + len(self.outputs)

    def become(self, state: State) -> None:
        assert state in TRANSITIONS[self.state], f"{self.request_id}: {self.state.value} can't become {state.value}"
        self.state = state

    def tokens(self) -> I32:
        """All tokens known: prompt, then outputs emitted so far; only while it holds no row, or has just taken one."""
        return np.concatenate([self.request.prompt, self.outputs])

    def preempted_until(self, now: int) -> int:
        """Nanoseconds that it has waited after preemptions."""
        return self.preempted_ns + (now - self.preempted_since_ns if self.preempted_since_ns >= 0 else 0)

    def stats(self, num_outputs: int, now: int) -> RequestStats:
        """Until `now`, or until its end."""
        first, end = self.first_token_ns, self.ended_ns if self.ended_ns >= 0 else now
        arrival = self.header.arrival_ns
        admitted = self.admitted_ns if self.admitted_ns >= 0 else end
        preempted_ns = self.preempted_until(end)
        return RequestStats(
            prompt_tokens=self.num_prompt_tokens,
            cached_tokens=self.cached_tokens,
            output_tokens=num_outputs,
            recomputed_tokens=self.recomputed_tokens,
            preemptions=self.preemptions,
            queued_ns=max(0, admitted - arrival),
            prefill_ns=max(0, (first if first >= 0 else end) - admitted) if self.admitted_ns >= 0 else 0,
            decode_ns=max(0, end - first - (preempted_ns - self.preempted_first_ns)) if first >= 0 else 0,
            preempted_ns=preempted_ns,
            first_token_ns=max(0, first - arrival) if first >= 0 else 0,
            block_ns=self.block_ns,
        )
