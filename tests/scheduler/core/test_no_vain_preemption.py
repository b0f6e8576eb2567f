"""Preemptions that would be in vain, and admissions that would bring them: none of them happens."""

from __future__ import annotations

import pytest

from scheduler.core import CoreConfig
from tests.helpers.core_driver import CoreDriver
from tests.helpers.fake_worker import worker_facts

BATCH, NORMAL, INTERACTIVE = 1, 2, 3


def driver(num_blocks: int, *, rows: int = 8, **config: object) -> CoreDriver:
    facts = worker_facts(num_blocks=num_blocks, block_size=4, max_batch_rows=rows, max_step_tokens=256)
    return CoreDriver(CoreConfig(max_batch_rows=rows, max_step_tokens=32, **config), facts)  # type: ignore[arg-type]


def preempted(core: CoreDriver) -> list[str]:
    return [request_id for request_id, reason in core.core.leaves if reason == "preempted"]


def turn(core: CoreDriver) -> dict[str, int]:
    rows = core.next_rows()
    if core.core.in_flight:
        core.answer()
    return rows


@pytest.mark.parametrize("length", range(1, 17))
@pytest.mark.parametrize("num_running", [1, 2, 3])
def test_nobody_is_admitted_who_has_to_go_at_once(length: int, num_running: int) -> None:
    core = driver(8)
    for i in range(num_running):
        core.accepted([i] * 3, 12, request_id=f"runs{i}")
    core.step()
    core.accepted(range(length), 2, request_id="joins")
    joined_at = {}
    for number in range(40):
        for name in turn(core):
            joined_at.setdefault(name, number)
        if preempted(core):
            assert number - joined_at.get("joins", -2) >= 2, preempted(core)
            break
    core.finish()


def test_at_the_turn_of_who_waits_longest_nobody_older_gives_way_to_him() -> None:
    core = driver(20, rows=1, oldest_every=2)
    core.accepted([1], 9, request_id="old", priority=BATCH)
    core.step()
    core.accepted([2], 2, request_id="urgent", priority=INTERACTIVE)
    for _ in range(40):
        turn(core)
    assert core.core.is_idle
    old = core.requests[0].end.stats
    assert old.preemptions == 0


def test_at_the_turn_of_who_waits_longest_it_is_he_who_takes_the_row() -> None:
    core = driver(20, rows=1, oldest_every=2)
    core.accepted([1], 9, request_id="old", priority=BATCH)
    core.step()
    core.accepted([2], 2, request_id="urgent", priority=INTERACTIVE)
    seen = []
    for _ in range(6):
        seen += turn(core)
    if preempted(core):
        assert seen[0] == "urgent" or seen[1] == "urgent", seen
    core.finish()


def test_who_is_about_to_end_is_not_preempted_to_make_room() -> None:
    core = driver(20, rows=1)
    core.accepted([1], 2, request_id="ending", priority=BATCH)
    core.next_rows(), core.next_rows()
    core.answer()
    core.accepted([2], 2, request_id="urgent", priority=INTERACTIVE)
    core.plan()
    assert preempted(core) == []
    core.answer()
    assert core.next_rows() == {"urgent": 1}
    core.finish()


def test_nobody_loses_its_row_when_another_is_about_to_be_free() -> None:
    core = driver(20, rows=2)
    core.accepted([3], 9, request_id="goes on", priority=BATCH)
    core.accepted([1], 2, request_id="ending", priority=BATCH)
    core.next_rows(), core.next_rows()
    core.answer()
    core.accepted([2], 2, request_id="urgent", priority=INTERACTIVE)
    core.plan()
    assert preempted(core) == []
    core.answer()
    assert "urgent" in core.next_rows()
    core.finish()


def test_nobody_is_preempted_for_blocks_that_others_share() -> None:
    core = driver(8)
    core.accepted(range(17), 9, request_id="equal", priority=INTERACTIVE, salt="")
    core.step()
    core.accepted(range(17), 6, request_id="low", priority=BATCH, salt="")
    core.step()
    core.accepted(range(100, 119), 3, request_id="wide", priority=INTERACTIVE)
    core.step()
    core.step()
    assert preempted(core) == []
    core.finish()
