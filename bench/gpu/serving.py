"""The engine with a Llama's shape: start, single steps, bursts, long prompts, prefix caching, sampling."""

from __future__ import annotations

import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from msgspec import structs
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench import workloads
from bench.gpu.check import Check, Figure
from bench.gpu.engine import Request, Run, burst, demand, random_prompts
from bench.gpu.models import Started, machine_of, shape_of, start
from bench.gpu.timing import back_to_back_seconds
from bench.roofline import least_seconds
from kvcache.prefix_index import root
from wire import SamplingSpec

Replay: TypeAlias = Callable[[], object]

_STEADY_ROWS, _STEADY = 64, 96  # rows and decode steps that are looked at
_BURSTS = ((128, 128, 1024), (219, 196, 640), (1000, 1000, 192))  # prompt, output, requests
_SAMPLED = SamplingSpec(temperature=0.8, top_k=0, top_p=0.95, min_p=0.0, seed=0)


def run_8b(check: Check) -> None:
    _run(check, "llama-3-8b", rows=512, g8=0.85, g6=0.99, whole=True)


def run_1b(check: Check) -> None:
    _run(check, "llama-3.2-1b", rows=128, g8=0.60, g6=0.97, whole=False)


def _run(check: Check, name: str, rows: int, g8: float, g6: float, whole: bool) -> None:
    shape = shape_of(name, check)
    if not whole and not check.tiny:
        shape = replace(shape, max_len=8192)  # its 131,072 tokens would make the tables of every step wider
    found: list[Started] = []

    def started() -> Iterator[Figure]:
        found.append(start(check, shape, Path(folder), "bfloat16", rows, *((8192, 0.0) if whole else (4096, None))))
        yield from _start_figures(check, name, found[0])

    with tempfile.TemporaryDirectory() as folder:
        if not check.attempt(f"{name}: start", started, 25):
            return
    one = found[0]
    check.attempt(f"{name}: batch 1", lambda: _batch_1(check, name, one, g8), 5)
    check.attempt(f"{name}: steady decode", lambda: _steady(check, name, one, g6), 6)
    if whole:
        _loads(check, one)
    check.attempt(f"{name}: kernels a layer", lambda: _launches(check, name, one), 3)


def _loads(check: Check, one: Started) -> None:
    check.attempt("sampling", lambda: _sampling(check, one), 12)
    for prompt, output, count in _BURSTS[: 1 if check.tiny else 2]:
        check.attempt(f"burst {prompt}/{output}", lambda: _burst(check, one, prompt, output, count), 10)  # noqa: B023
    check.attempt("long prompts", lambda: _long_prompts(check, one), 12)
    check.attempt("prefix caching, multi-turn", lambda: _multi_turn(check, one), 8)
    check.attempt("prefix caching at 0 % hits", lambda: _no_hits(check, one), 25)
    prompt, output, count = _BURSTS[2]
    check.attempt(f"burst {prompt}/{output}", lambda: _burst(check, one, prompt, output, count), 25)


def _start_figures(check: Check, name: str, one: Started) -> Iterator[Figure]:
    facts, took = one.engine.facts, one.seconds
    parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in took.items())
    note = f"{parts}; load holds weights and profile"
    yield Figure("", f"{name}: start", took["load"] + took["capture"], "s", note=note, more=took)
    tokens = facts.num_blocks * facts.block_size
    more: dict[str, Any] = {"description": facts.description}
    if check.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        more |= {"free_bytes": free, "total_bytes": total, "allocated_bytes": torch.cuda.memory_allocated()}
    yield Figure("", f"{name}: KV cache", tokens, "tokens", note=facts.description, more=more)
    if facts.num_host_blocks:
        rate = facts.block_size * facts.kv_bytes_per_token / facts.swap_block_ns
        note = f"{facts.num_host_blocks:,} host blocks, {facts.swap_block_ns / 1e3:.1f} µs each, the mean of both ways"
        yield Figure("", f"{name}: swapping", rate, "GB/s", note=note)


