"""`carousel simulate`, which is also `python -m bench.simulate`: the real core on a virtual clock, as a command.

Reads options and files, shows progress, prints tables, appends to a results file. Exit codes: 0 done, 1 failed, 2 wrong usage,
130 interrupted (what was done is printed).
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench import advice, provenance, tables, traces, workloads
from bench.cost_models import CostError, CostModel, Roofline, read_table
from bench.figures import Slo, figures
from bench.roofline import MACHINES, SHAPES
from bench.scenario import (
    Limits,
    Outcome,
    Scenario,
    ScenarioError,
    core_config,
    roofline_facts,
    run,
    setup_of,
    table_facts,
)
from bench.shadow import Shadow, ShadowError
from bench.shadow import read as read_recording
from bench.simulator import Setup, Simulation
from bench.sweep import CRITERIA, Capacity, capacity, saturated
from bench.workloads import (
    ANYSCALE_CAPS,
    ANYSCALE_KV_TOKENS,
    ANYSCALE_REQUESTS,
    ANYSCALE_STATIC_ROWS,
    RateError,
    Workload,
    WorkloadError,
)
from scheduler.command import INTERRUPTED, OneLineCommand
from scheduler.core import Core, CoreConfig, policies
from scheduler.recorder import Recorded, RecordingFile

_REQUESTS, _SWEEP_REQUESTS = 5000, 2000
_LOAD = 0.8
_REDRAW_S = 0.1


class _List(click.ParamType):  # type: ignore[type-arg]
    """Words with commas between; no empty ones, none twice."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        words = [word.strip() for word in str(value).split(",")]
        if not all(words):
            self.fail(f"{value!r} has an empty place between its commas", param, ctx)
        if len(set(words)) < len(words):
            self.fail(f"{value!r} names something twice", param, ctx)
        return words


class _Stop:
    """Ctrl-C sets it once; the second Ctrl-C is Python's own."""

    def __init__(self) -> None:
        self.pressed = False
        self.simulation: Simulation | None = None

    def __enter__(self) -> _Stop:
        self._before = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        if self.simulation is not None:
            self.simulation.stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


class _InterruptedError(Exception):
    """Ctrl-C came before there was anything to show."""


class _Runner:
    """Runs scenarios with a progress bar on stderr, and takes the time of what is asked for and of what that needs."""

    def __init__(self, stop: _Stop, quiet: bool) -> None:
        self.simulated, self.simulation_s = 0, 0.0  # requests, and what they took
        self.calibration_s = 0.0  # to find out what can be served
        self._stop = stop
        self._console = Console(stderr=True)
        self._quiet = quiet or not self._console.is_terminal

    def __call__(self, scenario: Scenario, *, core_of: Callable[[CoreConfig], Core] = Core) -> Outcome:
        def watch(simulation: Simulation) -> None:
            self._stop.simulation = simulation
            simulation.stop = self._stop.pressed

        began = time.perf_counter()
        with self._bar(scenario) as tell:
            outcome = run(scenario, tell, core_of, watch)
        self.simulated += len(outcome.run.requests.reason)
        self.simulation_s += time.perf_counter() - began
        return outcome

    def saturated_rate(self, scenario: Scenario) -> float:
        """Raises ScenarioError when nothing can be served."""
        before = self.simulated, self.simulation_s
        outcome = saturated(scenario, self)
        if self._stop.pressed:
            raise _InterruptedError
        if not outcome.figures.requests:
            raise ScenarioError(advice.nothing_fits(outcome))
        self.calibration_s += self.simulation_s - before[1]
        self.simulated, self.simulation_s = before
        return outcome.figures.request_rate

    def speed(self) -> str:
        """How fast this machine was."""
        a_minute = f", {self.simulated / self.simulation_s * 60:,.0f} a minute" if self.simulation_s else ""
        found = f"; {self.calibration_s:.1f} s more to find what can be served" if self.calibration_s else ""
        return f"{self.simulated:,} requests simulated in {self.simulation_s:.1f} s{a_minute}{found}"

    @contextlib.contextmanager
    def _bar(self, scenario: Scenario) -> Iterator[Callable[[int, int], None] | None]:
        if self._quiet:
            yield None
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[virtual]}"), TimeElapsedColumn())
        with Progress(*columns, console=self._console, transient=True, auto_refresh=False) as progress:
            at_rate = (
                f"{scenario.rate:.3g}/s" if 0 < scenario.rate < math.inf else "all at once" if scenario.rate else "as it was"
            )
            name = f"{scenario.workload.name}, {scenario.setup.core.policy}, {at_rate}"
            total = scenario.requests or len(getattr(scenario.workload, "requests", ())) or None
            task = progress.add_task(name, total=total, virtual="")
            due = 0.0

            def tell(ended: int, now: int) -> None:
                nonlocal due
                if time.monotonic() >= due:
                    due = time.monotonic() + _REDRAW_S
                    progress.update(
                        task, completed=ended, virtual=f"{ended:,} ended, {now / 1e9:,.0f} s simulated", refresh=True
                    )

            yield tell


