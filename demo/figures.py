"""What a run is worth in numbers, and two runs side by side. Pure: takes what callers and steps saw, returns figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from carousel.v1 import inspect_pb2


@dataclass(frozen=True)
class Outcome:
    """What a caller saw of its request. Times: seconds on the caller's clock."""

    label: str
    sent_s: float
    first_token_s: float
    ended_s: float
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Figures:
    num_steps: int
    output_tokens: int
    elapsed_s: float  # first request sent to last one ended
    ttft_p50_s: float  # time to first token
    ttft_p99_s: float
    e2e_p50_s: float  # sent to ended
    occupancy: float  # [0, 1]
    kv_waste: float  # [0, 1]

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.elapsed_s


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank: the smallest value that at least this share of the values does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def figures(
    outcomes: Sequence[Outcome], steps: Sequence[inspect_pb2.WatchStepsResponse], num_rows: int, block_size: int
) -> Figures:
    """num_rows: most rows of the batch; block_size: tokens of a KV block."""
    ttfts = [outcome.first_token_s - outcome.sent_s for outcome in outcomes]
    useful = sum(not row.padding for step in steps for row in step.rows)
    allocated = sum(step.held_blocks for step in steps) * block_size
    used = sum(step.kv_tokens for step in steps)
    return Figures(
        num_steps=len(steps),
        output_tokens=sum(len(outcome.token_ids) for outcome in outcomes),
        elapsed_s=max(outcome.ended_s for outcome in outcomes) - min(outcome.sent_s for outcome in outcomes),
        ttft_p50_s=percentile(ttfts, 0.5),
        ttft_p99_s=percentile(ttfts, 0.99),
        e2e_p50_s=percentile([outcome.ended_s - outcome.sent_s for outcome in outcomes], 0.5),
        occupancy=useful / (len(steps) * num_rows) if steps else 0.0,
        kv_waste=(allocated - used) / allocated if allocated else 0.0,
    )


def differences(one: Sequence[Outcome], other: Sequence[Outcome]) -> dict[str, int]:
    """By label: the first position at which the two runs' tokens of a request differ. Empty: all are the same."""
    others = {outcome.label: outcome.token_ids for outcome in other}
    found = {}
    for outcome in one:
        mine, theirs = outcome.token_ids, others[outcome.label]
        if mine != theirs:
            pairs = zip(mine, theirs, strict=False)
            found[outcome.label] = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(mine), len(theirs)))
    return found


def comparison(continuous: Figures, static: Figures) -> Table:
    """The two runs side by side, each figure with its meaning."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in ("continuous", "static", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("what it is", overflow="fold")

    def times(a: float, b: float) -> str:
        return f"{a / b:.2f}x" if b else ""

    new, old = continuous, static
    faster = times(new.tokens_per_s, old.tokens_per_s)
    table.add_row(
        "tokens/s", f"{new.tokens_per_s:.0f}", f"{old.tokens_per_s:.0f}", faster, "output tokens ÷ wall time of the run"
    )
    for name, a, b, meaning in (
        ("TTFT p50", new.ttft_p50_s, old.ttft_p50_s, "sent to first token, the middle request"),
        ("TTFT p99", new.ttft_p99_s, old.ttft_p99_s, "… and the slowest of a hundred"),
        ("E2E p50", new.e2e_p50_s, old.e2e_p50_s, "sent to last token, the middle request"),
    ):
        table.add_row(name, f"{a * 1000:.0f} ms", f"{b * 1000:.0f} ms", times(a, b), meaning)
    meaning = "rows that made or read tokens ÷ all rows of all steps"
    table.add_row(
        "batch occupancy", f"{new.occupancy:.0%}", f"{old.occupancy:.0%}", times(new.occupancy, old.occupancy), meaning
    )
    meaning = "(allocated - used) ÷ allocated slots of the KV cache"
    table.add_row("KV waste", f"{new.kv_waste:.0%}", f"{old.kv_waste:.0%}", times(new.kv_waste, old.kv_waste), meaning)
    table.add_row(
        "steps", str(new.num_steps), str(old.num_steps), times(new.num_steps, old.num_steps), "passes through the model"
    )
    return table