def _batch_1(check: Check, name: str, one: Started, goal: float) -> Iterator[Figure]:
    prompt, output = check.count(128, 4), check.count(512, 4)
    run = one.engine.serve(burst(1, prompt, output, one.shape.vocab))
    times = run.token_times(1)[0]
    gaps = np.diff(times[len(times) // 8 :])
    rate = 1 / float(gaps.mean())
    read = one.shape.weight_bytes + (prompt + output // 2) * one.shape.kv_bytes_per_token
    share = rate * read / check.limits.bandwidth
    limit = f"{check.limits.bandwidth / read:.0f} tokens/s; " + ("82% (gpt-fast)" if "8b" in name else "78% (megakernel)")
    note = f"{rate:.1f} tokens/s over {len(gaps)} tokens"
    yield Figure("G8", f"{name}: batch 1, share of copy bandwidth", share, "", limit, goal, note=note)


def _decode_steps(check: Check, one: Started, rows: int, steady: int) -> tuple[Run, Replay]:
    """A run that is stopped after so many steps of nothing but `rows` decodes; and what launches the last of them once more:
    its inputs lie on the device as it left them."""

    def is_decode(run: Run) -> bool:
        return all(step.tokens == step.rows == rows for step in run.steps[-steady:])

    requests = burst(rows, check.count(256, 4), 24 if check.tiny else steady + 256, one.shape.vocab)
    run = one.engine.serve(requests, stop=lambda run: len(run.steps) > steady and is_decode(run))
    if not (len(run.steps) > steady and is_decode(run)):
        raise RuntimeError(f"no {steady} steps one after the other in which {rows} rows decode")
    graphs = one.executor._graphs
    size = graphs.size_of(rows, 0)
    if size is None:
        raise RuntimeError(f"no step of {rows} rows was captured")
    replay: Replay = graphs._captured[size].replay
    return run, replay


def _steady(check: Check, name: str, one: Started, goal: float) -> Iterator[Figure]:
    rows, count = 2 if check.tiny else _STEADY_ROWS, check.count(_STEADY, 3)
    run, replay = _decode_steps(check, one, rows, count)
    steps = run.steps[-count:]
    gaps = np.diff([step.ended_s for step in steps])
    # Steps grow with their contexts, and what is replayed is the last one: by a line through all.
    wall = float(np.polyval(np.polyfit(range(len(gaps)), gaps, 1), len(gaps) - 1))
    device, mean = statistics.mean(step.device_s for step in steps[1:]), float(gaps.mean())
    with torch.inference_mode():
        alone = back_to_back_seconds(check.device, replay, check.count(50, 1))
    note = f"{1e6 * alone:.0f} of {1e6 * wall:.0f} µs: the step's graph replayed without a host ÷ the last of {count} steps"
    yield Figure("G6", f"{name}, B = {rows}: share of time the GPU is busy", alone / wall, "", "99.4%", goal, note=note)
    note = f"{1e6 * device:.0f} µs: from a step's first event to its last; what waits between them counts as busy"
    yield Figure("", f"{name}, B = {rows}: steps' durations ÷ wall time", device / mean, note=note)
    context = check.count(256, 4) + len(run.steps)
    bound = (one.shape.weight_bytes + rows * context * one.shape.kv_bytes_per_token) / check.limits.bandwidth
    note = f"at a context of about {context}"
    yield Figure("", f"{name}, B = {rows}: share of copy bandwidth", bound / wall, "", "1", note=note)
    submit = statistics.median(step.submit_s for step in steps)
    core = run.core_s / len(run.steps)
    note = f"beside it the core's plan and results, {1e6 * core:.0f} µs a step in the mean, prefill too"
    yield Figure("", f"{name}, B = {rows}: host time of submit()", 1e6 * submit, "µs", note=note)


def _launches(check: Check, name: str, one: Started) -> Iterator[Figure]:
    """Last of all: what traces kernels may slow down those that come later."""
    rows = 2 if check.tiny else _STEADY_ROWS
    _, replay = _decode_steps(check, one, rows, 3)
    on_gpu = check.device == "cuda"
    activity, device = (ProfilerActivity.CUDA, DeviceType.CUDA) if on_gpu else (ProfilerActivity.CPU, DeviceType.CPU)
    with profile(activities=[activity]) as traced, torch.inference_mode():
        replay()
        if on_gpu:
            torch.cuda.synchronize()
    often = Counter(event.name[:80] for event in traced.events() if event.device_type == device)
    if on_gpu and not often:
        raise RuntimeError("the profiler saw no kernel")
    note = f"{often.total()} in the step of {rows} rows, copies, head and sampler among them"
    a_layer = often.total() / one.shape.layers
    yield Figure("", f"{name}: kernels a layer", a_layer, "", "7 aimed at", note=note, more={"kernels": dict(often)})


def _burst(check: Check, one: Started, prompt: int, output: int, count: int) -> Iterator[Figure]:
    if check.tiny:
        prompt, output = 4, 3
    requests = burst(check.count(count, 2), prompt, output, one.shape.vocab)
    one.engine.serve(burst(min(32, len(requests)), prompt, 2, one.shape.vocab, 1))  # compiles what captured steps have not
    yield _bound_share(check, one, one.engine.serve(requests), requests, f"llama-3-8b: burst {prompt}/{output}", 0.75)


def _bound_share(check: Check, one: Started, run: Run, requests: Sequence[Request], what: str, goal: float) -> Figure:
    facts = one.engine.facts
    pool = facts.num_blocks * facts.block_size
    least = least_seconds(demand(requests), one.shape, machine_of(check), pool, facts.max_batch_rows)
    tokens = sum(request.max_tokens for request in requests)
    limit = f"{tokens / least:,.0f} output tokens/s; 60–75%"
    note = f"{run.output_tokens_per_s:,.0f} output tokens/s, {len(requests)} requests, {run.seconds:.1f} s"
    more = {"steps": len(run.steps), "core_s": run.core_s, "submit_s": sum(step.submit_s for step in run.steps)}
    more |= {"device_s": sum(step.device_s for step in run.steps), "preemptions": run.preemptions}
    return Figure("G4", f"{what}: share of the serial bound", least / run.seconds, "", limit, goal, note=note, more=more)


def _long_prompts(check: Check, one: Started) -> Iterator[Figure]:
    """As bench.targets has it in simulation: the target for the time between two tokens is 1.9 times what decodes need."""
    decoders, prompt, count = check.count(32, 2), check.count(8000, 20), check.count(4, 1)
    context, vocab = check.count(512, 4), one.shape.vocab
    alone = one.engine.serve(burst(decoders, context, check.count(256, 5), vocab))
    steady = [gap for times in alone.token_times(decoders) for gap in np.diff(times[1:])]
    target_ns = round(1.9e9 * _p99(steady))
    step_s = statistics.median(steady)
    first_s, every_s = check.count(20, 2) * step_s, 1.0
    outputs = 12 if check.tiny else round(min(3000, (first_s + (count + 1) * every_s) / step_s))
    long = [
        Request(ids, 2, arrival_s=first_s + number * every_s)
        for number, ids in enumerate(random_prompts(count, prompt, vocab, 1))
    ]
    requests = [*burst(decoders, context, outputs, vocab), *long]
    for name, goal, target in (("", 2.0, target_ns), (", no target for it", None, 0)):
        session = one.engine.session(target_itl_ns=target)
        session.serve([replace(request, max_tokens=min(request.max_tokens, 64)) for request in requests[: decoders + 1]])
        run = session.serve(requests)  # by now the core knows what steps cost
        times = run.token_times(len(requests))
        windows = [(request.arrival_s, first[0]) for request, first in zip(long, times[decoders:], strict=True)]
        during, otherwise = _gaps(times[:decoders], windows)
        if not during or not otherwise:
            raise RuntimeError("no token came while a long prompt was computed" if not during else "no token came outside")
        ratio = _p99(during) / _p99(otherwise)
        ttft = statistics.median(end - begin for begin, end in windows)
        note = f"p99 {1e3 * _p99(during):.1f} ms ÷ {1e3 * _p99(otherwise):.1f} ms, {count} prompts, their TTFT {ttft:.2f} s"
        what = f"p99 ITL of {decoders} decoders during a {prompt}-token prefill ÷ decode-only{name}"
        yield Figure("G11" if goal else "", what, ratio, "", "1", goal, True, note)


def _p99(values: Sequence[float]) -> float:
    return float(np.quantile(values, 0.99))


def _gaps(times: Sequence[Sequence[float]], windows: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Seconds between two tokens: those that overlap a window, and the others, which begin after all have their first."""
    during: list[float] = []
    otherwise: list[float] = []
    begin = max(each[0] for each in times)
    for each in times:
        for before, after in pairwise(each):
            if before < begin:
                continue
            overlaps = any(after > first and before < last for first, last in windows)
            (during if overlaps else otherwise).append(after - before)
    return during, otherwise


def _multi_turn(check: Check, one: Started) -> Iterator[Figure]:
    """Sessions ask one turn after the other, each on all that was said before. Possible: the full blocks of what the turn
    before computed (all but its last token), at most all but one token of the prompt."""
    sessions, turns = check.count(64, 2), check.count(5, 2)
    question, answer, size = check.count(300, 20), check.count(48, 3), one.engine.facts.block_size
    draw = np.random.default_rng(5)
    key = root("gpu-check", "", "multi-turn")
    saved = possible = asked = 0
    texts = [draw.integers(3, one.shape.vocab, question, dtype=np.int32) for _ in range(sessions)]
    session = one.engine.session()
    known = [0] * sessions
    for _ in range(turns):
        prompts = [len(text) for text in texts]
        possible += sum(min(k, n - 1) // size * size for k, n in zip(known, prompts, strict=True))
        asked += sum(prompts)
        run = session.serve([Request(text, answer, prefix_key=key) for text in texts])
        saved += run.cached_tokens
        known = [n + answer - 1 for n in prompts]
        replies = run.outputs(sessions)
        more = [draw.integers(3, one.shape.vocab, question, dtype=np.int32) for _ in range(sessions)]
        texts = [np.concatenate((t, np.array(r, np.int32), m)) for t, r, m in zip(texts, replies, more, strict=True)]
    note = f"{sessions} sessions of {turns} turns: {saved:,} of {possible:,} tokens, of {asked:,} asked"
    yield Figure("G15", "prefill saved ÷ possible, multi-turn", saved / possible, "", "1", 0.95, note=note)


def _no_hits(check: Check, one: Started) -> Iterator[Figure]:
    """A B A B; and in the first of them the pool is so small that requests wait for blocks all the time: G14."""
    count, vocab, size = check.count(96, 3), one.shape.vocab, one.engine.facts.block_size
    requests = _like_azure(check, count, vocab)
    longest = max(len(request.prompt) + request.max_tokens for request in requests)
    blocks = min(one.engine.facts.num_blocks, max(-(-longest // size) + 1, 64_000 // size if not check.tiny else 3))
    one.engine.serve(requests[:16])
    took: dict[bool, list[float]] = {True: [], False: []}
    for number in range(2 if check.tiny else 4):
        caching = number % 2 == 0
        key = root("gpu-check", "", f"no hits {number}")
        run = one.engine.serve(
            [replace(request, prefix_key=key) for request in requests], num_blocks=blocks, prefix_caching=caching
        )
        if run.cached_tokens:
            raise RuntimeError(f"{run.cached_tokens} tokens were found in the cache, none should have been")
        took[caching].append(run.seconds)
        if number == 0:
            yield _waste(run, blocks * size)
    ratio = statistics.median(took[False]) / statistics.median(took[True])
    note = f"A B A B, {count} requests like Azure's conversations, {', '.join(f'{t:.2f}' for t in took[True] + took[False])} s"
    yield Figure("G15", "prefix caching on ÷ off at 0 % hits, throughput", ratio, "", "1", 0.99, note=note)


def _like_azure(check: Check, count: int, vocab: int) -> list[Request]:
    if check.tiny:
        return [Request(ids, 5) for ids in random_prompts(count, 17, vocab)]
    jobs = list(workloads.by_name("azure-conv-like").jobs(float("inf"), count, 0))
    draw = np.random.default_rng(0)
    return [Request(draw.integers(3, vocab, job.prompt_tokens, dtype=np.int32), min(job.output_tokens, 1024)) for job in jobs]


def _waste(run: Run, pool: int) -> Figure:
    saturated = [step for step in run.steps if step.waiting and step.held_tokens]
    if not saturated:
        raise RuntimeError("no step had requests waiting")
    held = sum(step.held_tokens for step in saturated)
    waste = 1 - sum(step.used_tokens for step in saturated) / held
    note = f"{len(saturated)} steps with requests waiting, a pool of {pool:,} tokens, {run.preemptions} preemptions"
    return Figure("G14", "KV waste at saturation", waste, "", "< 4% (vLLM)", 0.02, True, note)


def _sampling(check: Check, one: Started) -> Iterator[Figure]:
    count = check.count(256, 2)
    greedy = burst(count, check.count(128, 4), check.count(128, 3), one.shape.vocab)
    seeded = [replace(request, sampling=structs.replace(_SAMPLED, seed=number)) for number, request in enumerate(greedy)]
    took: list[list[float]] = [[], []]
    one.engine.serve(seeded[:16])
    for _ in range(1 if check.tiny else 2):
        for which, requests in enumerate((greedy, seeded)):
            run = one.engine.serve(requests)
            took[which].append(run.seconds - max(times[0] for times in run.token_times(count)))
    ratio = statistics.median(took[0]) / statistics.median(took[1])
    note = f"{count} rows, decode steps only, A B A B; random weights give flat distributions, the hardest for top-p"
    what = "temperature, top-p and a seed in each row ÷ greedy, throughput"
    yield Figure("G16", what, ratio, "", "0.995 (FlashInfer)", 0.97, note=note)
