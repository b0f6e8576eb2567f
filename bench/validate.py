"""`python -m bench.validate`: what the simulator predicts against what a real server does, for the same requests at the same
times.

The server is started with the limits of the step-cost table; every request comes at its drawn time over gRPC, in a thread of
its own. Compared are what the callers measured, what the core's own recording says, what the simulator predicts from the table,
and what it predicts from the recording's step times. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import math
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import Progress

from bench import provenance, shadow, tables, workloads
from bench.cost_models import Table, read_table
from bench.figures import Figures, Percentiles, Slo, figures, percentiles
from bench.jobs import Job, token_ids
from bench.roofline import SHAPES
from bench.scenario import Limits, Scenario, core_config, run, setup_of, table_facts
from bench.server import Server
from bench.simulator import Setup
from bench.sweep import saturated_rate
from client import CarouselClient, CarouselError

_PATIENCE_S = 600.0  # for the last answer
_WARMING = 3  # requests before those that count
_COMPARED = ("ttft", "itl", "e2e")


@dataclass(slots=True)
class Heard:
    """What a caller saw. Nanoseconds of its clock."""

    job: Job
    sent_ns: int = 0
    tokens: list[tuple[int, int]] = field(default_factory=list)  # (time, how many came then)
    ended_ns: int = 0
    error: str = ""


def call(target: str, jobs: Sequence[Job], vocab_size: int) -> list[Heard]:
    """Sends each job at its time, and returns when all have ended."""
    heard = [Heard(job) for job in jobs]
    prompts = [token_ids(job.prompt, vocab_size).tolist() for job in jobs]
    began = time.monotonic_ns() + 100_000_000
    with CarouselClient(target) as client:
        threads = [
            threading.Thread(target=_one, args=(client, entry, prompt, began), daemon=True)
            for entry, prompt in zip(heard, prompts, strict=True)
        ]
        with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task("calling the server", total=len(threads))
            for thread, entry in zip(threads, heard, strict=True):
                time.sleep(max(0.0, (began + entry.job.arrival_ns - time.monotonic_ns()) / 1e9))
                thread.start()
            for thread in threads:
                thread.join(_PATIENCE_S)
                progress.advance(task)
    return heard


def _one(client: CarouselClient, entry: Heard, prompt: list[int], began: int) -> None:
    entry.sent_ns = time.monotonic_ns() - began
    options: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "seed": 0, "max_tokens": entry.job.output_tokens}
    try:
        for event in client.generate(prompt, **options):
            if event.WhichOneof("event") == "delta" and event.delta.token_ids:
                entry.tokens.append((time.monotonic_ns() - began, len(event.delta.token_ids)))
        entry.ended_ns = time.monotonic_ns() - began
    except CarouselError as error:
        entry.error = str(error)


@dataclass(frozen=True)
class Measured:
    """The callers' side."""

    ttft: Percentiles
    itl: Percentiles
    e2e: Percentiles
    output_tokens_per_s: float


def measured(heard: Sequence[Heard]) -> Measured:
    """Tokens that came in one message after another one count as having come one after the other at its time."""
    done = [entry for entry in heard if entry.ended_ns and entry.tokens]
    gaps: list[int] = []
    for entry in done:
        for (before, _), (now, count) in zip(entry.tokens, entry.tokens[1:], strict=False):
            gaps += [now - before] + [0] * (count - 1)
        gaps += [0] * (entry.tokens[0][1] - 1)
    last = max(entry.tokens[-1][0] for entry in done)
    tokens = sum(count for entry in done for _, count in entry.tokens)
    return Measured(
        ttft=percentiles(np.array([entry.tokens[0][0] - entry.sent_ns for entry in done], np.int64)),
        itl=percentiles(np.array(gaps, np.int64)),
        e2e=percentiles(np.array([entry.tokens[-1][0] - entry.sent_ns for entry in done], np.int64)),
        output_tokens_per_s=tokens / (last - min(entry.sent_ns for entry in heard)) * 1e9,
    )


