"""`python -m bench.anyscale`: the experiment behind "23x", on this machine: throughput, KV waste and latency of every system.

Systems: Carousel under its three policies on equal kernels and equal KV memory (continuous; static, with the largest batch that
the memory holds; prefill_first, which is Orca's), continuous and static once more with all memory, and transformers: padded
static batches of the post's sizes, and its own continuous batching. They run in turns, round by round; what each run came to is
kept, so that Ctrl-C loses nothing that was done.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench import anyscale_bounds, anyscale_report, cpu_limits, cpu_transformers, provenance, shadow, tables
from bench.anyscale_sizes import BLOCK, SIZES, Size
from bench.anyscale_summary import (
    ALL_MEMORY,
    CONTINUOUS,
    OURS,
    PREFILL_FIRST,
    STATIC,
    SYSTEMS,
    TRANSFORMERS_CONTINUOUS,
    TRANSFORMERS_STATIC,
    summary,
)
from bench.cost_models import CostError
from bench.cpu import cache, cached_checkpoint
from bench.cpu_bounds import Cost, Limits, best_seconds, pace
from bench.cpu_transformers import EngineFailedError, Place
from bench.cpu_workload import Request
from bench.draws import generators
from bench.generator import Asking, Heard, Offered, offer
from bench.http2 import Caller
from bench.jobs import Job, token_ids
from bench.load_watch import LoadWatch
from bench.server import Server, ServerFailedError
from bench.shadow import ShadowError
from bench.stopping import Stop
from client import CarouselClient, CarouselError
from scheduler.command import INTERRUPTED

POST, ALL = "post", "all"  # KV memory: for the post's static batch, or all that there is
_FAILURES = (EngineFailedError, ServerFailedError, CarouselError, ShadowError, CostError, OSError)
_WATCH_S = 0.1
_WARM_TOKENS = 8
_CONNECTIONS = 4


class UnservedError(Exception):
    """A request failed: then the run is no figure."""


@dataclass
class Report:
    """Everything that was done, as far as it went. What goes into it is JSON as it is."""

    size: Size
    seed: int
    load_before: float = field(default_factory=lambda: os.getloadavg()[0])  # others who use the machine
    limits: list[Limits] = field(default_factory=list)
    bursts: dict[int, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)  # post's cap → system → a run each
    bounds: dict[int, dict[str, list[dict[str, float]]]] = field(default_factory=dict)  # post's cap → memory → a round each
    capacity: float = 0.0  # requests a second of the latency workload under static
    latencies: dict[float, dict[str, list[list[float]]]] = field(default_factory=dict)  # load → system → E2E seconds of a run
    failed: dict[str, str] = field(default_factory=dict)  # system → why
    finished: bool = False

    def jobs(self, post_cap: int) -> list[Job]:
        return list(self.size.burst(post_cap).jobs(math.inf, self.size.requests, self.seed))

    def latency_jobs(self, rate: float) -> list[Job]:
        return list(self.size.latency.jobs(rate, self.size.latency_requests, self.seed))


Say = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """What each part of the measurement is given."""

    report: Report
    model: Path
    systems: Sequence[str]
    stop: Callable[[], bool]
    done: Say  # one step more, and what it was
    limits: Callable[[], Limits] | None = cpu_limits.measured  # of the machine; None: not known

    @property
    def size(self) -> Size:
        return self.report.size


def steps(size: Size, systems: Sequence[str]) -> int:
    """Runs in all: of a progress bar."""
    return len(systems) * (len(size.caps) * size.rounds + len(size.loads) * size.latency_rounds)


def measure(run: Run) -> None:
    """All rounds in turns, until it is stopped. A system that fails is left out from then on."""
    report, size = run.report, run.size
    for number in range(size.rounds):
        if run.stop():
            return
        if run.limits is not None:
            report.limits.append(run.limits())
        for post_cap in size.caps:
            _ours(run, post_cap, POST, size.kv_blocks(post_cap), in_turn((CONTINUOUS, STATIC, PREFILL_FIRST), number))
            _ours(run, post_cap, ALL, _all_blocks(size), in_turn(ALL_MEMORY, number))
            for system in (TRANSFORMERS_STATIC, TRANSFORMERS_CONTINUOUS):
                _attempt(run, system, lambda system=system, post_cap=post_cap: _theirs(run, post_cap, system))  # type: ignore[misc]
        if number < size.latency_rounds and not run.stop():
            _latency(run, number)
    report.finished = not run.stop() and not report.failed


def in_turn(systems: Sequence[str], number: int) -> tuple[str, ...]:
    """Another one first in each round."""
    first = number % len(systems)
    return (*systems[first:], *systems[:first])


def _all_blocks(size: Size) -> int | None:
    return None if size.all_kv_tokens is None else size.all_kv_tokens // BLOCK


def _attempt(run: Run, system: str, work: Callable[[], str]) -> None:
    """work's answer is one line about what came."""
    if system not in run.systems or system in run.report.failed or run.stop():
        return
    began = time.monotonic()
    try:
        what = work()
    except (*_FAILURES, UnservedError) as error:
        if run.stop():  # Ctrl-C ended it
            return
        run.report.failed[system] = str(error) or type(error).__name__
        what = f"{system} failed: {error}"
    run.done(f"{what}; {time.monotonic() - began:.0f} s")


