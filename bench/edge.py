"""`python -m bench.edge`: what the edge takes, without a model: targets S4, S5 and S6.

`carousel serve` with a simulated worker whose steps take no time, and loads of one process beside it. S4 tokens a second
through the whole path; S5 very many streams at once; S6 time to the first token of an idle server. Beside each figure stands
what a bare grpc.aio server makes of the same messages, already serialized, on the same machine in the same run, under the same
load generator.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from bench import processes, provenance, tables
from bench.edge_load import ECHO, GENERATE, MANY, Load, Loaded
from bench.processes import CORE, FRONTEND, SUPERVISOR, WORKER
from bench.server import Server, ServerFailedError
from bench.targets import Shown

_LOAD_S = 300.0
_GOALS = {GENERATE: 30_000, MANY: 200_000}  # S4, tokens a second
_FIRST_S = 3e-3  # S6
_BOTH_WAYS = (True, False)
_CONNECTIONS = 16  # of streams; the kernel shares them among front ends
_PAUSE_S = 0.002  # between calls that go one by one
_LOOK_S = 0.05
_DEMO = Path(__file__).parent.parent / "demo" / "model"


class LoadFailedError(Exception):
    """The load generator ended without figures, or not all was served."""


@dataclass(frozen=True)
class Size:
    """How much is asked. Lengths in tokens."""

    frontends: tuple[int, ...] = (1, 2)
    rounds: int = 3
    streams: int = 256  # S4: at once, and rows of the batch
    stream_tokens: int = 1024
    many_calls: int = 4  # connections of GenerateMany, that share the streams
    many_waves: int = 2  # so many times the streams are asked for; those without a row wait
    many_tokens: int = 1024
    crowd: int = 10_000  # S5
    crowd_tokens: int = 16
    singles: int = 400  # S6


QUICK = Size(frontends=(1,), rounds=1, stream_tokens=192, many_waves=1, many_tokens=512, crowd=1000, singles=100)


@dataclass(frozen=True)
class Rate:
    """S4: one load and, after it, its messages from the bare server. CPU seconds by process; `load`: the generator's."""

    kind: str
    text: bool
    frontends: int
    seconds: float
    tokens_per_s: float
    messages_per_s: float
    tokens_per_message: float
    bytes_per_message: float
    cpu_s: dict[str, float]
    bare_messages_per_s: float
    bare_cpu_s: dict[str, float]
    load_messages_per_cpu_s: float  # of the generator with the bare server: what it could take, had it a core to itself

    @property
    def bare_tokens_per_s(self) -> float:
        """As many tokens in a message."""
        return self.bare_messages_per_s * self.tokens_per_message


@dataclass(frozen=True)
class Crowd:
    """S5. Memory: of all front ends, resident."""

    streams: int
    served: int
    statuses: dict[str, int]
    most_heard: int  # open at once, and with a first token: none may be read before
    seconds: float
    heard_s: dict[str, float]  # until the headers, that go before the first token
    bytes_per_stream: float
    bare_served: int
    bare_bytes_per_stream: float


@dataclass(frozen=True)
class First:
    """S6: seconds to the first message, one call at a time; and of the bare server."""

    p50: float
    p99: float
    bare_p50: float
    bare_p99: float


@dataclass
class Report:
    size: Size
    seed: int
    load: float = field(default_factory=lambda: os.getloadavg()[0])  # before it began: others who use the machine
    rates: list[Rate] = field(default_factory=list)
    firsts: list[First] = field(default_factory=list)
    crowd: Crowd | None = None


# ----------------------------------------------------------------------------------------------------------------- runs


def measure(report: Report, model: Path, say: Callable[[str], None]) -> None:
    """Raises LoadFailedError, ServerFailedError."""
    size = report.size
    options = _options(model, size.streams)
    with _echo() as echo:
        for frontends in size.frontends:
            with Server([*options, "--frontends", str(frontends)]) as server:
                say(f"{frontends} front end(s)")
                offer(_generate(report, server.port, True, tokens=8))
                for _ in range(size.rounds):
                    for make in (_generate, _many):
                        for text in _BOTH_WAYS:
                            rate = _rate(server, frontends, echo, make(report, server.port, text))
                            report.rates.append(rate)
                            say(f"  {_named(rate)}: {rate.tokens_per_s:,.0f} tokens a second")
                    if frontends == 1:
                        report.firsts.append(_first(report, server, echo))
                        say(f"  first token after {report.firsts[-1].p50 * 1e3:.2f} ms")
    say(f"{size.crowd:,} streams at once")
    report.crowd = _crowd(report, model)


