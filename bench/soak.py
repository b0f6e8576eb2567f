"""`python -m bench.soak`: a long run of the whole service with the simulated worker, its processes killed at random times.

bench/soak_load.py makes the requests and judges each; here the server is started, killed in parts, watched and stopped. Exit
code 1 when a token is lost, comes twice or is another than the formula's, when a request ends as it must not, when the server
holds a block, row or request though nobody asks for anything, when a process grows, leaves descriptors or outlives its parent,
when the log holds what must never be there, or when it takes too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench import processes, provenance, tables
from bench.killable import KillableServer, ServerError, keep_logs, serving
from bench.processes import CORE, EXPORTER, FRONTEND, WORKER, Process
from bench.soak_load import Told
from bench.soak_watch import Growth, Watch, growths, idle_files, more_files
from client import CarouselError
from client.aio.api import AsyncCarouselClient
from scheduler.command import OneLineCommand

_DEMO = Path(__file__).parent.parent / "demo" / "model"
_CALM_SHARE = 0.25  # of the requests, the last ones: nothing is killed, and everybody's memory must be flat
_KILLS_UNTIL = 0.6  # of the requests, so that what they hit has ended before the calm time
_WARM_SHARE = 0.1  # of the requests, once it is calm, before memory is looked at
_JOURNAL_MIB = 64
_SEGMENTS = 8  # of a journal: it may be one larger than its limit
_POOL = {"--num-blocks": 320, "--max-batch-rows": 48, "--max-unread-tokens": 64}  # small: requests are preempted
_LOOK_S = 2.0
_SAY_S = 15.0
_WORKER_REST_S = 1.0  # between two kills of workers: the same rows hit twice would look like poison
_REPLACE_S = 30.0
_SETTLE_S = 3.0  # for connections to go, before descriptors are counted
_KILLS = {
    "worker": 4,
    "hang": 2,
    "exit": 2,
    "frontend": 4,
    "core": 4,
    "exporter": 1,
    "replace": 1,
    "server": 1,
}  # how often, to each other


@dataclass(frozen=True)
class Asked:
    requests: int
    seed: int
    minutes: float  # at most
    lanes: int
    frontends: int
    standbys: int
    kill_every_s: float  # on average
    leg: int  # requests between two pauses


@dataclass
class Report:
    asked: Asked
    seconds: float = 0.0
    kills: Counter[str] = field(default_factory=Counter)
    tally: dict[str, Any] = field(default_factory=dict)  # the load's last word
    growth: list[Growth] = field(default_factory=list)
    most_journal_bytes: int = 0
    wrongs: list[str] = field(default_factory=list)  # what must not be, in words
    load: float = field(default_factory=lambda: os.getloadavg()[0])  # before it began: others who use the machine

    @property
    def ended(self) -> int:
        return sum(self.tally.get("ended", {}).values())

    @property
    def holds(self) -> bool:
        return not self.wrongs


class _Killer:
    """Kills something, at random times, until it is told that it is enough."""

    def __init__(self, report: Report, server: KillableServer, client: AsyncCarouselClient) -> None:
        self._report, self._server, self._client = report, server, client
        self._draws = random.Random(f"{report.asked.seed} kills")
        self._worker_s = 0.0  # when one was killed last
        self.is_enough = False

    async def run(self) -> None:
        while not self.is_enough:
            await asyncio.sleep(self._draws.expovariate(1 / self._report.asked.kill_every_s))
            if self.is_enough:
                return
            what = self._draws.choices(list(_KILLS), list(_KILLS.values()))[0]
            if await self._kill(what):
                self._report.kills[what] += 1

    async def _kill(self, what: str) -> bool:
        """False: there was nothing to kill."""
        match what:
            case "worker" | "hang" | "exit":
                await asyncio.sleep(max(0.0, self._worker_s + _WORKER_REST_S - time.monotonic()))
                self._worker_s = time.monotonic()
                return self._signal(WORKER, {"worker": signal.SIGKILL, "hang": signal.SIGSTOP, "exit": signal.SIGTERM}[what])
            case "frontend":
                return self._signal(FRONTEND, signal.SIGKILL)
            case "core":
                return self._signal(CORE, signal.SIGKILL)
            case "exporter":
                return self._signal(EXPORTER, signal.SIGKILL)
            case "replace":
                with contextlib.suppress(CarouselError, TimeoutError):  # others are killed meanwhile: it may fail
                    await asyncio.wait_for(self._client.replace_worker(), _REPLACE_S)
                return True
        await asyncio.to_thread(self._server.kill_all)
        await asyncio.to_thread(self._server.start)
        return True

    def _signal(self, role: str, number: int) -> bool:
        found = self._server.of_role(role)
        if not found:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._draws.choice(found).pid, number)
        return True


async def soak(report: Report, model: Path, folder: Path, show_progress: Callable[[Report], None]) -> None:
    """Raises ServerError."""
    asked, watch = report.asked, Watch()
    journal = folder / "journal"
    with KillableServer(_options(asked, model, journal), serving(asked.frontends, asked.standbys), folder / "server") as server:
        idle = idle_files(server.members())
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(asked.minutes * 60):
                await _run(report, server, watch, journal, show_progress)
        except TimeoutError:
            report.wrongs.append(f"{report.ended:,} of {asked.requests:,} requests were done after {asked.minutes:g} minutes")
        report.seconds = time.monotonic() - began_s
        await asyncio.sleep(_SETTLE_S)
        report.wrongs += more_files(idle, idle_files(server.members()))
        await _end(report, server)
    report.wrongs += [growth.too_much for growth in report.growth if growth.too_much]
    report.most_journal_bytes = watch.most_journal_bytes
    if watch.most_journal_bytes > _JOURNAL_MIB * 2**20 * (1 + 1 / _SEGMENTS):
        report.wrongs.append(f"the journal had {watch.most_journal_bytes / 2**20:.1f} MiB")
    report.wrongs += _of_tally(report)


def _options(asked: Asked, model: Path, journal: Path) -> list[str]:
    options: dict[str, Any] = {"--model": model, "--device": "sim", "--frontends": asked.frontends, "--standby": asked.standbys}
    options |= {"--journal": journal, "--journal-limit-mib": _JOURNAL_MIB, "--metrics-port": 0} | _POOL
    return [str(word) for pair in options.items() for word in pair]


async def _run(
    report: Report, server: KillableServer, watch: Watch, journal: Path, show_progress: Callable[[Report], None]
) -> None:
    asked = report.asked
    calm_from = round(asked.requests * (1 - _CALM_SHARE))
    told = Told(
        target=server.target, requests=asked.requests, seed=asked.seed, lanes=asked.lanes, calm_from=calm_from, leg=asked.leg
    )
    calm_s = float("inf")
    async with AsyncCarouselClient(server.target) as client, _load(told) as load:
        assert load.stdout is not None
        killer = _Killer(report, server, client)
        killing = asyncio.create_task(killer.run())
        watching = asyncio.create_task(_watch(report, server, watch, journal, load.pid))
        try:
            async for line in load.stdout:
                report.tally = json.loads(line)
                show_progress(report)
                killer.is_enough |= report.ended >= _KILLS_UNTIL * asked.requests
                if report.ended >= calm_from + _WARM_SHARE * asked.requests:
                    calm_s = min(calm_s, time.monotonic())
                for task in (killing, watching):
                    if task.done():
                        task.result()
        finally:
            for task in (killing, watching):
                task.cancel()
            await asyncio.gather(killing, watching, return_exceptions=True)
        if await load.wait():
            report.wrongs.append("the load generator failed: see above")
    report.growth = list(growths(watch, calm_s))


@contextlib.asynccontextmanager
async def _load(told: Told) -> AsyncIterator[asyncio.subprocess.Process]:
    command = [sys.executable, "-m", "bench.soak_load", json.dumps(asdict(told))]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, limit=1 << 20, process_group=0)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _watch(report: Report, server: KillableServer, watch: Watch, journal: Path, load_pid: int) -> None:
    while True:
        load = [Process(load_pid, began, "load") for began in (processes.began(load_pid),) if began is not None]
        await asyncio.to_thread(watch.look, [*server.members(), *load], journal)
        report.wrongs += [f"the log: {line}" for line in server.complaints()]
        await asyncio.sleep(_LOOK_S)


async def _end(report: Report, server: KillableServer) -> None:
    """Raises ServerError."""
    code = await asyncio.to_thread(server.stop)
    if code:
        report.wrongs.append(f"the server that was told to stop ended with exit code {code}")
    report.wrongs += [f"the log: {line}" for line in server.complaints()]
    if left := server.left_behind():
        report.wrongs.append(f"left behind: {', '.join(left[:8])}")


def _of_tally(report: Report) -> Iterator[str]:
    tally = report.tally
    if not tally.get("done") and not report.wrongs:
        yield "the load generator did not come to its end"
    yield from tally.get("violations", ())
    if (more := tally.get("num_violations", 0) - len(tally.get("violations", ()))) > 0:
        yield f"and {more:,} more like these"


# --------------------------------------------------------------------------------------------------------------- output


@contextlib.contextmanager
def _progress(requests: int) -> Iterator[Callable[[Report], None]]:
    console = Console(stderr=True)
    began_s = time.monotonic()
    if not console.is_terminal:
        next_s = began_s

        def say(report: Report) -> None:
            nonlocal next_s
            if time.monotonic() >= next_s:
                next_s = time.monotonic() + _SAY_S
                seconds = time.monotonic() - began_s
                print(f"{seconds:5.0f} s  {report.ended:,} requests, {_kills(report)}", file=sys.stderr, flush=True)

        yield say
        return
    columns = (TextColumn("{task.completed:,} of {task.total:,} requests"), BarColumn(), TextColumn("{task.fields[kills]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=requests, kills="")
        yield lambda report: progress.update(task, completed=report.ended, kills=_kills(report))


def _kills(report: Report) -> str:
    return f"{report.kills.total()} kills, {report.tally.get('num_violations', 0) + len(report.wrongs)} violations"


def show(report: Report, console: Console) -> None:
    asked, tally = report.asked, report.tally
    console.print(
        f"{report.ended:,} requests in {report.seconds:.0f} s, {report.ended / max(1e-9, report.seconds):.0f} a second;"
        f" {asked.lanes} at a time, {asked.frontends} front ends; seed {asked.seed}; load before: {report.load:.1f}"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    for row in _rows(report):
        table.add_row(*row)
    console.print(table)
    for wrong in report.wrongs[:20]:
        console.print(f"wrong: {wrong}")
    if len(report.wrongs) > 20:
        console.print(f"… and {len(report.wrongs) - 20:,} more")
    console.print("all held" if report.holds else f"{len(report.wrongs)} violations; tally {tally.get('num_violations', 0)}")


def _rows(report: Report) -> Iterator[tuple[str, str, str]]:
    tally = report.tally
    for what, count in sorted(tally.get("ended", {}).items()):
        yield f"requests {what}", f"{count:,}", "of those without a window, with a killed process" if what == "cut" else ""
    flaws = tally.get("flaws", {})
    for name, meaning in (("lost", ""), ("doubled", ""), ("wrong", "others than the formula's")):
        yield f"tokens {name}", f"{flaws.get(name, 0):,}", meaning
    yield "tokens", f"{tally.get('tokens', 0):,}", "each compared"
    yield (
        "resumes",
        f"{tally.get('resumes', 0):,}",
        f"{tally.get('again', 0):,} made once more, {tally.get('refused', 0):,} refused for now",
    )
    for seconds, which in tally.get("slowest", ())[:2]:
        yield "slowest", tables.seconds(seconds), which
    yield "kills", f"{report.kills.total():,}", ", ".join(f"{what} {count}" for what, count in sorted(report.kills.items()))
    yield "rests", f"{tally.get('rests', 0):,}", "pauses at which no request, row or block was held"
    for name, count in tally.get("counters", {}).items():
        yield name.replace("_", " "), f"{count:,}", "as far as the cores lived to tell"
    for growth in report.growth:
        (first, last), (few, many) = growth.resident_bytes, growth.files
        yield (
            f"{growth.role}",
            f"{first / 2**20:.0f} → {last / 2**20:.0f} MiB",
            f"calm time, first and last third; descriptors {few} → {many}",
        )
    yield "journal", f"{report.most_journal_bytes / 2**20:.1f} MiB", f"at most; its limit is {_JOURNAL_MIB} and a segment"


def as_json(report: Report) -> dict[str, Any]:
    return {
        "asked": asdict(report.asked),
        "seconds": report.seconds,
        "requests/s": report.ended / max(1e-9, report.seconds),
        "load before": report.load,
        "kills": dict(report.kills),
        "tally": report.tally,
        "growth": [asdict(growth) for growth in report.growth],
        "journal bytes": report.most_journal_bytes,
        "wrongs": report.wrongs,
        "holds": report.holds,
    }


@click.command(cls=OneLineCommand, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--requests", type=click.IntRange(1), default=200_000)
@click.option("--seed", type=int, default=0, help="Of requests, fates and kills.")
@click.option("--minutes", type=float, default=15.0, help="It must be done by then.")
@click.option("--lanes", type=click.IntRange(1), default=96, help="Requests at a time.")
@click.option("--frontends", type=click.IntRange(1), default=2)
@click.option("--standbys", type=click.IntRange(0), default=1)
@click.option(
    "--kill-every", "kill_every_s", type=click.FloatRange(0.1), default=5.0, help="Seconds between kills, on average."
)
@click.option("--leg", type=click.IntRange(1), default=5_000, help="Requests between two pauses at which nothing may be held.")
@click.option("--model", type=click.Path(path_type=Path, exists=True), default=_DEMO, help="Whose tokenizer and length count.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Append a line to this file.")
def main(model: Path, json_file: Path | None, **asked: Any) -> None:
    """Very many requests through a server whose processes are killed at random, and all that must hold."""
    report = Report(Asked(**asked))
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, _progress(report.asked.requests) as show_progress:
        try:
            asyncio.run(soak(report, model, Path(folder), show_progress))
        except* ServerError as errors:
            report.wrongs += [str(error) for error in errors.exceptions]
        kept = [] if report.holds else keep_logs(Path(folder))
    show(report, tables.console())
    for log in kept:
        print(f"the server's log: {log}", file=sys.stderr)
    if json_file is not None:
        provenance.append(json_file, provenance.provenance("soak: simulated worker") | as_json(report))
    sys.exit(0 if report.holds else 1)


if __name__ == "__main__":
    main()
