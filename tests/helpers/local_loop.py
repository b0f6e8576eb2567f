"""The real core and a real executor in one process, without sockets: two plans deep, every message through the codec."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from kvcache.prefix_index import root
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
        return self.add_many(prompt, max_tokens, sampling, priority, num_outputs=1)[0]

    def add_many(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        sampling: SamplingSpec = GREEDY,
        priority: int = 2,
        *,
        num_outputs: int,
        salt: str | None = None,
    ) -> list[int]:
        """A request with several outputs; the handle of each. salt: None keeps it away from the prefix cache."""
        handles = list(range(len(self.got), len(self.got) + num_outputs))
        header = AddHeader(handles[0], f"request-{handles[0]}", self.now, priority, max_tokens, sampling, num_outputs)
        if salt is not None:
            header.prefix_key = root("model", "", salt)
        refused = self.core.add(AddRequest(header, np.array(prompt, np.int32)), 0, self.now)
        assert refused is None, refused
        self.got.update({handle: Got() for handle in handles})
        return handles

    def step(self) -> None:
        """Plans as deep as the pipeline allows, then computes the oldest plan in flight."""
        self.now += 1
        self._take_all()
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

    def _take_all(self) -> None:
        """Every reader takes what has come."""
        open_handles = [handle for handle, got in self.got.items() if got.ended is None and got.tokens]
        counts = [len(self.got[handle].tokens) for handle in open_handles]  # more than there is to take counts as all
        self.core.credit(0, np.array(open_handles, np.uint32), np.array(counts, np.int32), self.now)

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
