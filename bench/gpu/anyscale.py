"""The headline experiment (Anyscale 2023, "23x") with OPT-13B's shape in float16: G1, G2, G3.

Prompts of 512 random tokens, all at once; output lengths exponential, drawn anew while above a cap. Tokens/s counts prompts and
outputs. Three contestants: `transformers.generate` on padded batches of the post's sizes; our engine with the post's KV
budgets, and with all memory; our own static policy on the same kernels with the largest batch that all memory holds.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bench import workloads
from bench.gpu import peers
from bench.gpu.check import Check, Figure
from bench.gpu.engine import Request, Run, demand, random_prompts
from bench.gpu.models import Started, machine_of, shape_of, start
from bench.roofline import least_seconds
from bench.workloads import ANYSCALE_KV_TOKENS, ANYSCALE_STATIC_ROWS

_G1 = {1536: (23.0, "23 (vLLM), 8 (TGI)"), 512: (8.0, "–"), 128: (3.4, "–")}
_G2 = {1536: (4.0, 4.47), 512: (2.6, 2.90), 128: (1.3, 1.42), 32: (1.05, 1.12)}  # goal, bound
_REQUESTS_G1 = 200
_REQUESTS_G2 = {1536: 600, 512: 400, 128: 300, 32: 300}
_PROMPT = 512


def run(check: Check) -> None:
    shape = shape_of("opt-13b", check)
    baseline: dict[int, peers.Static] = {}

    def transformers_static() -> Iterator[Figure]:
        model = peers.random_model(check, shape, torch.float16)
        for cap in list(_G1)[: 1 if check.tiny else None]:
            rows = 2 if check.tiny else ANYSCALE_STATIC_ROWS[cap]
            baseline[cap] = peers.static_batches(check, model, requests_of(check, cap, _REQUESTS_G1), rows, check.count(6, 0))
        yield from ()

    check.attempt("transformers' static batches", transformers_static, 45)
    peers.release(check)
    found: list[Started] = []

    def started() -> Iterator[Figure]:
        found.append(start(check, shape, Path(folder), "float16", 256, 4096))
        note = found[0].engine.facts.description
        yield Figure("", "opt-13b: start", sum(found[0].seconds[part] for part in ("load", "capture")), "s", note=note)

    with tempfile.TemporaryDirectory() as folder:
        if not check.attempt("opt-13b: start", started, 20):
            return
    for cap, static in baseline.items():
        check.attempt(f"G1, cap {cap}", lambda: _g1(check, found[0], cap, static), 15)  # noqa: B023
    for cap in list(_G2)[: 1 if check.tiny else None]:
        check.attempt(f"G2, cap {cap}", lambda: _g2(check, found[0], cap), 20)  # noqa: B023


def requests_of(check: Check, cap: int, count: int) -> list[Request]:
    count = 4 if check.tiny else max(200, count // 2) if check.quick else count
    jobs = list(workloads.by_name(f"anyscale-{cap}").jobs(float("inf"), count, 0))
    vocab, length = (256, 6) if check.tiny else (50_272, _PROMPT)
    prompts = random_prompts(count, length, vocab)
    return [
        Request(ids, min(job.output_tokens, 5) if check.tiny else job.output_tokens)
        for ids, job in zip(prompts, jobs, strict=True)
    ]


def _tokens(requests: Sequence[Request]) -> int:
    return sum(len(request.prompt) + request.max_tokens for request in requests)


def _g1(check: Check, one: Started, cap: int, static: peers.Static) -> Iterator[Figure]:
    requests = requests_of(check, cap, _REQUESTS_G1)
    budget = 64 if check.tiny else ANYSCALE_KV_TOKENS[cap]
    one.engine.serve(requests[:16])  # compiles what the captured steps have not
    run = one.engine.serve(requests, num_blocks=budget // one.engine.facts.block_size)
    goal, best = _G1[cap]
    note = (
        f"{_tokens(requests) / run.seconds:,.0f} ÷ {_tokens(requests) / static.seconds:,.0f} tokens/s, "
        f"{len(requests)} requests, {budget:,} KV tokens; "
        f"{static.num_measured} of {static.num_batches} static batches run, the others by their longest "
        f"output ({1e3 * static.step_s:.1f} ms a step)"
    )
    what = f"Anyscale, cap {cap}: continuous ÷ transformers.generate"
    yield Figure("G1", what, static.seconds / run.seconds, "", best, goal, note=note, more=_about(run))


def _g2(check: Check, one: Started, cap: int) -> Iterator[Figure]:
    facts, requests = one.engine.facts, requests_of(check, cap, _REQUESTS_G2[cap])
    pool = facts.num_blocks * facts.block_size
    one.engine.serve(requests[:16])
    continuous = one.engine.serve(requests)
    if cap == 1536:
        least = least_seconds(demand(requests), one.shape, machine_of(check), pool, facts.max_batch_rows)
        limit = f"{_tokens(requests) / least:,.0f} tokens/s; 78% (vLLM, A100)"
        note = f"{_tokens(requests) / continuous.seconds:,.0f} tokens/s, {len(requests)} requests, a pool of {pool:,} tokens"
        what = "Anyscale, cap 1536, all memory: share of the bound"
        yield Figure("G3", what, least / continuous.seconds, "", limit, 0.80, note=note, more=_about(continuous))
    # A static batch reserves for each request what it may get, as nobody knows what it will.
    rows = 2 if check.tiny else min(facts.max_batch_rows, pool // (_PROMPT + cap))
    groups = [requests[at : at + rows] for at in range(0, len(requests), rows)]
    first = one.engine.serve(groups[0], policy="static", static_batch_size=rows)
    firsts = [times[0] for times in first.token_times(len(groups[0]))]
    longest = max(request.max_tokens for request in groups[0])
    step_s = (first.seconds - max(firsts)) / max(1, longest - 1)
    whole = [group for group in groups if len(group) == len(groups[0])]  # one that is not full would be too slow a comparison
    seconds = first.seconds + sum(
        max(firsts) + step_s * (max(request.max_tokens for request in group) - 1) for group in whole[1:]
    )
    static = sum(map(_tokens, whole)) / seconds
    goal, bound = _G2[cap]
    note = (
        f"{_tokens(requests) / continuous.seconds:,.0f} ÷ {static:,.0f} tokens/s, {len(requests)} requests; "
        f"static: {rows} rows, 1 of {len(whole)} batches run, the others by their longest output ({1e3 * step_s:.1f} ms a step)"
    )
    what = f"Anyscale, cap {cap}, all memory: continuous ÷ our static policy"
    ratio = _tokens(requests) / continuous.seconds / static
    yield Figure("G2", what, ratio, "", f"{bound} with 1,000", goal, note=note, more=_about(continuous))


def _about(run: Run) -> dict[str, float]:
    rows = statistics.mean(step.rows for step in run.steps)
    return {"steps": len(run.steps), "rows": rows, "preemptions": run.preemptions, "core_s": run.core_s}
