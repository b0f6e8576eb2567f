"""`python -m bench.targets`: the targets that can be shown in simulation, each with the number that it is held against.

G11 long prompts do not stop the others; G14 KV waste; G15 prefix caching; and the simulator's own speed. Writes a line each to
a results file.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table as Rows

from bench import provenance, tables, workloads
from bench.cost_models import CostModel, Roofline, StepWork, Table, read_table
from bench.figures import Slo, percentile
from bench.jobs import Job, Part
from bench.roofline import MACHINES, SHAPES
from bench.runs import Run
from bench.scenario import Limits, Outcome, Scenario, core_config, roofline_facts, run, setup_of, table_facts
from bench.simulator import Setup, Simulation
from bench.sweep import saturated_rate
from wire import WorkerFacts
from wire.messages import U32

_SECOND = 1_000_000_000


@dataclass(frozen=True)
class Shown:
    """One figure against its goal."""

    target: str
    what: str
    value: float
    goal: float
    at_most: bool = False
    more: dict[str, Any] | None = None

    @property
    def holds(self) -> bool:
        return self.value <= self.goal if self.at_most else self.value >= self.goal


# ------------------------------------------------------------------------------------------------------------------ G11


@dataclass(frozen=True)
class LongPrompts:
    """Some requests decode all the time; every now and then a long prompt comes."""

    decoders: int
    prompt: int = 8192
    interval_s: float = 2.0
    count: int = 10
    name: str = "long prompts"
    shares_prefixes: bool = False

    def jobs(self, rate: float, count: int, seed: int) -> Iterator[Job]:
        for number in range(self.decoders):
            yield Job(0, (Part(number, 256),), 100_000)
        for number in range(self.count):
            arrival_ns = round((number + 1) * self.interval_s * _SECOND)
            yield Job(arrival_ns, (Part(self.decoders + number, self.prompt),), 2)


def decoder_gaps(workload: LongPrompts, setup: Setup) -> tuple[NDArray[np.int64], NDArray[np.int64], Run]:
    """Times between the decoders' tokens: while a long prompt was computed, and otherwise."""
    last_ns = round((workload.count + 1) * workload.interval_s * _SECOND)
    simulation = Simulation(setup, workload.jobs(0, 0, 0))
    tokens: list[tuple[int, U32]] = []
    simulation.tokens = tokens
    simulation.end_ns = last_ns
    done = simulation.run()
    long = slice(workload.decoders, None)
    arrival, first = done.requests.arrival_ns[long], done.requests.first_ns[long]
    windows = np.stack([arrival, arrival + first], axis=1)[first > 0]
    last = np.full(workload.decoders, -1, np.int64)
    during: list[int] = []
    otherwise: list[int] = []
    for now, handles in tokens:
        mine = handles[handles < workload.decoders]
        begins = last[mine]
        overlaps = ((windows[:, 0, None] < now) & (windows[:, 1, None] > begins)).any(axis=0)
        gaps, known = now - begins, begins >= 0
        during += gaps[known & overlaps].tolist()
        otherwise += gaps[known & ~overlaps].tolist()
        last[mine] = now
    return np.sort(np.array(during)), np.sort(np.array(otherwise)), done


