"""Poison requests: who crashes the worker is found by halving, everybody else ends with the tokens of an undisturbed run."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.core import CoreConfig
from tests.helpers.core_driver import CoreDriver, Tracked
from tests.helpers.fake_worker import worker_facts
from wire import EndReason

POISON = 999


def driver(*, rows: int = 8, max_crashes: int = 2, policy: str = "continuous", **limits: int) -> CoreDriver:
    config = CoreConfig(policy=policy, max_batch_rows=rows, max_step_tokens=8 * rows, max_crashes=max_crashes, **limits)
    return CoreDriver(config, worker_facts(num_blocks=16 * rows, max_batch_rows=rows, max_step_tokens=8 * rows))


def run(core: CoreDriver, *, together: bool = False, at_output: int = 0, max_turns: int = 5_000) -> None:
    """Until nothing is left. The worker dies at each step that computes a poisoned request which has so many outputs; together:
    only when it computes two of them."""
    for _ in range(max_turns):
        core._take_all()
        while core.plan() is not None:
            pass
        if not core.core.in_flight:
            break
        poisoned = [
            name
            for name in core.computing()
            if any(r.request_id == name and POISON in r.prompt and len(r.got) >= at_output for r in core.requests)
        ]
        if len(poisoned) >= 1 + together:
            core.lost()
            core.joined()
        else:
            core.answer()
    core.finish()


def ends(core: CoreDriver) -> dict[str, EndReason]:
    return {request.request_id: request.end.reason for request in core.requests if request.end is not None}


def fill(core: CoreDriver, count: int, poisoned: set[int], max_tokens: int = 6) -> list[Tracked]:
    return [core.accepted([i + 1, POISON if i in poisoned else 1], max_tokens) for i in range(count)]


@pytest.mark.parametrize("policy", ["continuous", "static", "prefill_first"])
@pytest.mark.parametrize("culprit", range(8))
def test_the_culprit_fails_alone_and_the_others_get_all_their_tokens(culprit: int, policy: str) -> None:
    core = driver(policy=policy)
    fill(core, 8, {culprit})
    run(core)
    for i in range(8):
        assert ends(core)[f"r{i}"] is (EndReason.ERROR if i == culprit else EndReason.LENGTH)
    end = core.requests[culprit].end
    assert end is not None and end.message == "the worker failed 2 times while it computed this request alone"


@pytest.mark.parametrize("rows", [1, 2, 8, 32, 64])
def test_one_among_n_is_found_in_about_log_n_crashes(rows: int) -> None:
    core = driver(rows=rows)
    fill(core, rows, {rows // 3})
    run(core)
    assert len(core.crashes) <= 2 + math.ceil(math.log2(rows)) + 2  # not all are in the first one
    assert core.crashes[-1] == [f"r{rows // 3}"]


def test_the_halves_are_those_of_the_crash_by_arrival_and_who_got_past_it_runs_along() -> None:
    core = driver()
    fill(core, 8, {6})
    run(core)
    names = [f"r{i}" for i in range(8)]
    assert core.crashes == [names, names, names, ["r4", "r5", "r6", "r7"], ["r6"], ["r6"]]


def test_several_culprits_are_all_found() -> None:
    core = driver()
    fill(core, 8, {0, 3, 7})
    run(core)
    failed = {name for name, reason in ends(core).items() if reason is EndReason.ERROR}
    assert failed == {"r0", "r3", "r7"}


def test_poison_that_works_late_loses_no_token_that_came_before() -> None:
    core = driver()
    fill(core, 4, {2}, max_tokens=9)
    run(core, at_output=4)
    assert ends(core)["r2"] is EndReason.ERROR and len(core.requests[2].got) == 4
    assert [len(request.got) for request in core.requests] == [9, 9, 4, 9]


def test_those_who_crash_it_only_together_all_end_well() -> None:
    core = driver()
    fill(core, 6, {1, 4})
    run(core, together=True)
    assert set(ends(core).values()) == {EndReason.LENGTH}


def test_one_crash_blames_nobody_and_a_second_one_later_neither() -> None:
    core = driver()
    fill(core, 4, set(), max_tokens=30)
    for _ in range(8):
        core.turn(), core.turn(), core.turn(), core.turn()
        core.lost()
        core.joined()
        assert core.core.trials.groups == [], "they still run together"
    core.finish()
    assert set(ends(core).values()) == {EndReason.LENGTH}


def test_kills_from_outside_while_a_half_is_tried_end_nobody_who_gets_on_between_them() -> None:
    core = driver()
    fill(core, 4, set(), max_tokens=12)
    for turns in (1, 1, 1, 3, 1, 3):
        for _ in range(turns):
            core.turn()
        core.lost()
        core.joined()
    core.finish()
    assert set(ends(core).values()) == {EndReason.LENGTH}


def test_while_a_half_is_tried_everybody_else_waits() -> None:
    core = driver()
    fill(core, 4, {0})
    core.plan(), core.lost(), core.joined()
    core.plan(), core.lost(), core.joined()
    core.accepted([50], 3, request_id="new", priority=3)
    assert list(core.next_rows()) == ["r0", "r1"]
    assert core.core.trials.groups == [["r0", "r1"], ["r2", "r3"]]
    run(core)
    assert ends(core)["new"] is EndReason.LENGTH


def test_a_worker_that_is_lost_while_it_computes_nothing_blames_nobody() -> None:
    core = driver(max_crashes=1)
    core.accepted([1, 2], 5)
    core.step()
    for _ in range(4):
        core.lost()
        core.joined()
    assert not core.core.trials.has_suspects
    core.finish()
    assert ends(core) == {"r0": EndReason.LENGTH}


def test_one_who_waits_is_not_to_blame() -> None:
    core = driver(rows=1, max_crashes=1)
    core.accepted([1, POISON], 5), core.accepted([4], 5)
    run(core)
    assert ends(core) == {"r0": EndReason.ERROR, "r1": EndReason.LENGTH}


def test_a_failure_is_heard_when_a_new_worker_comes_before_the_loss_was_noticed() -> None:
    core = driver(max_crashes=1)
    core.accepted([1, 2], 9)
    core.plan()
    core.joined()
    assert ends(core) == {"r0": EndReason.ERROR}


def test_a_request_on_trial_that_nobody_reads_does_not_keep_the_others_waiting() -> None:
    core = driver(max_unread_tokens=2)
    slow = core.accepted([1, 2], 40)
    other = core.accepted([3, POISON], 6)
    for _ in range(6):  # only the second is read
        core.turn()
        core.credit((other, 1))
    assert len(slow.got) <= 2
    for _ in range(3):
        core.plan(), core.lost(), core.joined()
    run(core)
    assert ends(core)["r0"] is EndReason.LENGTH


def test_cancelling_the_one_on_trial_lets_the_others_in() -> None:
    core = driver()
    fill(core, 2, {0})
    for _ in range(3):
        core.plan(), core.lost(), core.joined()
    assert core.core.trials.groups[0] == ["r0"]
    core.cancel("r0")
    assert list(core.next_rows()) == ["r1"] and core.core.trials.groups == [["r1"]]
    run(core)
    assert core.core.trials.groups == [] and ends(core)["r1"] is EndReason.LENGTH


def test_outputs_of_one_request_are_tried_together() -> None:
    core = driver()
    core.accepted([5, 6, 7], 5, num_outputs=3)
    core.accepted([8, POISON], 5, num_outputs=3)
    run(core)
    by_request = {request.request_id: request.end.reason for request in core.requests if request.end}
    assert by_request == {"r0": EndReason.LENGTH, core.requests[3].request_id: EndReason.ERROR}


@settings(max_examples=60, deadline=None)
@given(
    poisoned=st.sets(st.integers(0, 9), max_size=3),
    at_output=st.integers(0, 4),
    rows=st.integers(1, 10),
    max_crashes=st.integers(1, 3),
    policy=st.sampled_from(["continuous", "static", "prefill_first"]),
)
def test_whoever_is_poisoned_exactly_those_fail(
    poisoned: set[int], at_output: int, rows: int, max_crashes: int, policy: str
) -> None:
    core = driver(rows=rows, max_crashes=max_crashes, policy=policy)
    fill(core, 10, poisoned)
    run(core, at_output=at_output)
    assert {int(name[1:]) for name, reason in ends(core).items() if reason is EndReason.ERROR} == poisoned
