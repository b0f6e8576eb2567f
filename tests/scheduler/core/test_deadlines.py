"""Deadlines, decision by decision: who is refused, who ends when, who goes first. Times are the driver's own; nothing waits."""

from __future__ import annotations

import pytest

from scheduler.core import CoreConfig
from scheduler.core.request import State
from tests.helpers.core_driver import CoreDriver, Tracked
from tests.helpers.fake_worker import worker_facts
from wire import EndReason, Refused

MS = 1_000_000
SECOND = 1000 * MS
BATCH, NORMAL, INTERACTIVE = 1, 2, 3


class Clocked(CoreDriver):
    """Time passes only while a step is computed: a nanosecond."""

    def answer(self) -> None:
        self.now += 1
        super().answer()


def driver(*, rows: int = 8, budget: int = 256, num_blocks: int = 200, **config: object) -> CoreDriver:
    facts = worker_facts(num_blocks=num_blocks, max_batch_rows=rows, max_step_tokens=256)
    core = Clocked(CoreConfig(max_batch_rows=rows, max_step_tokens=budget, **config), facts, tick=0)  # type: ignore[arg-type]
    return at(core, SECOND)


def learnt(**config: object) -> CoreDriver:
    """It has seen that a step takes 10 ms and 1 ms a token more."""
    core = driver(**config)  # type: ignore[arg-type]
    for num_tokens in (1, 100):
        core.core.step_cost.observe(num_tokens, 1, 0, (10 + num_tokens) * MS)
    return core


def at(core: CoreDriver, now: int) -> CoreDriver:
    core.now = now
    return core


def refusal(core: CoreDriver, num_prompt: int, left_ms: float, max_tokens: int = 4, **options: object) -> Refused | None:
    answer = core.add([1] * num_prompt, max_tokens, deadline_ns=core.now + int(left_ms * MS), **options)  # type: ignore[arg-type]
    if isinstance(answer, Refused):
        return answer
    core.cancel(answer.request_id)
    return None


def reason(request: Tracked) -> EndReason | None:
    return None if request.end is None else request.end.reason


# ------------------------------------------------------------------------------------------------------- at arrival


@pytest.mark.parametrize(("late_ms", "said"), [(5, "the deadline passed 5 ms ago"), (0, "the deadline passed")])
def test_a_deadline_already_past_is_refused(late_ms: int, said: str) -> None:
    core = driver()
    refused = refusal(core, 3, -late_ms)
    assert refused is not None and refused.code == "DEADLINE_EXCEEDED" and said in refused.message
    assert refused.details["estimate_ms"] == "0" and core.core.num_requests == 0
    assert core.core.next_wakeup_ns == 0


def test_while_no_step_was_measured_nothing_is_refused() -> None:
    core = driver()
    assert refusal(core, 100, 0.000001) is None
    assert refusal(core, 100, 0.000001, max_tokens=100, whole=True) is None


@pytest.mark.parametrize(("left_ms", "taken"), [(21, True), (19, False), (1, False)])
def test_whose_first_token_cant_come_in_time_is_refused_at_once_with_the_estimate(left_ms: int, taken: bool) -> None:
    core = learnt()
    refused = refusal(core, 10, left_ms)
    assert (refused is None) == taken
    if refused is not None:
        assert refused.code == "DEADLINE_EXCEEDED"
        assert refused.message == f"its first token would take about 20 ms, {left_ms} ms are left"
        assert refused.details == {"estimate_ms": "20", "left_ms": str(left_ms)}


@pytest.mark.parametrize(("left_ms", "taken"), [(125, True), (115, False), (25, False)])
def test_when_all_tokens_must_come_the_whole_length_counts(left_ms: int, taken: bool) -> None:
    core = learnt()
    assert refusal(core, 10, left_ms, max_tokens=10) is None, "its first token comes after 20 ms"
    refused = refusal(core, 10, left_ms, max_tokens=10, whole=True)
    assert (refused is None) == taken
    if refused is not None:
        assert refused.message == f"all its tokens would take about 119 ms, {left_ms} ms are left"
        assert refused.details == {"estimate_ms": "119", "left_ms": str(left_ms)}


def test_each_of_several_outputs_makes_the_steps_of_the_whole_longer() -> None:
    core = learnt()
    refused = refusal(core, 10, 25, max_tokens=10, whole=True, num_outputs=4)
    assert refused is not None and refused.details["estimate_ms"] == str(20 + 9 * 14)


