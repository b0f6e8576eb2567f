"""What is simulated: a workload, the service that it meets, and one run of the two. Builds setups; prints nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import msgspec

from bench.cost_models import CostError, CostModel, Roofline, Table
from bench.figures import Figures, Slo, demand, figures
from bench.jobs import Job
from bench.roofline import Machine, Shape, kv_tokens, least_seconds
from bench.runs import Run
from bench.simulator import Setup, Simulation, Tell
from bench.workloads import Workload
from scheduler.core import Core, CoreConfig
from wire import WorkerFacts

GIB = 1 << 30
_UNBOUNDED = 1 << 40  # of a queue that refuses nobody


class ScenarioError(Exception):
    """What was asked for can't be; the text is one line."""


@dataclass(frozen=True)
class Limits:
    """Of the simulated worker and its core. None: as the machine, the model or the table has it."""

    max_batch_rows: int | None = None
    max_step_tokens: int | None = None
    block_size: int | None = None
    kv_tokens: int | None = None
    max_model_len: int | None = None
    swap_gib: float | None = None


@dataclass(frozen=True)
class Scenario:
    workload: Workload
    rate: float  # requests a second; infinite: all at once; 0: as a file says
    requests: int
    seed: int
    setup: Setup
    slo: Slo

    def with_policy(self, policy: str) -> Scenario:
        return replace(self, setup=replace(self.setup, core=replace(self.setup.core, policy=policy)))

    def with_rate(self, rate: float) -> Scenario:
        return replace(self, rate=rate)

    def jobs(self) -> Iterator[Job]:
        return self.workload.jobs(self.rate, self.requests, self.seed)


@dataclass(frozen=True)
class Outcome:
    scenario: Scenario
    run: Run
    figures: Figures
    bound: Bound | None

    def as_json(self) -> dict[str, Any]:
        scenario, setup = self.scenario, self.scenario.setup
        facts = setup.facts
        return {
            "seed": scenario.seed,
            "workload": {
                "name": scenario.workload.name,
                "requests": scenario.requests,
                "rate": scenario.rate if math.isfinite(scenario.rate) else "all at once",
            },
            "policy": setup.core.policy,
            "workers": setup.num_workers,
            "setup": {
                "max_batch_rows": facts.max_batch_rows,
                "max_step_tokens": facts.max_step_tokens,
                "block_size": facts.block_size,
                "num_blocks": facts.num_blocks,
                "num_host_blocks": facts.num_host_blocks,
                "max_model_len": facts.max_model_len,
                "static_batch_size": setup.core.static_batch_size,
                "target_itl_ms": setup.core.target_itl_ns / 1e6,
                "prefix_caching": setup.core.prefix_caching,
                "hop_ns": setup.hop_ns,
            },
            "costs": setup.costs.describe(),
            "slo": asdict(scenario.slo),
            "figures": asdict(self.figures),
            "refused": self.run.refused,
            "bound": asdict(self.bound) if self.bound is not None else None,
            "complete": self.run.complete,
        }


@dataclass(frozen=True)
class Bound:
    """The machine's own limit for the same requests, on all workers together."""

    seconds: float
    output_tokens_per_s: float
    share: float  # reached of it; at a rate below the limit this is how loaded the machine is


def run(
    scenario: Scenario, tell: Tell | None = None, core_of: Callable[[CoreConfig], Core] = Core, watch: Watch | None = None
) -> Outcome:
    simulation = Simulation(
        scenario.setup, scenario.jobs(), shares_prefixes=scenario.workload.shares_prefixes, tell=tell, core_of=core_of
    )
    if watch is not None:
        watch(simulation)
    return outcome_of(scenario, simulation.run())


Watch = Callable[[Simulation], None]


def outcome_of(scenario: Scenario, done: Run) -> Outcome:
    setup = scenario.setup
    found = figures(done, scenario.slo, setup.num_workers)
    return Outcome(scenario, done, found, bound(done, found, setup))


def bound(done: Run, found: Figures, setup: Setup) -> Bound | None:
    """Only a roofline has one."""
    costs, facts = setup.costs, setup.facts
    if not isinstance(costs, Roofline) or not found.requests:
        return None
    pool = facts.num_blocks * facts.block_size
    seconds = least_seconds(demand(done), costs.shape, costs.machine, pool, facts.max_batch_rows) / setup.num_workers
    if not seconds or not found.elapsed_s:
        return None
    return Bound(seconds, found.output_tokens / seconds, seconds / found.elapsed_s)