@click.command(cls=OneLineCommand, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--workload",
    "names",
    type=_List(),
    default="azure-conv-like",
    show_default=True,
    metavar="NAME[,NAME…]",
    help=f"{', '.join(workloads.NAMES)}; anyscale: its four caps; or a file of JSON lines with arrival_s, prompt_tokens,"
    " output_tokens and perhaps prefix, prefix_tokens, tenant, priority, deadline_ms, num_outputs.",
)
@click.option(
    "--rate",
    type=float,
    metavar="R",
    help="Requests a second; inf: all at once. [default: --load; anyscale all at once; a file as it says]",
)
@click.option(
    "--load",
    type=click.FloatRange(0, min_open=True),
    metavar="SHARE",
    help=f"The rate as a share of what the first policy serves when all requests are there at once. [default: {_LOAD}]",
)
@click.option(
    "--policy",
    "policy_names",
    type=_List(),
    default="continuous",
    show_default=True,
    metavar="NAME[,NAME…]",
    help="continuous, static, prefill_first.",
)
@click.option("--workers", type=click.IntRange(1, 64), default=1, show_default=True, metavar="N", help="Worker groups.")
@click.option(
    "--requests", type=click.IntRange(1), metavar="N", help=f"[default: {_REQUESTS}; {_SWEEP_REQUESTS} a run of --sweep]"
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, metavar="S")
@click.option(
    "--model", "shape", type=click.Choice([*SHAPES]), metavar="SHAPE", help=f"[default: llama-3-8b] {', '.join(SHAPES)}"
)
@click.option("--gpu", type=click.Choice([*MACHINES]), metavar="NAME", help=f"[default: h200] {', '.join(MACHINES)}")
@click.option(
    "--costs",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Measured step costs (python -m bench.measure_costs) instead of --model and --gpu.",
)
@click.option("--bandwidth-share", type=click.FloatRange(0, 1, min_open=True), default=0.75, show_default=True, metavar="X")
@click.option("--peak-share", type=click.FloatRange(0, 1, min_open=True), default=0.75, show_default=True, metavar="X")
@click.option("--slo-ttft-ms", type=click.FloatRange(0, min_open=True), default=1000.0, show_default=True, metavar="MS")
@click.option(
    "--slo-itl-ms",
    type=click.FloatRange(0, min_open=True),
    default=100.0,
    show_default=True,
    metavar="MS",
    help="For the mean over a request's tokens.",
)
@click.option("--sweep", is_flag=True, help="Find the largest rate at which --criterion holds, for each policy.")
@click.option(
    "--criterion",
    type=click.Choice(CRITERIA),
    default="goodput",
    show_default=True,
    help="goodput: 90 % of the requests keep the SLO; ttft: 99 % have their first token in time.",
)
@click.option("--batch-rows", type=click.IntRange(1, 65535), metavar="N", help="[default: 256, or as measured]")
@click.option("--step-tokens", type=click.IntRange(1), metavar="N", help="[default: 2048, or as measured]")
@click.option("--block-size", type=click.IntRange(1, 256), metavar="N", help="[default: 16, or as measured]")
@click.option(
    "--kv-tokens",
    type=click.IntRange(0),
    metavar="N",
    help="KV cache. [default: what fits; anyscale as published; 0: what fits]",
)
@click.option("--max-model-len", type=click.IntRange(2), metavar="N", help="[default: the model's]")
@click.option(
    "--static-batch-size", type=click.IntRange(0), metavar="N", help="[default: what fits; anyscale as published; 0: what fits]"
)
@click.option("--target-itl-ms", type=click.FloatRange(0), default=100.0, show_default=True, metavar="MS", help="0: no target.")
@click.option("--no-prefix-caching", is_flag=True)
@click.option(
    "--swap-gib",
    type=click.FloatRange(0),
    metavar="GIB",
    help="Host memory for preempted requests. [default: 4, or as measured]",
)
@click.option(
    "--hop-us", type=click.FloatRange(0), default=0.0, show_default=True, metavar="US", help="From core to worker, and back."
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="OUT",
    help="Append JSON lines to this file.",
)
@click.option(
    "--record", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Record one run, for carousel replay."
)
@click.option(
    "--shadow",
    type=click.Path(path_type=Path),
    metavar="RECORDING",
    help="Simulate what was recorded (carousel serve --record) under --policy.",
)
@click.option("--quiet", is_flag=True, help="No progress, and no word of how long it took.")
@click.pass_context
def simulate_command(context: click.Context, /, **options: Any) -> None:
    """Simulate a workload: the shipped scheduler core on a virtual clock, with measured or calculated step times.

    \b
    Examples:
      carousel simulate --workload azure-conv-like --rate 15
      carousel simulate --workload azure-conv-like,azure-code-like --policy continuous,prefill_first,static --load 0.8
      carousel simulate --workload anyscale --model opt-13b --gpu a100-40g --policy continuous,static
      carousel simulate --workload azure-conv-like --policy continuous,static --sweep --slo-ttft-ms 500
      carousel simulate --shadow day.rec --policy static
    """
    try:
        with _Stop() as stop:
            runner = _Runner(stop, options["quiet"])
            if options["shadow"] is not None:
                _refuse_with_shadow(context)
                _shadow(options, runner)
            elif options["sweep"]:
                _sweep(options, runner, stop)
            else:
                _compare(options, runner, stop)
    except (ScenarioError, RateError) as error:
        raise click.UsageError(str(error)) from None
    except (WorkloadError, CostError, ShadowError) as error:
        raise click.ClickException(str(error)) from None
    except _InterruptedError:
        raise click.Abort from None
    if stop.pressed:
        click.echo("carousel: interrupted: the figures are of what was done", err=True)
        sys.exit(INTERRUPTED)
    if not options["quiet"]:
        click.echo(runner.speed(), err=True)


