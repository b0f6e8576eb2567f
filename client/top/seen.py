"""What was seen of a running server, put together: rows, queue, blocks, rates. Values only: no connection, no clock."""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from carousel.v1 import control_pb2, inspect_pb2

HISTORY = 60  # values of a sparkline, steps of the budget's
_FIRSTS = 4  # requests whose first token was seen last
FREE, CACHED, RETIRING, SHARED = -1, -2, -3, -4  # of a block that is not one owner's
_STATES = {
    inspect_pb2.BLOCK_STATE_CACHED: CACHED,
    inspect_pb2.BLOCK_STATE_RETIRING: RETIRING,
    inspect_pb2.BLOCK_STATE_HELD: RETIRING,  # by a row that is not in the tables any more
}


@dataclass(frozen=True, slots=True)
class Row:
    """An output in the batch."""

    slot: int
    request_id: str
    output_index: int
    tenant: str
    prompt_tokens: int  # 0: not known
    computed_tokens: int
    output_tokens: int  # of the request; of all its outputs together
    num_outputs: int
    blocks: int
    shared_blocks: int
    state: str  # prompt, decode


@dataclass(frozen=True, slots=True)
class Waiting:
    request_id: str
    tenant: str
    state: str  # waiting, preempted
    priority: str
    prompt_tokens: int
    output_tokens: int
    age_s: float


@dataclass(frozen=True)
class Snapshot:
    """All of it at one moment. Times in milliseconds; histories oldest first."""

    target: str
    model: str
    version: str
    policy: str
    uptime_s: float
    max_batch_rows: int
    group: int  # whose rows, blocks and steps these are
    num_groups: int
    load: control_pb2.GetLoadResponse
    rows: Sequence[Row]  # by slot
    waiting: Sequence[Waiting]  # the first ones; the load says how many there are
    block_size: int
    blocks: Sequence[int]  # a slot, or FREE, CACHED, RETIRING, SHARED
    tokens_per_s: Sequence[float]
    ttft_ms: Sequence[float]
    itl_ms: Sequence[float]
    step_tokens: Sequence[tuple[int, int]]  # (computed, budget) of the last steps that were looked at
    waste: float = 0.0  # of the room of held blocks, [0, 1]; a shared block counts once
    trouble: str = ""  # why nothing new comes


