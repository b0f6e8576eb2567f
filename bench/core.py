"""`python -m bench.core`: what scheduling costs, without a model: targets S1, S2, S3.

S1 CPU time of the core for one decode step, by rows running and requests waiting. S2 a plan through the wire's codec. S3 from
a plan to its result through ZeroMQ and a worker process that computes nothing. One thread each; the process's CPU time for S1
and S2, the clock for S3.
"""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import zmq
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import provenance
from kvcache.prefix_index import hash_blocks, root
from scheduler.core import Core, CoreConfig
from scheduler.step_meter import StepMeter
from wire import (
    AddHeader,
    AddRequest,
    Heartbeat,
    PlanHeader,
    ResultHeader,
    SamplingSpec,
    StepPlan,
    StepResult,
    Welcome,
    WorkerFacts,
    decode,
    encode,
)

LENGTH = 2048
KEY = root("bench", "", "")
GREEDY = SamplingSpec(0.0, 0, 1.0, 0.0, 0)
TARGETS = {"S1 256": 60.0, "S1 4096": 250.0, "S2": 30.0, "S3 p50": 80.0, "S3 p99": 250.0}  # microseconds


@dataclass(frozen=True)
class StepCosts:
    """Microseconds of CPU time for a decode step: its plan and the taking of its result."""

    rows: int
    waiting: int
    block_size: int
    median: float
    mean: float  # with the steps in which blocks fill, are hashed and taken
    p99: float


def facts(rows: int, block_size: int) -> WorkerFacts:
    """Of a worker with room for so many rows of LENGTH tokens."""
    return WorkerFacts(
        device="sim",
        pid=os.getpid(),
        description="nobody",
        architecture="none",
        dtype="none",
        vocab_size=32_000,
        max_model_len=LENGTH,
        block_size=block_size,
        num_blocks=rows * LENGTH // block_size,
        kv_bytes_per_token=1,
        num_parameters=0,
        max_batch_rows=rows,
        max_step_tokens=max(rows, 8192),
    )


def request(number: int, block_size: int) -> AddRequest:
    num_tokens = number % block_size + 1  # so that in every step the same share of the rows fills a block
    prompt = np.full(num_tokens, number % 31_000 + 1, np.int32)
    header = AddHeader(number, f"r{number}", 0, 2, LENGTH - num_tokens, GREEDY, tenant=f"t{number % 100}")
    header.prefix_key, header.hash_block_size = KEY, block_size
    return AddRequest(header, prompt, np.frombuffer(hash_blocks(KEY, prompt, block_size), np.uint8))


def step_costs(rows: int, waiting: int, block_size: int, steps: int, with_metrics: bool = False) -> StepCosts:
    """All rows decode, in a pool that suffices, while `waiting` requests of a hundred tenants wait for a row."""
    meter = StepMeter(rows) if with_metrics else None
    config = CoreConfig(max_batch_rows=rows, max_step_tokens=max(rows, 8192), max_queue_requests=1_000_000)
    core = Core(config)
    core.worker_joined(facts(rows, block_size), 0)
    for number in range(rows + waiting):
        refused = core.add(request(number, block_size), 0, number)
        assert refused is None, refused
    now, pending, costs = 1_000_000, list[StepPlan](), list[int]()
    tokens = np.arange(rows, dtype=np.int32) % 31_000
    gc.collect()
    gc.disable()
    try:
        while len(costs) < steps:
            now += 1_000_000
            start = time.process_time_ns()
            while (plan := core.plan(now)) is not None:
                pending.append(plan)
                if meter is not None and plan.header.starts:
                    meter.planned(core, plan)
            planned = time.process_time_ns()
            plan = pending.pop(0)
            step, slots = core.in_flight[0], core.in_flight[0].sampled
            decodes = len(slots) == rows == len(plan.slots) and not plan.header.starts
            header = ResultHeader(0, plan.header.epoch, plan.header.step_id, 1_000_000)
            result = StepResult(header, tokens[: len(slots)], slots.astype(np.uint16))
            before = time.process_time_ns()
            core.apply(result, now)
            if meter is not None:
                meter.result(step, result, now)
            spent = time.process_time_ns() - before + planned - start
            credit(core, slots, now)
            if decodes:
                costs.append(spent)
    finally:
        gc.enable()
    assert len(core.queue) == waiting, "somebody was admitted while it was measured"
    micros = [cost / 1000 for cost in costs]
    p99 = statistics.quantiles(micros, n=100)[98]
    return StepCosts(rows, waiting, block_size, statistics.median(micros), statistics.mean(micros), p99)


