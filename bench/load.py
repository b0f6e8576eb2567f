"""`carousel bench`, which is also `python -m bench.load`: loads a running server over gRPC and says what came of it.

Reads options, shows progress, prints a table, appends to a results file. Exit codes: 0 done, 1 failed or a request was not
served, 2 wrong usage, 130 interrupted (what was measured is printed).
"""

from __future__ import annotations

import contextlib
import math
import os
import ssl
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench import provenance, tables, traces, workloads
from bench.figures import Percentiles, Slo
from bench.generator import Asking, Offered, Tell, offer
from bench.http2 import Caller, Peer
from bench.jobs import Job
from bench.load_figures import LoadFigures, load_figures
from bench.load_watch import LoadWatch, Seen
from bench.stopping import Stop
from bench.workloads import Workload, WorkloadError
from client import CarouselClient, CarouselError
from scheduler.command import INTERRUPTED, OneLineCommand

_REQUESTS = 200


@dataclass(frozen=True)
class Asked:
    """What the command was told, and what the server said of itself."""

    workload: Workload
    jobs: list[Job]
    rate: float  # requests a second; infinite: all at once
    at_once: int | None
    seed: int
    slo: Slo
    server: dict[str, Any]


def as_json(asked: Asked, found: LoadFigures, seen: Seen | None, broke: str, load_before: float) -> dict[str, Any]:
    loop = (
        {"concurrency": asked.at_once}
        if asked.at_once
        else {"rate": asked.rate if math.isfinite(asked.rate) else "all at once"}
    )
    return {
        "seed": asked.seed,
        "workload": {"name": asked.workload.name, "requests": sum(1 for job in asked.jobs for _ in job.turns())} | loop,
        "server": asked.server,
        "slo": asdict(asked.slo),
        "load before": load_before,
        "figures": asdict(found),
        "KV cache": asdict(seen) if seen else None,
        "broke": broke or None,
    }


# ------------------------------------------------------------------------------------------------------------------- table


def _rows(found: LoadFigures, seen: Seen | None) -> Iterator[tuple[str, str, str]]:
    yield "requests", f"{found.requests:,}", "that ended by themselves"
    for status, count in found.errors.items():
        yield f"… {status}", f"{count:,}", "ended so"
    if found.unfinished or found.unsent:
        yield "not ended, not sent", f"{found.unfinished:,}, {found.unsent:,}", "when it was interrupted"
    yield "requests/s", tables.number(found.request_rate), f"over {found.seconds:.1f} s"
    yield "output tokens/s", tables.number(found.output_tokens_per_s), ""
    yield "… with prompts", tables.number(found.tokens_per_s), "prompt and output tokens a second"
    for name, spread in (("TTFT", found.ttft), ("ITL", found.itl), ("E2E", found.e2e)):
        meaning = {"TTFT": "to the first token", "ITL": "between two tokens", "E2E": "to the last token"}[name]
        yield f"{name} p50 / p90 / p99", _spread(spread), meaning
    yield "good", tables.share(found.good_share), "of all that ended kept the SLO"
    yield "goodput", tables.number(found.goodput), "requests a second that did"
    if seen is not None and seen.samples:
        yield "KV waste", tables.share(seen.kv_waste), f"(allocated − used) ÷ allocated, {seen.samples} samples"
        yield "KV cache held", tables.share(seen.held_share), "of the pool, mean"
        yield "rows", tables.number(seen.rows), f"mean; at most {seen.most_waiting:,} waiting"
        yield "prefix hits", tables.share(seen.cached_share), "of the prompt tokens admitted"
        yield "preemptions", f"{seen.preemptions:,}", ""
    late = tables.seconds(found.generator_late_s.p99)
    yield "generator", tables.share(found.generator_cpu_share), f"of one core; requests sent {late} late (p99)"


def _spread(spread: Percentiles) -> str:
    return " / ".join(tables.seconds(value) for value in (spread.p50, spread.p90, spread.p99))


