"""`python -m bench.journal`: what the journal costs a step, by rows and by how often it is forced to the disk, and how long the
next core takes to read it.

One thread, by the clock: a write of a step's tokens and all that `tidy` does behind it. The folder decides what an fsync costs
(nothing where its files are in memory): take one on the disk that is to be used.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from bench import provenance
from scheduler.core import Output
from scheduler.journal import Fsync, Journal
from scheduler.journal_files import read
from wire import AddHeader, AddRequest, RestoreRequest, SamplingSpec, TokenBatch, TokenBatchHeader

_MODEL = "none"
_POLICIES = ("never", "interval:100", "interval:10", "always")
_GREEDY = SamplingSpec(0.0, 0, 1.0, 0.0, 0)


@dataclass(frozen=True, slots=True)
class JournalCost:
    """Microseconds a step."""

    fsync: str
    rows: int
    median: float
    mean: float
    p99: float
    bytes_per_token: float


def cost(folder: Path, fsync: str, rows: int, steps: int, pause_s: float) -> JournalCost:
    """pause_s: between steps, as a model computes meanwhile; intervals need it to mean anything."""
    journal = Journal(folder, _MODEL, fsync=Fsync(fsync), max_bytes=1 << 30)
    journal.begin((), 0)
    for handle in range(1, rows + 1):
        header = AddHeader(handle, f"request-{handle}", handle, 2, steps, _GREEDY, resume_window_ms=30_000)
        assert journal.added(AddRequest(header, np.zeros(256, np.int32)), 1), journal.failure
    before, times = journal.num_bytes, []
    handles = np.arange(1, rows + 1, dtype=np.uint32)
    for step in range(steps):
        outputs = [Output(1, TokenBatch(TokenBatchHeader(step), handles, np.full(rows, step, np.int32)))]
        began = time.perf_counter_ns()
        journal.tokens(outputs)
        journal.tidy(_nothing)
        times.append((time.perf_counter_ns() - began) / 1000)
        time.sleep(pause_s)
    per_token = (journal.num_bytes - before) / (rows * steps)
    journal.close()
    p99 = statistics.quantiles(times, n=100)[98]
    return JournalCost(fsync, rows, statistics.median(times), statistics.fmean(times), p99, per_token)


def reading(folder: Path) -> tuple[float, int]:
    """(seconds to read a journal back, tokens in it)."""
    began = time.perf_counter()
    found = read(folder, _MODEL, time.monotonic_ns(), time.time_ns())
    took = time.perf_counter() - began
    assert not found.notes
    return took, sum(len(request.tokens) for request in found.requests)


def filesystem(folder: Path) -> str:
    """Its type, as Linux names it; empty: not known."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return ""
    above = {str(path) for path in (folder.resolve(), *folder.resolve().parents)}
    return max((mount for mount in mounts if mount[0] in above), key=lambda mount: len(mount[0]), default=["", ""])[1]


def _nothing(key: tuple[int, int]) -> RestoreRequest | None:
    raise AssertionError(f"request {key} was asked for, and nothing was to be written once more")


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False, writable=True),
    help="Where the journals are written. [default: that for temporary files]",
)
@click.option("--rows", "all_rows", multiple=True, type=click.IntRange(1), default=(1, 64, 256, 1024), help="Rows of a step.")
@click.option("--steps", type=click.IntRange(2), default=500, help="Steps of each measurement.")
@click.option("--pause-ms", type=click.FloatRange(0), default=2.0, help="Between two steps.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Add the figures to this .jsonl file.")
def main(folder: Path | None, all_rows: tuple[int, ...], steps: int, pause_ms: float, json_path: Path | None) -> None:
    """Measure what the journal costs a step. Leave the machine alone meanwhile."""
    costs, took, num_tokens, load_before = [], 0.0, 0, os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="carousel-journal-", dir=folder) as made:
        kind = filesystem(Path(made))
        for fsync in _POLICIES:
            for rows in all_rows:
                place = Path(made) / f"{fsync.replace(':', '-')}-{rows}"
                place.mkdir(mode=0o700)
                costs.append(cost(place, fsync, rows, steps, pause_ms / 1000))
                took, num_tokens = max((took, num_tokens), reading(place), key=lambda each: each[1])
    table = Table("fsync", "rows", "median µs", "mean µs", "p99 µs", "bytes a token", title="the journal's cost of a step")
    for each in costs:
        figures = (each.median, each.mean, each.p99, each.bytes_per_token)
        table.add_row(each.fsync, f"{each.rows:,}", *(f"{figure:.1f}" for figure in figures))
    output = Console()
    output.print(table)
    output.print(
        f"read back: {num_tokens:,} tokens in {took:.3f} s; file system: {kind or 'not known'}; load: {load_before:.1f}"
    )
    if json_path is not None:
        line = provenance.provenance("journal") | {
            "steps": [asdict(each) for each in costs],
            "num_steps": steps,
            "pause_ms": pause_ms,
            "file system": kind,
            "load before": load_before,
            "read_s": took,
            "read_tokens": num_tokens,
        }
        provenance.append(json_path, line)
        output.print(f"added to {json_path}")


if __name__ == "__main__":
    main()
