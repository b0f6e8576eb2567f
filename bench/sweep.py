"""How much a service can take: the largest rate at which a criterion holds, found by bisection. The workload's draws are the
same at every rate, only faster."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from bench.figures import Figures
from bench.scenario import Outcome, Scenario

CRITERIA = ("goodput", "ttft")
LEAST_GOOD_SHARE = 0.9
_PRECISION = 1.02  # between the last rate that holds and the first that does not
_MOST_DOUBLINGS = 6  # then the requests are too few to find a limit
_SATURATING = 2000  # requests that come at once, to see how fast they can be served

Try: TypeAlias = Callable[[Scenario], Outcome]


@dataclass(frozen=True)
class Capacity:
    """rate 0: the criterion holds at no rate. `tried` by rate, up to the largest one that holds `best`; `least`: at the lowest
    rate that was tried."""

    rate: float
    best: Outcome | None
    tried: tuple[tuple[float, bool], ...]
    least: Outcome


def holds(figures: Figures, criterion: str, slo_ttft_ms: float) -> bool:
    """goodput: at least 90 % of the requests kept the SLO; ttft: 99 % had their first token in time."""
    if criterion == "goodput":
        return figures.good_share >= LEAST_GOOD_SHARE
    return figures.ttft.p99 * 1000 <= slo_ttft_ms


def saturated_rate(scenario: Scenario, run: Try) -> float:
    """Requests a second when all are there at once."""
    return saturated(scenario, run).figures.request_rate


def saturated(scenario: Scenario, run: Try) -> Outcome:
    return run(replace(scenario, rate=math.inf, requests=min(scenario.requests or _SATURATING, _SATURATING)))


def capacity(scenario: Scenario, criterion: str, run: Try, most: float) -> Capacity:
    """most: a rate that can't be served for long."""
    tried: dict[float, bool] = {}
    best: Outcome | None = None
    least: Outcome | None = None

    def good(rate: float) -> bool:
        nonlocal best, least
        outcome = run(scenario.with_rate(rate))
        tried[rate] = holds(outcome.figures, criterion, scenario.slo.ttft_ms)
        if tried[rate] and (best is None or rate > best.scenario.rate):
            best = outcome
        if least is None or rate < least.scenario.rate:
            least = outcome
        return tried[rate]

    low, high = 0.0, most
    while good(high):  # a short run can be served above the lasting rate
        low, high = high, 2 * high
        if len(tried) == _MOST_DOUBLINGS:
            high = low
            break
    floor = most / 256
    while not low and high > floor:  # the first rate that holds, by large steps
        middle = high / 4
        low, high = (middle, high) if good(middle) else (0.0, middle)
    while low and high / low > _PRECISION:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if good(middle) else (low, middle)
    assert least is not None
    return Capacity(low, best, tuple(sorted(tried.items())), least)
