"""What `carousel top` costs, from runs with and without it."""

from __future__ import annotations

import math

from bench.top_cost import Turn, cost, measure


def test_a_run_with_it_is_compared_to_the_runs_beside_it() -> None:
    """The machine gets slower all the time; the watched runs take a tenth more than that."""
    turns = [Turn(at % 2 == 1, 1000, 1.0 + at / 10, {"core": (1.0 + at / 10) * (1.1 if at % 2 else 1.0)}) for at in range(7)]
    found = cost(32, turns)
    assert all(math.isclose(ratio, 1.1) for ratio in found.cpu_ratio)
    assert found.cpu_us_per_token == 1300.0
    assert 0.99 < found.pace_ratio[0] <= found.pace_ratio[1] <= found.pace_ratio[2] < 1.01


def test_a_real_server_is_watched() -> None:
    turns = measure(rows=4, requests=4, rounds=1)
    assert [turn.watched for turn in turns] == [False, True, False]
    assert all(turn.tokens == 4 * 96 and turn.cpu_s["core"] >= 0 and sum(turn.cpu_s.values()) > 0 for turn in turns)