# ---------------------------------------------------------------------------------------------------------------- setups


def _workloads(names: Sequence[str]) -> list[Workload]:
    found: list[Workload] = []
    for name in names:
        if name == "anyscale":
            found += [workloads.by_name(f"anyscale-{cap}") for cap in ANYSCALE_CAPS]
        elif name not in workloads.NAMES and (Path(name).exists() or "/" in name or "." in name):
            found.append(traces.read(Path(name)))
        else:
            try:
                found.append(workloads.by_name(name))
            except WorkloadError as error:
                raise click.UsageError(str(error)) from None
    return found


def _policies(names: Sequence[str]) -> Sequence[str]:
    for name in names:
        try:
            policies.by_name(name)
        except ValueError as error:
            raise ScenarioError(str(error)) from None
    return names


def _anyscale_cap(workload: Workload) -> int | None:
    name, _, cap = workload.name.partition("-")
    return int(cap) if name == "anyscale" and cap.isdecimal() else None


def _setup(options: dict[str, Any], workload: Workload) -> Setup:
    cap = _anyscale_cap(workload)
    kv_tokens, static_rows = options["kv_tokens"], options["static_batch_size"]
    if cap is not None:
        kv_tokens = ANYSCALE_KV_TOKENS[cap] if kv_tokens is None else kv_tokens
        static_rows = ANYSCALE_STATIC_ROWS[cap] if static_rows is None else static_rows
    limits = _limits(options, kv_tokens)
    costs: CostModel
    if options["costs"] is not None:
        if options["shape"] or options["gpu"]:
            raise click.UsageError("--costs is measured for one model on one machine: give it alone, or --model and --gpu")
        table = read_table(options["costs"])
        costs, facts = table, table_facts(table, limits)
    else:
        shape, machine = SHAPES[options["shape"] or "llama-3-8b"], MACHINES[options["gpu"] or "h200"]
        costs = Roofline(shape, machine, options["bandwidth_share"], options["peak_share"])
        facts = roofline_facts(shape, machine, limits)
    core = core_config(facts, static_batch_size=static_rows or 0, **_core_options(options))
    return setup_of(facts, costs, core, options["workers"], round(options["hop_us"] * 1000))