@dataclass
class Seen:
    """Takes the server's messages in any order, each as often as it comes."""

    target: str
    server: control_pb2.GetServerInfoResponse = field(default_factory=control_pb2.GetServerInfoResponse)
    model: control_pb2.GetModelInfoResponse = field(default_factory=control_pb2.GetModelInfoResponse)
    group: int = 0
    trouble: str = ""
    _load: control_pb2.GetLoadResponse = field(default_factory=control_pb2.GetLoadResponse)
    _loaded_s: float = -1.0
    _requests: dict[str, control_pb2.RequestSummary] = field(default_factory=dict)
    _now_ns: int = 0  # of the list of requests
    _rows: list[Row] = field(default_factory=list)
    _blocks: list[int] = field(default_factory=list)
    _waste: float = 0.0
    _policy: str = ""
    _tokens_per_s: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))
    _ttft_ms: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))
    _itl_ms: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))
    _gaps_ms: list[float] = field(default_factory=list)  # between the tokens of running requests, since the last load
    _firsts_ms: list[float] = field(default_factory=list)
    _step_tokens: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=HISTORY))
    _before: inspect_pb2.WatchStepsResponse | None = None
    _firsts: deque[tuple[str, str]] = field(default_factory=lambda: deque(maxlen=_FIRSTS))

    def take_load(self, load: control_pb2.GetLoadResponse, now_s: float) -> None:
        """Once in an interval: the histories go on by one. now_s: by any clock that only goes forward."""
        if self._loaded_s >= 0 and now_s > self._loaded_s:
            new = load.output_tokens - self._load.output_tokens
            self._tokens_per_s.append(max(0, new) / (now_s - self._loaded_s))
            for history, values in ((self._itl_ms, self._gaps_ms), (self._ttft_ms, self._firsts_ms)):
                if values:
                    history.append(statistics.median(values))
                    values.clear()
        self._load, self._loaded_s = load, now_s

    def take_requests(self, told: control_pb2.ListRequestsResponse) -> None:
        self._requests = {request.request_id: request for request in told.requests}
        self._now_ns = told.now_ns

    def firsts(self) -> list[tuple[str, str]]:
        """(request, tenant) of some that had their first token since the last call."""
        found = list(self._firsts)
        self._firsts.clear()
        return found

    def take_first(self, told: control_pb2.ExplainRequestResponse) -> None:
        if told.timing.time_to_first_token_ns:
            self._firsts_ms.append(told.timing.time_to_first_token_ns / 1e6)

    def take_step(self, step: inspect_pb2.WatchStepsResponse) -> None:
        if step.group != self.group:
            return
        before, self._before = self._before, step
        self._policy = step.policy
        self._step_tokens.append((sum(row.num_tokens for row in step.rows), step.token_budget))
        for row in step.rows:
            if row.sampled and (row.joined or row.num_tokens > 1):
                self._firsts.append((row.request_id, row.tenant))
        if any(row.sampled and not row.joined and row.num_tokens == 1 for row in step.rows):
            follows = before is not None and step.step_id == before.step_id + 1 and before.rows
            gap_ns = step.planned_ns - before.planned_ns if follows and before is not None else step.duration_ns
            self._gaps_ms.append(gap_ns / 1e6)

    def take_tables(self, told: inspect_pb2.GetBlockTablesResponse) -> None:
        blocks = [_STATES.get(state, FREE) for state in told.states]
        counts = told.ref_counts
        for table in told.tables:
            for block in table.blocks:
                blocks[block - 1] = table.slot
        shared = {i for i, count in enumerate(counts) if count > 1}
        for i in shared:
            blocks[i] = SHARED
        room = sum(count > 0 for count in counts) * told.block_size
        again = sum(counts[i] - 1 for i in shared) * told.block_size  # tokens of shared blocks: each table tells them
        used = sum(table.computed_tokens for table in told.tables) - again
        self._waste = min(1.0, max(0.0, 1 - used / room)) if room else 0.0
        tables = sorted(told.tables, key=lambda table: table.slot)
        self._rows = [self._row(table, sum(block - 1 in shared for block in table.blocks) if shared else 0) for table in tables]
        self._blocks = blocks

    def _row(self, table: inspect_pb2.BlockTable, shared: int) -> Row:
        told = self._requests.get(table.request_id) or control_pb2.RequestSummary()
        known = told.prompt_tokens
        return Row(
            slot=table.slot,
            request_id=table.request_id,
            output_index=table.output_index,
            tenant=told.tenant,
            prompt_tokens=known,
            computed_tokens=table.computed_tokens,
            output_tokens=told.output_tokens,
            num_outputs=max(1, told.num_outputs),
            blocks=len(table.blocks),
            shared_blocks=shared,
            state="prompt" if known and table.computed_tokens < known else "decode",
        )

    def snapshot(self) -> Snapshot:
        held = {row.request_id for row in self._rows}
        waiting = [_waiting(each, self._now_ns) for each in self._requests.values() if each.request_id not in held]
        return Snapshot(
            target=self.target,
            model=self.server.served_model_name,
            version=self.server.version,
            policy=self._policy or self.server.policy,
            uptime_s=self._now_ns / 1e9,
            max_batch_rows=self.server.max_batch_rows,
            group=self.group,
            num_groups=len({worker.group for worker in self.server.workers}),
            load=self._load,
            rows=list(self._rows),
            waiting=[each for each in waiting if each.state],
            block_size=self.model.block_size,
            blocks=self._blocks,
            tokens_per_s=list(self._tokens_per_s),
            ttft_ms=list(self._ttft_ms),
            itl_ms=list(self._itl_ms),
            step_tokens=list(self._step_tokens),
            waste=self._waste,
            trouble=self.trouble,
        )


_WORDS = {control_pb2.REQUEST_STATE_WAITING: "waiting", control_pb2.REQUEST_STATE_PREEMPTED: "preempted"}
_CLASSES = {1: "batch", 2: "normal", 3: "interactive"}


def _waiting(told: control_pb2.RequestSummary, now_ns: int) -> Waiting:
    return Waiting(
        told.request_id,
        told.tenant,
        _WORDS.get(told.state, ""),
        _CLASSES.get(told.priority, "normal"),
        told.prompt_tokens,
        told.output_tokens,
        max(0, now_ns - told.arrival_ns) / 1e9,
    )


def as_json(seen: Snapshot) -> dict[str, Any]:
    """The same for programs. Rates and times are those of the last interval; null: none was seen."""
    load, kinds = seen.load, Counter(min(owner, 0) for owner in seen.blocks)
    return {
        "target": seen.target,
        "model": seen.model,
        "version": seen.version,
        "policy": seen.policy,
        "uptime_s": round(seen.uptime_s, 3),
        "max_batch_rows": seen.max_batch_rows,
        "group": seen.group,
        "running": load.running_requests,
        "waiting": load.waiting_requests,
        "tokens_per_s": _last(seen.tokens_per_s),
        "ttft_ms": _last(seen.ttft_ms),
        "itl_ms": _last(seen.itl_ms),
        "preemptions": load.preemptions,
        "blocks": {
            "size": seen.block_size,
            "total": load.total_blocks,
            "held": load.held_blocks,
            "shared": kinds[SHARED],
            "cached": load.cached_blocks,
            "free": load.free_blocks,
            "waste": round(seen.waste, 6),
        },
        "steps": [{"tokens": tokens, "budget": budget} for tokens, budget in seen.step_tokens],
        "rows": [{name: getattr(row, name) for name in Row.__slots__} for row in seen.rows],
        "queue": [{name: getattr(each, name) for name in Waiting.__slots__} for each in seen.waiting],
    }


def _last(values: Sequence[float]) -> float | None:
    return round(values[-1], 3) if values else None
