"""Everything that can happen to a core, in seeded order, with a simulated worker that checks its blocks' contents.

It calls the core's verbs only, so that a recorder can stand between; what comes out is not looked at.
"""

from __future__ import annotations

import random
from collections import deque

import msgspec
import numpy as np

from scheduler.core.core import ProtocolError
from scheduler.recorder import Recorded
from tests.helpers.content_executor import ContentExecutor
from tests.helpers.fake_worker import worker_facts
from wire import AddHeader, AddRequest, SamplingSpec, StepFailed, StepResult, WorkerFacts, decode, encode

MS = 1_000_000
PREFIX_KEY = bytes(range(16))
POLICIES = ("continuous", "static", "prefill_first")

_MOVES = {
    "turn": 100,
    "plan": 10,
    "answer": 10,
    "add": 25,
    "abort": 2,
    "cancel": 3,
    "truncate": 2,
    "credit": 30,
    "set_policy": 2,
    "stray": 1,
    "failed": 1,
    "lost": 1,
    "frontend_lost": 1,
    "idle": 3,
}


class Churn:
    """One core under `moves` random inputs. `ask` is called before each of them."""

    def __init__(self, core: Recorded, seed: int, *, facts: WorkerFacts | None = None) -> None:
        self.core = core
        self.rng = random.Random(seed)
        self.facts = facts or worker_facts(num_blocks=24, max_model_len=80, num_host_blocks=8, swap_block_ns=1)
        self.now = 5_000 * MS
        self.num_added = 0
        self.added: list[tuple[int, int, str]] = []  # (frontend, handle, request_id)
        self.join()

    def run(self, moves: int) -> None:
        kinds = self.rng.choices([*_MOVES], [*_MOVES.values()], k=moves)
        for kind in kinds:
            self.ask()
            getattr(self, kind)()

    def ask(self) -> None:
        """To be replaced by one who asks the core something."""

    def finish(self) -> None:
        """Until nothing is left to do."""
        for _ in range(2000):
            if self.core.is_idle:
                return
            for frontend in range(3):
                self._credit(frontend, self.added)
            self.turn()
        raise AssertionError(f"{self.core.num_requests} requests do not end")

    # ------------------------------------------------------------------------------------------------------ moves

    def tick(self) -> int:
        self.now += self.rng.randrange(2 * MS)
        return self.now

    def join(self) -> None:
        self.core.worker_joined(self.facts, self.tick())
        self.worker = ContentExecutor.of(self.facts, end_chance=0.02)
        self.unanswered: deque[StepResult] = deque()  # computed; an answer that is late is one that is held back

    def plan(self) -> bool:
        plan = self.core.plan(self.tick())
        self.core.take_outputs()
        if plan is not None:
            self.worker.submit(decode(encode(plan)), self._hold_back)
        return plan is not None

    def _hold_back(self, result: StepResult | StepFailed) -> None:
        assert isinstance(result, StepResult), result
        self.unanswered.append(result)

    def answer(self) -> None:
        if self.unanswered:
            self.core.apply(self.unanswered.popleft(), self.tick())

    def turn(self) -> None:
        while self.plan():
            pass
        self.answer()

    def add(self) -> None:
        rng, number = self.rng, self.num_added
        self.num_added += 1
        now, frontend, num_outputs = self.tick(), rng.randrange(3), rng.choice([1, 1, 1, 2, 3])
        session = rng.randrange(4)  # of which all prompts begin alike
        prompt = [(session * 31 + 7 * i) % 1000 for i in range(rng.choice([1, 5, 9, 20, 33]))] + [number % 1000]
        stops = tuple(rng.sample(range(1000), 3))
        cached = rng.random() < 0.8
        header = AddHeader(
            handle=8 * number,
            request_id=f"r{number}",
            arrival_ns=now,
            priority=rng.randint(1, 3),
            max_tokens=rng.choice([0, 1, 5, 12, 30]),
            sampling=SamplingSpec(0.0, 0, 1.0, 0.0, 0, 0, stops),
            num_outputs=num_outputs,
            tenant=rng.choice(["", "a", "b"]),
            deadline_ns=rng.choice([0, 0, 0, now + rng.randrange(200 * MS)]),
            partial_at_deadline=rng.random() < 0.5,
            prefix_key=PREFIX_KEY if cached else b"",
        )
        refused = self.core.add(AddRequest(header, np.array(prompt, np.int32)), frontend, now)
        if refused is None:
            self.added += [(frontend, header.handle + index, header.request_id) for index in range(num_outputs)]

    def _someone(self) -> tuple[int, int, str] | None:
        return self.rng.choice(self.added[-12:]) if self.added else None

    def abort(self) -> None:
        if (some := self._someone()) is not None:
            self.core.abort(some[0], some[1], self.tick())

    def cancel(self) -> None:
        if (some := self._someone()) is not None:
            self.core.cancel(some[2], self.tick())

    def truncate(self) -> None:
        if (some := self._someone()) is not None:
            self.core.truncate(some[0], some[1], self.rng.randrange(5), self.tick())

    def credit(self) -> None:
        self._credit(self.rng.randrange(3), self.added[-40:])

    def _credit(self, frontend: int, added: list[tuple[int, int, str]]) -> None:
        mine = [handle for owner, handle, _ in added if owner == frontend]
        handles = np.array(mine, np.uint32)
        self.core.credit(frontend, handles, np.full(len(mine), self.rng.randint(1, 9), np.int32), self.tick())

    def set_policy(self) -> None:
        self.core.set_policy(self.rng.choice([*POLICIES, "nonsense"]), self.tick())

    def stray(self) -> None:
        """An answer that was not asked for: the worker's mirror is void."""
        if not self.unanswered:
            return
        result = self.unanswered.popleft()
        try:
            self.core.apply(StepResult(result.header, result.tokens, result.slots + np.uint16(1)), self.tick())
        except ProtocolError:
            self.failed()

    def failed(self) -> None:
        self.core.worker_lost(self.tick())
        self.join()

    def lost(self) -> None:
        """For a while."""
        self.core.worker_lost(self.tick())
        for _ in range(self.rng.randrange(5)):
            self.add()
            self.cancel()
            self.core.plan(self.tick())
            self.core.take_outputs()
        if self.rng.random() < 0.3:
            self.facts = msgspec.structs.replace(self.facts, num_blocks=self.rng.randint(20, 30))
        self.join()

    def frontend_lost(self) -> None:
        self.core.frontend_lost(self.rng.randrange(3), self.tick())

    def idle(self) -> None:
        """A while in which nothing happens; deadlines pass."""
        self.now += self.rng.randrange(50 * MS)
