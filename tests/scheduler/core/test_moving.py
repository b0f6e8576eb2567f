"""Requests that one core gives to another: every one gets the tokens of an undisturbed run, and what it stands accused of goes
along."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from scheduler.core import Core, CoreConfig
from scheduler.core.arrival import Elsewhere
from scheduler.core.config import TenantLimits
from scheduler.core.request import State
from scheduler.recorder import Recorded, RecordingFile
from scheduler.recording import Recording
from scheduler.replay import Replay
from tests.helpers.core_driver import CoreDriver, Tracked
from tests.helpers.fake_worker import FakeWorker, worker_facts
from wire import AddHeader, AddRequest, EndReason, MovedRequest, Refused, SamplingSpec, WorkerFacts, decode, encode

CONFIG = CoreConfig(max_batch_rows=6, max_step_tokens=24, max_unread_tokens=8)
FACTS = worker_facts(num_blocks=40)
POISON = 999


class Moving(CoreDriver):
    """Whose requests go to another core when the worker is lost, as those of a group without a worker do."""

    def __init__(
        self, config: CoreConfig = CONFIG, facts: WorkerFacts = FACTS, made: Callable[[CoreConfig], Any] = Core
    ) -> None:
        self._made = made
        super().__init__(config, facts)
        self.core = made(config)
        self.joined()

    def joined(self, facts: WorkerFacts | None = None) -> None:
        super().joined(facts)
        self.worker = FakeWorker(self.facts, self.core.epoch, self.core.config.group)

    def moved(self, facts: WorkerFacts | None = None, *, late: bool = False) -> None:
        """facts: of the other core's worker, if it is another one. late: it comes after the requests."""
        self.lost()
        old = self.core
        alive = {request.request_id: request.siblings for request in self._alive()}
        self.core = self._made(replace(old.config, group=old.config.group + 1))
        self._in_slot, self.num_refused, self.num_accepted, self.requests = {}, 0, 0, []
        self.joined(facts)
        if late:
            self.lost()
        tried = [request.request_id for trial in old.trials.trials for request in trial]
        for name in [*tried, *(name for name in alive if name not in tried)]:
            siblings = alive[name]
            given = decode(encode(old.give(siblings[0].frontend, siblings[0].handle, self._pass_time())))
            assert isinstance(given, MovedRequest)
            self.core.take(given, siblings[0].frontend, self._pass_time())
            self.num_accepted += 1
            for request in siblings:
                request.sequence_id = len(self.requests)
                self.requests.append(request)
        old.check_invariants()
        assert old.is_idle and not old.take_outputs() and not old.trials.trials and not old.next_wakeup_ns
        if late:
            self.joined()
        self.check()

    def run_out(self) -> None:
        """All get everything."""
        for _ in range(5_000):
            self._take_all()
            if not self.turn():
                break
        assert self.core.is_idle and all(request.over for request in self.requests)
        assert self.core.load(0).held_blocks == 0
        for request in self.requests:
            assert request.end is not None
            assert request.end.reason is not EndReason.LENGTH or request.got == request.expected


def prompt(length: int, seed: int) -> list[int]:
    return [random.Random(seed).randrange(1000) for _ in range(length)]


@pytest.mark.parametrize("policy", ["continuous", "static", "prefill_first"])
@pytest.mark.parametrize("seed", range(12))
def test_requests_that_change_their_core_at_any_moment_lose_no_token(policy: str, seed: int) -> None:
    dice = random.Random(seed)
    driver = Moving(replace(CONFIG, policy=policy))
    for number in range(25):
        for _ in range(dice.randrange(3)):
            driver.accepted(
                prompt(dice.randint(1, 40), dice.randrange(5)),
                dice.randint(1, 25),
                frontend=dice.randrange(2),
                priority=dice.randint(1, 3),
                num_outputs=dice.choice([1, 1, 1, 3]),
                salt=dice.choice([None, "salt"]),
                request_id=f"{seed}-{number}-{dice.random()}",
            )
        for _ in range(dice.randrange(4)):
            driver.turn()
        if dice.randrange(3):
            driver._take_all()
        if not dice.randrange(4):
            driver.moved(late=bool(dice.randrange(2)))
    driver.moved(msgspec.structs.replace(FACTS, block_size=2 * FACTS.block_size))
    driver.run_out()


