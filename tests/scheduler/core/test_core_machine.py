"""The core under any order of inputs: the driver holds the laws after each, and every request gets what a run alone gives."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from scheduler.core import CoreConfig
from tests.helpers.core_driver import CoreDriver, Tracked
from tests.helpers.fake_worker import worker_facts
from wire import CancelOutcome, StepResult

VOCAB = 50  # small, so that end tokens are drawn often
prompts = st.builds(
    lambda length, seed: [(seed * 31 + 7 * i * i + i) % VOCAB for i in range(length)], st.integers(1, 30), st.integers(0, 10**6)
)
stop_ids = st.one_of(st.just(()), st.sampled_from([(3,), (0, 49), tuple(range(12)), tuple(range(0, 50, 3))]))


class CoreMachine(RuleBasedStateMachine):
    policy = "continuous"

    @initialize(
        rows=st.integers(1, 7),
        budget=st.integers(1, 23),
        block_size=st.integers(1, 5),
        num_blocks=st.integers(5, 30),
        max_model_len=st.integers(12, 60),
        max_queue_requests=st.sampled_from([2, 5, 100]),
        max_queue_tokens=st.sampled_from([20, 100, 10_000]),
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

    @rule(
        prompt=prompts,
        max_tokens=st.integers(0, 30),
        priority=st.integers(1, 3),
        frontend=st.integers(0, 2),
        stop=stop_ids,
        min_tokens=st.integers(0, 3),
    )
    def arrive(
        self, prompt: list[int], max_tokens: int, priority: int, frontend: int, stop: Sequence[int], min_tokens: int
    ) -> None:
        expected = self.expected_refusal(len(prompt), max_tokens)
        answer = self.driver.add(prompt, max_tokens, priority=priority, frontend=frontend, stop=stop, min_tokens=min_tokens)
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

    @rule()
    def plan(self) -> None:
        self.driver.plan()

    @precondition(lambda self: self.driver.core.in_flight)
    @rule()
    def answer(self) -> None:
        self.driver.answer()

    @rule(turns=st.integers(1, 10))
    def run_on(self, turns: int) -> None:
        for _ in range(turns):
            self.driver.turn()

    @precondition(lambda self: self.driver.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.driver.abort(data.draw(st.sampled_from(self.driver.requests[-8:])))

    @precondition(lambda self: self.driver.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.driver.requests[-8:]))
        expected = CancelOutcome.ALREADY_FINISHED if request.over else CancelOutcome.CANCELLED
        assert self.driver.cancel(request.request_id) is expected

    @precondition(lambda self: self.driver.requests)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.driver.requests[-8:]))
        self.driver.truncate(request, data.draw(st.integers(0, len(request.got))))

    @rule(frontend=st.integers(0, 2), really=st.integers(0, 5))
    def frontend_lost(self, frontend: int, really: int) -> None:
        if not really:
            self.driver.frontend_lost(frontend)

    @precondition(lambda self: self.driver.core.in_flight)
    @rule()
    def step_failed(self) -> None:
        self.remember_late_results()
        self.driver.step_failed()

    @rule()
    def worker_lost(self) -> None:
        self.remember_late_results()
        self.driver.lost()

    @rule(shrink=st.sampled_from([0, 0, 0, 1, 4]))
    def worker_joined(self, shrink: int) -> None:
        """After a loss, or in place of one whose loss was not noticed."""
        self.remember_late_results()
        old = self.driver.facts
        self.driver.joined(
            worker_facts(
                num_blocks=max(2, old.num_blocks - shrink),
                block_size=old.block_size,
                max_model_len=old.max_model_len,
                vocab_size=VOCAB,
                max_batch_rows=6,
                max_step_tokens=20,
            )
        )

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

    @rule(really=st.integers(0, 15))
    def drain(self, really: int) -> None:
        if not really:
            self.driver.core.drain()

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            self.driver.finish()


class StaticMachine(CoreMachine):
    policy = "static"


class LongCoreMachine(CoreMachine):
    pass


class LongStaticMachine(StaticMachine):
    pass


_quick = settings(max_examples=300, stateful_step_count=40, deadline=None, derandomize=True, database=None)
_long = settings(max_examples=1500, stateful_step_count=100, deadline=None, database=None, print_blob=True)

TestContinuous = CoreMachine.TestCase
TestStatic = StaticMachine.TestCase
TestContinuous.settings = TestStatic.settings = _quick
TestContinuousForLong = pytest.mark.slow(LongCoreMachine.TestCase)
TestStaticForLong = pytest.mark.slow(LongStaticMachine.TestCase)
TestContinuousForLong.settings = TestStaticForLong.settings = _long
