"""How seldom `carousel top` asks: by its own count, not by the clock."""

from __future__ import annotations

import pytest

from client.top.watching import ROWS_PER_S, Sampling, pause_after


def looked_at(rows: int, step_s: float, seconds: float) -> tuple[int, int]:
    """(steps looked at, most in a row) of a server that computes so many rows every step_s, over the time."""
    sampling, now_s, steps, row, most = Sampling(), 0.0, 0, 0, 0
    sampling.begin(now_s)
    while now_s < seconds:
        now_s += step_s
        steps, row = steps + 1, row + 1
        most = max(most, row)
        pause_s = sampling.pause_s(rows, now_s)
        if pause_s:
            now_s, row = now_s + pause_s, 0
            sampling.begin(now_s)
    return steps, most


@pytest.mark.parametrize(("rows", "step_s"), [(64, 0.02), (256, 0.02), (256, 0.1), (4096, 0.05), (16, 0.001)])
def test_no_more_rows_are_looked_at_than_are_allowed(rows: int, step_s: float) -> None:
    seconds = 100.0
    steps, most = looked_at(rows, step_s, seconds)
    assert steps * rows <= ROWS_PER_S * seconds + 3 * max(rows, ROWS_PER_S), "in the long run, but for one look"
    assert most >= 2, "two in a row, or there is no time between tokens"


def test_a_small_batch_is_watched_all_the_time() -> None:
    steps, most = looked_at(1, 0.02, 100.0)
    assert steps == most == pytest.approx(5000, abs=2)


@pytest.mark.parametrize(("took_s", "pause_s"), [(0.001, 1.0), (0.01, 1.0), (0.03, 3.0), (2.0, 10.0)])
def test_what_takes_long_is_asked_for_seldom(took_s: float, pause_s: float) -> None:
    assert pause_after(took_s, 1.0) == pytest.approx(pause_s, rel=0.11)