def _options(model: Path, rows: int) -> list[str]:
    limits = {"--max-batch-rows": rows, "--max-step-tokens": max(2048, rows), "--max-queue-requests": 20_000}
    return ["--model", str(model), "--device", "sim", *(text for name, value in limits.items() for text in (name, str(value)))]


def _generate(report: Report, port: int, text: bool, tokens: int = 0) -> Load:
    size = report.size
    tokens = tokens or size.stream_tokens
    return Load(
        kind=GENERATE, port=port, calls=size.streams, connections=_CONNECTIONS, tokens=tokens, text=text, seed=report.seed
    )


def _many(report: Report, port: int, text: bool) -> Load:
    size = report.size
    requests = -(-size.streams * size.many_waves // size.many_calls)
    calls, tokens = size.many_calls, size.many_tokens
    return Load(
        kind=MANY, port=port, calls=calls, connections=calls, requests=requests, tokens=tokens, text=text, seed=report.seed
    )


def _rate(server: Server, frontends: int, echo: _Echo, load: Load) -> Rate:
    before = processes.of_server(server.pid)
    loaded = offer(load)
    cpu_s = processes.cpu_between(before, processes.of_server(server.pid)) | {"load": loaded.cpu_s}
    cpu_s.pop(SUPERVISOR, None)
    size, each = round(loaded.message_bytes / loaded.messages), round(loaded.messages / load.calls)
    before = processes.of_server(echo.pid)
    bare = offer(replace(load, kind=ECHO, port=echo.port, messages=each, message_bytes=size))
    bare_cpu_s = processes.cpu_between(before, processes.of_server(echo.pid))
    return Rate(
        kind=load.kind,
        text=load.text,
        frontends=frontends,
        seconds=loaded.seconds,
        tokens_per_s=loaded.tokens / loaded.seconds,
        messages_per_s=loaded.messages_per_s,
        tokens_per_message=loaded.tokens / loaded.messages,
        bytes_per_message=loaded.message_bytes / loaded.messages,
        cpu_s=cpu_s,
        bare_messages_per_s=bare.messages_per_s,
        bare_cpu_s={"server": sum(bare_cpu_s.values()), "load": bare.cpu_s},
        load_messages_per_cpu_s=bare.messages / bare.cpu_s,
    )


def _first(report: Report, server: Server, echo: _Echo) -> First:
    load = Load(kind=GENERATE, port=server.port, calls=report.size.singles, at_once=1, pause_s=_PAUSE_S, seed=report.seed)
    ours = offer(load).first_s
    bare = offer(replace(load, kind=ECHO, port=echo.port)).first_s
    return First(*quantiles(ours), *quantiles(bare))


def _crowd(report: Report, model: Path) -> Crowd:
    size, tokens = report.size, report.size.crowd_tokens
    load = Load(kind=GENERATE, port=0, calls=size.crowd, connections=_CONNECTIONS, tokens=tokens, seed=report.seed, holds=True)
    with Server(_options(model, size.streams)) as server:
        loaded, grown = _with_memory(server.pid, FRONTEND, replace(load, port=server.port))
    with _echo() as echo:
        bare, bare_grown = _with_memory(echo.pid, SUPERVISOR, replace(load, kind=ECHO, port=echo.port))
    p50, p99 = quantiles(loaded.heard_s)
    return Crowd(
        streams=size.crowd,
        served=loaded.served,
        statuses=loaded.statuses,
        most_heard=loaded.most_heard,
        seconds=loaded.seconds,
        heard_s={"p50": p50, "p99": p99},
        bytes_per_stream=grown / size.crowd,
        bare_served=bare.served,
        bare_bytes_per_stream=bare_grown / size.crowd,
    )


def _with_memory(pid: int, role: str, load: Load) -> tuple[Loaded, int]:
    """… and by how many bytes the processes of this role grew meanwhile, at most."""
    begin = processes.of_server(pid)[role].resident_bytes
    most, done = begin, threading.Event()

    def look() -> None:
        nonlocal most
        while not done.wait(_LOOK_S):
            most = max(most, processes.of_server(pid)[role].resident_bytes)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        return offer(load, must_serve=False), most - begin
    finally:
        done.set()
        watcher.join()


def offer(load: Load, must_serve: bool = True) -> Loaded:
    """By a process of its own. Raises LoadFailedError."""
    command = [sys.executable, "-m", "bench.edge_load", json.dumps(asdict(load))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LOAD_S)
    except subprocess.TimeoutExpired:
        raise LoadFailedError(f"the load was not done after {_LOAD_S:g} s: {load}") from None
    if done.returncode:
        raise LoadFailedError(f"the load generator failed: {done.stderr.strip().splitlines()[-1:]}")
    loaded = Loaded(**json.loads(done.stdout))
    if must_serve and loaded.served != load.calls * (load.requests if load.kind == MANY else 1):
        raise LoadFailedError(f"not all was served: {loaded.served} of {load}; {loaded.statuses}, {loaded.failed}")
    return loaded


@dataclass(frozen=True)
class _Echo:
    port: int
    pid: int


@contextmanager
def _echo() -> Iterator[_Echo]:
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.edge_echo"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield _Echo(int(process.stdout.readline()), process.pid)
    finally:
        process.kill()
        process.communicate()


def quantiles(values: Sequence[float]) -> tuple[float, float]:
    """(p50, p99)."""
    hundredths = statistics.quantiles(values, n=100, method="inclusive")
    return hundredths[49], hundredths[98]


# -------------------------------------------------------------------------------------------------------------- targets


def targets(report: Report) -> Iterator[Shown]:
    for kind, goal in _GOALS.items():
        for text in _BOTH_WAYS:
            yield _s4(report, kind, text, goal)
    crowd = report.crowd
    assert crowd is not None
    refused = crowd.streams - crowd.served
    yield Shown("S5", f"{crowd.streams:,} streams at once: not served", refused, 0, at_most=True, more=asdict(crowd))
    p50, bare = (statistics.median(getattr(first, name) for first in report.firsts) for name in ("p50", "bare_p50"))
    yield Shown("S6", "ms to the first token, p50", p50 * 1e3, _FIRST_S * 1e3, at_most=True, more={"bare ms": bare * 1e3})


def _s4(report: Report, kind: str, text: bool, goal: float) -> Shown:
    """The median over the rounds, with as many front ends as suit it best."""
    rates = [rate for rate in report.rates if (rate.kind, rate.text) == (kind, text)]
    by_frontends = {rate.frontends: [each for each in rates if each.frontends == rate.frontends] for rate in rates}
    found = {n: statistics.median(rate.tokens_per_s for rate in each) for n, each in by_frontends.items()}
    best = max(found, key=lambda n: found[n])
    seen = [rate.tokens_per_s for rate in by_frontends[best]]
    what = f"tokens/s, {_titles(kind, text)}, {best} front end(s)"
    return Shown("S4", what, found[best], goal, more={"least": min(seen), "most": max(seen), "by front ends": found})


def _titles(kind: str, text: bool) -> str:
    return f"{'GenerateMany' if kind == MANY else 'Generate'}, {'text' if text else 'ids only'}"


def _named(rate: Rate) -> str:
    return _titles(rate.kind, rate.text)


# --------------------------------------------------------------------------------------------------------------- output


def show(report: Report, console: Console) -> None:
    size = report.size
    console.print(f"{size.streams} streams, null model, {len(os.sched_getaffinity(0))} cores; load before: {report.load:.1f}")
    console.print(_rates(report))
    crowd = report.crowd
    assert crowd is not None
    console.print(
        f"{crowd.streams:,} streams: {crowd.served:,} served, {crowd.most_heard:,} at once with their first token there and"
        f" unread, after p50 {crowd.heard_s['p50']:.2f} s, p99 {crowd.heard_s['p99']:.2f} s; front end"
        f" {crowd.bytes_per_stream / 1024:.1f} KiB a stream (bare server: {crowd.bare_served:,} served,"
        f" {crowd.bare_bytes_per_stream / 1024:.1f} KiB)"
    )
    first = {name: statistics.median(getattr(one, name) for one in report.firsts) * 1e3 for name in First.__dataclass_fields__}
    console.print(
        f"first token of an idle server: p50 {first['p50']:.2f} ms, p99 {first['p99']:.2f} ms;"
        f" bare server: p50 {first['bare_p50']:.2f} ms, p99 {first['bare_p99']:.2f} ms"
    )
    rows = Table("target", "what", box=box.SIMPLE_HEAD)
    for name in ("value", "goal", "holds"):
        rows.add_column(name, justify="right")
    for shown in targets(report):
        goal = f"{'≤' if shown.at_most else '≥'} {tables.number(shown.goal)}"
        rows.add_row(shown.target, shown.what, tables.number(shown.value), goal, "yes" if shown.holds else "no")
    console.print(rows)


def _rates(report: Report) -> Table:
    """Medians of the rounds."""
    title = "S4; CPU in µs a token: of all, and of each process; bare: grpc.aio with these messages ready"
    found = Table("call", "front ends", box=box.SIMPLE_HEAD, title=title, title_justify="left")
    columns = ("tokens/s", "messages/s", "tokens a\nmessage", "bare\nmessages/s", CORE, FRONTEND, WORKER, "load", "load\nbusy")
    for name in columns:
        found.add_column(name, justify="right", no_wrap=True)
    keys = list(dict.fromkeys((rate.kind, rate.text, rate.frontends) for rate in report.rates))
    for kind, text, frontends in sorted(keys):
        rates = [rate for rate in report.rates if (rate.kind, rate.text, rate.frontends) == (kind, text, frontends)]
        wires = [_median(rates, name) for name in ("tokens_per_s", "messages_per_s", "tokens_per_message")]
        costs = [
            statistics.median(rate.cpu_s[role] / (rate.tokens_per_s * rate.seconds) * 1e6 for rate in rates)
            for role in (CORE, FRONTEND, WORKER, "load")
        ]
        busy = statistics.median(rate.cpu_s["load"] / rate.seconds for rate in rates)
        numbers = [tables.number(value) for value in (*wires, _median(rates, "bare_messages_per_s"))]
        found.add_row(_titles(kind, text), str(frontends), *numbers, *map(tables.plain, costs), f"{busy:.0%}")
    ceiling = statistics.median(rate.load_messages_per_cpu_s for rate in report.rates if rate.kind == GENERATE)
    found.caption = f"The load generator's own limit: {tables.number(ceiling)} messages of Generate a second on a core."
    return found


def _median(rates: Sequence[Rate], name: str) -> float:
    return float(statistics.median(getattr(rate, name) for rate in rates))


def as_json(report: Report, quick: bool) -> dict[str, Any]:
    return {
        "quick": quick,
        "seed": report.seed,
        "size": asdict(report.size),
        "load before": report.load,
        "rates": [asdict(rate) | {"bare_tokens_per_s": rate.bare_tokens_per_s} for rate in report.rates],
        "first_token_s": [asdict(first) for first in report.firsts],
        "crowd": None if report.crowd is None else asdict(report.crowd),
        "targets": [asdict(shown) | {"holds": shown.holds} for shown in targets(report)],
    }


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--model", type=click.Path(path_type=Path, exists=True), default=_DEMO, help="Whose tokenizer and length count.")
@click.option("--frontends", metavar="N,…", help="Numbers of front-end processes to try. [default: 1,2; quick: 1]")
@click.option("--rounds", type=click.IntRange(1), help="[default: 3; quick: 1]")
@click.option("--crowd", type=click.IntRange(1), help="Streams at once of S5. [default: 10000; quick: 1000]")
@click.option("--seed", type=int, default=0)
@click.option("--quick", is_flag=True, help="Smaller, under a minute: to see that it works, not for figures.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Append a line to this file.")
def main(
    model: Path, frontends: str | None, rounds: int | None, crowd: int | None, seed: int, quick: bool, json_file: Path | None
) -> None:
    """Measure the edge with a worker that computes nothing: S4, S5, S6. Leave the machine alone meanwhile."""
    size = QUICK if quick else Size()
    if frontends is not None:
        size = replace(size, frontends=_numbers(frontends))
    report = Report(replace(size, rounds=rounds or size.rounds, crowd=crowd or size.crowd), seed)
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:5.0f} s  {text}", file=sys.stderr, flush=True)

    try:
        measure(report, model, say)
    except (LoadFailedError, ServerFailedError) as error:
        raise click.ClickException(str(error)) from None
    show(report, tables.console())
    if json_file is not None:
        provenance.append(json_file, provenance.provenance("edge: null model") | as_json(report, quick))
    sys.exit(0 if quick or all(shown.holds for shown in targets(report)) else 1)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text}: whole numbers, as in 1,2", param_hint="--frontends") from None


if __name__ == "__main__":
    main()