def show(asked: Asked, found: LoadFigures, seen: Seen | None, console: Console) -> None:
    at = (
        f"{asked.at_once} at once" if asked.at_once else "all at once" if math.isinf(asked.rate) else f"{asked.rate:g} a second"
    )
    console.print(
        f"{asked.workload.name}, {at}; seed {asked.seed}; SLO: TTFT {asked.slo.ttft_ms:g} ms, ITL {asked.slo.itl_ms:g} ms"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    for row in _rows(found, seen):
        table.add_row(*row)
    console.print(table)
    if found.generator_limits:
        console.print(
            "note: the generator was busy or late: what it measures may be itself; take fewer requests, or another core"
        )


# -------------------------------------------------------------------------------------------------------------------- run


@contextlib.contextmanager
def _bar(total: int, quiet: bool) -> Iterator[Tell]:
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda ended, tokens: None
        return
    began = time.monotonic()
    columns = (TextColumn("{task.completed:,} of {task.total:,} requests"), BarColumn(), TextColumn("{task.fields[speed]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("", total=total, speed="")

        def tell(ended: int, tokens: int) -> None:
            speed = tokens / max(1e-9, time.monotonic() - began)
            progress.update(task, completed=ended, speed=f"{speed:,.0f} tokens/s of those ended", refresh=True)

        yield tell


def peer(target: str, options: dict[str, Any]) -> Peer:
    """Raises OSError for a file that can't be read, ValueError for what can't be used."""
    host, colon, port = target.rpartition(":")
    if not colon or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"--target {target}: HOST:PORT is expected")
    tls = None
    if options["tls_ca"] or options["tls_cert"]:
        tls = ssl.create_default_context(cafile=options["tls_ca"])
        tls.set_alpn_protocols(["h2"])
        if options["tls_cert"]:
            tls.load_cert_chain(options["tls_cert"], options["tls_key"])
    token = options["token"]
    return Peer(host.strip("[]"), int(port), tls, (("authorization", f"Bearer {token}"),) if token else ())


def measure(
    asked: Asked, to: Peer, client: CarouselClient, asking: Asking, connections: int, stop: Callable[[], bool], tell: Tell
) -> tuple[Offered, Seen | None, str]:
    """What came, the server's load meanwhile, and why that is not known. Raises OSError."""
    caller = Caller(to, connections)
    watch = LoadWatch(client)
    try:
        with watch:
            offered = offer(caller, asking, asked.jobs, at_once=asked.at_once, stop=stop, tell=tell)
    finally:
        caller.close()
    return offered, watch.seen, watch.why


def workload_of(name: str) -> Workload:
    """Raises WorkloadError."""
    if name not in workloads.NAMES and (Path(name).exists() or "/" in name or "." in name):
        return traces.read(Path(name))
    return workloads.by_name(name)


def _rate(workload: Workload, rate: float | None, at_once: int | None) -> float:
    """Raises WorkloadError, UsageError."""
    if at_once is not None:
        if rate is not None:
            raise click.UsageError("--rate is of an open loop, --concurrency of a closed one: choose one of them")
        return math.inf
    if rate is None:
        if isinstance(workload, traces.Trace):
            return 0.0
        return math.inf if workload.name.startswith("anyscale") else 1.0
    workloads.check_rate(rate)
    return rate


@click.command(cls=OneLineCommand, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--target", default="127.0.0.1:50051", show_default=True, metavar="HOST:PORT", help="The server.")
@click.option(
    "--workload",
    "name",
    default="azure-conv-like",
    show_default=True,
    metavar="NAME",
    help=f"{', '.join(workloads.NAMES)}; or a file of JSON lines, as `carousel simulate` takes it.",
)
@click.option(
    "--rate",
    type=float,
    metavar="R",
    help="Open loop: requests a second in the mean, however many run; inf: all at once. [default: 1; anyscale all at once; a"
    " file as it says]",
)
@click.option("--concurrency", type=click.IntRange(1), metavar="N", help="Closed loop: so many requests at once, always.")
@click.option("--requests", type=click.IntRange(1), default=_REQUESTS, show_default=True, metavar="N")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, metavar="S")
@click.option(
    "--max-prompt",
    type=click.IntRange(1),
    metavar="N",
    help="Requests with longer prompts are left out. [default: what the model takes]",
)
@click.option("--text/--no-text", default=True, show_default=True, help="Ask for text, or for token ids alone.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, metavar="T")
@click.option("--slo-ttft-ms", type=click.FloatRange(0, min_open=True), default=1000.0, show_default=True, metavar="MS")
@click.option(
    "--slo-itl-ms",
    type=click.FloatRange(0, min_open=True),
    default=100.0,
    show_default=True,
    metavar="MS",
    help="For the mean over a request's tokens.",
)
@click.option("--connections", type=click.IntRange(1, 256), default=4, show_default=True, metavar="N")
@click.option("--tls-ca", metavar="FILE", help="PEM certificates that vouch for the server's; calls are encrypted then.")
@click.option("--tls-cert", metavar="FILE", help="PEM certificate to show to a server that wants one.")
@click.option("--tls-key", metavar="FILE", help="Its private key, PEM.")
@click.option("--token", envvar="CAROUSEL_TOKEN", show_envvar=True, metavar="TOKEN", help="Says who calls.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="OUT",
    help="Append a JSON line to this file.",
)
@click.option("--quiet", is_flag=True, help="No progress.")
def bench_command(**options: Any) -> None:
    """Load a running server over gRPC: throughput, TTFT, ITL, E2E, goodput, KV waste, and what the generator itself took.

    \b
    Examples:
      carousel bench --workload azure-conv-like --rate 2
      carousel bench --workload conversations --concurrency 16 --requests 500
      carousel bench --workload anyscale-512 --json results.jsonl
    """
    try:
        workload = workload_of(options["name"])
        rate = _rate(workload, options["rate"], options["concurrency"])
        way = {name: options[name] for name in ("tls_ca", "tls_cert", "tls_key", "token")}
        with CarouselClient(options["target"], **way) as client:
            # The client has looked at the files by now, and knows how to say what is wrong with them.
            failed = _bench(options, workload, rate, peer(options["target"], options), client)
    except WorkloadError as error:
        raise click.UsageError(str(error)) from None
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except CarouselError as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"{error.filename or options['target']}: {error.strerror or error}") from None
    sys.exit(failed)


def _bench(options: dict[str, Any], workload: Workload, rate: float, to: Peer, client: CarouselClient) -> int:
    """The exit code. Raises CarouselError, OSError."""
    load_before = os.getloadavg()[0]
    model, info = client.model_info(), client.server_info()
    jobs, left_out = fitting(
        list(workload.jobs(rate, options["requests"], options["seed"])), model.max_model_len, options["max_prompt"]
    )
    if not jobs:
        raise click.ClickException(f"no request of {workload.name} fits the model's {model.max_model_len:,} tokens")
    server = {
        "model": model.served_model_name,
        "dtype": model.dtype,
        "parameters": model.num_parameters,
        "KV tokens": model.num_blocks * model.block_size,
        "version": info.version,
        "policy": info.policy,
        "max_batch_rows": info.max_batch_rows,
        "max_step_tokens": info.max_step_tokens,
        "workers": [f"{worker.device}: {worker.description}" for worker in info.workers],
    }
    slo = Slo(options["slo_ttft_ms"], options["slo_itl_ms"])
    asked = Asked(workload, jobs, rate, options["concurrency"], options["seed"], slo, server)
    salt = uuid.uuid4().hex  # what another run left in the prefix cache is none of this one's
    asking = Asking(model.vocab_size, options["text"], salt, options["temperature"])
    total = sum(1 for job in jobs for _ in job.turns())
    with Stop() as stop, _bar(total, options["quiet"]) as tell:
        offered, seen, why = measure(asked, to, client, asking, options["connections"], lambda: stop.pressed, tell)
    found = load_figures(offered, slo)
    show(asked, found, seen, tables.console())
    for note in (
        f"{left_out:,} requests left out: they are longer than the model takes, {model.max_model_len:,} tokens"
        if left_out
        else "",
        f"KV cache not known: {why}" if why else "",
        f"load average {load_before:.1f} before: others use this machine" if load_before > 0.5 else "",
        f"the connection broke: {offered.broke}" if offered.broke else "",
    ):
        if note:
            click.echo(f"note: {note}")
    if options["json_file"] is not None:
        line = as_json(asked, found, seen, offered.broke, load_before)
        provenance.append(options["json_file"], provenance.provenance("load over gRPC") | line)
    if stop.pressed:
        click.echo("carousel: interrupted: the figures are of what was done", err=True)
        return INTERRUPTED
    return 1 if found.errors or offered.broke else 0


def fitting(jobs: list[Job], max_model_len: int, max_prompt: int | None) -> tuple[list[Job], int]:
    """Those that a model takes, sessions up to their first turn that is too long, and how many requests the others are."""
    cut = [_cut(job, max_model_len, max_prompt or max_model_len) for job in jobs]
    kept = [job for job in cut if job is not None]
    return kept, sum(1 for job in jobs for _ in job.turns()) - sum(1 for job in kept for _ in job.turns())


def _cut(job: Job, max_model_len: int, max_prompt: int) -> Job | None:
    kept: list[Job] = []
    for turn in job.turns():
        if turn.prompt_tokens > max_prompt or turn.prompt_tokens + max(turn.max_tokens, turn.output_tokens) > max_model_len:
            break
        kept.append(turn)
    found: Job | None = None
    for turn in reversed(kept):
        found = replace(turn, then=found)
    return found


if __name__ == "__main__":
    bench_command(prog_name="carousel bench")
