"""The headline experiment's line of JSON as the few figures that say what it found. Pure: prints and draws nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.cpu_workload import Noise

CONTINUOUS, STATIC, PREFILL_FIRST = "continuous", "static", "prefill_first"
CONTINUOUS_ALL, STATIC_ALL = "continuous-all", "static-all"
TRANSFORMERS_STATIC, TRANSFORMERS_CONTINUOUS = "transformers-static", "transformers-continuous"

# Of the plots, in their order; and for people.
SYSTEMS = {
    TRANSFORMERS_STATIC: "transformers, static",
    TRANSFORMERS_CONTINUOUS: "transformers, continuous",
    STATIC: "Carousel, static",
    PREFILL_FIRST: "Carousel, prefill_first",
    CONTINUOUS: "Carousel, continuous",
    STATIC_ALL: "Carousel, static, all memory",
    CONTINUOUS_ALL: "Carousel, continuous, all memory",
}
OURS = {
    STATIC: "static",
    PREFILL_FIRST: "prefill_first",
    CONTINUOUS: "continuous",
    STATIC_ALL: "static",
    CONTINUOUS_ALL: "continuous",
}  # system → policy
ALL_MEMORY = (STATIC_ALL, CONTINUOUS_ALL)

BOUND_GOAL = 0.9  # share of the bound of the ratio to (a), at each cap
BUSY = 0.5  # load average before it began
_PERCENTILES = tuple(range(1, 101))


@dataclass(frozen=True)
class Ratio:
    """Continuous ÷ a baseline, in tokens a second, round by round; and what it can be at most."""

    baseline: str
    value: Noise
    bound: float | None
    fit_error: float | None = None  # of the step costs behind the bound, median of a step

    @property
    def share(self) -> float | None:
        return None if self.bound is None else self.value.median / self.bound


@dataclass(frozen=True)
class Cap:
    """One of the four."""

    post_cap: int
    cap: int
    mean_output: float
    kv_tokens: int
    static_rows: int
    tokens_per_s: dict[str, Noise]  # by system
    ratio_a: Ratio | None  # to our static policy, equal kernels and memory
    ratio_a_all: Ratio | None  # the same with all memory
    ratio_b: Ratio | None  # to transformers' padded static batches
    ratio_b_all: Ratio | None  # continuous with all memory ÷ the same
    limit_tokens_per_s: float | None  # of the machine
    kv_waste: dict[str, Noise]
    reserve_max_waste: float
    generator_cpu_share: float  # the most of all runs


@dataclass(frozen=True)
class Load:
    """Latencies at one arrival rate. Seconds, in order, of all runs together."""

    load: float  # × what static can serve
    rate: float
    e2e_s: dict[str, list[float]]
    p50: dict[str, Noise]  # over the runs
    p99: dict[str, Noise]

    @property
    def every_percentile_below_static(self) -> bool | None:
        """Of continuous; None: one of the two is missing."""
        if not self.e2e_s.get(CONTINUOUS) or not self.e2e_s.get(STATIC):
            return None
        ours, theirs = (np.quantile(self.e2e_s[name], np.array(_PERCENTILES) / 100) for name in (CONTINUOUS, STATIC))
        return bool((ours < theirs).all())


@dataclass(frozen=True)
class Summary:
    line: dict[str, Any]
    caps: list[Cap]
    loads: list[Load]

    @property
    def is_busy(self) -> bool:
        return bool(self.line["load before"] > BUSY)

    @property
    def rounds(self) -> int:
        return max((len(runs) for cap in self.line["caps"] for runs in cap["runs"].values()), default=0)

    @property
    def shares_of_bound(self) -> list[float]:
        """With equal memory, by cap."""
        return [cap.ratio_a.share for cap in self.caps if cap.ratio_a is not None and cap.ratio_a.share is not None]

    @property
    def holds(self) -> dict[str, bool | None]:
        """Conclusion → whether it holds; None: not measured."""
        shares, half = self.shares_of_bound, next((load for load in self.loads if load.load <= 0.5), None)
        ratios = [cap.ratio_a.value.median for cap in self.caps if cap.ratio_a is not None]
        return {
            f"at least {BOUND_GOAL:.0%} of the bound of the ratio to static, at each cap": (
                min(shares) >= BOUND_GOAL if shares else None
            ),
            "the ratio to static grows from cap to cap": ratios == sorted(ratios) if len(ratios) > 1 else None,
            "at half of static's capacity every percentile of E2E latency is below static's": (
                half.every_percentile_below_static if half is not None else None
            ),
        }


def summary(line: dict[str, Any]) -> Summary:
    """line: of bench.anyscale."""
    return Summary(line, [_cap(cap) for cap in line["caps"]], _loads(line["latency"]))


def _cap(cap: dict[str, Any]) -> Cap:
    runs: dict[str, list[dict[str, Any]]] = {system: cap["runs"][system] for system in SYSTEMS if system in cap["runs"]}
    speeds = {system: [run["tokens_per_s"] for run in found] for system, found in runs.items()}
    tokens, limit_s = cap["prompt_tokens"] + cap["output_tokens"], cap["limit_seconds"]
    limit = tokens / limit_s if limit_s else None
    wastes = {name: [run["kv_waste"] for run in runs[name] if run["kv_waste"] is not None] for name in runs if name in OURS}
    return Cap(
        post_cap=cap["post_cap"],
        cap=cap["cap"],
        mean_output=cap["mean_output"],
        kv_tokens=cap["kv_tokens"],
        static_rows=cap["static_rows"],
        tokens_per_s={system: Noise.of(values) for system, values in speeds.items()},
        ratio_a=_ratio(speeds, CONTINUOUS, STATIC, *_bound(cap["bounds"].get("post", []))),
        ratio_a_all=_ratio(speeds, CONTINUOUS_ALL, STATIC_ALL, *_bound(cap["bounds"].get("all", []))),
        ratio_b=_ratio(speeds, CONTINUOUS, TRANSFORMERS_STATIC, _limit_ratio(speeds, limit)),
        ratio_b_all=_ratio(speeds, CONTINUOUS_ALL, TRANSFORMERS_STATIC, _limit_ratio(speeds, limit)),
        limit_tokens_per_s=limit,
        kv_waste={name: Noise.of(values) for name, values in wastes.items() if values},
        reserve_max_waste=cap["reserve_max_waste"],
        generator_cpu_share=max((run.get("generator_cpu_share", 0.0) for found in runs.values() for run in found), default=0.0),
    )


def _ratio(
    speeds: dict[str, list[float]], system: str, baseline: str, bound: float | None, fit_error: float | None = None
) -> Ratio | None:
    pairs = list(zip(speeds.get(system, ()), speeds.get(baseline, ()), strict=False))
    return Ratio(baseline, Noise.of([ours / theirs for ours, theirs in pairs]), bound, fit_error) if pairs else None


def _bound(rounds: Sequence[dict[str, float]]) -> tuple[float | None, float | None]:
    """Medians of the bound and of its fit's error."""
    if not rounds:
        return None, None
    return Noise.of([one["ratio"] for one in rounds]).median, Noise.of([one["fit_error"] for one in rounds]).median


def _limit_ratio(speeds: dict[str, list[float]], limit: float | None) -> float | None:
    """To (b), as target C1 has it: at the machine's limit, with transformers as measured."""
    found = speeds.get(TRANSFORMERS_STATIC)
    return limit / Noise.of(found).median if found and limit else None


def _loads(latency: dict[str, Any] | None) -> list[Load]:
    found = []
    for load in latency["loads"] if latency else ():
        runs = {system: load["e2e_s"][system] for system in SYSTEMS if load["e2e_s"].get(system)}
        p50, p99 = (
            {name: Noise.of([float(np.quantile(one, share)) for one in of_it]) for name, of_it in runs.items()}
            for share in (0.5, 0.99)
        )
        together = {name: sorted(value for one in of_it for value in one) for name, of_it in runs.items()}
        found.append(Load(load["load"], load["rate"], together, p50, p99))
    return found
