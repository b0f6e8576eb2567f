"""Outcomes as tables for people. Takes figures, returns rich tables; computes nothing but ratios."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from bench.figures import Figures
from bench.scenario import Outcome
from bench.sweep import Capacity

Write = Callable[[Figures], str]

_FILE_WIDTH = 500  # characters: more than any table needs


def console() -> Console:
    """Standard output; in a file or a pipe nothing is cut or broken, however long the lines get."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=_FILE_WIDTH)


def seconds(value: float) -> str:
    """Three digits and a unit."""
    if math.isnan(value):
        return "–"
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= 0.9995 * size or unit == "µs":
            scaled = value / size
            digits = 0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2
            return f"{scaled:,.{digits}f} {unit}"
    raise AssertionError


def number(value: float) -> str:
    if value != value:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def plain(value: float) -> str:
    """Three digits, three behind the point at most; the unit stands elsewhere."""
    return (
        "–" if math.isnan(value) else f"{value:,.{0 if value >= 99.95 else 1 if value >= 9.995 else 2 if value >= 1 else 3}f}"
    )


def share(value: float) -> str:
    return f"{value:.1%}"


def _times(name: str, of: str) -> Iterator[tuple[str, Write, str, bool]]:
    """Three lines: the middle, nine of ten, ninety-nine of a hundred."""
    for at in ("p50", "p90", "p99"):
        meaning = of if at == "p50" else "…"
        yield f"{name} {at}", lambda f, at=at: seconds(getattr(getattr(f, name.lower()), at)), meaning, False  # type: ignore[misc]


# name, how it is written, what it is, whether it is left out where it is 0 everywhere
_ROWS: tuple[tuple[str, Write, str, bool], ...] = (
    ("requests", lambda f: number(f.requests), "that ended by themselves", False),
    ("refused", lambda f: number(f.refused), "at their arrival", True),
    ("past deadline", lambda f: number(f.deadline), "ended by it", True),
    ("requests/s", lambda f: number(f.request_rate), "first arrival to last end", False),
    ("output tokens/s", lambda f: number(f.output_tokens_per_s), "likewise", False),
    ("… with prompts", lambda f: number(f.tokens_per_s), "prompt and output tokens a second", False),
    *_times("TTFT", "arrival to first token"),
    *_times("ITL", "between two tokens of an output"),
    *_times("E2E", "arrival to last token"),
    *_times("queued", "arrival to a row in the batch"),
    ("good", lambda f: share(f.good_share), "requests that kept the SLO ÷ all", False),
    ("goodput", lambda f: number(f.goodput), "requests a second that kept the SLO", False),
    ("rows a step", lambda f: number(f.mean_rows), "that made or read tokens, mean", False),
    ("batch occupancy", lambda f: share(f.occupancy), "of them ÷ all rows of all steps", False),
    ("padding", lambda f: share(f.padding_share), "rows computed for nobody ÷ rows computed", True),
    ("KV waste", lambda f: share(f.kv_waste), "(allocated - used) ÷ allocated token slots", False),
    ("prefix hits", lambda f: share(f.cached_share), "prompt tokens taken from the cache", True),
    ("preemptions", lambda f: number(f.preemptions), "rows that lost their blocks for a while", True),
    ("… recomputed", lambda f: number(f.recomputed_tokens), "tokens", True),
    ("… swapped", lambda f: number(f.swapped_blocks), "blocks, out and in", True),
    ("most waiting", lambda f: number(f.most_waiting), "requests in the queue at once", False),
    ("worker busy", lambda f: share(f.busy_share), "of the time", False),
    ("steps", lambda f: number(f.steps), "passes through the model", False),
)