def poisoned(max_crashes: int = 2) -> Moving:
    config = CoreConfig(max_batch_rows=8, max_step_tokens=64, max_crashes=max_crashes)
    driver = Moving(config, worker_facts(num_blocks=128, max_batch_rows=8, max_step_tokens=64))
    for i in range(8):
        driver.accepted([i + 1, POISON if i == 5 else 1], 6)
    return driver


@pytest.mark.parametrize("stays", [0, 2, 3])
def test_who_crashes_workers_is_found_in_as_many_crashes_wherever_it_goes(stays: int) -> None:
    """stays: every so many crashes it stays with its core."""
    driver = poisoned()
    first, crashes = list(driver.requests), 0
    for _ in range(5_000):
        driver._take_all()
        while driver.plan() is not None:
            pass
        if not driver.core.in_flight:
            break
        if any(name == "r5" for name in driver.computing()):
            crashes += 1
            if stays and crashes % stays == 0:
                driver.lost()
                driver.joined()
            else:
                driver.moved()
        else:
            driver.answer()
    reasons = [request.end.reason for request in first if request.end is not None]
    assert reasons == [EndReason.ERROR if i == 5 else EndReason.LENGTH for i in range(8)]
    assert crashes <= 2 + math.ceil(math.log2(8)) + 2


def test_who_is_tried_stays_apart_in_the_other_core() -> None:
    driver = poisoned()
    for _ in range(2):
        driver.plan()
        driver.moved()
    assert driver.core.trials.groups == [["r0", "r1", "r2", "r3"], ["r4", "r5", "r6", "r7"]]
    driver.plan()
    assert driver.computing() == ["r0", "r1", "r2", "r3"]


def test_one_that_got_past_it_is_accused_no_more() -> None:
    driver = poisoned()
    driver.plan()
    driver.moved()
    assert driver.core.trials.has_suspects
    driver.turn(), driver.turn()
    assert not driver.core.trials.has_suspects
    for _ in range(3):
        driver.moved()
        driver.turn(), driver.turn()
        assert driver.core.trials.groups == []


def test_order_class_credit_and_the_account_of_its_time_go_along() -> None:
    driver = Moving()
    first = driver.accepted(prompt(3, 1), 40, request_id="unread")
    urgent = driver.accepted(prompt(3, 2), 40, priority=3, request_id="urgent")
    for _ in range(14):
        driver.turn()
    driver.credit((urgent, len(urgent.got)))
    waiting = driver.accepted(prompt(20, 3), 5, request_id="waiting")
    assert len(first.got) == 8, "as far as its reader lets it"
    before = driver.core.request("urgent").sequences[0]
    taken, admitted, first_token = len(urgent.got), before.admitted_ns, before.first_token_ns
    driver.moved()
    states = {name: driver.core.request(name).sequences[0].state for name in ("unread", "urgent", "waiting")}
    assert states == {"unread": State.PARKED, "urgent": State.PREEMPTED, "waiting": State.WAITING}
    assert next(iter(driver.next_rows())) == "urgent" and waiting.got == []
    moved = driver.core.request("urgent").sequences[0]
    assert (moved.admitted_ns, moved.first_token_ns, int(driver.core.rows.taken[moved.slot])) == (admitted, first_token, taken)
    driver.credit((first, 8))
    driver.run_out()
    assert urgent.end is not None and urgent.end.stats.recomputed_tokens > 0 and urgent.end.stats.preemptions == 0


