"""What a watcher sees of a step."""

from __future__ import annotations

from scheduler.core import CoreConfig
from scheduler.core.observe import step_record
from tests.helpers.core_driver import CoreDriver
from tests.helpers.fake_worker import worker_facts
from wire import RowRecord


def driver(policy: str = "continuous") -> CoreDriver:
    return CoreDriver(CoreConfig(policy=policy, max_batch_rows=4, max_step_tokens=8, group=0), worker_facts(num_blocks=20))


def test_a_record_names_each_row_what_it_computes_and_whether_it_joined_and_sampled() -> None:
    core = driver()
    core.accepted([1, 2, 3], 5, request_id="a")
    core.accepted(range(9), 5, request_id="b")
    core.accepted([1], 5, request_id="c")
    core.now = 1000
    core.plan(), core.plan()
    first, second = (step_record(core.core, step, started_ns=400, duration_ns=7) for step in core.core.in_flight)
    assert first.rows == (
        RowRecord("a", 0, 3, sampled=True, joined=True, padding=False),
        RowRecord("b", 1, 5, sampled=False, joined=True, padding=False),
    )
    assert (first.step_id, first.group, first.planned_ns, first.duration_ns) == (0, 0, 610, 7)
    assert (first.held_blocks, first.total_blocks, first.kv_tokens, first.waiting_requests) == (4, 20, 8, 1)
    assert second.rows == (
        RowRecord("a", 0, 1, sampled=True, joined=False, padding=False),
        RowRecord("b", 1, 4, sampled=True, joined=False, padding=False),
        RowRecord("c", 2, 1, sampled=True, joined=True, padding=False),
    )
    assert (second.kv_tokens, second.waiting_requests) == (14, 0)


def test_a_row_that_left_while_its_step_runs_is_still_named() -> None:
    core = driver()
    core.accepted([1, 2, 3], 5, request_id="a")
    core.plan()
    core.cancel("a")
    record = step_record(core.core, core.core.in_flight[0], 0, 1)
    assert [row.request_id for row in record.rows] == ["a"]
    assert core.core.leaves == [("a", "cancelled")]


def test_padding_rows_are_marked() -> None:
    core = driver("static")
    core.accepted([1], 1, request_id="a")
    core.accepted([2], 4, request_id="b")
    core.step()
    core.plan()
    record = step_record(core.core, core.core.in_flight[0], 0, 1)
    assert [(row.request_id, row.padding, row.sampled) for row in record.rows] == [("b", False, True), ("a", True, False)]


def test_who_left_is_remembered_with_the_reason() -> None:
    core = driver()
    core.accepted([1], 1, request_id="a")
    core.accepted([2], 9, request_id="b")
    core.step()
    core.lost()
    assert core.core.leaves == [("a", "length"), ("b", "preempted")]
