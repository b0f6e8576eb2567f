"""What to say, and what to change, when a simulation shows that something can't be. Takes outcomes, returns sentences."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bench.cost_models import Roofline
from bench.figures import FINISHED, Slo, is_good
from bench.roofline import SHAPES
from bench.scenario import Outcome
from bench.simulator import Setup
from bench.sweep import LEAST_GOOD_SHARE

_MANY_MS = 1e12  # a bound that everything keeps


def who(outcome: Outcome) -> str:
    return f"{outcome.scenario.workload.name}, {outcome.scenario.setup.core.policy}"


def nothing_fits(outcome: Outcome) -> str:
    """Of a run in which every request was refused."""
    scenario, setup = outcome.scenario, outcome.scenario.setup
    return f"no request of {scenario.workload.name} fits {setup.facts.max_model_len:,} tokens: {_make_longer(setup)}"


def refusals(outcome: Outcome) -> Iterator[str]:
    """One sentence for each reason."""
    for code, count in sorted(outcome.run.refused.items()):
        yield f"{who(outcome)}: {count:,} requests refused, {_why(code, outcome.scenario.setup)}"


def _why(code: str, setup: Setup) -> str:
    facts = setup.facts
    match code:
        case "INVALID_ARGUMENT":
            return f"longer than {facts.max_model_len:,} tokens with their output: {_make_longer(setup)}"
        case "FAILED_PRECONDITION":
            return f"larger than the KV cache of {facts.num_blocks * facts.block_size:,} tokens: raise --kv-tokens"
        case "DEADLINE_EXCEEDED":
            return "their deadline can't be met: lower --rate, or simulate more --workers"
        case "RESOURCE_EXHAUSTED":
            return "the queue is full: lower --rate, or simulate more --workers"
    return f"with {code}"


def _make_longer(setup: Setup) -> str:
    """What to change so that longer requests are taken."""
    facts, costs = setup.facts, setup.costs
    if facts.max_model_len >= facts.num_blocks * facts.block_size:
        return "the KV cache holds no more, raise --kv-tokens"
    if not isinstance(costs, Roofline):
        return "that is the length of the model whose steps were measured"
    shape = costs.shape
    if facts.max_model_len < shape.max_len:
        return "raise --max-model-len"
    longer = [other for other in SHAPES.values() if other.max_len > shape.max_len]
    if not longer:
        return "no model here takes more"
    similar = min(longer, key=lambda other: abs(other.body - shape.body))
    return f"{shape.name} takes no more, --model {similar.name} takes {similar.max_len:,}"


def no_rate(outcome: Outcome, criterion: str) -> str:
    """Of a sweep that has found nothing; outcome: that of the lowest rate that it tried."""
    run, slo, found = outcome.run, outcome.scenario.slo, outcome.figures
    at = f"{who(outcome)}: no rate keeps the SLO; at {outcome.scenario.rate:.2g} requests/s"
    if found.refused > (1 - LEAST_GOOD_SHARE) * len(run.requests.reason):
        return f"{at} " + "; ".join(sentence.partition(": ")[2] for sentence in refusals(outcome))
    if criterion == "ttft":
        return f"{at} the TTFT p99 is {found.ttft.p99 * 1000:,.3g} ms, not {slo.ttft_ms:g}: raise --slo-ttft-ms"
    requests = run.requests
    finished = np.isin(np.array(requests.reason, dtype=object), FINISHED)
    first, outputs = requests.first_ns[finished], requests.output_tokens[finished]
    e2e = requests.end_ns[finished] - requests.arrival_ns[finished]
    late, slow = (
        1 - is_good(first, e2e, outputs, Slo(ttft_ms, itl_ms)).sum() / max(1, len(requests.reason))
        for ttft_ms, itl_ms in ((slo.ttft_ms, _MANY_MS), (_MANY_MS, slo.itl_ms))
    )
    said = []
    if late >= slow or late > 1 - LEAST_GOOD_SHARE:
        p50 = f"p50 {found.ttft.p50 * 1000:,.3g} ms"
        said.append(f"{late:.0%} have no first token within {slo.ttft_ms:g} ms ({p50}): raise --slo-ttft-ms")
    if slow > late or slow > 1 - LEAST_GOOD_SHARE:
        p50 = f"p50 {found.itl.p50 * 1000:,.3g} ms"
        said.append(f"{slow:.0%} take more than {slo.itl_ms:g} ms a token ({p50}): raise --slo-itl-ms")
    return f"{at} {'; '.join(said)}"