def g11(costs: CostModel, facts: WorkerFacts, name: str, decoders: int = 32) -> Iterator[Shown]:
    """p99 between tokens while an 8k prompt is computed ÷ while only decodes are, with a target of 1.9 times the latter. The
    time to the long prompts' first token without a target stands beside it: that is what the target costs."""
    prompt = min(8192, facts.max_model_len - 64)
    decoders = min(decoders, facts.max_batch_rows - 4)
    facts = _long_enough(facts)
    probe = LongPrompts(decoders, prompt, interval_s=_interval_s(costs, prompt, decoders))
    free_during, free_alone, free = decoder_gaps(probe, setup_of(facts, costs, core_config(facts, target_itl_ns=0)))
    alone = percentile(free_alone, 0.99)
    target_ns = round(1.9 * alone)
    during, otherwise, kept = decoder_gaps(probe, setup_of(facts, costs, core_config(facts, target_itl_ns=target_ns)))
    ratio = percentile(during, 0.99) / percentile(otherwise, 0.99)

    def ttft_ms(done: Run) -> float:
        first = done.requests.first_ns[decoders:]
        return float(np.median(first[first > 0])) / 1e6

    more = {
        "prompt": prompt,
        "decoders": decoders,
        "target_itl_ms": target_ns / 1e6,
        "decode-only p99 ms": percentile(otherwise, 0.99) / 1e6,
        "while prefilling p99 ms": percentile(during, 0.99) / 1e6,
        "TTFT p50 ms of the long prompts": ttft_ms(kept),
        "without a target": {"ratio": percentile(free_during, 0.99) / alone, "TTFT p50 ms": ttft_ms(free)},
    }
    yield Shown("G11", f"p99 ITL during a {prompt}-token prefill ÷ decode-only, {name}", ratio, 2.0, True, more)


def _long_enough(facts: WorkerFacts) -> WorkerFacts:
    """The decoders never end, as far as the run goes."""
    return msgspec.structs.replace(facts, max_model_len=1 << 20, num_blocks=max(facts.num_blocks, 1 << 16))


