"""The demo's figures, by hand-made runs whose values can be checked in the head."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from carousel.v1 import inspect_pb2
from demo.figures import Figures, Outcome, comparison, differences, figures, percentile
from demo.workload import CROWD, MAX_TOKENS, OPENER_TOKENS, PROMPTS, workload


def step(held_blocks: int, kv_tokens: int, rows: int, padding: int = 0) -> inspect_pb2.WatchStepsResponse:
    record = inspect_pb2.WatchStepsResponse(held_blocks=held_blocks, kv_tokens=kv_tokens)
    for slot in range(rows + padding):
        record.rows.add(slot=slot, padding=slot >= rows)
    return record


def test_figures_of_a_small_run():
    outcomes = [
        Outcome("A", sent_s=10.0, first_token_s=10.5, ended_s=12.0, token_ids=(1, 2, 3)),
        Outcome("B", sent_s=11.0, first_token_s=13.0, ended_s=14.0, token_ids=(4,)),
    ]
    steps = [step(2, 16, rows=2), step(2, 32, rows=1, padding=3)]
    got = figures(outcomes, steps, num_rows=4, block_size=16)
    assert got.tokens_per_s == 4 / (14.0 - 10.0)
    assert (got.ttft_p50_s, got.ttft_p99_s, got.e2e_p50_s) == (0.5, 2.0, 2.0)
    assert got.occupancy == 3 / 8
    assert got.kv_waste == (4 * 16 - 48) / (4 * 16)
    assert got.num_steps == 2


def test_a_run_without_steps_or_blocks_divides_by_nothing():
    outcomes = [Outcome("A", 0.0, 1.0, 2.0, (1,))]
    assert figures(outcomes, [], 4, 16).occupancy == 0
    assert figures(outcomes, [step(0, 0, 1)], 4, 16).kv_waste == 0


@pytest.mark.parametrize(("share", "value"), [(0.5, 2), (0.75, 3), (0.99, 4), (1.0, 4), (0.01, 1)])
def test_percentiles_are_values_that_occurred(share, value):
    assert percentile([4, 2, 1, 3], share) == value


def test_differences_name_the_first_token_that_differs():
    one = [Outcome(label, 0, 0, 0, tokens) for label, tokens in (("A", (1, 2, 3)), ("B", (1, 2)), ("C", (5,)))]
    other = [Outcome(label, 0, 0, 0, tokens) for label, tokens in (("C", (5,)), ("B", (1, 2, 3)), ("A", (1, 9, 3)))]
    assert differences(one, other) == {"A": 1, "B": 2}
    assert differences(one, one) == {}


def test_the_comparison_names_every_figure_with_its_ratio_and_meaning():
    new = Figures(100, 1000, 2.0, 0.1, 0.2, 1.0, 0.9, 0.05)
    old = Figures(250, 1000, 5.0, 0.4, 0.8, 3.0, 0.45, 0.5)
    out = io.StringIO()
    Console(file=out, width=110).print(comparison(new, old))
    lines = [line.split() for line in out.getvalue().splitlines() if line.strip()]
    assert lines[0][:3] == ["continuous", "static", "ratio"]
    rows = {" ".join(words) for words in lines[2:]}
    for expected in (
        "tokens/s 500 200 2.50x output tokens ÷ wall time of the run",
        "TTFT p50 100 ms 400 ms 0.25x sent to first token, the middle request",
        "E2E p50 1000 ms 3000 ms 0.33x sent to last token, the middle request",
        "batch occupancy 90% 45% 2.00x rows that made or read tokens ÷ all rows of all steps",
        "KV waste 5% 50% 0.10x (allocated - used) ÷ allocated slots of the KV cache",
        "steps 100 250 0.40x passes through the model",
    ):
        assert expected in rows


def test_the_workload_is_the_same_every_time_and_within_its_limits():
    works = workload()
    assert works == workload() and works != workload(seed=1)
    assert len(works) == len(PROMPTS) >= 16
    assert len({work.label for work in works}) == len(works)
    assert len({len(work.prompt) for work in works}) > 16  # clearly different lengths
    assert works[0].max_tokens == OPENER_TOKENS
    assert all(1 <= work.max_tokens <= MAX_TOKENS for work in works)
    assert [work.after_crowd for work in works] == [0] * (CROWD + 1) + [*range(1, len(works) - CROWD)]