def credit(core: Core, slots: np.ndarray[tuple[int], np.dtype[np.intp]], now: int) -> None:
    """Readers take all that there is, now and then, as front ends tell it."""
    first = int(slots[0]) if len(slots) else 0
    if len(slots) and core.rows.num_outputs[first] % 256 == 0:
        handles = core.rows.handle[slots]
        core.credit(0, handles, np.full(len(slots), 256, np.int32), now)


def codec_costs(rows: int, rounds: int) -> tuple[float, float]:
    """(microseconds to encode and decode a decode step's plan, bytes a row)."""
    slots = np.arange(rows, dtype=np.uint16)
    plan = StepPlan(PlanHeader(0, 1, 7), num_tokens=np.ones(rows, np.int32), slots=slots)
    times = []
    for _ in range(rounds):
        start = time.process_time_ns()
        decode(encode(plan))
        times.append(time.process_time_ns() - start)
    return statistics.median(times) / 1000, sum(map(len, encode(plan))) / rows


def round_trips(rows: int, rounds: int) -> tuple[float, float]:
    """(p50, p99) microseconds from a plan, encoded and sent, to its decoded result: a worker's link that computes nothing."""
    with peer(str(rows)) as (socket, identity):
        send(socket, identity, encode(Welcome(0, 1)))
        slots, step = np.arange(rows, dtype=np.uint16), 0

        def once() -> None:
            nonlocal step
            plan = StepPlan(PlanHeader(0, 1, step), num_tokens=np.ones(rows, np.int32), slots=slots)
            send(socket, identity, encode(plan))
            while isinstance(result := decode(socket.recv_multipart()[1:]), Heartbeat):
                pass
            assert isinstance(result, StepResult) and len(result.tokens) == rows and result.header.step_id == step
            step += 1

        return quantiles(once, rounds)


def echoes(rows: int, rounds: int) -> tuple[float, float]:
    """The same for the same bytes sent back by a bare socket: what this machine takes for the hop alone."""
    frames = encode(StepPlan(PlanHeader(0, 1, 7), num_tokens=np.ones(rows, np.int32), slots=np.arange(rows, dtype=np.uint16)))
    with peer("echo") as (socket, identity):

        def once() -> None:
            send(socket, identity, frames)
            socket.recv_multipart()

        return quantiles(once, rounds)


def quantiles(once: Callable[[], None], rounds: int) -> tuple[float, float]:
    """(p50, p99) microseconds."""
    times = []
    for i in range(rounds + 200):
        start = time.perf_counter_ns()
        once()
        if i >= 200:
            times.append((time.perf_counter_ns() - start) / 1000)
    hundredths = statistics.quantiles(times, n=100)
    return hundredths[49], hundredths[98]


def send(socket: zmq.Socket[bytes], identity: bytes, frames: Sequence[bytes]) -> None:
    socket.send_multipart([identity, *frames], copy=False)


@contextmanager
def peer(what: str) -> Iterator[tuple[zmq.Socket[bytes], bytes]]:
    """A process of bench.null_worker, connected."""
    with tempfile.TemporaryDirectory(prefix="carousel-bench-") as folder:
        endpoint, context = f"ipc://{folder}/peer", zmq.Context()
        socket = context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.RCVTIMEO, 20_000)
        socket.bind(endpoint)
        process = subprocess.Popen([sys.executable, "-m", "bench.null_worker", endpoint, what])
        try:
            yield socket, socket.recv_multipart()[0]
        finally:
            process.kill()
            process.wait(10)
            context.destroy(linger=0)