# ---------------------------------------------------------------------------------------------------------------- setups


def roofline_facts(shape: Shape, machine: Machine, limits: Limits) -> WorkerFacts:
    """Raises ScenarioError."""
    block_size = limits.block_size or 16
    tokens = limits.kv_tokens or kv_tokens(shape, machine)
    if limits.kv_tokens and tokens < block_size:
        raise ScenarioError(f"--kv-tokens {tokens} is less than one block of {block_size} tokens")
    if tokens < block_size:
        size = f"{shape.stored_bytes / 1e9:.0f} GB of weights"
        raise ScenarioError(
            f"{shape.name} ({size}) does not fit {machine.name} ({machine.memory_bytes / 1e9:.0f} GB); tensor parallel groups"
            " are not simulated"
        )
    num_blocks = tokens // block_size
    swap_bytes = 4 * GIB if limits.swap_gib is None else int(limits.swap_gib * GIB)
    rows, step_tokens = _sizes(limits, 256, 2048)
    return WorkerFacts(
        device="virtual",
        pid=0,
        description=f"{shape.name} on {machine.name}, by the roofline",
        architecture=shape.name,
        dtype="bfloat16",
        vocab_size=shape.vocab,
        max_model_len=min(limits.max_model_len or shape.max_len, num_blocks * block_size),
        block_size=block_size,
        num_blocks=num_blocks,
        kv_bytes_per_token=shape.kv_bytes_per_token,
        num_parameters=shape.body + shape.head,
        max_batch_rows=rows,
        max_step_tokens=step_tokens,
        num_host_blocks=swap_bytes // (block_size * shape.kv_bytes_per_token),
    )


def _sizes(limits: Limits, rows: int, step_tokens: int) -> tuple[int, int]:
    """Rows of the batch and tokens of a step, with these defaults; one that was given alone holds. Raises ScenarioError."""
    if limits.max_batch_rows and limits.max_step_tokens and limits.max_batch_rows > limits.max_step_tokens:
        words = f"--batch-rows {limits.max_batch_rows} is more than --step-tokens {limits.max_step_tokens}"
        raise ScenarioError(f"{words}: each sequence computes at least one token in a step")
    rows = limits.max_batch_rows or min(rows, limits.max_step_tokens or rows)
    return rows, limits.max_step_tokens or max(step_tokens, rows)


def table_facts(table: Table, limits: Limits) -> WorkerFacts:
    """Of the worker that was measured, where nothing else was asked for. Raises CostError."""
    try:
        facts = WorkerFacts(**table.facts)
    except TypeError as error:
        raise CostError(f"the file of step costs has facts of another version: {error}") from None
    block_size = limits.block_size or facts.block_size
    num_blocks = (limits.kv_tokens or facts.num_blocks * facts.block_size) // block_size
    rows, step_tokens = _sizes(limits, facts.max_batch_rows, facts.max_step_tokens)
    return msgspec.structs.replace(
        facts,
        block_size=block_size,
        num_blocks=max(1, num_blocks),
        max_batch_rows=rows,
        max_step_tokens=step_tokens,
        max_model_len=min(limits.max_model_len or facts.max_model_len, max(1, num_blocks) * block_size),
    )


def core_config(facts: WorkerFacts, **options: Any) -> CoreConfig:
    """With a queue that refuses nobody, unless the options say otherwise. Raises ScenarioError."""
    limits = {"max_queue_requests": _UNBOUNDED, "max_queue_tokens": _UNBOUNDED}
    sizes = {"max_batch_rows": facts.max_batch_rows, "max_step_tokens": facts.max_step_tokens}
    try:
        return CoreConfig(**{**limits, **sizes, **options})
    except ValueError as error:
        raise ScenarioError(str(error)) from None


def setup_of(facts: WorkerFacts, costs: CostModel, core: CoreConfig, num_workers: int = 1, hop_ns: int = 0) -> Setup:
    if isinstance(costs, Roofline):
        facts = msgspec.structs.replace(facts, swap_block_ns=costs.swap_block_ns(facts.block_size))
    return Setup(facts, costs, core, num_workers, hop_ns)