def _limits(options: dict[str, Any], kv_tokens: int | None) -> Limits:
    return Limits(
        max_batch_rows=options["batch_rows"],
        max_step_tokens=options["step_tokens"],
        block_size=options["block_size"],
        kv_tokens=kv_tokens or None,
        max_model_len=options["max_model_len"],
        swap_gib=options["swap_gib"],
    )


def _core_options(options: dict[str, Any]) -> dict[str, Any]:
    return {
        "target_itl_ns": round(options["target_itl_ms"] * 1e6),
        "prefix_caching": not options["no_prefix_caching"],
    }


def _scenario(options: dict[str, Any], workload: Workload, runner: _Runner) -> Scenario:
    """At the rate that was asked for, with the first policy."""
    policy = _policies(options["policy_names"])[0]
    if options["rate"] is not None:
        if options["load"] is not None:
            raise click.UsageError("--rate and --load both say how fast requests come: give one of them")
        workloads.check_rate(options["rate"])
    setup = _setup(options, workload)
    slo = Slo(options["slo_ttft_ms"], options["slo_itl_ms"])
    from_file, at_once = isinstance(workload, traces.Trace), _anyscale_cap(workload) is not None
    default = 0 if from_file else ANYSCALE_REQUESTS if at_once else _SWEEP_REQUESTS if options["sweep"] else _REQUESTS
    scenario = Scenario(workload, math.inf, options["requests"] or default, options["seed"], setup, slo).with_policy(policy)
    if options["rate"] is not None:
        return scenario.with_rate(options["rate"])
    if options["load"] is None and (from_file or at_once):
        return scenario.with_rate(0.0 if from_file else math.inf)
    return scenario.with_rate((options["load"] or _LOAD) * runner.saturated_rate(scenario))


# -------------------------------------------------------------------------------------------------------------- commands