def plot(costs: list[StepCosts], path: Path) -> None:
    """Two panels: cost by rows for each number waiting, cost by number waiting at 256 rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    by_rows, by_waiting = figure.subplots(1, 2)
    for waiting in sorted({cost.waiting for cost in costs}):
        for what in ("mean", "median"):
            line = sorted((cost.rows, getattr(cost, what)) for cost in costs if cost.waiting == waiting)
            if len(line) > 1:
                by_rows.plot(*zip(*line, strict=True), marker="o", label=f"{what}, {waiting:,} waiting")
    by_rows.set(xscale="log", yscale="log", xlabel="rows that decode", ylabel="µs of CPU time a step", title="by rows")
    by_rows.legend()
    line = sorted((cost.waiting, cost.mean) for cost in costs if cost.rows == 256)
    by_waiting.plot(*zip(*line, strict=True), marker="o")
    by_waiting.set(
        xscale="symlog",
        ylim=(0, 1.2 * max(cost for _, cost in line)),
        xlabel="requests waiting",
        title="by requests waiting, 256 rows, mean",
    )
    for axes in (by_rows, by_waiting):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


@click.command(help=__doc__)
@click.option("--quick", is_flag=True, help="Up to 1,024 rows and 10,000 waiting, fewer steps.")
@click.option("--metrics", is_flag=True, help="S1 as in a server with --metrics-port.")
@click.option("--block-size", default=16, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Appends the figures to this file.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Draws them (PNG or SVG; needs matplotlib).")
def main(quick: bool, metrics: bool, block_size: int, json_path: Path | None, plot_path: Path | None) -> None:
    all_rows = [64, 256, 1024] if quick else [16, 64, 256, 1024, 4096, 16_384]
    all_waiting = [0, 10_000] if quick else [0, 10_000, 100_000]
    cases = [(rows, waiting) for rows in all_rows for waiting in ([10_000] if rows != 256 else all_waiting)]
    console = Console(stderr=True)
    costs = []
    for rows, waiting in track(cases, "S1", console=console, transient=True):
        costs.append(step_costs(rows, waiting, block_size, steps=128 if quick else 512, with_metrics=metrics))
    codec, row_bytes = codec_costs(1024, 500 if quick else 5000)
    rounds = 500 if quick else 5000
    p50, p99 = round_trips(64, rounds)
    echo_p50, echo_p99 = echoes(64, rounds)

    table = Table(
        "rows", "waiting", "median µs", "mean µs", "p99 µs", "target", title="S1: the core's CPU time for a decode step"
    )
    for cost in costs:
        target = TARGETS.get(f"S1 {cost.rows}") if cost.waiting == 10_000 else None
        shown = f"≤ {target:.0f}" if target else ""
        table.add_row(f"{cost.rows:,}", f"{cost.waiting:,}", *(f"{x:.0f}" for x in (cost.median, cost.mean, cost.p99)), shown)
    output = Console()
    output.print(table)
    output.print(
        f"S2: plan of 1,024 rows, encoded and decoded: {codec:.1f} µs (target ≤ 30), {row_bytes:.1f} bytes a row (≤ 8)"
    )
    output.print(
        f"S3: plan to result with a worker that computes nothing, 64 rows: p50 {p50:.0f} µs (≤ 80), p99 {p99:.0f} µs (≤ 250);\n"
        f"    the bare ZeroMQ echo of the same bytes: p50 {echo_p50:.0f} µs, p99 {echo_p99:.0f} µs"
    )
    if plot_path is not None:
        plot(costs, plot_path)
        output.print(f"drawn: {plot_path}")
    if json_path is not None:
        line = provenance.provenance("core") | {
            "block_size": block_size,
            "prefix_caching": True,
            "metrics": metrics,
            "steps": [{name: getattr(cost, name) for name in StepCosts.__dataclass_fields__} for cost in costs],
            "codec_us_1024_rows": codec,
            "bytes_per_row": row_bytes,
            "round_trip_us": {"p50": p50, "p99": p99, "rows": 64},
            "bare_echo_us": {"p50": echo_p50, "p99": echo_p99},
            "targets_us": TARGETS,
        }
        provenance.append(json_path, line)
        output.print(f"added to {json_path}")


if __name__ == "__main__":
    main()
