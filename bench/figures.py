"""What a run is worth in numbers. Pure: takes a run's columns, returns figures; nothing here prints."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.roofline import Demand
from bench.runs import Run

Numbers = NDArray[np.int64]
SHARES = (0.5, 0.9, 0.99)
FINISHED = ("length", "stop")


@dataclass(frozen=True)
class Slo:
    """What a request must keep to count for goodput."""

    ttft_ms: float = 1000.0
    itl_ms: float = 100.0  # in the mean over the request's tokens


@dataclass(frozen=True)
class Percentiles:
    p50: float
    p90: float
    p99: float
    mean: float
    most: float


@dataclass(frozen=True)
class Figures:
    """Times in seconds of the virtual clock."""

    requests: int  # that ended by themselves
    refused: int
    deadline: int  # ended by theirs
    prompt_tokens: int
    output_tokens: int
    elapsed_s: float  # first arrival to the last end
    request_rate: float  # ended a second
    output_tokens_per_s: float
    tokens_per_s: float  # prompt and output
    ttft: Percentiles
    itl: Percentiles
    e2e: Percentiles
    queued: Percentiles
    good_share: float  # of all requests, refused ones too
    goodput: float  # requests a second that kept the SLO
    steps: int
    busy_share: float  # of elapsed_s × workers that a step was computed
    mean_rows: float  # that made or read tokens, in a step
    occupancy: float  # rows that made or read tokens ÷ all rows of all steps
    padding_share: float  # of the rows computed
    kv_waste: float  # (allocated - used) ÷ allocated token slots, over all steps
    cached_share: float  # prompt tokens taken from the prefix cache
    preemptions: int
    recomputed_tokens: int
    swapped_blocks: int
    most_waiting: int
    wall_s: float  # that the simulation took


def percentile(values: Numbers, share: float, counts: Numbers | None = None) -> float:
    """Nearest rank: the smallest value that at least this share of the values does not exceed; values in order. counts: how
    often each is there."""
    if not len(values):
        return float("nan")
    if counts is None:
        return float(values[max(0, int(np.ceil(share * len(values))) - 1)])
    reached = np.cumsum(counts)
    return float(values[int(np.searchsorted(reached, share * reached[-1]))])


def percentiles(values: Numbers, counts: Numbers | None = None) -> Percentiles:
    """Of nanoseconds, in seconds."""
    if counts is None:
        values = np.sort(values)
    if not len(values):
        return Percentiles(*[float("nan")] * 5)
    p50, p90, p99 = (percentile(values, share, counts) / 1e9 for share in SHARES)
    mean = float(np.average(values, weights=counts)) / 1e9
    return Percentiles(p50, p90, p99, mean, float(values[-1]) / 1e9)


def figures(run: Run, slo: Slo, num_workers: int = 1) -> Figures:
    requests, steps = run.requests, run.steps
    reason = np.array(requests.reason, dtype=object)
    finished = np.isin(reason, FINISHED)
    outputs, first, end = (column[finished] for column in (requests.output_tokens, requests.first_ns, requests.end_ns))
    arrival = requests.arrival_ns[finished]
    e2e = end - arrival
    good = is_good(first, e2e, outputs, slo)
    ended = requests.end_ns >= 0
    elapsed_s = float(requests.end_ns[ended].max() - requests.arrival_ns.min()) / 1e9 if ended.any() else 0.0
    a_second = 1 / elapsed_s if elapsed_s else 0.0
    computed = int((steps.rows + steps.padding).sum())
    allocated = int(steps.held_blocks.sum()) * run.block_size
    all_outputs = int(np.maximum(requests.output_tokens, 0).sum())
    prompts = int(requests.prompt_tokens[finished].sum())
    asked = run.counters["prompt_tokens"]
    return Figures(
        requests=int(finished.sum()),
        refused=int((reason == "refused").sum()),
        deadline=int((reason == "deadline").sum()),
        prompt_tokens=prompts,
        output_tokens=all_outputs,
        elapsed_s=elapsed_s,
        request_rate=float(finished.sum()) * a_second,
        output_tokens_per_s=all_outputs * a_second,
        tokens_per_s=(prompts + all_outputs) * a_second,
        ttft=percentiles(first),
        itl=percentiles(run.gap_ns, run.gap_counts),
        e2e=percentiles(e2e),
        queued=percentiles(requests.queued_ns[finished]),
        good_share=float(good.sum()) / max(1, len(reason)),
        goodput=float(good.sum()) * a_second,
        steps=len(steps.rows),
        busy_share=float((steps.end_ns - steps.begin_ns).sum()) / 1e9 * a_second / num_workers,
        mean_rows=float(steps.rows.mean()) if len(steps.rows) else 0.0,
        occupancy=float(steps.rows.mean()) * num_workers / run.num_rows if len(steps.rows) else 0.0,
        padding_share=float(steps.padding.sum()) / computed if computed else 0.0,
        kv_waste=1 - int(steps.used_tokens.sum()) / allocated if allocated else 0.0,
        cached_share=run.counters["cached_tokens"] / asked if asked else 0.0,
        preemptions=run.counters["preemptions"],
        recomputed_tokens=run.counters["recomputed_tokens"],
        swapped_blocks=run.counters["swapped_blocks"],
        most_waiting=int(steps.waiting.max(initial=0)),
        wall_s=run.wall_s,
    )


def is_good(first_ns: Numbers, e2e_ns: Numbers, outputs: Numbers, slo: Slo) -> NDArray[np.bool_]:
    """First token in time, and the others in the mean."""
    mean_gap = (e2e_ns - first_ns) / np.maximum(outputs - 1, 1)
    good: NDArray[np.bool_] = (first_ns <= slo.ttft_ms * 1e6) & (mean_gap <= slo.itl_ms * 1e6)
    return good


def demand(run: Run) -> Demand:
    """What the run's finished requests need at the least."""
    requests = run.requests
    finished = np.isin(np.array(requests.reason, dtype=object), FINISHED)
    prompts, outputs, cached = (
        column[finished] for column in (requests.prompt_tokens, requests.output_tokens, requests.cached_tokens)
    )
    fresh = prompts - cached
    decodes = outputs - 1  # the first token comes with the prompt
    return Demand(
        prompt_tokens=int(fresh.sum()),
        output_tokens=int(decodes.sum()),
        pairs=int((fresh * cached + fresh * (fresh + 1) // 2).sum()),
        context=int((decodes * prompts + decodes * (decodes + 1) // 2).sum()),
        longest_output=int(decodes.max(initial=0)),
    )