def errors(predicted: Figures, seen: Measured | Figures) -> dict[str, float]:
    """Predicted ÷ seen - 1."""
    found = {"output_tokens_per_s": predicted.output_tokens_per_s / seen.output_tokens_per_s - 1}
    for name in _COMPARED:
        for at in ("p50", "p90", "p99", "mean"):
            found[f"{name}_{at}"] = getattr(getattr(predicted, name), at) / getattr(getattr(seen, name), at) - 1
    return found


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--model", type=click.Path(path_type=Path, exists=True, file_okay=False), help="A checkpoint.")
@click.option("--shape", type=click.Choice([*SHAPES]), help="Or random weights of this shape.")
@click.option("--costs", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=True, help="Its step costs.")
@click.option("--workload", default="anyscale-latency", help="A named one whose lengths the model can do.")
@click.option("--rate", type=float, help="Requests a second. [default: 0.7 of what the simulator says it can do]")
@click.option("--requests", type=click.IntRange(1), default=100)
@click.option("--seed", type=click.IntRange(0), default=0)
@click.option("--policy", default="continuous")
@click.option("--hop-us", type=click.FloatRange(0), default=150.0, help="From core to worker, and back, in the simulation.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Append a line to this file.")
def main(model: Path | None, shape: str | None, costs: Path, json_file: Path | None, **options: Any) -> None:
    """Serve a model on this machine's CPU, and compare with what the simulator predicts."""
    if (model is None) == (shape is None):
        raise click.UsageError("give one of --model DIR and --shape NAME")
    table = read_table(costs)
    with tempfile.TemporaryDirectory() as folder:
        if shape is not None:
            from bench import random_checkpoint

            model = random_checkpoint.write(SHAPES[shape], Path(folder) / "model")
        assert model is not None
        line = validate(model, table, Path(folder) / "run.rec", **options)
    if json_file is not None:
        provenance_line = provenance.provenance("simulator against measured")
        provenance.append(json_file, provenance_line | {"costs": table.describe()} | line)


def validate(
    model: Path,
    table: Table,
    recording: Path,
    *,
    workload: str,
    rate: float | None,
    requests: int,
    seed: int,
    policy: str,
    hop_us: float,
) -> dict[str, Any]:
    facts = table_facts(table, Limits())
    setup = setup_of(facts, table, core_config(facts, policy=policy), hop_ns=round(hop_us * 1000))
    scenario = Scenario(workloads.by_name(workload), math.inf, requests, seed, setup, Slo())
    scenario = scenario.with_rate(rate or 0.7 * saturated_rate(scenario, run))
    jobs = [job for first in scenario.jobs() for job in first.turns()]
    print(f"{requests} requests of {workload} at {scenario.rate:.3g} a second, policy {policy}", file=sys.stderr)
    with Server(_options(model, setup, recording)) as server:
        other = replace(scenario, seed=seed + 1, rate=1.0, requests=_WARMING)  # the first calls are slower
        call(server.target, list(other.jobs()), facts.vocab_size)
        heard = call(server.target, jobs, facts.vocab_size)
    failed = [entry.error or "no end" for entry in heard if not entry.ended_ns]
    if failed:
        raise click.ClickException(f"{len(failed)} requests failed, the first with: {failed[0]}")
    callers = measured(heard)
    predicted = run(scenario).figures
    recorded = shadow.read(recording)
    warm = shadow.without_first(recorded, _WARMING)
    core_side = figures(warm.run, Slo())
    again = run(Scenario(warm, 0.0, 0, 0, Setup(warm.facts, warm.costs, warm.config), Slo())).figures
    columns = [("core, recorded", core_side), ("predicted (table)", predicted), ("predicted (recording)", again)]
    tables.console().print(tables.side_by_side(columns))
    against = {
        "table against callers": errors(predicted, callers),
        "table against core": errors(predicted, core_side),
        "recording against core": errors(again, core_side),
    }
    for what, found in against.items():
        worst = max(found.values(), key=abs)
        print(f"{what}: " + ", ".join(f"{name} {value:+.1%}" for name, value in found.items()) + f"; worst {worst:+.1%}")
    return {
        "workload": {"name": workload, "requests": requests, "rate": scenario.rate, "seed": seed},
        "policy": policy,
        "hop_us": hop_us,
        "callers": asdict(callers),
        "core": asdict(core_side),
        "predicted from the table": asdict(predicted),
        "predicted from the recording": asdict(again),
        "errors": against,
    }


def _options(model: Path, setup: Setup, recording: Path) -> list[str]:
    facts, core = setup.facts, setup.core
    numbers = {
        "--max-batch-rows": facts.max_batch_rows,
        "--max-step-tokens": facts.max_step_tokens,
        "--block-size": facts.block_size,
        "--num-blocks": facts.num_blocks,
        "--max-model-len": facts.max_model_len,
        "--target-itl-ms": core.target_itl_ns / 1e6,
    }
    options = ["--model", str(model), "--device", "cpu", "--policy", core.policy, "--record", str(recording)]
    return options + [word for name, value in numbers.items() for word in (name, str(value))]


if __name__ == "__main__":
    main()