def _compare(options: dict[str, Any], runner: _Runner, stop: _Stop) -> None:
    console = tables.console()
    found = _workloads(options["names"])
    if options["record"] is not None and (len(found), len(options["policy_names"]), options["workers"]) != (1, 1, 1):
        raise click.UsageError("--record takes down one run: give one workload, one policy and one worker")
    outcomes: list[Outcome] = []
    for workload in found:
        before_s = runner.calibration_s
        try:
            scenario = _scenario(options, workload, runner)
        except _InterruptedError:
            if not outcomes:
                raise
            break
        calibration = {"calibration_s": round(runner.calibration_s - before_s, 3)}
        if workload is found[0]:
            console.print(_about(scenario))
        for policy in _policies(options["policy_names"]):
            if stop.pressed and outcomes:
                break
            with _recording(options["record"]) as core_of:
                outcomes.append(runner(scenario.with_policy(policy), core_of=core_of))
            _save(options["json_file"], "simulate", outcomes[-1].as_json() | calibration)
    for outcome in outcomes:
        for sentence in advice.refusals(outcome):
            console.print(f"note: {sentence}")
    if len(found) > 1 and (overview := tables.overview(outcomes, console.width)) is not None:
        console.print(overview)
        return
    for workload in found:
        if mine := [outcome for outcome in outcomes if outcome.scenario.workload is workload]:
            console.print(_one(mine))


def _one(outcomes: Sequence[Outcome]) -> Any:
    columns = [(outcome.scenario.setup.core.policy, outcome.figures) for outcome in outcomes]
    bounds = [tables.bound_cell(outcome) for outcome in outcomes] if any(outcome.bound for outcome in outcomes) else []
    return tables.side_by_side(columns, bounds, _title(outcomes[0].scenario))


def _title(scenario: Scenario) -> str:
    requests = scenario.requests or len(getattr(scenario.workload, "requests", ()))
    at = "all at once" if scenario.rate == math.inf else f"at {scenario.rate:.4g} a second" if scenario.rate else "as they came"
    return f"{scenario.workload.name}: {requests:,} requests {at}, seed {scenario.seed}"


def _about(scenario: Scenario) -> str:
    setup = scenario.setup
    facts = setup.facts
    workers = f"{setup.num_workers} × " if setup.num_workers > 1 else ""
    return (
        f"{workers}{facts.description}: {facts.max_batch_rows} rows, {facts.max_step_tokens:,} tokens a step,"
        f" KV cache of {facts.num_blocks * facts.block_size:,} tokens in blocks of {facts.block_size};"
        f" SLO {scenario.slo.ttft_ms:g} ms to the first token, {scenario.slo.itl_ms:g} ms between tokens"
    )


def _sweep(options: dict[str, Any], runner: _Runner, stop: _Stop) -> None:
    if options["rate"] is not None or options["load"] is not None:
        raise click.UsageError("--sweep looks for the rate itself: leave out --rate and --load")
    if options["record"] is not None:
        raise click.UsageError("--record takes down one run, not a sweep")
    console = tables.console()
    found: list[tuple[str, str, Capacity]] = []
    for workload in _workloads(options["names"]):
        scenario = _scenario(options | {"load": 1.0}, workload, runner)
        if not found:
            console.print(_about(scenario))
        for policy in _policies(options["policy_names"]):
            if stop.pressed:
                break
            most = 2 * runner.saturated_rate(scenario.with_policy(policy))
            result = capacity(scenario.with_policy(policy), options["criterion"], runner, most)
            if stop.pressed:
                break
            found.append((workload.name, policy, result))
            line: dict[str, Any] = {
                "criterion": options["criterion"],
                "capacity": result.rate,
                "tried": [list(t) for t in result.tried],
            }
            at_capacity = (
                result.best.as_json() if result.best is not None else {"policy": policy, "workload": {"name": workload.name}}
            )
            _save(options["json_file"], "simulate sweep", line | {"at_capacity": at_capacity})
    for _, _, result in found:
        if result.best is None:
            console.print(f"note: {advice.no_rate(result.least, options['criterion'])}")
        else:
            for sentence in advice.refusals(result.best):
                console.print(f"note: {sentence}")
    console.print(tables.capacities(found))


def _refuse_with_shadow(context: click.Context) -> None:
    """Options that the recording decides."""
    for name in ("names", "workers", "shape", "gpu", "bandwidth_share", "peak_share", "sweep", "record", "load", "seed"):
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            option = {"names": "workload", "shape": "model"}.get(name, name).replace("_", "-")
            raise click.UsageError(f"--{option} makes no sense with --shadow: the recording says it")


