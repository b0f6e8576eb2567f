"""The core under any order of inputs: the driver holds the laws after each, and every request gets what a run alone gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from scheduler.core import CoreConfig
from tests.helpers.core_driver import CoreDriver, Tracked
from tests.helpers.fake_worker import worker_facts
from wire import CancelOutcome, StepResult

VOCAB = 50  # small, so that end tokens are drawn often


@dataclass(frozen=True)
class Arrival:
    prompt: list[int]
    max_tokens: int
    priority: int
    frontend: int
    stop: Sequence[int]
    min_tokens: int


def prompt(length: int, seed: int) -> list[int]:
    return [(seed * 31 + 7 * i * i + i) % VOCAB for i in range(length)]


arrivals = st.builds(
    Arrival,
    prompt=st.builds(prompt, st.one_of(st.integers(1, 8), st.integers(4, 12), st.integers(1, 40)), st.integers(0, 10**6)),
    max_tokens=st.one_of(st.integers(4, 12), st.integers(4, 12), st.integers(0, 40)),
    priority=st.integers(1, 3),
    frontend=st.integers(0, 2),
    stop=st.sampled_from([(), (), (), (3,), (0, 49), tuple(range(12)), tuple(range(0, 50, 3))]),
    min_tokens=st.integers(0, 3),
)


class CoreMachine(RuleBasedStateMachine):
    policy = "continuous"

    @initialize(
        rows=st.integers(1, 7),
        budget=st.integers(1, 23),
        block_size=st.sampled_from([2, 3, 4, 1]),
        num_blocks=st.integers(8, 20),
        max_model_len=st.integers(20, 60),
        max_queue_requests=st.sampled_from([100, 100, 100, 3]),
        max_queue_tokens=st.sampled_from([10_000, 10_000, 10_000, 20]),
        static_batch_size=st.integers(0, 5),
        max_crashes=st.integers(0, 3),
    )
    def set_up(
        self,
        rows: int,
        budget: int,
        block_size: int,
        num_blocks: int,
        max_model_len: int,
        max_queue_requests: int,
        max_queue_tokens: int,
        static_batch_size: int,
        max_crashes: int,
    ) -> None:
        config = CoreConfig(
            policy=self.policy,
            max_batch_rows=rows,
            max_step_tokens=budget,
            max_queue_requests=max_queue_requests,
            max_queue_tokens=max_queue_tokens,
            static_batch_size=static_batch_size,
            max_crashes=max_crashes,
        )
        facts = worker_facts(
            num_blocks=num_blocks,
            block_size=block_size,
            max_model_len=max_model_len,
            vocab_size=VOCAB,
            max_batch_rows=6,
            max_step_tokens=20,
        )
        self.driver = CoreDriver(config, facts)
        self.late: list[StepResult] = []  # results of workers that were given up

    @rule(some=st.lists(arrivals, min_size=1, max_size=5))
    def arrive(self, some: list[Arrival]) -> None:
        for one in some:
            expected = self.expected_refusal(len(one.prompt), one.max_tokens)
            answer = self.driver.add(
                one.prompt,
                one.max_tokens,
                priority=one.priority,
                frontend=one.frontend,
                stop=one.stop,
                min_tokens=one.min_tokens,
            )
            assert expected == ("" if isinstance(answer, Tracked) else answer.code)

    def expected_refusal(self, num_prompt: int, max_tokens: int) -> str:
        core, facts = self.driver.core, self.driver.facts
        waiting = core.load(0)
        if core.draining:
            return "UNAVAILABLE"
        if num_prompt + max(max_tokens, 1) > facts.max_model_len:
            return "INVALID_ARGUMENT"
        if num_prompt + max(max_tokens, 1) - 1 > facts.num_blocks * facts.block_size:
            return "FAILED_PRECONDITION"
        full = waiting.waiting_requests >= core.config.max_queue_requests
        full |= waiting.waiting_tokens + num_prompt > core.config.max_queue_tokens
        return "RESOURCE_EXHAUSTED" if full and waiting.waiting_requests else ""

    @rule(moves=st.lists(st.booleans(), min_size=1, max_size=12))
    def plans_and_answers(self, moves: list[bool]) -> None:
        """In any order: answers may be late."""
        for plans in moves:
            if plans:
                self.driver.plan()
            elif self.driver.core.in_flight:
                self.driver.answer()

    @rule(turns=st.integers(1, 15))
    def turn(self, turns: int) -> None:
        for _ in range(turns):
            self.driver.turn()

    @precondition(lambda self: self.driver.requests)
    @rule(data=st.data(), how=st.sampled_from(["cancel", "abort", "truncate"]))
    def end_one(self, data: st.DataObject, how: str) -> None:
        """Somebody's request ends before its time, or has ended already."""
        request = data.draw(st.sampled_from(self.driver.requests[-8:]))
        if how == "abort":
            self.driver.abort(request)
        elif how == "truncate":
            self.driver.truncate(request, data.draw(st.integers(0, len(request.got))))
        else:
            expected = CancelOutcome.ALREADY_FINISHED if request.over else CancelOutcome.CANCELLED
            assert self.driver.cancel(request.request_id) is expected

    @rule(
        what=st.sampled_from(["none", "failed", "lost", "joined", "frontend", "smaller", "drain"]), frontend=st.integers(0, 2)
    )
    def trouble(self, what: str, frontend: int) -> None:
        driver = self.driver
        if what == "frontend":
            driver.frontend_lost(frontend)
        elif what == "drain" and len(driver.requests) > 12:
            driver.core.drain()
        elif what == "failed" and driver.core.in_flight:
            self.remember_late_results()
            driver.step_failed()
        elif what == "lost":
            self.remember_late_results()
            driver.lost()
        elif what == "joined":  # after a loss, or in place of one whose loss was not noticed
            self.remember_late_results()
            driver.joined()
        elif what == "smaller":
            self.remember_late_results()
            facts = driver.facts
            driver.joined(msgspec.structs.replace(facts, num_blocks=max(2, facts.num_blocks - 2)))

    def remember_late_results(self) -> None:
        if self.driver.worker is not None:
            self.late += [step.result for step in self.driver.worker.unanswered]

    @precondition(lambda self: self.late)
    @rule()
    def a_late_result_is_ignored(self) -> None:
        before = self.driver.core.load(0)
        assert self.driver.core.apply(self.late.pop(), self.driver.now) == []
        assert self.driver.core.load(0) == before
        self.driver.check()

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            self.driver.finish()


class StaticMachine(CoreMachine):
    policy = "static"


class LongCoreMachine(CoreMachine):
    pass


class LongStaticMachine(StaticMachine):
    pass


_quick = settings(max_examples=120, stateful_step_count=40, deadline=None, derandomize=True, database=None)
_long = settings(max_examples=400, stateful_step_count=80, deadline=None, database=None, print_blob=True)

TestContinuous = CoreMachine.TestCase
TestStatic = StaticMachine.TestCase
TestContinuous.settings = TestStatic.settings = _quick
TestContinuousForLong = pytest.mark.slow(LongCoreMachine.TestCase)
TestStaticForLong = pytest.mark.slow(LongStaticMachine.TestCase)
TestContinuousForLong.settings = TestStaticForLong.settings = _long