def side_by_side(columns: Sequence[tuple[str, Figures]], bounds: Sequence[str] = (), title: str = "") -> Table:
    """Figures as rows, with what they mean. bounds: of the output tokens a second, and the shares reached."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title or None, title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for name, _ in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("what it is", overflow="fold", style="dim")
    for name, write, meaning, optional in _ROWS:
        cells = [write(figures) for _, figures in columns]
        if optional and set(cells) <= {"0", "0.0%"}:
            continue
        table.add_row(name, *cells, meaning)
        if name == "output tokens/s" and any(bounds):
            table.add_row("… limit", *bounds, "the roofline's, at full bandwidth and peak; share reached")
    return table


def bound_cell(outcome: Outcome) -> str:
    bound = outcome.bound
    return f"{number(bound.output_tokens_per_s)} ({bound.share:.0%})" if bound is not None else "–"


# head, cell, and in what order columns give way where there is too little room (0: never, the largest first)
_OVERVIEW: tuple[tuple[str, Callable[[Outcome], str], int], ...] = (
    ("workload", lambda o: o.scenario.workload.name, 0),
    ("policy", lambda o: o.scenario.setup.core.policy, 0),
    ("req/s", lambda o: number(o.figures.request_rate), 0),
    ("tok/s", lambda o: number(o.figures.output_tokens_per_s), 0),
    ("of\nlimit", lambda o: f"{o.bound.share:.0%}" if o.bound else "–", 5),
    ("TTFT\np50 s", lambda o: plain(o.figures.ttft.p50), 2),
    ("TTFT\np99 s", lambda o: plain(o.figures.ttft.p99), 0),
    ("ITL\np50 ms", lambda o: plain(o.figures.itl.p50 * 1000), 3),
    ("ITL\np99 ms", lambda o: plain(o.figures.itl.p99 * 1000), 0),
    ("E2E\np99 s", lambda o: plain(o.figures.e2e.p99), 1),
    ("good", lambda o: f"{o.figures.good_share:.0%}", 0),
    ("rows", lambda o: number(o.figures.mean_rows), 8),
    ("KV\nwaste", lambda o: share(o.figures.kv_waste), 4),
    ("hits", lambda o: f"{o.figures.cached_share:.0%}", 7),
    ("pre-\nempt.", lambda o: number(o.figures.preemptions), 6),
)
_ONLY_IF_ANY = ("hits", "pre-\nempt.")  # left out where they are 0 everywhere


def overview(outcomes: Sequence[Outcome], width: int) -> Table | None:
    """One line for each workload and policy, with as many columns as `width` characters hold; None: too few."""
    columns = [(head, [cell(outcome) for outcome in outcomes], order) for head, cell, order in _OVERVIEW]
    columns = [column for column in columns if column[0] not in _ONLY_IF_ANY or set(column[1]) - {"0", "0%"}]
    while True:
        table = _overview([(head, cells) for head, cells, _ in columns], [outcome.scenario.workload for outcome in outcomes])
        if Console(width=_FILE_WIDTH).measure(table).maximum <= width:
            return table
        least = max(columns, key=lambda column: column[2])
        if not least[2]:
            return None
        columns.remove(least)


def _overview(columns: Sequence[tuple[str, Sequence[str]]], workloads: Sequence[object]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for head, _ in columns:
        table.add_column(head, justify="left" if head in ("workload", "policy") else "right", no_wrap=True, vertical="bottom")
    for at, cells in enumerate(zip(*(cells for _, cells in columns), strict=True)):
        again = at > 0 and workloads[at - 1] is workloads[at]
        ends = at + 1 == len(workloads) or workloads[at + 1] is not workloads[at]
        table.add_row("" if again else cells[0], *cells[1:], end_section=ends)
    return table


def capacities(found: Sequence[tuple[str, str, Capacity]]) -> Table:
    """(workload, policy, capacity), the first policy of a workload being what the others are compared with."""
    title = "capacity, and the figures at that rate"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for name in ("workload", "policy"):
        table.add_column(name, no_wrap=True)
    for name in ("requests/s", "ratio", "tokens/s", "TTFT p99", "ITL p99", "good", "rows", "KV waste"):
        table.add_column(name, justify="right", no_wrap=True)
    first: dict[str, float] = {}
    for workload, policy, capacity in found:
        base = first.setdefault(workload, capacity.rate)
        ratio = f"{capacity.rate / base:.2f}" if base else "–"
        if capacity.best is None:
            table.add_row(workload, policy, "0", ratio, *["–"] * 6)
            continue
        f = capacity.best.figures
        cells = (number(f.output_tokens_per_s), seconds(f.ttft.p99), seconds(f.itl.p99), f"{f.good_share:.0%}")
        table.add_row(workload, policy, f"{capacity.rate:.3g}", ratio, *cells, number(f.mean_rows), share(f.kv_waste))
    return table
