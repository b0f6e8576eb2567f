"""`python -m bench.peers.run`: Carousel beside OpenVINO GenAI, vLLM and llama.cpp on this CPU, in one run.

Installs each peer on first use (gigabytes, and half an hour of building for llama.cpp). A peer that can't be installed or run
is skipped, and the reason is printed. All get the same requests and the same checkpoint. The engines take turns, each started
afresh in every round and given all cores.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from bench import provenance
from bench.cpu import QUICK, SIZES, Report, cache, cached_checkpoint
from bench.cpu_workload import Outcome, Request
from bench.peers import driven
from bench.peers.driven import Work
from bench.peers.engines import DEFAULT, ENGINES, Engine
from bench.peers.environments import Environment, PeerUnavailableError, ensure
from bench.peers.table import table, target_table, targets
from bench.roofline import SHAPES, Shape
from bench.tables import console, plain, seconds

_KV_VALUE_BYTES = 4
_KV_MARGIN = 1.25  # blocks that are filled in part


class Comparison:
    """The engines that take part, what they came to, and why others do not."""

    def __init__(self, engines: Sequence[Engine], work: Work) -> None:
        self.engines = list(engines)
        self.work = work
        self.runs: dict[str, list[Outcome]] = {}
        self.skipped: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        self._environments: dict[str, Environment | PeerUnavailableError] = {}
        self._models: dict[str, Path] = {}

    @property
    def left(self) -> list[Engine]:
        return [engine for engine in self.engines if engine.name not in self.skipped]

    def prepare(self, checkpoint: Path) -> None:
        """Installs, and converts the checkpoint."""
        for engine in self.left:
            try:
                environment = self._environment(engine)
                self._models[engine.name] = (
                    checkpoint if environment is None else driven.convert(engine, checkpoint, environment)
                )
            except PeerUnavailableError as error:
                self.skip(engine, str(error))

    def round(self, number: int) -> None:
        for engine in self.left:
            try:
                outcome = self._run(engine)
            except PeerUnavailableError as error:
                self.skip(engine, f"{error} (round {number})")
                continue
            self.runs.setdefault(engine.name, []).append(outcome)
            speed, ready = plain(outcome.output_tokens_per_s), seconds(outcome.ready_s or math.nan)
            print(f"round {number}: {engine.name} {speed} tok/s, started in {ready}", flush=True)

    def skip(self, engine: Engine, reason: str) -> None:
        self.skipped[engine.name] = reason
        print(f"skipped: {engine.name}: {reason}", flush=True)

    def as_json(self) -> dict[str, Any]:
        return {
            "engines": {
                engine.name: {"dtype": engine.dtype, "compared": engine.compared, "note": engine.note}
                | {"runs": [outcome.as_json() for outcome in self.runs[engine.name]]}
                for engine in self.engines
                if engine.name in self.runs
            },
            "targets": [asdict(shown) | {"holds": shown.holds} for shown in targets(self.runs)],
            "skipped": self.skipped,
        }

    def _run(self, engine: Engine) -> Outcome:
        environment, model = self._environment(engine), self._models[engine.name]
        if environment is None:
            return driven.run_carousel(engine, model, self.work)
        outcome, versions = driven.run(engine, model, self.work, environment)
        self.versions |= versions
        return outcome

    def _environment(self, engine: Engine) -> Environment | None:
        """None: ours. What could not be installed once is not tried again."""
        if engine.peer is None:
            return None
        if engine.peer not in self._environments:
            try:
                self._environments[engine.peer] = ensure(engine.peer, len(self.work.cores))
            except PeerUnavailableError as error:
                self._environments[engine.peer] = error
        found = self._environments[engine.peer]
        if isinstance(found, PeerUnavailableError):
            raise found
        return found


def kv_gib(shape: Shape, requests: Sequence[Request]) -> int:
    """Enough for all of them at once, in whole GiB."""
    tokens = sum(len(request.prompt_ids) + request.max_tokens for request in requests)
    per_token = shape.kv_bytes_per_token // shape.bytes_per_value * _KV_VALUE_BYTES
    return math.ceil(_KV_MARGIN * tokens * per_token / 2**30)


def _engines(context: click.Context, option: click.Parameter, names: str) -> list[Engine]:
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in ENGINES:
            raise click.BadParameter(f"there is no {name}; there are {', '.join(ENGINES)}")
    if not wanted:
        raise click.BadParameter("names no engine")
    return [ENGINES[name] for name in dict.fromkeys(wanted)]


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--shape", type=click.Choice([*SIZES]), default="smollm-135m")
@click.option("--engines", callback=_engines, default=",".join(DEFAULT), metavar="NAME,…", help=f"Of: {', '.join(ENGINES)}.")
@click.option("--requests", type=click.IntRange(1), help="[default: 64 of the 135M shape, 16 of the 1B shape]")
@click.option("--rounds", type=click.IntRange(1), help="Turns of every engine. [default: 2; quick: 1]")
@click.option("--seed", type=int, default=0)
@click.option("--quick", is_flag=True, help="Fewer and shorter requests: to see that it works, not for figures.")
@click.option("--limit", "limit_s", type=click.FloatRange(10), default=1800.0, help="Seconds of one run, its start included.")
@click.option("--install-only", is_flag=True, help="Install and convert, run nothing.")
@click.option("--checkpoints", type=click.Path(path_type=Path, file_okay=False), help="[default: in the user's cache]")
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Append a line to this file.")
def main(
    shape: str,
    engines: list[Engine],
    seed: int,
    quick: bool,
    limit_s: float,
    install_only: bool,
    checkpoints: Path | None,
    json_file: Path | None,
    **sizes: int | None,
) -> None:
    size = replace(QUICK if quick else SIZES[shape], **{name: value for name, value in sizes.items() if value is not None})
    asked = Report(SHAPES[shape], size, seed)  # the same as of `make bench-cpu`
    cores = tuple(sorted(os.sched_getaffinity(0)))
    work = Work(asked.requests, asked.single, cores, kv_gib(asked.shape, asked.requests), limit_s)
    comparison = Comparison(engines, work)
    outputs = [request.max_tokens for request in work.requests]
    print(
        f"{shape}: {len(outputs)} requests of {size.prompt_len} random prompt tokens, all at once; {sum(outputs)} output"
        f" tokens, the longest {max(outputs)}; {len(cores)} cores; median of {size.rounds} round(s); load before:"
        f" {asked.load:.1f}",
        flush=True,
    )
    try:
        comparison.prepare(cached_checkpoint(asked.shape, checkpoints or cache()))
    except OSError as error:
        raise click.ClickException(str(error)) from None
    for number in range(1, 1 if install_only else size.rounds + 1):
        comparison.round(number)
    if comparison.runs:
        show(comparison)
    if json_file is not None and comparison.runs:
        line = provenance.provenance(f"Carousel and peers on this CPU, {shape}, all requests at once")
        line["versions"] |= comparison.versions
        line |= {"shape": shape, "quick": quick, "seed": seed, "size": asdict(size), "output_tokens": sum(outputs)}
        provenance.append(json_file, line | {"load before": asked.load} | comparison.as_json())
    sys.exit(1 if not quick and any(not shown.holds for shown in targets(comparison.runs)) else 0)


def show(comparison: Comparison) -> None:
    out = console()
    out.print(table(comparison.engines, comparison.runs))
    if reached := list(targets(comparison.runs)):
        out.print(target_table(reached))
    for engine in comparison.engines:
        if engine.note and engine.name in comparison.runs:
            out.print(f"{engine.name}: {engine.note}")
    for name, reason in comparison.skipped.items():
        out.print(f"skipped: {name}: {reason}", markup=False)


if __name__ == "__main__":
    main()