def test_prompts_that_go_before_count_and_those_that_do_not_do_not() -> None:
    core = learnt()
    core.accepted([1] * 30, 4, priority=INTERACTIVE)
    core.accepted([1] * 20, 4, priority=NORMAL)
    core.accepted([1] * 40, 4, priority=BATCH)
    for priority, estimate in [(INTERACTIVE, 20), (NORMAL, 50), (BATCH, 70)]:
        refused = refusal(core, 10, 1, priority=priority)
        assert refused is not None and refused.details["estimate_ms"] == str(estimate), "its own class has no deadlines"


def test_of_its_own_class_those_with_an_earlier_deadline_go_before() -> None:
    core = learnt()
    core.accepted([1] * 30, 4, deadline_ns=core.now + 3 * SECOND)
    core.accepted([1] * 20, 4, deadline_ns=core.now + 9 * SECOND)
    core.accepted([1] * 60, 4)
    early, late = refusal(core, 10, 5, max_tokens=40), refusal(core, 100, 6000, max_tokens=150, whole=True, num_outputs=30)
    assert early is not None and early.details["estimate_ms"] == "20"
    assert late is not None and late.details["estimate_ms"] == str(140 + 149 * 40), "30 tokens of the first one's go before"


def test_admitted_prompts_that_are_not_computed_yet_count_too() -> None:
    core = learnt(budget=64)
    core.accepted([1] * 100, 4, priority=BATCH)
    core.plan()
    refused = refusal(core, 10, 1, priority=INTERACTIVE)
    assert refused is not None and refused.details["estimate_ms"] == str(10 + 36 + 10)


def test_a_request_that_is_too_large_is_told_so_whatever_its_deadline() -> None:
    core = learnt(num_blocks=4)
    refused = refusal(core, 40, -5)
    assert refused is not None and refused.code == "FAILED_PRECONDITION"


# --------------------------------------------------------------------------------------------------- while it waits


def full(core: CoreDriver) -> Tracked:
    """Somebody takes all rows for long."""
    running = at(core, SECOND - 10).accepted([1], 100, request_id="runs", priority=INTERACTIVE)
    core.step()
    at(core, SECOND)
    return running


def test_who_waits_ends_when_its_latest_start_has_passed() -> None:
    core = driver(rows=1)
    full(core)
    core.core.step_cost = learnt().core.step_cost
    waits = core.accepted([1] * 10, 4, deadline_ns=core.now + 100 * MS)
    latest = SECOND + 80 * MS
    assert abs(core.core.next_wakeup_ns - latest) <= 1
    at(core, latest - MS).plan()
    assert reason(waits) is None
    at(core, latest + 1).plan()
    assert waits.end is not None and waits.end.reason is EndReason.DEADLINE and waits.got == []
    assert waits.end.message == "its first token would take 20 ms, and 20 ms are left"
    assert core.core.next_wakeup_ns == 0 and len(core.core.queue) == 0
    core.finish()


def test_who_waits_and_wants_a_partial_answer_waits_until_it_must_end() -> None:
    core = driver(rows=1)
    full(core)
    core.core.step_cost = learnt().core.step_cost
    waits = core.accepted([1] * 10, 4, deadline_ns=core.now + 100 * MS, partial=True)
    at(core, SECOND + 81 * MS).plan()
    assert reason(waits) is None
    at(core, SECOND + 90 * MS).plan()
    assert reason(waits) is EndReason.DEADLINE
    core.finish()


def test_without_measured_costs_it_waits_until_its_deadline() -> None:
    core = driver(rows=1)
    full(core)
    core.core.step_cost = type(core.core.step_cost)()
    waits = core.accepted([1] * 10, 4, deadline_ns=core.now + 100 * MS)
    assert core.core.next_wakeup_ns == SECOND + 100 * MS
    at(core, SECOND + 100 * MS - 1).plan()
    assert reason(waits) is None
    at(core, SECOND + 100 * MS).plan()
    assert reason(waits) is EndReason.DEADLINE
    assert waits.end is not None and waits.end.message == "its deadline has passed"
    core.finish()


def test_who_was_admitted_in_time_outlives_its_latest_start() -> None:
    core = learnt()
    request = core.accepted([1] * 10, 100, deadline_ns=core.now + 100 * MS)
    core.plan()
    at(core, SECOND + 81 * MS).plan()
    assert reason(request) is None and core.core.next_wakeup_ns == SECOND + 100 * MS
    core.cancel(request.request_id)
    core.finish()


