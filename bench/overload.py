"""`python -m bench.overload`: what more load than a server can take does to it, and 10,000 streams that do nothing.

A server with a simulated worker, whose steps cost what a formula says, so that the machine's cores are for the scheduler and
the figures are its own. First its capacity by a closed loop; then half of it, all of it, one and a half and three times as
much by an open loop, three times for minutes: goodput in windows, refusals, memory of every process, time to the first token of
those admitted; then how long until all is as before. Last a crowd of slow readers that is held while others are served.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import click
import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from bench import processes, provenance, tables
from bench.figures import Percentiles
from bench.generator import offer
from bench.http2 import Caller
from bench.overload_figures import Growth, Phase, Recovery, Resident, growth, recovery
from bench.overload_figures import Load as QueueLoad
from bench.overload_load import BEGUN, HELD, SENT, Came, Crowd, Load, asking, jobs
from bench.processes import CORE, FRONTEND, WORKER
from bench.server import Server, ServerFailedError
from bench.targets import Shown
from client import CarouselClient, CarouselError

_DEMO = Path(__file__).parent.parent / "demo" / "model"
_STEP_NS = {"base": 3_500_000, "per-token": 17_500, "per-context-token": 30}  # Llama 3 8B, bfloat16, H200, by the roofline
_OTHERS = (0.5, 1.0, 1.5)  # loads, as multiples of capacity
_MOST = 3.0
_DEADLINE = 3.0  # of a request, as a multiple of the slowest's time in the closed loop
_LOOK_S = 0.5
_WATCH_S = 0.1
_PAUSE_S = 0.05  # between requests that go one by one
_PATIENCE_S = 120.0
_POLL_S = 0.02
_STILL_S = 0.5
_STREAM_S = 0.03  # patience for each of a crowd
_MOST_SEEDS = 100  # of a run
_ROLES = (CORE, FRONTEND, WORKER)

_SHARE, _REFUSAL_S, _GROWTH, _RECOVERY_S = 0.9, 0.05, 0.02, 10.0  # goals …
_WAIT = 1.5  # … and of a first token, as a multiple of the time in which a full queue empties


class LoadFailedError(Exception):
    """The load generator ended without figures."""


@dataclass(frozen=True)
class Size:
    """How much is asked; seconds."""

    rows: int = 64
    queue: int = 96  # requests that may wait, and at once in the closed loop, of which some then always wait
    words: tuple[int, int] = (32, 400)  # of a prompt
    tokens: tuple[int, int] = (32, 224)  # of an output
    closed_s: float = 30.0
    others_s: float = 30.0
    most_s: float = 180.0
    window_s: float = 5.0
    singles: int = 40
    crowd: int = 10_000
    crowd_tokens: int = 32
    crowd_unread: int = 16  # tokens of a stream that may wait for its reader
    hold_s: float = 20.0


_SHORT_WORDS, _SHORT_TOKENS = (16, 100), (8, 56)  # for a model on a CPU, where a request takes long
QUICK = Size(closed_s=8.0, others_s=5.0, most_s=15.0, window_s=1.0, singles=15, crowd=1000, hold_s=5.0)


@dataclass(frozen=True)
class Measured:
    """One load of an open or closed loop."""

    times: float  # of the capacity; 0: the closed loop
    rate: float  # requests a second offered; 0: the closed loop
    phase: Phase
    busy: dict[str, float]  # CPU seconds a second, by role; `load`: the generator


@dataclass(frozen=True)
class Idle:
    """The crowd, and who was served beside it. Bytes a stream, by role."""

    crowd: Crowd
    bytes_per_stream: dict[str, float]
    alive: int  # requests in the core, before they were let go
    before: Phase  # half of the capacity, without the crowd
    beside: Phase  # … and with it


@dataclass
class Report:
    size: Size
    device: str
    frontends: int
    seed: int
    load: float = field(default_factory=lambda: os.getloadavg()[0])  # before it began: others who use the machine
    deadline_s: float = 0.0
    measured: list[Measured] = field(default_factory=list)
    memory: dict[str, Growth] = field(default_factory=dict)  # while the most came, its second half
    usual_s: tuple[float, float] = (0.0, 0.0)  # first token of an idle server: p50 and the slowest
    recovery: Recovery | None = None
    idle: Idle | None = None
    seeds: int = 0  # that were given out

    def next_seed(self) -> int:
        """Of a load with prompts of its own: what another one left in the prefix cache is of no use to it."""
        self.seeds += 1
        return self.seed * _MOST_SEEDS + self.seeds

    @property
    def closed(self) -> Measured:
        return self.measured[0]

    @property
    def most(self) -> Measured:
        return next(each for each in self.measured if each.times == _MOST)

    @property
    def peak(self) -> float:
        """Of all loads, tokens a second."""
        return max(each.phase.goodput for each in self.measured)


# ----------------------------------------------------------------------------------------------------------------- runs


def measure(report: Report, model: Path, say: Callable[[str], None]) -> None:
    """Raises LoadFailedError, ServerFailedError, CarouselError."""
    size = report.size
    with _server(report, model, size.queue, 1024) as server:
        fresh = [first_s for _, first_s in _singles(report, server)]
        report.usual_s = statistics.median(fresh), max(fresh)
        say(f"first token of the idle server after {report.usual_s[0] * 1e3:.1f} ms")
        load = replace(_load(report, server), ramp_s=min(5.0, size.others_s / 3))
        closed = replace(load, at_once=size.queue)
        report.measured.append(_capacity(report, server, closed))
        report.deadline_s = round(_DEADLINE * report.closed.phase.e2e.most, 1)
        say(f"capacity {report.closed.phase.goodput:,.0f} tokens/s, {report.closed.phase.rate:.1f} requests/s")
        with_deadline = replace(load, deadline_s=report.deadline_s)
        for times in _OTHERS:
            offered = replace(with_deadline, seconds=size.others_s, rate=times * report.closed.phase.rate)
            report.measured.append(_measured(server, replace(offered, seed=report.next_seed()), times)[0])
            say(f"{times:g} times that: {report.measured[-1].phase.goodput:,.0f} tokens/s in time")
        most = replace(with_deadline, seconds=size.most_s, rate=_MOST * report.closed.phase.rate)
        _overload(report, server, replace(most, seed=report.next_seed()))
        say(f"{_MOST:g} times that: {report.most.phase.goodput:,.0f} tokens/s in time")
    with _server(report, model, 2 * size.crowd, size.crowd_unread) as server:
        say(f"{size.crowd:,} streams that nobody reads")
        report.idle = _idle(report, server)


def _capacity(report: Report, server: Server, closed: Load) -> Measured:
    """By a closed loop, that is longer where requests take longer. Raises LoadFailedError."""
    for longer in (1, 2, 4):
        seconds = longer * report.size.closed_s
        measured, _ = _measured(server, replace(closed, seconds=seconds, seed=report.next_seed()), 0.0)
        if measured.phase.windows and measured.phase.rate:
            return measured
    raise LoadFailedError(f"{seconds:g} s of a closed loop are too short for requests that take so long")


def _load(report: Report, server: Server) -> Load:
    size = report.size
    return Load(port=server.port, words=size.words, tokens=size.tokens, window_s=size.window_s, seed=report.next_seed())


def _server(report: Report, model: Path, queue: int, unread: int) -> Server:
    options = {
        "--model": model,
        "--device": report.device,
        "--frontends": report.frontends,
        "--max-batch-rows": report.size.rows,
        "--max-queue-requests": queue,
        "--max-unread-tokens": unread,
    }
    if report.device != "sim":
        return Server(_flat(options))
    steps = {f"--sim-{name}-ns": cost for name, cost in _STEP_NS.items()}
    return Server(_flat(options | {"--num-blocks": 8192} | steps), module="bench.sim_server")


def _flat(options: dict[str, Any]) -> list[str]:
    return [str(text) for pair in options.items() for text in pair]


def _measured(server: Server, load: Load, times: float, then: Callable[[], None] = lambda: None) -> tuple[Measured, Came]:
    """then: done once all is sent."""
    with _loading(load) as loading:
        begun_ns, before = loading.told(BEGUN), processes.of_server(server.pid)
        sent_ns, after = loading.told(SENT), processes.of_server(server.pid)
        then()
        came = loading.came()
    spent = processes.cpu_between(before, after)
    busy = {role: spent[role] / ((sent_ns - begun_ns) / 1e9) for role in _ROLES}
    return Measured(times, load.rate, came.phase, busy | {"load": came.cpu_share}), came


def _overload(report: Report, server: Server, load: Load) -> None:
    """The most, watched; and what follows it."""
    fresh: list[tuple[int, float]] = []
    usual_s = report.usual_s[1]

    def probe() -> None:
        fresh.extend(_singles(report, server, usual_s))

    with CarouselClient(server.target) as client, _Watch(server.pid, client) as watch:
        measured, came = _measured(server, load, _MOST, probe)
        time.sleep(2 * _WATCH_S)
    report.measured.append(measured)
    report.memory = growth(watch.resident, came.begun_ns + round(load.seconds * 0.5e9), came.sent_ns)
    report.recovery = recovery(came.sent_ns, watch.loads, fresh, usual_s)


def _singles(report: Report, server: Server, until_s: float = 0.0) -> list[tuple[int, float]]:
    """Requests one by one: when each was sent, and seconds to its first token; as many as were served, and none after the first
    that had it within until_s."""
    found: list[tuple[int, float]] = []
    caller = Caller(server.port, 1)
    until = time.monotonic() + _PATIENCE_S
    try:
        for job in jobs(Load(port=server.port, seconds=60, seed=report.next_seed())):
            heard = offer(caller, asking(), [replace(job, arrival_ns=0)]).heard
            if heard and heard[0].is_served:
                found.append((heard[0].sent_ns, (heard[0].first_ns - heard[0].sent_ns) / 1e9))
                if len(found) == report.size.singles or found[-1][1] <= until_s:
                    break
            if time.monotonic() > until:
                break
            time.sleep(_PAUSE_S)
    finally:
        caller.close()
    return found


def _idle(report: Report, server: Server) -> Idle:
    size = report.size
    rate = report.closed.phase.rate * _OTHERS[0]
    beside = replace(_load(report, server), seconds=size.hold_s, rate=rate, deadline_s=report.deadline_s)
    before = _measured(server, beside, _OTHERS[0])[0].phase
    resident = processes.of_server(server.pid)
    crowd = Load(port=server.port, crowd=size.crowd, words=(8, 8), tokens=(1, size.crowd_tokens), seed=report.next_seed())
    with CarouselClient(server.target) as client, _loading(crowd) as holding:
        holding.told(HELD)
        _wait_still(client, _PATIENCE_S + size.crowd * _STREAM_S)
        grown = {role: taken.resident_bytes - resident[role].resident_bytes for role, taken in _of(server).items()}
        served = _measured(server, replace(beside, seed=report.next_seed()), _OTHERS[0])[0].phase
        load = client.load()
        held = holding.crowd()
    return Idle(
        held, {role: grown[role] / size.crowd for role in _ROLES}, load.waiting_requests + load.running_requests, before, served
    )


def _of(server: Server) -> dict[str, processes.Taken]:
    return processes.of_server(server.pid)


def _wait_still(client: CarouselClient, patience_s: float) -> None:
    """Until no step is planned: the whole crowd waits for its readers. Raises LoadFailedError."""
    until, steps = time.monotonic() + patience_s, -1
    while (now := client.load().steps) != steps:
        steps = now
        if time.monotonic() > until:
            raise LoadFailedError(f"for streams that nobody reads there are still steps after {patience_s:g} s")
        time.sleep(_STILL_S)


# ------------------------------------------------------------------------------------------------------ the load's process


class _Loading:
    """A load under way; what it says goes to a file."""

    def __init__(self, load: Load) -> None:
        self._out, self._errors = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115 -- close
        command = [sys.executable, "-m", "bench.overload_load", json.dumps(asdict(load))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=self._out, stderr=self._errors, process_group=0)
        self._patience_s = load.seconds + load.crowd * _STREAM_S + _PATIENCE_S

    def told(self, word: str) -> int:
        """The time that stands behind this word in the line that it begins. Raises LoadFailedError."""
        until = time.monotonic() + self._patience_s
        while not (found := [line for line in self._lines() if line.startswith(word)]):
            if self._process.poll() is not None or time.monotonic() > until:
                raise LoadFailedError(f"the load generator did not say {word!r}: {self._why()}")
            time.sleep(_POLL_S)
        return int(found[0].split()[1])

    def came(self) -> Came:
        """Raises LoadFailedError."""
        return msgspec.convert(self._last(), Came)

    def crowd(self) -> Crowd:
        """Lets it go, and waits for its end. Raises LoadFailedError."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return msgspec.convert(self._last(), Crowd)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._out.close()
        self._errors.close()

    def _last(self) -> dict[str, Any]:
        try:
            code = self._process.wait(self._patience_s)
        except subprocess.TimeoutExpired:
            raise LoadFailedError(f"the load was not done after {self._patience_s:g} s") from None
        if code:
            raise LoadFailedError(f"the load generator failed: {self._why()}")
        found: dict[str, Any] = json.loads(self._lines()[-1])
        return found

    def _lines(self) -> list[str]:
        """Whole ones. pread: the other process writes at the file's own offset."""
        size = os.fstat(self._out.fileno()).st_size
        return os.pread(self._out.fileno(), size, 0).decode().rpartition("\n")[0].splitlines()

    def _why(self) -> str:
        size = os.fstat(self._errors.fileno()).st_size
        return (os.pread(self._errors.fileno(), size, 0).decode().strip().splitlines() or ["it said nothing"])[-1]