def _interval_s(costs: CostModel, prompt: int, decoders: int) -> float:
    """Long enough for a prompt to be computed while decodes take half of each step, twice over."""
    chunk = 512
    steps = -(-prompt // chunk)
    one = costs.step_ns(StepWork(decoders, decoders * 512, 1, chunk, prompt // 2, chunk * prompt // 2, decoders))
    return 6 * steps * one / 1e9


# ------------------------------------------------------------------------------------------------------------------ G15


def possible_hits(sessions: Sequence[Job], block_size: int) -> int:
    """Prompt tokens of these conversations that a cache without limits would have had: full blocks of what the turn before
    computed (all but its last token), or of a system prompt that was there before; at most all but one token."""
    seen: set[int] = set()
    total = 0
    for first in sessions:
        system = first.prompt[0]
        known = system.length if system.key in seen else 0
        seen.add(system.key)
        for job in first.turns():
            total += min(known, job.prompt_tokens - 1) // block_size * block_size
            known = job.prompt_tokens + job.output_tokens - 1
    return total


def g15(seed: int = 0, requests: int = 4000) -> Iterator[Shown]:
    """At 0 % hits caching costs nothing; in conversations it saves what can be saved."""
    shape, machine = SHAPES["llama-3-8b"], MACHINES["h200"]
    facts, costs = roofline_facts(shape, machine, Limits()), Roofline(shape, machine)
    scenario = Scenario(
        workloads.by_name("azure-conv-like"), math.inf, requests, seed, setup_of(facts, costs, core_config(facts)), Slo()
    )
    on, off = (
        run(
            replace(scenario, setup=replace(scenario.setup, hash_prompts=True, core=core_config(facts, prefix_caching=caching)))
        )
        for caching in (True, False)
    )
    assert on.figures.cached_share == 0.0
    more = {
        "on tokens/s": on.figures.output_tokens_per_s,
        "off tokens/s": off.figures.output_tokens_per_s,
        "wall µs a step, on": on.run.wall_s / on.figures.steps * 1e6,
        "wall µs a step, off": off.run.wall_s / off.figures.steps * 1e6,
    }
    ratio = on.figures.output_tokens_per_s / off.figures.output_tokens_per_s
    yield Shown("G15", "prefix caching on ÷ off at 0 % hits, azure-conv-like, all at once", ratio, 0.99, more=more)

    chat = workloads.by_name("conversations")
    scenario = replace(scenario, workload=chat, rate=10.0)
    outcome = run(scenario)
    possible = possible_hits(list(scenario.jobs()), facts.block_size)
    saved = int(outcome.run.requests.cached_tokens.sum())
    more = {"saved tokens": saved, "possible tokens": possible, "of all prompt tokens": outcome.figures.cached_share}
    yield Shown("G15", "prefill saved ÷ possible, conversations at 10 requests/s", saved / possible, 0.95, more=more)


# -------------------------------------------------------------------------------------------------------- G14 and the speed


def g14(outcome: Outcome) -> Iterator[Shown]:
    yield Shown("G14", "KV waste at saturation, azure-conv-like, all at once", outcome.figures.kv_waste, 0.02, True)


def speed(seed: int = 0, requests: int = 100_000) -> Iterator[Shown]:
    shape, machine = SHAPES["llama-3-8b"], MACHINES["h200"]
    facts, costs = roofline_facts(shape, machine, Limits()), Roofline(shape, machine)
    scenario = Scenario(
        workloads.by_name("azure-conv-like"), math.inf, 4000, seed, setup_of(facts, costs, core_config(facts)), Slo()
    )
    saturated = run(scenario)
    yield from g14(saturated)
    began = time.perf_counter()
    rate = 0.8 * saturated_rate(scenario, run)
    calibration_s = time.perf_counter() - began
    scenario = replace(scenario, rate=rate, requests=requests)
    began = time.perf_counter()
    figures = run(scenario).figures
    wall_s = time.perf_counter() - began
    more = {
        "rate": rate,
        "requests": requests,
        "wall_s": wall_s,
        "calibration_s": calibration_s,
        "steps": figures.steps,
        "µs a step": wall_s / figures.steps * 1e6,
        "output tokens": figures.output_tokens,
        "rows a step": figures.mean_rows,
    }
    yield Shown("simulator", "requests simulated a minute, 80 % of capacity", requests / wall_s * 60, 100_000, more=more)


# -------------------------------------------------------------------------------------------------------------- command


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1, type=click.Choice(["g11", "g15", "speed"]), metavar="[g11] [g15] [speed]")
@click.option(
    "--costs",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Step costs of a measured worker, for g11 too; may be given several times.",
)
@click.option("--requests", type=click.IntRange(1), default=100_000, show_default=True, help="Of speed.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Append a line each to this file.")
def main(names: tuple[str, ...], costs: tuple[Path, ...], requests: int, json_file: Path | None) -> None:
    """Show targets in simulation: all without arguments. Exit code 1 when one does not hold."""
    wanted = names or ("g11", "g15", "speed")
    shown: list[Shown] = []
    makers: dict[str, Callable[[], Iterator[Shown]]] = {
        "g11": lambda: _all_g11(costs),
        "g15": g15,
        "speed": lambda: speed(requests=requests),
    }
    console = Console(stderr=True)
    for name in wanted:
        with console.status(f"{name} …"):
            shown += makers[name]()
    table = Rows(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("target", "what", "value", "goal", ""):
        table.add_column(column, justify="right" if column in ("value", "goal") else "left")
    for entry in shown:
        sign = "≤" if entry.at_most else "≥"
        table.add_row(
            entry.target, entry.what, f"{entry.value:,.4g}", f"{sign} {entry.goal:,g}", "holds" if entry.holds else "FAILS"
        )
        if json_file is not None:
            numbers = {"target": entry.target, "value": entry.value, "goal": entry.goal, "holds": entry.holds}
            provenance.append(json_file, provenance.provenance(entry.what) | numbers | {"more": entry.more or {}})
    tables.console().print(table)
    sys.exit(0 if all(entry.holds for entry in shown) else 1)


def _all_g11(costs: Sequence[Path]) -> Iterator[Shown]:
    shape, machine = SHAPES["llama-3.1-8b"], MACHINES["h200"]
    facts = roofline_facts(shape, machine, Limits())
    yield from g11(Roofline(shape, machine), facts, "llama-3.1-8b on h200 by the roofline")
    for path in costs:
        table: Table = read_table(path)
        yield from g11(table, table_facts(table, Limits()), f"{table.about['model']} on the measured CPU")


if __name__ == "__main__":
    main()