def test_deadlines_hold_while_no_worker_is_there() -> None:
    core = driver()
    request = core.accepted([1, 2], 9, deadline_ns=core.now + MS)
    core.step()
    core.lost()
    assert core.core.next_wakeup_ns == SECOND + MS
    assert at(core, SECOND + MS).plan() is None
    assert reason(request) is EndReason.DEADLINE and len(request.got) == 1
    core.finish()


def test_deadlines_hold_while_the_pipeline_is_full() -> None:
    core = driver()
    request = core.accepted([1, 2], 9, deadline_ns=core.now + MS)
    core.plan(), core.plan()
    assert at(core, SECOND + MS).plan() is None
    assert reason(request) is EndReason.DEADLINE and request.got == []
    core.finish()


# --------------------------------------------------------------------------------------------------- while it runs


def test_who_runs_ends_at_its_deadline_with_the_tokens_so_far() -> None:
    core = driver()
    request = core.accepted([1, 2], 50, deadline_ns=core.now + 100 * MS)
    for _ in range(3):
        core.step()
    at(core, SECOND + 100 * MS - 1)
    core.step()
    assert reason(request) is None
    at(core, SECOND + 100 * MS)
    assert core.plan() is None and reason(request) is EndReason.DEADLINE
    assert len(request.got) == 4 and request.end is not None and request.end.stats.output_tokens == 4
    assert core.core.load(0).held_blocks == 0 and core.core.next_wakeup_ns == 0
    core.finish()


@pytest.mark.parametrize(("time_ms", "margin_ms"), [(100, 10), (400, 40), (500, 50), (501, 50), (10_000, 50)])
def test_a_partial_answer_ends_a_margin_before_the_deadline(time_ms: int, margin_ms: int) -> None:
    core = driver()
    request = core.accepted([1, 2], 50, deadline_ns=core.now + time_ms * MS, partial=True)
    core.step()
    core.step()
    end = SECOND + (time_ms - margin_ms) * MS
    assert core.core.next_wakeup_ns == end
    at(core, end - 1).step()
    assert reason(request) is None
    assert at(core, end).plan() is None
    assert reason(request) is EndReason.DEADLINE and len(request.got) == 3
    core.finish()


def test_who_ends_in_time_ends_as_ever() -> None:
    core = driver()
    request = core.accepted([1, 2], 3, deadline_ns=core.now + MS)
    core.finish()
    assert reason(request) is EndReason.LENGTH and core.core.next_wakeup_ns == 0
    at(core, SECOND + 2 * MS).plan()
    assert core.core.counters.finished == 1


def test_one_that_was_preempted_ends_at_its_deadline_too_and_gives_its_host_blocks_back() -> None:
    facts = worker_facts(num_blocks=20, max_batch_rows=1, num_host_blocks=9, swap_block_ns=1)
    core = at(Clocked(CoreConfig(max_batch_rows=1), facts, tick=0), SECOND)
    core.accepted(range(500, 508), 2)
    core.finish()
    request = core.accepted(range(9), 9, deadline_ns=core.now + MS)
    core.step()
    core.accepted([1], 30, priority=INTERACTIVE)
    core.step()
    assert core.core.load(0).held_host_blocks == 3
    at(core, core.now + MS).plan()
    assert reason(request) is EndReason.DEADLINE and core.core.load(0).held_host_blocks == 0
    core.finish()


def test_all_outputs_of_a_request_end_at_its_deadline_those_that_wait_too() -> None:
    core = driver(rows=2)
    outputs = core.accepted([1, 2, 3], 30, num_outputs=4, deadline_ns=core.now + MS, partial=True).siblings
    for _ in range(3):
        core.step()
    core.truncate(outputs[1], 1)
    at(core, SECOND + MS).plan()
    assert [reason(output) for output in outputs] == [EndReason.DEADLINE, EndReason.STOP, *[EndReason.DEADLINE] * 2]
    assert [len(output.got) for output in outputs] == [3, 2, 0, 0]
    assert core.core.num_requests == 0
    core.finish()