@contextmanager
def _loading(load: Load) -> Iterator[_Loading]:
    loading = _Loading(load)
    try:
        yield loading
    finally:
        loading.close()


class _Watch:
    """Memory of a server's processes, and its load, while it is entered: in two threads of its own."""

    def __init__(self, pid: int, client: CarouselClient) -> None:
        self.resident: list[Resident] = []
        self.loads: list[QueueLoad] = []
        self._pid, self._client = pid, client
        self._over = threading.Event()

    def __enter__(self) -> Self:
        self._stream = self._client.watch_load(_WATCH_S)
        self._threads = [threading.Thread(target=watch, daemon=True) for watch in (self._watch_memory, self._watch_load)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._stream.close()
        for thread in self._threads:
            thread.join()

    def _watch_memory(self) -> None:
        while not self._over.wait(_LOOK_S):
            taken = processes.of_server(self._pid)
            self.resident.append((time.monotonic_ns(), {role: each.resident_bytes for role, each in taken.items()}))

    def _watch_load(self) -> None:
        try:
            for message in self._stream:
                load = message.load
                self.loads.append((time.monotonic_ns(), load.waiting_requests, load.running_requests))
        except CarouselError:
            pass  # the server has gone: whoever loads it hears that too


# -------------------------------------------------------------------------------------------------------------- targets


def targets(report: Report) -> Iterator[Shown]:
    most, recovered, idle = report.most.phase, report.recovery, report.idle
    assert recovered is not None and idle is not None
    name, minutes = "overload", report.size.most_s / 60
    at = f"{_MOST:g}x for {minutes:.2g} min"
    shares = [each / report.peak for each in most.windows]
    yield Shown(name, f"{at}: goodput, share of its peak", most.goodput / report.peak, _SHARE)
    yield Shown(name, f"… worst window of {report.size.window_s:g} s", min(shares), _SHARE)
    yield Shown(name, "… refusal, p99 ms", most.refusal.p99 * 1e3, _REFUSAL_S * 1e3, at_most=True)
    full = most.statuses.get("RESOURCE_EXHAUSTED", 0)
    yield Shown(name, "… of those refused for a full queue: told when to come again", most.told_when / max(1, full), 1.0)
    most_wait = report.size.queue / report.closed.phase.rate * _WAIT
    yield Shown(name, "… first token of those admitted, p99 s", most.ttft.p99, most_wait, at_most=True)
    for role, grown in report.memory.items():
        yield Shown(name, f"… memory of {role}, growth in its second half", grown.share, _GROWTH, at_most=True)
    yield Shown(name, "then: seconds until nobody waits", recovered.empty_s, _RECOVERY_S, at_most=True)
    yield Shown(name, "… and a first token comes as before", recovered.fresh_s, _RECOVERY_S, at_most=True)
    lost = idle.crowd.streams - idle.crowd.served
    yield Shown(name, f"{idle.crowd.streams:,} idle streams: not served whole", lost, 0, at_most=True)
    yield Shown(name, "… others refused beside them", idle.beside.requests - idle.beside.good, 0, at_most=True)


# --------------------------------------------------------------------------------------------------------------- output


def show(report: Report, console: Console) -> None:
    size, idle = report.size, report.idle
    assert idle is not None
    steps = ", ".join(f"{name} {cost:,} ns" for name, cost in _STEP_NS.items()) if report.device == "sim" else "the model's"
    console.print(
        f"{size.rows} rows, {size.queue} may wait, {report.frontends} front end(s), {report.device}, steps: {steps}; deadline"
        f" {report.deadline_s:g} s; {len(os.sched_getaffinity(0))} cores, load before: {report.load:.1f}"
    )
    console.print(_phases(report))
    most = report.most.phase
    console.print(
        f"goodput in windows of {size.window_s:g} s at {_MOST:g} times: "
        + " ".join(f"{each / report.peak:.0%}" for each in most.windows)
    )
    for role, grown in report.memory.items():
        console.print(
            f"{role}: {grown.first / 2**20:.1f} → {grown.last / 2**20:.1f} MiB, at most {grown.most / 2**20:.1f},"
            f" {grown.bytes_per_minute / 2**20:+.2f} MiB a minute"
        )
    each = ", ".join(f"{role} {held / 1024:.1f}" for role, held in idle.bytes_per_stream.items())
    console.print(
        f"{idle.crowd.streams:,} streams idle: {idle.alive:,} alive in the core after {size.hold_s:g} s; KiB a stream: {each};"
        f" others' first token p50 / p99 {_both(idle.beside.ttft)}, before {_both(idle.before.ttft)}"
    )
    rows = Table("what", box=box.SIMPLE_HEAD)
    for name in ("value", "goal", "holds"):
        rows.add_column(name, justify="right")
    for shown in targets(report):
        goal = f"{'≤' if shown.at_most else '≥'} {tables.number(shown.goal)}"
        rows.add_row(shown.what, tables.number(shown.value), goal, "yes" if shown.holds else "no")
    console.print(rows)


def _phases(report: Report) -> Table:
    found = Table(box=box.SIMPLE_HEAD)
    columns: tuple[str, ...] = (
        "load",
        "requests/s",
        "served",
        "refused",
        "else",
        "tokens/s\nin time",
        "of peak",
        "worst\nwindow",
    )
    columns += ("TTFT\np50 / p99", "E2E\np50 / p99", "refusal\np50 / p99", *(f"{role}\nbusy" for role in (*_ROLES, "load")))
    for name in columns:
        found.add_column(name, justify="right", no_wrap=True)
    for each in report.measured:
        phase = each.phase
        ends = (phase.served, phase.refused, phase.requests - phase.served - phase.refused)
        found.add_row(
            f"{each.times:g}x" if each.times else "closed",
            f"{each.rate:.0f}" if each.times else "",
            *(f"{count:,}" for count in ends),
            tables.number(phase.goodput),
            f"{phase.goodput / report.peak:.0%}",
            f"{min(phase.windows, default=0) / report.peak:.0%}",
            _both(phase.ttft),
            _both(phase.e2e),
            _both(phase.refusal),
            *(f"{each.busy.get(role, 0):.0%}" for role in (*_ROLES, "load")),
        )
    return found


def _both(spread: Percentiles) -> str:
    return f"{tables.seconds(spread.p50)} / {tables.seconds(spread.p99)}"


def as_json(report: Report, quick: bool) -> dict[str, Any]:
    return {
        "quick": quick,
        "seed": report.seed,
        "device": report.device,
        "step_ns": _STEP_NS if report.device == "sim" else None,
        "frontends": report.frontends,
        "size": asdict(report.size),
        "load before": report.load,
        "deadline_s": report.deadline_s,
        "loads": [asdict(each) for each in report.measured],
        "memory": {role: asdict(grown) for role, grown in report.memory.items()},
        "usual_first_token_s": report.usual_s,
        "recovery": asdict(report.recovery) if report.recovery else None,
        "idle": asdict(report.idle) if report.idle else None,
        "targets": [asdict(shown) | {"holds": shown.holds} for shown in targets(report)],
    }


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--model", type=click.Path(path_type=Path, exists=True), default=_DEMO, help="With sim its tokenizer counts.")
@click.option("--device", type=click.Choice(["sim", "cpu"]), default="sim", help="cpu: the model itself, on the same cores.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Of the largest load. [default: 3; quick: ¼]")
@click.option("--crowd", type=click.IntRange(1), help="Idle streams. [default: 10000; quick: 1000]")
@click.option("--frontends", type=click.IntRange(1), default=1)
@click.option("--seed", type=int, default=0)
@click.option("--quick", is_flag=True, help="A minute: to see that it works, not for figures.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Append a line to this file.")
def main(
    model: Path,
    device: str,
    minutes: float | None,
    crowd: int | None,
    frontends: int,
    seed: int,
    quick: bool,
    json_file: Path | None,
) -> None:
    """Measure what an overload does, and idle streams. Leave the machine alone meanwhile."""
    size = QUICK if quick else Size()
    if device == "cpu":
        size = replace(size, words=_SHORT_WORDS, tokens=_SHORT_TOKENS)
    size = replace(size, most_s=minutes * 60 if minutes else size.most_s, crowd=crowd or size.crowd)
    report = Report(size, device, frontends, seed)
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:5.0f} s  {text}", file=sys.stderr, flush=True)

    try:
        measure(report, model, say)
    except (LoadFailedError, ServerFailedError, CarouselError) as error:
        raise click.ClickException(str(error)) from None
    show(report, tables.console())
    if json_file is not None:
        provenance.append(json_file, provenance.provenance("overload") | as_json(report, quick))
    sys.exit(0 if quick or all(shown.holds for shown in targets(report)) else 1)


if __name__ == "__main__":
    main()