# -------------------------------------------------------------------------------------------------------------- our server


@contextmanager
def _server(run: Run, blocks: int | None, recording: Path | None, latency: bool) -> Iterator[tuple[Server, CarouselClient]]:
    """Raises ServerFailedError, CarouselError."""
    size = run.size
    options = ["--model", str(run.model), "--device", size.device, "--dtype", size.dtype, "--block-size", str(BLOCK)]
    options += ["--max-batch-rows", str(size.max_rows), "--max-queue-requests", str(size.requests + size.latency_requests + 8)]
    if blocks is not None:
        options += ["--num-blocks", str(blocks)]
    if size.random_weights:
        options += ["--weights", "random:0"]
    if not latency:
        options += ["--target-itl-ms", "0"]  # an offline burst: nobody reads along
    if recording is not None:
        options += ["--record", str(recording)]
    with Server(options) as server, CarouselClient(server.target) as client:
        # The first steps of each size take longer than all later ones.
        jobs = run.report.jobs(size.caps[-1])[: size.max_rows]
        warm = [replace(job, output_tokens=at % _WARM_TOKENS + 1, max_tokens=0) for at, job in enumerate(jobs)]
        _offered(server, client, Asking(client.model_info().vocab_size, cache_salt="warm"), warm, run.stop)
        yield server, client


def _offered(server: Server, client: CarouselClient, asking: Asking, jobs: list[Job], stop: Callable[[], bool]) -> Offered:
    """Raises UnservedError, CarouselError, OSError."""
    caller = Caller(server.port, _CONNECTIONS)
    try:
        offered = offer(caller, asking, jobs, stop=stop)
    finally:
        caller.close()
    wrong = next((heard for heard in offered.heard if not _is_whole(heard)), None)
    if wrong is not None:
        got = f"{wrong.output_tokens} of {wrong.job.output_tokens} tokens, {wrong.status}"
        raise UnservedError(f"a request got {got}")
    if offered.broke:
        raise UnservedError(offered.broke)
    return offered


def _is_whole(heard: Heard) -> bool:
    return heard.is_served and heard.output_tokens == heard.job.output_tokens


def _ours(run: Run, post_cap: int, memory: str, blocks: int | None, systems: Sequence[str]) -> None:
    """One server for these policies, which it takes one after the other; and what its recording says of the bound."""
    wanted = [system for system in systems if system in run.systems and system not in run.report.failed]
    if not wanted or run.stop():
        return
    with tempfile.TemporaryDirectory() as folder:
        recording = Path(folder) / "recording"
        try:
            with _server(run, blocks, recording, latency=False) as (server, client):
                for system in wanted:
                    _attempt(run, system, lambda system=system: _burst(run, post_cap, system, server, client))  # type: ignore[misc]
            if not run.stop():
                _bound(run, post_cap, memory, recording)
        except _FAILURES as error:
            if not run.stop():
                run.report.failed |= dict.fromkeys(wanted, str(error))