def test_one_output_that_was_admitted_in_time_keeps_its_siblings_from_being_too_late() -> None:
    core = driver(rows=1)
    core.core.step_cost = learnt().core.step_cost
    outputs = core.accepted([1] * 10, 30, num_outputs=2, deadline_ns=core.now + 100 * MS).siblings
    core.plan()
    at(core, SECOND + 85 * MS).plan()
    assert [reason(output) for output in outputs] == [None, None]
    at(core, SECOND + 100 * MS).plan()
    assert [reason(output) for output in outputs] == [EndReason.DEADLINE] * 2
    core.finish()


# ----------------------------------------------------------------------------------------------------- waking up


def test_the_next_wake_up_is_that_of_the_earliest_who_still_lives() -> None:
    core = driver()
    assert core.core.next_wakeup_ns == 0
    core.accepted([1], 9, request_id="none")
    assert core.core.next_wakeup_ns == 0
    for name, left in [("b", 7), ("a", 5), ("c", 9)]:
        core.accepted([1], 9, request_id=name, deadline_ns=core.now + left)
    assert core.core.next_wakeup_ns == SECOND + 5
    core.cancel("a")
    assert core.core.next_wakeup_ns == SECOND + 7
    core.cancel("c")
    at(core, SECOND + 7).plan()
    assert core.core.next_wakeup_ns == 0 and core.core.num_requests == 1
    core.finish()


def test_after_each_wake_up_the_next_one_is_later() -> None:
    """So nobody who sleeps until then spins."""
    core = learnt(rows=1)
    full(core)
    for index in range(6):
        core.accepted([1] * (5 + index), 9, deadline_ns=core.now + (300 + 20 * index) * MS, partial=bool(index % 2))
    wakings = 0
    while wakeup := core.core.next_wakeup_ns:
        assert wakeup > core.now
        at(core, wakeup).plan()
        wakings += 1
    assert 6 <= wakings <= 12 and core.core.num_requests == 1
    core.finish()


# -------------------------------------------------------------------------------------------------------------- order


def test_inside_a_tenant_the_latest_start_decides_then_arrival() -> None:
    core = driver()
    for name, left in [("d9", 9), ("none1", 0), ("d5", 5), ("none2", 0), ("d5b", 5), ("d60", 60)]:
        core.accepted([1], 9, request_id=name, deadline_ns=core.now + left * SECOND if left else 0)
    assert list(core.next_rows()) == ["d5", "d5b", "d9", "none1", "none2", "d60"], "no deadline stands for 30 s"


def test_with_the_same_deadline_the_longer_prompt_goes_first_as_it_must_start_earlier() -> None:
    core = learnt()
    for name, length in [("short", 3), ("long", 40), ("middle", 20)]:
        core.accepted([1] * length, 9, request_id=name, deadline_ns=core.now + SECOND)
    assert list(core.next_rows()) == ["long", "middle", "short"]


def test_a_deadline_does_not_pass_a_higher_class() -> None:
    core = driver()
    core.accepted([1], 9, request_id="soon", deadline_ns=core.now + MS)
    core.accepted([1], 9, request_id="urgent", priority=INTERACTIVE)
    assert list(core.next_rows()) == ["urgent", "soon"]


def test_a_deadline_does_not_pass_another_tenants_turn() -> None:
    core = driver(rows=1)
    core.accepted([1] * 20, 1, request_id="x1", tenant="x")
    core.step()
    core.accepted([1], 1, request_id="y1", tenant="y")
    core.accepted([1], 1, request_id="x2", tenant="x", deadline_ns=core.now + MS)
    core.accepted([1], 1, request_id="y2", tenant="y")
    order = []
    while core.core.num_requests:
        order += list(core.next_rows())
        core.answer()
    assert order.index("x2") > 0 and order[0] == "y1"


def test_those_whose_time_is_over_make_room_in_the_same_plan() -> None:
    core = driver(rows=1)
    core.accepted([1], 90, request_id="over", deadline_ns=core.now + MS)
    core.step()
    core.accepted([2], 9, request_id="next")
    at(core, SECOND + MS)
    assert core.next_rows() == {"next": 1}


def test_one_that_ended_by_its_deadline_is_known_as_such() -> None:
    core = driver()
    core.accepted([1], 90, request_id="a", deadline_ns=core.now + MS)
    core.step()
    at(core, SECOND + MS).plan()
    request = core.core.request("a")
    assert request is not None and request.sequences[0].state is State.ENDED
    assert request.sequences[0].end_reason == "deadline" and core.core.leaves[-1] == ("a", "deadline")
