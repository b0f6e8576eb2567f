"""What continuous batching can be worth at most over static batching on equal kernels. Pure: step costs in, seconds out.

The step costs are a line fitted to the server's own recording of the very runs that are compared (bench.shadow): a number for
each step, token, row and pair of a token and one that it attends to. With the same line

    static:  the shipped core under the static policy, on a virtual clock, with these costs
    best:    as few steps as the longest output, the rows of the batch, the tokens of a step and the KV cache allow, and every
             token, row and pair once; no schedule needs less

and the bound of the ratio of their speeds is static ÷ best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.cost_models import Line
from bench.figures import Slo
from bench.jobs import Job
from bench.roofline import Demand
from bench.scenario import Scenario, core_config, run, setup_of
from bench.workloads import Workload
from wire import WorkerFacts


@dataclass(frozen=True)
class Bound:
    """Of one server's runs."""

    static_s: float  # by the fitted costs
    best_s: float
    fit_error: float  # of a step, median

    @property
    def ratio(self) -> float:
        return self.static_s / self.best_s


def bound(workload: Workload, jobs: Sequence[Job], seed: int, costs: Line, facts: WorkerFacts, **config: Any) -> Bound:
    """jobs: what the workload draws with this seed, all at once. config: of the core, beside the policy."""
    core = core_config(facts, policy="static", **config)
    scenario = Scenario(workload, math.inf, len(jobs), seed, setup_of(facts, costs, core), Slo())
    pool = facts.num_blocks * facts.block_size
    best_s = least_seconds(demand(jobs), len(jobs), costs, pool, facts.max_batch_rows, facts.max_step_tokens)
    error = float(costs.about["median_error"]) if "median_error" in costs.about else 0.0
    return Bound(run(scenario).figures.elapsed_s, best_s, error)


def demand(jobs: Sequence[Job]) -> Demand:
    """As bench.figures has it of a run: the first output token comes with the prompt."""
    prompts, decodes = [job.prompt_tokens for job in jobs], [job.output_tokens - 1 for job in jobs]
    return Demand(
        prompt_tokens=sum(prompts),
        output_tokens=sum(decodes),
        pairs=sum(prompt * (prompt + 1) // 2 for prompt in prompts),
        context=sum(more * prompt + more * (more + 1) // 2 for prompt, more in zip(prompts, decodes, strict=True)),
        longest_output=max(decodes, default=0),
    )


def least_seconds(asked: Demand, requests: int, costs: Line, pool: int, max_rows: int, max_step_tokens: int) -> float:
    """pool: tokens of the KV cache."""
    tokens, rows = asked.prompt_tokens + asked.output_tokens, asked.output_tokens + requests
    steps = max(
        asked.longest_output + 1, rows / max_rows, tokens / max_step_tokens, (asked.context + asked.prompt_tokens) / pool
    )
    pairs = asked.pairs + asked.context
    return (costs.base * steps + costs.per_token * tokens + costs.per_row * rows + costs.per_pair * pairs) / 1e9
