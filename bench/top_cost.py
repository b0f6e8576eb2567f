"""`python -m bench.top_cost`: what `carousel top` costs the server that it looks at.

The same closed load again and again on one server, in turns with `carousel top` on a terminal of its own and without. What
counts is the server's CPU time for a token; the picture is drawn by whoever looks, mostly on another machine.
"""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import click
from rich import box
from rich.table import Table

from bench import processes, provenance, tables
from bench.generator import Asking, offer
from bench.http2 import Caller
from bench.jobs import Job, Part
from bench.server import Server, ServerFailedError
from client import CarouselClient

_DEMO = Path(__file__).parents[1] / "demo" / "model"
_PROMPT, _OUTPUT = 32, 96  # tokens of a request
_LIMIT = 1.01  # CPU time with ÷ without: the target


@dataclass(frozen=True, slots=True)
class Turn:
    """One run of the load. cpu_s: of the server's processes, by role."""

    watched: bool
    tokens: int
    seconds: float
    cpu_s: dict[str, float]

    @property
    def cpu_us_per_token(self) -> float:
        return sum(self.cpu_s.values()) * 1e6 / self.tokens

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True)
class TopCost:
    """Ratios are with ÷ without, of neighbours in time: (least, median, most)."""

    rows: int
    cpu_ratio: tuple[float, float, float]
    pace_ratio: tuple[float, float, float]
    cpu_us_per_token: float  # without, median
    tokens_per_s: float


def cost(rows: int, turns: list[Turn]) -> TopCost:
    """turns: without and with, in turns. Each with is compared to the mean of its neighbours: a drift cancels out."""
    cpu, pace = [], []
    for before, watched, after in zip(turns[::2], turns[1::2], turns[2::2], strict=False):
        assert watched.watched and not before.watched and not after.watched
        cpu.append(2 * watched.cpu_us_per_token / (before.cpu_us_per_token + after.cpu_us_per_token))
        pace.append(2 * watched.tokens_per_s / (before.tokens_per_s + after.tokens_per_s))
    alone = [turn for turn in turns if not turn.watched]
    return TopCost(
        rows,
        _spread(cpu),
        _spread(pace),
        median(turn.cpu_us_per_token for turn in alone),
        median(turn.tokens_per_s for turn in alone),
    )


def _spread(values: list[float]) -> tuple[float, float, float]:
    return min(values), median(values), max(values)


@contextlib.contextmanager
def _watched(target: str) -> Iterator[None]:
    """`carousel top` on a terminal whose screen nobody sees; niced, as it is not the server's."""
    ours, theirs = pty.openpty()
    command = ["nice", "-n", "19", sys.executable, "-m", "client", "top", "--target", target]
    top = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL, env=os.environ | {"TERM": "xterm"})
    os.close(theirs)
    reader = threading.Thread(target=_read_all, args=(ours,), daemon=True)
    reader.start()
    try:
        yield
        if top.poll() is not None:
            raise ServerFailedError(f"`carousel top` ended with {top.returncode}")
    finally:
        top.terminate()
        top.wait()
        reader.join()
        os.close(ours)


def _read_all(terminal: int) -> None:
    with contextlib.suppress(OSError):  # the other end is closed
        while os.read(terminal, 1 << 16):
            pass


def _turn(server: Server, asking: Asking, jobs: list[Job], rows: int, watched: bool) -> Turn:
    caller = Caller(server.port, 1)
    try:
        with _watched(server.target) if watched else contextlib.nullcontext():
            before = processes.of_server(server.pid)
            offered = offer(caller, asking, jobs, at_once=rows)
            taken = processes.cpu_between(before, processes.of_server(server.pid))
    finally:
        caller.close()
    tokens = sum(heard.output_tokens for heard in offered.heard)
    if offered.broke or tokens != _OUTPUT * len(jobs):
        raise ServerFailedError(offered.broke or f"{tokens} tokens came instead of {_OUTPUT * len(jobs)}")
    return Turn(watched, tokens, offered.seconds, taken)


def measure(rows: int, requests: int, rounds: int) -> list[Turn]:
    """rounds: runs with `carousel top`, each between two without. Raises ServerFailedError."""
    options = ["--model", str(_DEMO), "--device", "cpu", "--max-batch-rows", str(rows)]
    with Server(options) as server, CarouselClient(server.target) as client:
        vocab_size = client.model_info().vocab_size
        jobs = [Job(0, (Part(at + 1, _PROMPT),), _OUTPUT) for at in range(requests)]

        def turn(at: int) -> Turn:
            """Prompts that were never there before: every run computes the same."""
            return _turn(server, Asking(vocab_size, cache_salt=str(at)), jobs, rows, watched=bool(at % 2))

        turn(-2)  # the first steps of each size take longer
        return [turn(at) for at in range(2 * rounds + 1)]


def show(found: TopCost) -> None:
    table = Table(title=f"carousel top beside {found.rows} rows of the bundled model", box=box.SIMPLE_HEAD)
    for name in ("with ÷ without", "least", "median", "most"):
        table.add_column(name, justify="left" if name[0] == "w" else "right")
    table.add_row("server's CPU time for a token", *(f"{value:.3f}" for value in found.cpu_ratio))
    table.add_row("tokens/s", *(f"{value:.3f}" for value in found.pace_ratio))
    console = tables.console()
    console.print(table)
    alone = f"Without: {found.cpu_us_per_token:,.0f} µs of CPU a token, {found.tokens_per_s:,.0f} tokens/s."
    verdict = "holds" if found.cpu_ratio[1] <= _LIMIT else "is missed"
    console.print(f"{alone} The target, {_LIMIT:g} of the CPU time at most, {verdict}.")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rows", type=click.IntRange(1, 256), default=32, show_default=True, help="Requests at once.")
@click.option("--requests", type=click.IntRange(1), default=192, show_default=True, help="… of one run.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Runs with `carousel top`.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Append the result to this file.")
def main(rows: int, requests: int, rounds: int, path: Path | None) -> None:
    """What `carousel top` costs the server that it looks at."""
    try:
        turns = measure(rows, requests, rounds)
    except ServerFailedError as error:
        raise click.ClickException(str(error)) from None
    found = cost(rows, turns)
    show(found)
    if path is not None:
        line = provenance.provenance("top_cost") | {"figures": asdict(found), "turns": [asdict(turn) for turn in turns]}
        provenance.append(path, line)


if __name__ == "__main__":
    main()