def test_a_deadline_goes_along_and_rings_in_one_core_only() -> None:
    driver = Moving()
    request = driver.accepted(prompt(10, 1), 100, deadline_ns=driver.now + 1_000_000)
    for _ in range(6):
        driver.turn()
    driver.moved()
    assert driver.core.next_wakeup_ns
    driver.now += 2_000_000
    driver.plan()
    assert request.end is not None and request.end.reason is EndReason.DEADLINE


def test_only_what_holds_no_row_can_be_given() -> None:
    driver = Moving()
    driver.accepted(prompt(10, 1), 10, request_id="runs")
    driver.turn()
    driver.accepted(prompt(10, 1), 10, request_id="waits")
    assert not driver.core.can_give(driver.core.request("runs")) and driver.core.can_give(driver.core.request("waits"))


def test_one_that_waits_may_leave_a_core_that_computes() -> None:
    driver = Moving(replace(CONFIG, max_batch_rows=1))
    runs = driver.accepted(prompt(5, 1), 6)
    driver.turn()
    waits = driver.accepted(prompt(5, 2), 6)
    driver.turn()
    given = driver.core.give(waits.frontend, waits.handle, driver._pass_time())
    driver.requests.remove(waits)
    driver.num_accepted -= 1
    driver.run_out()
    assert runs.got == runs.expected and len(given.prompt) == 5


def test_the_limits_of_all_cores_are_one() -> None:
    tenants = (TenantLimits("few", max_requests=2), TenantLimits("slow", max_requests_per_s=2), TenantLimits("*"))
    core = Core(CoreConfig(max_queue_requests=4, max_queue_tokens=100, tenants=tenants))
    core.worker_joined(FACTS, 0)

    def add(handle: int, tenant: str = "", **others: int) -> str:
        header = AddHeader(handle, str(handle), 0, 2, 4, SamplingSpec(0.0, 0, 1.0, 0.0, 0), tenant=tenant)
        answer = core.add(AddRequest(header, np.arange(10, dtype=np.int32)), 0, 0, Elsewhere(**others))
        return answer.message if isinstance(answer, Refused) else ""

    assert add(1, waiting_requests=3) == ""
    assert add(2, waiting_requests=3) == "4 requests with 10 prompt tokens wait already"
    assert add(3, waiting_requests=1, waiting_tokens=81) == "2 requests with 91 prompt tokens wait already"
    assert add(4, "few", tenant_requests=1) == ""
    assert "may have 2 requests at a time" in add(5, "few", tenant_requests=1)
    second = 1_000_000_000
    assert "may send 2 requests a second" in add(6, "slow", tenant_due_ns=second)
    assert add(7, "slow", tenant_due_ns=second // 2) == ""
    assert core.tenants.standing("slow") == (1, second) and core.tenants.standing("few")[0] == 1
    assert core.tenants.standing("nobody") == (0, 0)


def test_recordings_of_both_cores_replay(tmp_path: Path) -> None:
    made: list[RecordingFile] = []

    def recorded(config: CoreConfig) -> Recorded:
        made.append(RecordingFile(tmp_path / f"{len(made)}.rec", config))
        return Recorded(Core(config), made[-1])

    driver = Moving(made=recorded)
    for seed in range(9):
        driver.accepted(prompt(12, seed), 15, salt="salt", num_outputs=1 + seed % 2)
    for _ in range(2):
        for _ in range(6):
            driver.turn()
        driver.moved()
    driver.run_out()
    for number, file in enumerate(made):
        file.close()
        recording = Recording(tmp_path / f"{number}.rec")
        report = Replay(recording.header).run(recording.events())
        assert report.same and report.requests == 9 and report.steps > 0, report


def test_every_output_of_a_request_that_moved_is_known_by_its_handle() -> None:
    driver = Moving()
    request: Tracked = driver.accepted(prompt(5, 1), 12, num_outputs=3)
    one, other, _ = request.siblings
    while len(other.got) < 3:
        driver.turn()
    driver.truncate(one, 2)
    driver.moved()
    assert all(driver.core.has_handle(each.frontend, each.handle) for each in request.siblings)
    driver.abort(other)
    assert driver.core.is_idle