def _burst(run: Run, post_cap: int, system: str, server: Server, client: CarouselClient) -> str:
    jobs = run.report.jobs(post_cap)
    client.set_policy(OURS[system])
    # Prompts are the same for all; a salt keeps one's blocks from the next.
    asking = Asking(client.model_info().vocab_size, cache_salt=system)
    with LoadWatch(client, _WATCH_S) as watch:
        offered = _offered(server, client, asking, jobs, run.stop)
    if run.stop():
        return f"{system}: interrupted"
    seen, tokens = watch.seen, sum(heard.prompt_tokens + heard.output_tokens for heard in offered.heard)
    found = {
        "seconds": offered.seconds,
        "tokens_per_s": tokens / offered.seconds,
        "kv_waste": seen.kv_waste if seen and seen.samples else None,
        "samples": seen.samples if seen else 0,
        "rows": seen.rows if seen else None,
        "preemptions": seen.preemptions if seen else None,
        "steps": seen.steps if seen else None,
        "generator_cpu_share": offered.cpu_s / offered.seconds,
    }
    run.report.bursts.setdefault(post_cap, {}).setdefault(system, []).append(found)
    return f"cap {run.size.cap(post_cap)}, {system}: {found['tokens_per_s']:,.0f} tokens a second"


def _bound(run: Run, post_cap: int, memory: str, recording: Path) -> None:
    """Raises ShadowError."""
    recorded = shadow.read(recording)
    report, config = run.report, recorded.config
    limits = {"max_batch_rows": config.max_batch_rows, "max_step_tokens": config.max_step_tokens}
    workload, jobs = run.size.burst(post_cap), report.jobs(post_cap)
    found = anyscale_bounds.bound(workload, jobs, report.seed, recorded.costs, recorded.facts, **limits)
    line = asdict(found) | {"ratio": found.ratio}
    report.bounds.setdefault(post_cap, {}).setdefault(memory, []).append(line)


# ----------------------------------------------------------------------------------------------------------- transformers


def _requests(jobs: Sequence[Job], vocab_size: int) -> list[Request]:
    return [Request(token_ids(job.prompt, vocab_size).tolist(), job.output_tokens) for job in jobs]


def _place(size: Size) -> Place:
    return Place(size.device, size.dtype, size.random_weights)


def _engine(system: str, batch: int) -> str:
    return f"static-{batch}" if system == TRANSFORMERS_STATIC else "continuous"


def _single(run: Run) -> Request:
    draw = generators(run.report.seed + 1000, 1)[0]
    return Request(draw.integers(5, run.size.shape.vocab, run.size.prompt).tolist(), 2 * _WARM_TOKENS)


