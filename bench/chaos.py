"""`python -m bench.chaos`: every kind of process is killed, time and again, under a load of streams; what the callers notice.

The streams' tokens are held against those of an undisturbed run of the same requests. Exit code 1 when a token is lost, comes
twice or differs (near ties of a real model, proven, are counted apart: bench/near_ties.py), when a caller has an error, when a
server does not come back, or when its log holds what must never be there.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from bench import near_ties, processes, provenance, tables
from bench.chaos_load import Job, Load, Stream, all_once, connected, longest_pause
from bench.killable import KillableServer, ServerError, keep_logs, serving, wait_until
from bench.processes import CORE, FRONTEND, WORKER, Process
from bench.witness import Flaws, first_difference
from client import CarouselError
from client.aio.api import AsyncCarouselClient
from scheduler.command import OneLineCommand

_DEMO = Path(__file__).parent.parent / "demo" / "model"
_PATIENCE_S = 120.0  # until all streams go on after a kill
_POLL_S = 0.01
_CALM_S = 3.0  # of the row without a kill
_PAUSE_S = (0.2, 1.5)  # before a kill, at random: it is to find streams and steps wherever they are
_TEXTS = ("for i in", "def main", "import os\n" * 4, "class A:\n    x = 1\n" * 6, "# " + "the quick brown fox " * 10)
_LONG = {"cpu": 240, "sim": 1200}  # tokens of a stream: some seconds
_STOPPED = "exit code of the server that was told to stop"


@dataclass(frozen=True)
class Size:
    rounds: int  # kills of each kind
    lanes: int = 24  # requests at a time
    jobs: int = 24  # half of them greedy, half drawn
    frontends: int = 2
    connections: int = 6


QUICK, FULL = Size(rounds=1, lanes=12, jobs=12), Size(rounds=8)


@dataclass(frozen=True)
class Kind:
    title: str
    kill: Callable[[Scene], Awaitable[None]]
    standbys: int = 0  # of the server that it is tried on


@dataclass
class Row:
    """What was seen of one kind. Pauses in seconds: the longest time without a token that began at the kill or before."""

    title: str
    kills: int = 0
    requests: int = 0  # streams that were alive at a kill
    flaws: Flaws = field(default_factory=Flaws)
    mismatches: int = 0  # streams that are others than undisturbed, near ties apart
    near_ties: int = 0
    errors: int = 0  # streams that ended with one
    any_pauses_s: list[float] = field(default_factory=list)  # of all streams together, one a kill
    stream_pauses_s: list[float] = field(default_factory=list)  # of each stream that was alive at a kill
    notes: list[str] = field(default_factory=list)  # what went wrong, in words

    @property
    def holds(self) -> bool:
        return not (self.flaws or self.mismatches or self.errors)


@dataclass
class Report:
    device: str
    size: Size
    seed: int
    undisturbed_tokens: int = 0
    rows: dict[str, Row] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)  # of the servers' logs, and of their ends
    load: float = field(default_factory=lambda: os.getloadavg()[0])  # before it began: others who use the machine

    @property
    def holds(self) -> bool:
        return not self.complaints and all(row.holds for row in self.rows.values())


class Scene:
    """A server, and a connection that asks it questions."""

    def __init__(self, server: KillableServer, client: AsyncCarouselClient, draws: random.Random) -> None:
        self.server, self.client, self._draws = server, client, draws

    async def computing(self) -> int:
        """Process id of the worker that computes."""
        while True:
            if workers := (await self.client.server_info()).workers:
                return workers[0].pid
            await asyncio.sleep(_POLL_S)

    def one_of(self, role: str) -> Process:
        return self._draws.choice(self.server.of_role(role))


# ---------------------------------------------------------------------------------------------------------------- kills


def _signal_worker(number: int) -> Callable[[Scene], Awaitable[None]]:
    async def kill(scene: Scene) -> None:
        os.kill(await scene.computing(), number)

    return kill


def _kill_role(role: str) -> Callable[[Scene], Awaitable[None]]:
    async def kill(scene: Scene) -> None:
        os.kill(scene.one_of(role).pid, signal.SIGKILL)

    return kill


async def _replace(scene: Scene) -> None:
    await scene.client.replace_worker()


async def _kill_server(scene: Scene) -> None:
    await asyncio.to_thread(scene.server.kill_all)
    await asyncio.to_thread(scene.server.start)


async def _nothing(scene: Scene) -> None:
    await asyncio.sleep(_CALM_S)


KINDS = {
    "none": Kind("nothing", _nothing),
    "worker": Kind("worker, kill -9", _signal_worker(signal.SIGKILL)),
    "hang": Kind("worker hangs (SIGSTOP)", _signal_worker(signal.SIGSTOP)),
    "exit": Kind("worker exits", _signal_worker(signal.SIGTERM)),
    "frontend": Kind("front end, kill -9", _kill_role(FRONTEND)),
    "core": Kind("core, kill -9", _kill_role(CORE)),
    "replace": Kind("worker replaced", _replace),
    "server": Kind("whole server, kill -9", _kill_server),
    "standby": Kind("worker, kill -9, a standby takes over", _signal_worker(signal.SIGKILL), standbys=1),
}


# ----------------------------------------------------------------------------------------------------------------- runs


async def measure(report: Report, model: Path, kinds: Sequence[str], folder: Path, say: Callable[[str], None]) -> None:
    """Raises ServerError, CarouselError."""
    report.rows.update((name, Row(KINDS[name].title)) for name in kinds)
    for standbys in sorted({KINDS[name].standbys for name in kinds}):
        here = [name for name in kinds if KINDS[name].standbys == standbys]
        place, expected = folder / str(standbys), serving(report.size.frontends, standbys)
        with KillableServer(_options(report, model, standbys, place / "journal"), expected, place) as server:
            await _Trial(report, server, say).run(here)
            if code := await asyncio.to_thread(server.stop):
                report.complaints.append(f"{_STOPPED}: {code}")
            report.complaints += [*server.complaints(), *(f"{name} is left behind" for name in server.left_behind())]


def _options(report: Report, model: Path, standbys: int, journal: Path) -> list[str]:
    options = {"--model": model, "--device": report.device, "--journal": journal, "--frontends": report.size.frontends}
    if standbys:
        options["--standby"] = standbys
    if report.device == "cpu":
        options |= {"--dtype": "float32", "--threads": 1}
    return [str(word) for pair in options.items() for word in pair]


class _Trial:
    """All kills of one server."""

    def __init__(self, report: Report, server: KillableServer, say: Callable[[str], None]) -> None:
        self._report, self._server, self._say = report, server, say
        self._random = random.Random(report.seed)
        self._expected: dict[Job, list[int]] = {}
        self._ended: list[Stream] = []

    async def run(self, kinds: Sequence[str]) -> None:
        size = self._report.size
        async with connected(self._server.target) as client:
            scene = Scene(self._server, client, self._random)
            jobs = await _jobs(client, self._report)
            self._expected = await self._undisturbed(jobs)
            seed = self._report.seed
            async with Load(self._server.target, jobs, size.lanes, size.connections, seed, self._ended.append) as load:
                for _ in range(size.rounds):
                    for name in self._random.sample(kinds, len(kinds)):
                        await self._disturb(scene, load, name)
                await load.finish()
            for stream in self._ended:
                await self._look_into(client, stream)

    async def _undisturbed(self, jobs: Sequence[Job]) -> dict[Job, list[int]]:
        streams = await all_once(self._server.target, jobs)
        for stream in streams:
            if stream.error or not stream.witness.is_whole:
                raise ServerError(f"a request failed before anything was killed: {stream.error or stream.witness.reasons}")
        self._report.undisturbed_tokens += sum(stream.witness.num_tokens for stream in streams)
        return {stream.job: stream.witness.tokens() for stream in streams}

    async def _disturb(self, scene: Scene, load: Load, name: str) -> None:
        row = self._report.rows[name]
        await _until(lambda: sum(bool(stream.at_s) for stream in load.alive) >= len(load.alive) // 2 > 0, "no streams run")
        await asyncio.sleep(self._random.uniform(*_PAUSE_S))
        before = await asyncio.to_thread(self._server.members)
        alive = [stream for stream in load.alive if stream.at_s]
        others = [stream for stream in self._ended[-200:] if stream.at_s]  # their last tokens may stand before the pause
        for stream in load.alive:
            stream.kind = name
        begin_s = time.monotonic()
        await KINDS[name].kill(scene)
        if name != "none":
            await self._whole_again(before)
        heard = {stream: len(stream.at_s) for stream in alive}
        await _until(lambda: all(stream.ended_s or len(stream.at_s) > heard[stream] for stream in alive), f"after {row.title}")
        end_s = time.monotonic()
        row.kills += 1
        row.requests += len(alive)
        everybody = {*alive, *others, *load.alive, *self._ended[-200:]}
        all_at_s = sorted(at_s for stream in everybody for at_s in stream.at_s)
        pauses = [longest_pause(stream.at_s, begin_s, end_s) for stream in alive]
        row.stream_pauses_s += [pause for pause in pauses if pause is not None]
        pause = longest_pause(all_at_s, begin_s, end_s)
        row.any_pauses_s += [pause] if pause is not None else []
        self._report.complaints += self._server.complaints()
        self._say(f"{row.title}: {len(alive)} streams went on after {tables.seconds(pause or 0.0)}")

    async def _whole_again(self, before: Sequence[Process]) -> None:
        """Something of it is gone, and as many of everything are there again, the models loaded."""
        server, known = self._server, {process.pid for process in before}

        def whole() -> bool:
            if all(processes.began(process.pid) == process.began for process in before) or not server.is_whole():
                return False
            new, log = [process.pid for process in server.of_role(WORKER) if process.pid not in known], server.log()
            return all(f"worker (pid {pid})" in log for pid in new)

        if not await asyncio.to_thread(wait_until, whole, _PATIENCE_S):
            raise ServerError(f"the server is not whole after {_PATIENCE_S:g} s")

    async def _look_into(self, client: AsyncCarouselClient, stream: Stream) -> None:
        """After all kills, when the server is at rest: a near tie has to be proven."""
        name = stream.kind or "none"  # it ended before the first kill
        row = self._report.rows.setdefault(name, Row(KINDS[name].title))
        expected, got = self._expected[stream.job], stream.witness.tokens()
        if stream.error or not stream.witness.is_whole:
            row.errors += 1
            row.notes.append(stream.error or f"ended as {sorted(map(str, stream.witness.reasons))}")
        flaws = stream.witness.flaws([expected])
        differs, flaws.wrong = bool(flaws.wrong), 0
        row.flaws += flaws
        if not differs:
            return
        at = first_difference(got, expected)
        why = f"token {at} of {stream.job.count} differs"
        if self._report.device != "sim" and len(got) == len(expected) and not flaws:
            verdict = await near_ties.judge(client, stream.job, got, expected)
            row.near_ties += len(verdict.ties)
            why = verdict.why
        if why:
            row.mismatches += 1
            row.notes.append(why)


async def _jobs(client: AsyncCarouselClient, report: Report) -> list[Job]:
    draws = random.Random(report.seed)
    prompts = [tuple(await client.tokenize(text)) for text in _TEXTS]
    return [
        Job(
            prompt=prompts[number % len(prompts)],
            count=_LONG[report.device] + draws.randrange(_LONG[report.device] // 4),
            seed=draws.getrandbits(63),
            temperature=0.8 if number % 2 else 0.0,
        )
        for number in range(report.size.jobs)
    ]


async def _until(condition: Callable[[], bool], what: str) -> None:
    """Raises ServerError."""
    until = time.monotonic() + _PATIENCE_S
    while not condition():
        if time.monotonic() > until:
            raise ServerError(f"not within {_PATIENCE_S:g} s: {what}")
        await asyncio.sleep(_POLL_S)


# --------------------------------------------------------------------------------------------------------------- output


def show(report: Report, console: Console) -> None:
    size = report.size
    what = "the simulated worker" if report.device == "sim" else "the demo model in float32"
    console.print(
        f"{what}, {size.lanes} streams at a time, {size.frontends} front ends, journal; seed {report.seed}; load before:"
        f" {report.load:.1f}"
    )
    table = Table("killed", box=box.SIMPLE_HEAD)
    counts = ("kills", "streams", "tokens\nlost", "tokens\ndoubled", "mis-\nmatches", "near\nties", "errors")
    times = ("any stream\np50", "any stream\np99", "each stream\np50", "each stream\np99")
    for name in (*counts, *times):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.rows.values():
        numbers = (row.kills, row.requests, row.flaws.lost, row.flaws.doubled, row.mismatches, row.near_ties, row.errors)
        pauses = (*_quantiles(row.any_pauses_s), *_quantiles(row.stream_pauses_s))
        table.add_row(row.title, *(f"{number:,}" for number in numbers), *map(tables.seconds, pauses))
    table.caption = "Times: the longest pause without a token around a kill, of all streams together, and of each stream."
    table.caption_justify = "left"
    console.print(table)
    for row in report.rows.values():
        for note in row.notes[:4]:
            console.print(f"{row.title}: {note}")
    for complaint in report.complaints[:8]:
        console.print(f"the server: {complaint}")


def _quantiles(values: Sequence[float]) -> tuple[float, float]:
    """(p50, p99); NaN without values."""
    if not values:
        return float("nan"), float("nan")
    p50, p99 = np.quantile(values, (0.5, 0.99))
    return float(p50), float(p99)


def as_json(report: Report) -> dict[str, Any]:
    def row(found: Row) -> dict[str, Any]:
        told = asdict(found)
        for name in ("any_pauses_s", "stream_pauses_s"):
            told[name] = dict(zip(("p50", "p99"), _quantiles(told[name]), strict=True))
        return told | {"holds": found.holds}

    return {
        "device": report.device,
        "seed": report.seed,
        "size": asdict(report.size),
        "load before": report.load,
        "undisturbed tokens": report.undisturbed_tokens,
        "rows": {name: row(found) for name, found in report.rows.items()},
        "complaints": report.complaints,
        "holds": report.holds,
    }


@click.command(cls=OneLineCommand, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--device", type=click.Choice(["cpu", "sim"]), default="cpu", help="sim: no model, invented tokens.")
@click.option("--model", type=click.Path(path_type=Path, exists=True), default=_DEMO, help="Whose tokenizer, and weights.")
@click.option("--kinds", metavar="NAME,…", default=",".join(KINDS), help="What is killed.")
@click.option("--rounds", type=click.IntRange(1), help=f"Kills of each kind. [default: {FULL.rounds}; quick: {QUICK.rounds}]")
@click.option("--seed", type=int, default=0)
@click.option("--quick", is_flag=True, help="One kill of each kind: about a minute.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Append a line to this file.")
def main(device: str, model: Path, kinds: str, rounds: int | None, seed: int, quick: bool, json_file: Path | None) -> None:
    """Kill every kind of process in a loop under load, and hold each stream against an undisturbed run."""
    chosen = kinds.split(",")
    if unknown := [name for name in chosen if name not in KINDS]:
        raise click.BadParameter(f"{', '.join(unknown)}: no such kind", param_hint="--kinds")
    size = QUICK if quick else FULL
    report = Report(device, Size(**asdict(size) | {"rounds": rounds or size.rounds}), seed)
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:5.0f} s  {text}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        try:
            asyncio.run(measure(report, model, chosen, Path(folder), say))
        except (ServerError, CarouselError) as error:
            report.complaints.append(str(error))
        kept = [] if report.holds else keep_logs(Path(folder))
    show(report, tables.console())
    for log in kept:
        say(f"the server's log: {log}")
    if json_file is not None:
        provenance.append(json_file, provenance.provenance(f"chaos: {device}") | as_json(report))
    sys.exit(0 if report.holds else 1)


if __name__ == "__main__":
    main()
