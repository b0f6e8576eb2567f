from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from bench import workloads
from bench.cost_models import Line
from bench.figures import Slo
from bench.scenario import Outcome, Scenario, core_config, run, setup_of
from bench.sweep import Capacity, capacity, holds, saturated_rate
from tests.helpers.fake_worker import worker_facts

FACTS = worker_facts(num_blocks=400, block_size=16, max_model_len=3000, max_batch_rows=16, max_step_tokens=512)


def scenario(policy: str = "continuous", requests: int = 80) -> Scenario:
    setup = setup_of(FACTS, Line(4e6, 10e3, 0.0, 20.0, {}), core_config(FACTS, policy=policy))
    slo = Slo(ttft_ms=400, itl_ms=20)
    return Scenario(workloads.by_name("anyscale-latency"), math.inf, requests, 0, setup, slo)


def up_to(limit: float) -> tuple[Callable[[Scenario], Any], list[float]]:
    """A service that keeps the SLO up to a rate, and the rates that it was tried at."""
    tried: list[float] = []

    def attempt(scenario: Scenario) -> Any:
        tried.append(scenario.rate)
        return SimpleNamespace(scenario=scenario, figures=SimpleNamespace(good_share=1.0 if scenario.rate <= limit else 0.5))

    return attempt, tried


@pytest.mark.parametrize("limit", [0.9, 3.0, 10.0, 25.0])
def test_it_finds_the_largest_rate_that_holds(limit: float) -> None:
    attempt, tried = up_to(limit)
    found = capacity(scenario(), "goodput", attempt, most=20.0)
    assert limit / 1.021 <= found.rate <= limit
    assert found.best is not None and found.best.scenario.rate == found.rate
    assert len(tried) < 16 and found.tried == tuple(sorted((rate, rate <= limit) for rate in tried))


def test_a_service_that_never_keeps_the_slo_has_no_capacity() -> None:
    found = capacity(scenario(), "goodput", up_to(0.0)[0], most=20.0)
    assert (found.rate, found.best) == (0.0, None) and len(found.tried) < 8


def test_a_service_without_a_limit_is_not_looked_at_for_ever() -> None:
    found = capacity(scenario(), "goodput", up_to(math.inf)[0], most=20.0)
    assert found.rate >= 20.0 and len(found.tried) <= 8


def test_the_criteria() -> None:
    outcome = run(scenario().with_rate(2.0))
    assert holds(outcome.figures, "goodput", 400) == (outcome.figures.good_share >= 0.9)
    p99_ms = outcome.figures.ttft.p99 * 1000
    assert holds(outcome.figures, "ttft", p99_ms * 1.001) and not holds(outcome.figures, "ttft", p99_ms * 0.999)


def found_capacity(policy: str) -> Capacity:
    one = scenario(policy)

    def attempt(scenario: Scenario) -> Outcome:
        return run(scenario)

    return capacity(one, "goodput", attempt, 2 * saturated_rate(one, attempt))


@pytest.mark.slow
def test_continuous_has_more_capacity_than_static() -> None:
    continuous, static = found_capacity("continuous"), found_capacity("static")
    assert continuous.rate > 3 * static.rate
    assert continuous.best is not None and continuous.best.figures.good_share >= 0.9


def test_the_saturated_rate_is_that_of_all_requests_at_once() -> None:
    one = scenario()
    assert saturated_rate(one, run) == run(one).figures.request_rate
