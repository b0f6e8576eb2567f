"""A core that begins with what another one had: every request gets the tokens of an undisturbed run, none twice."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from scheduler.core import Core, CoreConfig
from scheduler.core.config import TenantLimits
from scheduler.recorder import Recorded, RecordingFile
from scheduler.recording import Recording
from scheduler.replay import Replay
from tests.helpers.core_driver import CoreDriver, Tracked
from tests.helpers.fake_worker import worker_facts
from wire import EndReason, RestoreHeader, RestoreRequest

CONFIG = CoreConfig(max_batch_rows=6, max_step_tokens=24, max_unread_tokens=8)
FACTS = worker_facts(num_blocks=40)


class Surviving(CoreDriver):
    """Its core may die; whoever drives it goes on with another one."""

    def __init__(self, config: CoreConfig = CONFIG, made: Callable[[CoreConfig], Any] = Core) -> None:
        self._made = made
        super().__init__(config, FACTS)

    def core_lost(self, config: CoreConfig | None = None) -> list[str]:
        """What the journal holds goes into a new core, and the worker comes to it. Returns why some could not go on."""
        old, whys = self.core, []
        alive = list({id(request.siblings): request.siblings for request in self._alive()}.values())
        self.core = self._made(replace(config or old.config, first_epoch=old.epoch + 1))
        self.worker, self._in_slot, self.requests = None, {}, [request for siblings in alive for request in siblings]
        self.num_accepted, self.num_refused = len(alive), 0
        for number, request in enumerate(self.requests):
            request.sequence_id, request.crashes_alone, request.crashes_in_a_row = number, 0, 0
        for siblings in alive:
            header = RestoreHeader(old.request(siblings[0].request_id).header, tuple(request.end for request in siblings))
            restored = RestoreRequest(
                header,
                prompt=np.array(siblings[0].prompt, np.int32),
                tokens=np.array([token for request in siblings for token in request.got], np.int32),
                num_tokens=np.array([len(request.got) for request in siblings], np.int32),
            )
            whys.append(self.core.restore(restored, siblings[0].frontend, self._pass_time()))
        if not any(whys):
            self.joined()
        return whys

    def run_out(self) -> None:
        """All get everything."""
        for _ in range(5_000):
            self._take_all()
            if not self.turn():
                break
        assert self.core.is_idle and all(request.over for request in self.requests)
        assert self.core.load(0).held_blocks == 0
        for request in self.requests:
            assert request.end is not None and request.end.reason is EndReason.LENGTH and request.got == request.expected


def prompt(length: int, seed: int) -> list[int]:
    return [random.Random(seed).randrange(1000) for _ in range(length)]


@pytest.mark.parametrize("policy", ["continuous", "static", "prefill_first"])
@pytest.mark.parametrize("seed", range(12))
def test_cores_that_die_at_any_moment_change_no_token(policy: str, seed: int) -> None:
    dice = random.Random(seed)
    driver = Surviving(replace(CONFIG, policy=policy))
    for number in range(25):
        for _ in range(dice.randrange(3)):
            driver.accepted(
                prompt(dice.randint(1, 40), dice.randrange(5)),
                dice.randint(1, 25),
                frontend=dice.randrange(2),
                num_outputs=dice.choice([1, 1, 1, 3]),
                salt=dice.choice([None, "salt"]),
                request_id=f"{seed}-{number}-{dice.random()}",
            )
        for _ in range(dice.randrange(4)):
            driver.turn()
        if not dice.randrange(4):
            driver.core_lost()
    driver.core_lost()
    driver.run_out()


def test_a_core_may_die_before_any_worker_has_come_to_it() -> None:
    driver = Surviving()
    some = [driver.accepted(prompt(20, seed), 12) for seed in range(3)]
    for _ in range(5):
        driver.turn()
    had = [list(request.got) for request in some]
    for _ in range(3):
        driver.core_lost()
    assert [request.got for request in some] == had and any(had)
    driver.run_out()


def test_who_had_tokens_goes_before_who_had_none() -> None:
    driver = Surviving()
    first = driver.accepted(prompt(3, 2), 20, request_id="first")
    while not first.got:
        driver.turn()
    driver.accepted(prompt(20, 1), 5, request_id="behind")
    driver.requests.reverse()
    driver.core_lost()
    assert list(driver.next_rows()) == ["first", "behind"]


def test_an_output_that_had_ended_stays_ended() -> None:
    driver = Surviving()
    request = driver.accepted(prompt(5, 1), 12, num_outputs=2)
    one, other = request.siblings
    while len(other.got) < 3:
        driver.turn()
    driver.truncate(one, 2)
    num_had = len(one.got)
    driver.core_lost()
    for _ in range(100):
        driver._take_all()
        if not driver.turn():
            break
    assert len(one.got) == num_had and other.got == other.expected


def test_a_request_without_a_limit_of_its_own_gets_what_the_new_worker_leaves() -> None:
    driver = Surviving()
    request = driver.accepted(prompt(10, 1))
    for _ in range(6):
        driver.turn()
    driver.core_lost()
    driver.run_out()
    assert len(request.got) == request.max_outputs


def test_a_deadline_that_passed_meanwhile_ends_it() -> None:
    driver = Surviving()
    request = driver.accepted(prompt(10, 1), 100, deadline_ns=driver.now + 1_000_000)
    for _ in range(6):
        driver.turn()
    assert request.got
    driver.now += 2_000_000
    driver.core_lost()
    driver.plan()
    assert request.end is not None and request.end.reason is EndReason.DEADLINE


def test_a_tenant_that_is_not_served_any_more_is_named() -> None:
    driver = Surviving(replace(CONFIG, tenants=(TenantLimits("a"), TenantLimits("b"))))
    driver.accepted(prompt(10, 1), 5, tenant="a")
    whys = driver.core_lost(replace(CONFIG, tenants=(TenantLimits("b"),)))
    assert whys == ["tenant 'a' is not served any more"]


def test_who_was_restored_can_be_asked_for_and_ended() -> None:
    driver = Surviving()
    request: Tracked = driver.accepted(prompt(10, 1), 50)
    for _ in range(6):
        driver.turn()
    driver.core_lost()
    driver.cancel(request.request_id)
    assert request.end is not None and request.end.reason is EndReason.CANCELLED
    assert msgspec.structs.asdict(request.end.stats)["output_tokens"] == len(request.got)


def test_a_recording_that_begins_with_restored_requests_replays(tmp_path: Path) -> None:
    made: list[RecordingFile] = []

    def recorded(config: CoreConfig) -> Recorded:
        made.append(RecordingFile(tmp_path / f"{len(made)}.rec", config))
        return Recorded(Core(config), made[-1])

    driver = Surviving(made=recorded)
    driver.core = recorded(driver.core.config)
    driver.joined()
    for seed in range(4):
        driver.accepted(prompt(12, seed), 15, salt="salt")
    for _ in range(6):
        driver.turn()
    driver.core_lost()
    driver.run_out()
    made[-1].close()
    recording = Recording(tmp_path / f"{len(made) - 1}.rec")
    report = Replay(recording.header).run(recording.events())
    assert report.same and report.requests == 4, report
