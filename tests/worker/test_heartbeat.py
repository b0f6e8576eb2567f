"""How a step that computes is told from one that hangs."""

from __future__ import annotations

from worker.heartbeat import Stall

MS = 1_000_000


def test_a_long_step_that_uses_the_processor_is_no_stall() -> None:
    stall = Stall()
    for beat in range(400):  # 100 s of one step
        assert stall.observe(step=1, busy_ns=beat * 5 * MS, now_ns=beat * 250 * MS) == 0


def test_a_step_that_uses_no_processor_time_stalls_from_its_last_use_on() -> None:
    stall = Stall()
    busy = [10, 20, 30, 30, 30, 30.5, 30.6]
    found = [stall.observe(1, int(busy_ms * MS), beat * 250 * MS) // MS for beat, busy_ms in enumerate(busy)]
    assert found == [0, 0, 0, 250, 500, 750, 1000]


def test_a_step_that_goes_on_is_no_stall_any_more() -> None:
    stall = Stall()
    beats = [(0, 0), (250, 0), (500, 7), (750, 7)]
    assert [stall.observe(1, busy * MS, at * MS) // MS for at, busy in beats] == [0, 250, 0, 250]


def test_each_step_begins_anew_and_between_steps_nothing_stalls() -> None:
    stall = Stall()
    steps = [1, 1, 2, 2, 0, 0, 3]
    assert [stall.observe(step, 0, at * 250 * MS) // MS for at, step in enumerate(steps)] == [0, 250, 0, 250, 0, 0, 0]
