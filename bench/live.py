"""The steps of a running server, for pictures: what WatchSteps tells for a while. Knows the client; draws nothing.

WatchSteps says how long a step took, not when it began, and not how many blocks are shared: the first follows from the order of
plans and results, the second is asked for a few times a second (GetBlockTables).
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from bench.cost_models import Line
from bench.fit import relative
from bench.jobs import Job, Part
from bench.observed import Observed, Workload
from bench.pictures.steps import PREEMPTED
from bench.pictures.watched import Sharing, steps_of
from bench.simulator import Setup
from carousel.v1 import control_pb2, inspect_pb2
from client import CarouselClient, CarouselError
from scheduler.core import CoreConfig
from wire import WorkerFacts

_POLL_S = 0.25
_PAGE = 1000  # requests; the most that the server gives at once
_LEAST_FIT = 20  # steps from which step costs can be told


@dataclass
class Watch:
    """What came in the time."""

    target: str
    server: control_pb2.GetServerInfoResponse
    model: control_pb2.GetModelInfoResponse
    steps: list[inspect_pb2.WatchStepsResponse] = field(default_factory=list)
    shared: list[Sharing] = field(default_factory=list)
    arrivals: dict[str, control_pb2.RequestSummary] = field(default_factory=dict)
    group: int = 0

    @property
    def skipped(self) -> int:
        return sum(step.skipped_steps for step in self.steps)


def watch(client: CarouselClient, seconds: float, group: int = 0) -> Watch:
    """A worker group, for so long or until Ctrl-C: what was seen by then is kept. Raises CarouselError."""
    client.block_tables(group)  # there must be such a group
    seen = Watch(client.target, client.server_info(), client.model_info(), group=group)
    over = threading.Event()
    with _ctrl_c(over), client.watch_steps() as stream:

        def end() -> None:
            over.wait(seconds)
            over.set()
            stream.close()

        threads = [threading.Thread(target=end), threading.Thread(target=_poll, args=(client, seen, over))]
        for thread in threads:
            thread.start()
        try:
            seen.steps.extend(step for step in stream if step.group == group)
        finally:
            over.set()
            for thread in threads:
                thread.join()
    return seen


@contextlib.contextmanager
def _ctrl_c(over: threading.Event) -> Iterator[None]:
    """Sets it. Not by an exception, which in the middle of grpc's own work would leave a channel that never closes."""
    before = signal.signal(signal.SIGINT, lambda *_: over.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _poll(client: CarouselClient, seen: Watch, over: threading.Event) -> None:
    """Until it is over, or the server has gone: that is the watch's to tell."""
    try:
        while True:
            tables = client.block_tables(seen.group)
            counts = np.array(tables.ref_counts, np.int64)
            seen.shared.append(Sharing(len(seen.steps), int((counts > 1).sum()), int(np.maximum(counts - 1, 0).sum())))
            for request in client.list_requests(_PAGE).requests:
                seen.arrivals.setdefault(request.request_id, request)
            if over.wait(_POLL_S):
                return
    except CarouselError:
        return


def observed(seen: Watch) -> Observed:
    notes = (f"{seen.skipped} steps were left out: this program did not keep up",) if seen.skipped else ()
    steps = steps_of(seen.steps, seen.model.block_size, seen.shared)
    return Observed(seen.target, steps, seen.server.max_batch_rows, notes)


# -------------------------------------------------------------------------------------------------------------- workload


@dataclass(slots=True)
class _Asked:
    """A request that joined while it was watched."""

    joined_ns: int
    prompt_tokens: int = 0
    sampled: dict[int, int] = field(default_factory=dict)  # tokens, by output


def workload(seen: Watch, requests: int, num_rows: int) -> Workload | None:
    """The first so many requests that joined in the time, as long as they were seen to be; None: there are too few steps."""
    timed = [step for step in seen.steps if step.duration_ns]
    if len(timed) < _LEAST_FIT:
        return None
    asked = list(_asked(seen.steps).items())[: requests or None]
    if not asked:
        return None
    first_ns = min(_arrival_ns(seen, name, each) for name, each in asked)
    jobs = [_job(_arrival_ns(seen, name, each) - first_ns, i, each) for i, (name, each) in enumerate(asked, 1)]
    server, model = seen.server, seen.model
    rows = num_rows or server.max_batch_rows
    config = CoreConfig(
        max_batch_rows=rows, max_step_tokens=max(rows, server.max_step_tokens), max_queue_requests=len(jobs) + 1
    )
    facts = WorkerFacts(
        device="virtual",
        pid=0,
        description=f"as seen at {seen.target}",
        architecture=model.architecture,
        dtype=model.dtype,
        vocab_size=model.vocab_size,
        max_model_len=model.max_model_len,
        block_size=model.block_size,
        num_blocks=model.num_blocks,
        kv_bytes_per_token=model.kv_bytes_per_token,
        num_parameters=model.num_parameters,
        max_batch_rows=rows,
        max_step_tokens=config.max_step_tokens,
    )
    return Workload(tuple(sorted(jobs, key=lambda job: job.arrival_ns)), Setup(facts, _costs(timed), config), False)


def _asked(steps: Sequence[inspect_pb2.WatchStepsResponse]) -> dict[str, _Asked]:
    found: dict[str, _Asked] = {}
    strangers: set[str] = set()  # that were in the batch, or had to leave it, before
    for step in steps:
        for row in step.rows:
            if row.padding or row.request_id in strangers:
                continue
            asked = found.get(row.request_id)
            if asked is None:
                if not row.joined:
                    strangers.add(row.request_id)
                    continue
                asked = found[row.request_id] = _Asked(step.planned_ns)
            if not asked.sampled:
                asked.prompt_tokens += row.num_tokens + row.cached_tokens
            if row.sampled:
                asked.sampled[row.output_index] = asked.sampled.get(row.output_index, 0) + 1
        strangers |= {leave.request_id for leave in step.leaves if leave.reason == PREEMPTED} - set(found)
    return {name: asked for name, asked in found.items() if asked.sampled}


def _arrival_ns(seen: Watch, name: str, asked: _Asked) -> int:
    listed = seen.arrivals.get(name)
    return min(listed.arrival_ns, asked.joined_ns) if listed is not None else asked.joined_ns


def _job(arrival_ns: int, number: int, asked: _Asked) -> Job:
    prompt = (Part(number, max(1, asked.prompt_tokens)),)
    return Job(arrival_ns, prompt, max(asked.sampled.values()), num_outputs=len(asked.sampled))


def _costs(timed: Sequence[inspect_pb2.WatchStepsResponse]) -> Line:
    """Fitted to the steps' times: a number for the step, a token and a row."""
    features = np.array([(1, sum(row.num_tokens for row in step.rows), len(step.rows)) for step in timed], float)
    took = np.array([step.duration_ns for step in timed], float)
    base, token, row = (float(number) for number in relative(features, took))
    return Line(base, token, row, 0.0, {"steps": len(timed)})
