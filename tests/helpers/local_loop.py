"""The real core and a real executor in one process, without sockets: two plans deep, every message through the codec."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from scheduler.core import Core, CoreConfig, Output
from wire import (
    AddHeader,
    AddRequest,
    OutputEnded,
    SamplingSpec,
    StepFailed,
    StepPlan,
    StepResult,
    WorkerFacts,
    decode,
    encode,
)

GREEDY = SamplingSpec(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)


class Executor(Protocol):
    facts: WorkerFacts

    def reset(self) -> None: ...
    def submit(self, plan: StepPlan, deliver: Callable[[StepResult | StepFailed], None]) -> None: ...


@dataclass(slots=True)
class Got:
    """What came back for one request."""

    tokens: list[int] = field(default_factory=list)
    ended: OutputEnded | None = None


class LocalLoop:
    """`add` requests, `step` or `run` until all have ended. Time is a counter."""

    def __init__(self, executor: Executor, config: CoreConfig) -> None:
        self.executor = executor
        self.core = Core(config)
        self.now = 0
        self.got: dict[int, Got] = {}
        self.plans: list[StepPlan] = []
        self._pending: deque[StepPlan] = deque()
        self.join()

    def join(self) -> None:
        """The worker joins, or comes back with an empty mirror."""
        self.executor.reset()
        self._pending.clear()
        self._take(self.core.worker_joined(self.executor.facts, self.now))

    def add(self, prompt: Sequence[int], max_tokens: int, sampling: SamplingSpec = GREEDY, priority: int = 2) -> int:
        """Queues a request; returns its handle."""
        handle = len(self.got)
        header = AddHeader(handle, f"request-{handle}", self.now, priority, max_tokens, sampling)
        refused = self.core.add(AddRequest(header, np.array(prompt, np.int32)), 0, self.now)
        assert refused is None, refused
        self.got[handle] = Got()
        return handle

    def step(self) -> None:
        """Plans as deep as the pipeline allows, then computes the oldest plan in flight."""
        self.now += 1
        while (plan := self.core.plan(self.now)) is not None:
            again = decode(encode(plan))
            assert isinstance(again, StepPlan)
            self._pending.append(again)
            self.plans.append(again)
        self.core.check_invariants()
        if self._pending:
            self.executor.submit(self._pending.popleft(), self._deliver)

    def run(self, max_steps: int = 100_000) -> dict[int, Got]:
        """Until every request has ended; returns what came back by handle."""
        for _ in range(max_steps):
            if self.core.is_idle:
                self.core.plan(self.now)  # lets go of a static batch's padding
                self.core.check_invariants()
                assert self.core.load(0).held_blocks == 0
                return self.got
            self.step()
        raise AssertionError(f"{self.core.num_requests} requests have not ended after {max_steps} steps")

    def _deliver(self, result: StepResult | StepFailed) -> None:
        assert isinstance(result, StepResult), result
        self._take(self.core.apply(result, self.now))
        self.core.check_invariants()

    def _take(self, outputs: list[Output]) -> None:
        for output in outputs:
            batch = output.batch
            for handle, token in zip(batch.handles.tolist(), batch.tokens.tolist(), strict=True):
                assert self.got[handle].ended is None, "a token after the end"
                self.got[handle].tokens.append(token)
            for ended in batch.header.ended:
                assert self.got[ended.handle].ended is None, "ended twice"
                self.got[ended.handle].ended = ended
