from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from bench.figures import Slo, demand, figures, percentile, percentiles
from bench.runs import Columns, Run, Steps

MS = 1_000_000


def column(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def run() -> Run:
    """Four requests: two that finished, one refused, one that still runs; two steps."""
    return Run(
        requests=Columns(
            arrival_ns=column(0, 10 * MS, 20 * MS, 30 * MS),
            prompt_tokens=column(100, 50, 10, 10),
            output_tokens=column(3, 5, -1, -1),
            first_ns=column(20 * MS, 90 * MS, -1, -1),
            end_ns=column(40 * MS, 140 * MS, 20 * MS, -1),
            reason=["length", "stop", "refused", ""],
            cached_tokens=column(16, 0, -1, -1),
            recomputed_tokens=column(0, 0, -1, -1),
            preemptions=column(0, 1, -1, -1),
            queued_ns=column(1 * MS, 2 * MS, -1, -1),
            priority=column(2, 2, 2, 2),
            deadline_ns=column(0, 0, 0, 0),
        ),
        steps=Steps(
            begin_ns=column(0, 10 * MS),
            end_ns=column(10 * MS, 15 * MS),
            rows=column(2, 1),
            padding=column(0, 1),
            tokens=column(150, 1),
            context=column(0, 51),
            pairs=column(5000, 0),
            sampled=column(2, 1),
            held_blocks=column(10, 10),
            used_tokens=column(150, 130),
            waiting=column(0, 3),
        ),
        gap_ns=column(5 * MS, 10 * MS),
        gap_counts=column(3, 3),
        num_rows=4,
        block_size=16,
        refused={"RESOURCE_EXHAUSTED": 1},
        counters={"prompt_tokens": 160, "cached_tokens": 16, "preemptions": 1, "recomputed_tokens": 7, "swapped_blocks": 0},
        wall_s=0.5,
        complete=False,
    )


def test_figures_are_exactly_what_the_columns_say() -> None:
    found = figures(run(), Slo(ttft_ms=50, itl_ms=15))
    assert (found.requests, found.refused, found.deadline) == (2, 1, 0)
    assert found.elapsed_s == 0.14
    assert (found.prompt_tokens, found.output_tokens) == (150, 8)
    assert found.output_tokens_per_s == pytest.approx(8 / 0.14)
    assert found.tokens_per_s == pytest.approx(158 / 0.14)
    assert (found.ttft.p50, found.ttft.p99, found.ttft.mean) == (0.02, 0.09, 0.055)
    assert (found.itl.p50, found.itl.p90, found.itl.mean) == (0.005, 0.01, 0.0075)
    assert (found.e2e.p50, found.e2e.most) == (0.04, 0.13)
    assert found.good_share == 0.25, "one of four was in time; refused and unfinished ones are not good"
    assert found.goodput == pytest.approx(1 / 0.14)
    assert found.busy_share == pytest.approx(15 / 140)
    assert (found.mean_rows, found.occupancy) == (1.5, 0.375)
    assert found.padding_share == 0.25
    assert found.kv_waste == pytest.approx(1 - 280 / 320)
    assert found.cached_share == 0.1
    assert (found.preemptions, found.recomputed_tokens, found.most_waiting, found.steps) == (1, 7, 3, 2)


def test_a_request_is_good_by_its_first_token_and_the_mean_of_the_others() -> None:
    assert figures(run(), Slo(ttft_ms=90, itl_ms=10)).good_share == 0.5, "20 ms / 2 gaps and 40 ms / 4 gaps"
    assert figures(run(), Slo(ttft_ms=90, itl_ms=9.99)).good_share == 0.0
    assert figures(run(), Slo(ttft_ms=19, itl_ms=99)).good_share == 0.0


def test_several_workers_share_the_time_and_add_their_rows() -> None:
    assert figures(run(), Slo(), num_workers=2).busy_share == pytest.approx(15 / 280)
    assert figures(replace(run(), num_rows=8), Slo(), num_workers=2).occupancy == 0.375


@pytest.mark.parametrize("seed", range(5))
def test_percentiles_of_counted_values_are_those_of_the_values(seed: int) -> None:
    random = np.random.default_rng(seed)
    values, counts = np.unique(random.integers(0, 50, 30)), np.arange(0)
    counts = random.integers(1, 9, len(values))
    spelled = np.repeat(values, counts)
    for share in (0.01, 0.1, 0.25, 0.5, 0.9, 0.99, 1.0):
        assert percentile(values, share, counts) == percentile(spelled, share)
    assert percentiles(values, counts) == percentiles(spelled)


def test_nothing_has_no_percentile() -> None:
    assert math.isnan(percentile(column(), 0.5)) and math.isnan(percentiles(column()).p99)


def test_demand_counts_only_what_had_to_be_computed() -> None:
    found = demand(run())
    assert found.prompt_tokens == 84 + 50 and found.output_tokens == 2 + 4 and found.longest_output == 4
    assert found.pairs == sum(range(17, 101)) + sum(range(1, 51))
    assert found.context == (101 + 102) + (51 + 52 + 53 + 54)