def _shadow(options: dict[str, Any], runner: _Runner) -> None:
    if options["rate"] is not None:
        workloads.check_rate(options["rate"])
    shadow = read_recording(options["shadow"])
    slo = Slo(options["slo_ttft_ms"], options["slo_itl_ms"])
    names = _policies(options["policy_names"])
    outcomes = [runner(_shadow_scenario(options, shadow, slo, policy)) for policy in names]
    recorded = figures(shadow.run, slo)
    console = tables.console()
    about = shadow.costs.about
    console.print(
        f"{shadow.name}: {len(shadow.requests):,} requests, {about['steps']:,} steps, recorded under {shadow.config.policy};"
        f" step times fitted with a median error of {about['median_error']:.1%} (90 % of them within {about['p90_error']:.1%})"
    )
    for note in shadow.notes:
        console.print(f"note: {note}")
    columns = [("recorded", recorded), *((f"simulated {o.scenario.setup.core.policy}", o.figures) for o in outcomes)]
    console.print(tables.side_by_side(columns))
    recorded_json = {
        "recorded": asdict(recorded),
        "recorded_policy": shadow.config.policy,
        "notes": list(shadow.notes),
    }
    for outcome in outcomes:
        _save(options["json_file"], "simulate shadow", recorded_json | outcome.as_json())


def _shadow_scenario(options: dict[str, Any], shadow: Shadow, slo: Slo, policy: str) -> Scenario:
    context = click.get_current_context()

    def given(name: str) -> bool:
        return context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE

    costs, facts = shadow.costs, shadow.facts
    changes: dict[str, Any] = {"policy": policy}
    if given("target_itl_ms"):
        changes["target_itl_ns"] = _core_options(options)["target_itl_ns"]
    if options["no_prefix_caching"]:
        changes["prefix_caching"] = False
    for option, name in (("batch_rows", "max_batch_rows"), ("step_tokens", "max_step_tokens"), ("static_batch_size",) * 2):
        if options[option] is not None:
            changes[name] = options[option]
    if options["kv_tokens"]:
        facts = msgspec.structs.replace(facts, num_blocks=max(1, options["kv_tokens"] // facts.block_size))
    try:
        core = replace(shadow.config, **changes)
    except ValueError as error:
        raise ScenarioError(str(error)) from None
    facts = msgspec.structs.replace(
        facts,
        max_batch_rows=max(facts.max_batch_rows, core.max_batch_rows),
        max_step_tokens=max(facts.max_step_tokens, core.max_step_tokens),
    )
    table = read_table(options["costs"]) if options["costs"] is not None else costs
    setup = Setup(facts, table, core, 1, round(options["hop_us"] * 1000))
    return Scenario(shadow, options["rate"] or 0.0, options["requests"] or 0, 0, setup, slo)


# ----------------------------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def _recording(path: Path | None) -> Iterator[Callable[[CoreConfig], Core]]:
    if path is None:
        yield Core
        return
    files: list[RecordingFile] = []

    def recorded(config: CoreConfig) -> Core:
        assert path is not None
        try:
            files.append(RecordingFile(path, config))
        except OSError as error:
            raise click.ClickException(f"{path}: {error.strerror}") from None
        return Recorded(Core(config), files[0])  # type: ignore[return-value]

    try:
        yield recorded
    finally:
        for file in files:
            file.close()


def _save(path: Path | None, what: str, line: dict[str, Any]) -> None:
    if path is None:
        return
    try:
        provenance.append(path, provenance.provenance(what) | line)
    except OSError as error:
        raise click.ClickException(f"{path}: {error.strerror}") from None


if __name__ == "__main__":
    simulate_command(prog_name="carousel simulate")
