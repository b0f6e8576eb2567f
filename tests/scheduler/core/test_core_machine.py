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
from scheduler.core.config import TenantLimits
from scheduler.core.request import State
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
    num_outputs: int
    salt: str | None
    tenant: str
    time_left: int  # nanoseconds to its deadline; 0: none
    partial: bool


def prompt(length: int, seed: int) -> list[int]:
    return [(seed * 31 + 7 * i * i + i) % VOCAB for i in range(length)]


arrivals = st.builds(
    Arrival,
    prompt=st.builds(
        prompt,
        st.one_of(st.integers(1, 8), st.integers(4, 12), st.integers(1, 40)),
        st.one_of(st.integers(0, 2), st.integers(0, 10**6)),  # often the beginning of another's
    ),
    max_tokens=st.one_of(st.integers(4, 12), st.integers(4, 12), st.integers(0, 40)),
    priority=st.integers(1, 3),
    frontend=st.integers(0, 2),
    stop=st.sampled_from([(), (), (), (3,), (0, 49), tuple(range(12)), tuple(range(0, 50, 3))]),
    min_tokens=st.integers(0, 3),
    num_outputs=st.sampled_from([1, 1, 1, 2, 4]),
    salt=st.sampled_from(["", "", "", "x", None]),
    tenant=st.sampled_from(["a", "a", "b", "c"]),
    time_left=st.sampled_from([0, 0, 0, 0, 200, 3000]),
    partial=st.booleans(),
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
        max_crashes=st.integers(1, 3),
        max_preemptions=st.sampled_from([0, 1, 3]),
        max_unread_tokens=st.sampled_from([1000, 1000, 1, 3]),
        quota=st.sampled_from([0, 0, 0, 7]),
        num_host_blocks=st.sampled_from([0, 0, 5, 30]),
        target_itl_ns=st.sampled_from([0, 1000]),
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
        max_preemptions: int,
        max_unread_tokens: int,
        quota: int,
        num_host_blocks: int,
        target_itl_ns: int,
    ) -> None:
        config = CoreConfig(
            policy=self.policy,
            max_batch_rows=rows,
            max_step_tokens=budget,
            max_queue_requests=max_queue_requests,
            max_queue_tokens=max_queue_tokens,
            static_batch_size=static_batch_size,
            max_crashes=max_crashes,
            max_preemptions=max_preemptions,
            max_unread_tokens=max_unread_tokens,
            tenants=(TenantLimits("a", weight=2), TenantLimits("b", max_blocks=quota), TenantLimits("*")),
            target_itl_ns=target_itl_ns,
            oldest_every=4,
        )
        facts = worker_facts(
            num_blocks=num_blocks,
            block_size=block_size,
            max_model_len=max_model_len,
            vocab_size=VOCAB,
            max_batch_rows=6,
            max_step_tokens=20,
            num_host_blocks=num_host_blocks,
            swap_block_ns=1,
        )
        self.driver = CoreDriver(config, facts)
        self.late: list[StepResult] = []  # results of workers that were given up

    @rule(some=st.lists(arrivals, min_size=1, max_size=5))
    def arrive(self, some: list[Arrival]) -> None:
        for one in some:
            expected = self.expected_refusal(one)
            now = self.driver.now
            answer = self.driver.add(
                one.prompt,
                one.max_tokens,
                priority=one.priority,
                frontend=one.frontend,
                stop=one.stop,
                min_tokens=one.min_tokens,
                num_outputs=one.num_outputs,
                salt=one.salt,
                tenant=one.tenant,
                deadline_ns=now + one.time_left if one.time_left else 0,
                partial=one.partial,
            )
            code = "" if isinstance(answer, Tracked) else answer.code
            assert code == expected or (one.time_left and code == "DEADLINE_EXCEEDED")

    def expected_refusal(self, one: Arrival) -> str:
        core, facts = self.driver.core, self.driver.facts
        num_prompt, max_tokens = len(one.prompt), one.max_tokens
        new = [request for request in core.live_requests() if request.sequences[0].state is State.WAITING]
        if core.draining:
            return "UNAVAILABLE"
        if num_prompt + max(max_tokens, 1) > facts.max_model_len:
            return "INVALID_ARGUMENT"
        quota = core.config.tenants[1].max_blocks if one.tenant == "b" else 0
        num_blocks = min(facts.num_blocks, quota) if quota else facts.num_blocks
        if num_prompt + max(max_tokens, 1) - 1 > num_blocks * facts.block_size:
            return "FAILED_PRECONDITION"
        full = len(new) >= core.config.max_queue_requests
        full |= sum(len(request.prompt) for request in new) + num_prompt > core.config.max_queue_tokens
        return "RESOURCE_EXHAUSTED" if full and new else ""

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

    @rule(data=st.data(), count=st.integers(1, 40))
    def readers_read(self, data: st.DataObject, count: int) -> None:
        behind = [request for request in self.driver.requests if request.got and not request.over]
        if behind:
            self.driver.credit((data.draw(st.sampled_from(behind)), count))

    @rule(name=st.sampled_from(["continuous", "static", "prefill_first", "none such"]))
    def another_policy(self, name: str) -> None:
        assert bool(self.driver.set_policy(name)) == (name == "none such")

    @rule(ticks=st.sampled_from([1, 20, 300]))
    def time_passes(self, ticks: int) -> None:
        self.driver.now += ticks * self.driver.tick

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
            over = all(sibling.over for sibling in request.siblings)
            expected = CancelOutcome.ALREADY_FINISHED if over else CancelOutcome.CANCELLED
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