def _theirs(run: Run, post_cap: int, system: str) -> str:
    """The first requests in whole batches; what all would take follows from the pace. Raises EngineFailedError."""
    size, batch = run.size, run.size.static_rows(post_cap)
    requests = _requests(run.report.jobs(post_cap), size.shape.vocab)
    tokens = sum(len(request.prompt_ids) + request.max_tokens for request in requests)
    count = min(len(requests), -(-size.baseline_requests // batch) * batch)
    asked = requests[:count]
    outcome, token_s = cpu_transformers.run(
        _engine(system, batch), run.model, asked, _single(run), place=_place(size), max_rows=size.max_rows
    )
    if system == TRANSFORMERS_STATIC:
        seconds = pace(asked, token_s, batch).seconds(requests, batch)
        found: dict[str, Any] = {"seconds": seconds, "tokens_per_s": tokens / seconds}
    else:
        found = {"seconds": outcome.seconds, "tokens_per_s": outcome.tokens_per_s}
    found |= {"requests": count, "rows": batch if system == TRANSFORMERS_STATIC else None}
    run.report.bursts.setdefault(post_cap, {}).setdefault(system, []).append(found)
    return f"cap {size.cap(post_cap)}, {system}: {found['tokens_per_s']:,.0f} tokens a second"


# ---------------------------------------------------------------------------------------------------------------- latency


def _latency(run: Run, number: int) -> None:
    """The memory of the largest cap, as in the post; loads by what static can serve at once."""
    size, report = run.size, run.report
    ours = [
        system
        for system in in_turn((CONTINUOUS, STATIC, PREFILL_FIRST), number)
        if system in run.systems and system not in report.failed
    ]
    try:
        with _server(run, size.kv_blocks(size.caps[-1]), None, latency=True) as (server, client):
            if not report.capacity:
                report.capacity = _capacity(run, server, client)
            for load in size.loads:
                for system in ours:
                    _attempt(run, system, lambda load=load, system=system: _our_latency(run, load, system, server, client))  # type: ignore[misc]
    except (*_FAILURES, UnservedError) as error:
        if not run.stop():
            report.failed |= dict.fromkeys(ours, str(error))
    if not report.capacity:
        return
    for load in size.loads:
        for system in (TRANSFORMERS_STATIC, TRANSFORMERS_CONTINUOUS):
            _attempt(run, system, lambda load=load, system=system: _their_latency(run, load, system))  # type: ignore[misc]


def _capacity(run: Run, server: Server, client: CarouselClient) -> float:
    """Requests a second, all there at once. Raises CarouselError, UnservedError."""
    client.set_policy(STATIC)
    asking = Asking(client.model_info().vocab_size, cache_salt="capacity")
    offered = _offered(server, client, asking, run.report.latency_jobs(math.inf), run.stop)
    return len(offered.heard) / offered.seconds if not run.stop() else 0.0


def _our_latency(run: Run, load: float, system: str, server: Server, client: CarouselClient) -> str:
    client.set_policy(OURS[system])
    salt = f"{system} at {load} in {len(run.report.latencies.get(load, {}).get(system, ()))}"
    jobs = run.report.latency_jobs(load * run.report.capacity)
    offered = _offered(server, client, Asking(client.model_info().vocab_size, cache_salt=salt), jobs, run.stop)
    return _keep_latency(run, load, system, [(heard.last_ns - heard.due_ns) / 1e9 for heard in offered.heard])


def _their_latency(run: Run, load: float, system: str) -> str:
    """Raises EngineFailedError."""
    size = run.size
    jobs = run.report.latency_jobs(load * run.report.capacity)
    arrivals = [job.arrival_ns / 1e9 for job in jobs]
    _, token_s = cpu_transformers.run(
        _engine(system, size.static_rows(size.caps[-1])),
        run.model,
        _requests(jobs, size.shape.vocab),
        _single(run),
        arrivals,
        _place(size),
        size.max_rows,
    )
    return _keep_latency(run, load, system, [times[-1] - at for times, at in zip(token_s, arrivals, strict=True)])


def _keep_latency(run: Run, load: float, system: str, e2e_s: list[float]) -> str:
    if run.stop():
        return f"{system}: interrupted"
    run.report.latencies.setdefault(load, {}).setdefault(system, []).append(sorted(e2e_s))
    return f"{load:g} × static's capacity, {system}: E2E p50 {tables.seconds(statistics.median(e2e_s))}"


# ----------------------------------------------------------------------------------------------------------------- output


def as_json(report: Report, name: str) -> dict[str, Any]:
    size = report.size
    return {
        "size": name,
        "shape": size.shape.name,
        "scaling": size.scaling,
        "divisor": size.divisor,
        "requests": size.requests,
        "rounds": size.rounds,
        "device": size.device,
        "dtype": size.dtype,
        "max_rows": size.max_rows,
        "seed": report.seed,
        "finished": report.finished,
        "load before": report.load_before,
        "limits": asdict(cpu_limits.best(report.limits)) if report.limits else None,
        "caps": [_cap_json(report, post_cap) for post_cap in size.caps if post_cap in report.bursts],
        "latency": _latency_json(report),
        "failed": report.failed,
    }


def _cap_json(report: Report, post_cap: int) -> dict[str, Any]:
    size, jobs = report.size, report.jobs(post_cap)
    outputs = [job.output_tokens for job in jobs]
    found: dict[str, Any] = {
        "post_cap": post_cap,
        "cap": size.cap(post_cap),
        "prompt": size.prompt,
        "prompt_tokens": sum(job.prompt_tokens for job in jobs),
        "output_tokens": sum(outputs),
        "mean_output": statistics.mean(outputs),
        "longest_output": max(outputs),
        "static_rows": size.static_rows(post_cap),
        "kv_tokens": size.kv_blocks(post_cap) * BLOCK,
        "published_kv_tokens": size.published_kv_tokens(post_cap),
        "reserve_max_waste": reserve_waste(jobs, size.max_len),
        "runs": report.bursts[post_cap],
        "bounds": report.bounds.get(post_cap, {}),
        "limit_seconds": None,
    }
    if report.limits:
        cost = Cost(size.shape, cpu_limits.best(report.limits))
        found["limit_seconds"] = best_seconds(_requests(jobs, size.shape.vocab), cost)
    return found


def reserve_waste(jobs: Sequence[Job], reserved: int) -> float:
    """(allocated − used) ÷ allocated where every row holds `reserved` tokens from its first step to its last, as engines did
    that reserve for the model's longest sequence."""
    used = sum(job.prompt_tokens * job.output_tokens + job.output_tokens * (job.output_tokens - 1) // 2 for job in jobs)
    return 1 - used / sum(reserved * job.output_tokens for job in jobs)


def _latency_json(report: Report) -> dict[str, Any] | None:
    if not report.latencies:
        return None
    loads = [
        {"load": load, "rate": load * report.capacity, "e2e_s": report.latencies[load]}
        for load in report.size.loads
        if load in report.latencies
    ]
    return {"requests": report.size.latency_requests, "static capacity": report.capacity, "loads": loads}


def checkpoint(size: Size, folder: Path) -> Path:
    """Raises OSError."""
    if not size.random_weights:
        return cached_checkpoint(size.shape, folder)
    from bench.gpu.models import config_of
    from bench.random_checkpoint import copy_tokenizer

    found = folder / f"{size.shape.name}-config"
    config_of(size.shape).save_pretrained(found)
    copy_tokenizer(found)
    return found


def _systems(context: click.Context, parameter: click.Parameter, text: str) -> list[str]:
    found = text.split(",")
    for name in found:
        if name not in SYSTEMS:
            raise click.BadParameter(f"{name}: choose from {', '.join(SYSTEMS)}")
    return found


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--quick", "name", flag_value="quick", help="Fewer requests, one round: under 10 minutes.")
@click.option("--full", "name", flag_value="full", help="The post's own lengths and an OPT-13B shape, on a GPU.")
@click.option("--systems", default=",".join(SYSTEMS), callback=_systems, metavar="NAME,…")
@click.option("--requests", type=click.IntRange(2), metavar="N", help="[default: 96; quick: 48; full: 1000]")
@click.option("--rounds", type=click.IntRange(1), metavar="N", help="[default: 3; quick: 1]")
@click.option("--seed", type=click.IntRange(0), default=0)
@click.option("--checkpoints", type=click.Path(path_type=Path, file_okay=False), help="[default: in the user's cache]")
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Append a line to it."
)
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write the report.")
def main(
    name: str | None,
    systems: list[str],
    requests: int | None,
    rounds: int | None,
    seed: int,
    checkpoints: Path | None,
    json_file: Path | None,
    html: Path | None,
) -> None:
    """Throughput for four caps, latency at two loads: Carousel and transformers. Leave the machine alone meanwhile."""
    name = name or "cpu"
    size = SIZES[name]
    size = replace(size, requests=requests or size.requests, rounds=rounds or size.rounds)
    size = replace(size, latency_rounds=min(size.latency_rounds, size.rounds))
    report = Report(size, seed)
    try:
        model = checkpoint(size, checkpoints or cache())
    except OSError as error:
        raise click.ClickException(str(error)) from None
    with Stop() as stop, _progress(steps(size, systems)) as done:
        limits = cpu_limits.measured if size.device == "cpu" else None
        measure(Run(report, model, systems, lambda: stop.pressed, done, limits))
    line = provenance.provenance("anyscale") | as_json(report, name)
    if "transformers" in ",".join(systems):
        line["versions"]["transformers"] = version("transformers")
    line = provenance.rounded(line)
    if not line["caps"]:
        why = "; ".join(f"{system}: {text}" for system, text in report.failed.items())
        raise click.ClickException(f"nothing was measured{': ' + why if why else ''}")
    anyscale_report.show(summary(line), tables.console())
    if json_file is not None:
        provenance.append(json_file, line)
    if html is not None:
        lines = anyscale_report.read(json_file) if json_file is not None else [line]
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(anyscale_report.html(lines))
        click.echo(f"report: {html}")
    sys.exit(INTERRUPTED if stop.pressed else 1 if report.failed else 0)


@contextmanager
def _progress(total: int) -> Iterator[Say]:
    """A line for each run; on a terminal a bar below them."""
    console = Console(stderr=True, highlight=False)
    began = time.monotonic()
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("runs"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)

        def done(text: str) -> None:
            console.print(f"{time.monotonic() - began:5.0f} s  {text}", soft_wrap=True)
            progress.advance(task)

        yield done


if __name__ == "__main__":
    main()
