"""What would another policy have done with what was recorded? Takes a recording of `carousel serve --record` apart.

The shipped core runs over the recording once, as in a replay, and tells what came of every request; out of that come the
requests (arrival, prompt, actual length, cancel, tenant, class, deadline) and the costs of the steps, fitted to the worker's
own times.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bench.cost_models import Line, StepWork
from bench.fit import relative
from bench.jobs import Job, Part
from bench.runs import Columns, Run, RunLog, Steps
from bench.virtual_worker import VirtualWorker
from scheduler.core import Core, CoreConfig, Output
from scheduler.recording import Event, Recording, RecordingError, Verb
from scheduler.replay import Replay
from wire import AddRequest, EndReason, StepPlan, StepResult, WorkerFacts, WorkerHello

_NATURAL = (EndReason.LENGTH, EndReason.STOP)


class ShadowError(Exception):
    """A recording that can't be used; the text is one line."""


@dataclass(frozen=True)
class Shadow:
    """A recording, as a workload and what else a simulation needs."""

    name: str
    shares_prefixes: bool
    requests: tuple[Job, ...]  # by arrival
    config: CoreConfig
    facts: WorkerFacts
    costs: Line
    run: Run  # as it was recorded
    notes: tuple[str, ...]  # for people: what of the recording is not simulated

    def jobs(self, rate: float, count: int, seed: int) -> Iterator[Job]:
        """All of them, as they came; rate above 0: so much a second in the mean."""
        scale = self.own_rate / rate if rate else 1.0
        for job in self.requests[: count or None]:
            yield replace(job, arrival_ns=round(job.arrival_ns * scale)) if scale != 1.0 else job

    @property
    def own_rate(self) -> float:
        """Requests a second; infinite when all came at once."""
        span_ns = self.requests[-1].arrival_ns - self.requests[0].arrival_ns
        return (len(self.requests) - 1) / span_ns * 1e9 if span_ns else float("inf")


def without_first(shadow: Shadow, count: int) -> Shadow:
    """Without the first requests, which have ended before the others came, such as those that warm up."""
    rest = shadow.requests[count:]
    start_ns, columns, steps = rest[0].arrival_ns, shadow.run.requests, shadow.run.steps
    kept = steps.end_ns > columns.arrival_ns[count]
    run = replace(
        shadow.run,
        requests=Columns(**{field.name: getattr(columns, field.name)[count:] for field in fields(columns)}),
        steps=Steps(**{field.name: getattr(steps, field.name)[kept] for field in fields(steps)}),
    )
    requests = tuple(replace(job, arrival_ns=job.arrival_ns - start_ns) for job in rest)
    return replace(shadow, requests=requests, run=run)


class _Listening(Core):
    """The core, with somebody who hears all that it says."""

    heard: list[Output]

    def take_outputs(self) -> list[Output]:
        outputs = super().take_outputs()
        self.heard += outputs
        return outputs


class _NoCost:
    def step_ns(self, work: StepWork) -> int:
        return 0

    def describe(self) -> dict[str, Any]:
        return {}


@dataclass(slots=True)
class _Asked:
    """A request of the recording."""

    add: AddRequest
    at_ns: int
    first: int  # index of its first output
    refused: bool = False
    tokens: list[list[int]] = field(default_factory=list)  # by output
    reasons: list[EndReason] = field(default_factory=list)
    end_ns: int = 0


@dataclass(slots=True)
class _Step:
    """One that is in flight, or was."""

    planned_ns: int
    work: StepWork
    plan: StepPlan
    sampled: int
    held_blocks: int
    used_tokens: int
    waiting: int
    duration_ns: int = 0
    applied_ns: int = 0
    follows: bool = False  # it was planned before the result before it came: the worker went on at once


class _Observer:
    """Looks at each event before and after the core gets it."""

    def __init__(self, config: CoreConfig) -> None:
        self.core = _Listening(config)
        self.core.heard = []
        self.log = RunLog()
        self.asked: list[_Asked] = []
        self.steps: list[_Step] = []
        self.facts: WorkerFacts | None = None
        self.epochs = 0
        self.policies = {config.policy}
        self.stopped_at = ""
        self._of_output: list[_Asked] = []
        self._index: dict[tuple[int, int], int] = {}  # (front end, handle) -> output
        self._in_flight: list[_Step] = []
        self._worker: VirtualWorker | None = None

    def watch(self, events: Iterator[Event]) -> Iterator[Event]:
        for event in events:
            if event.verb in (Verb.FAILED, Verb.RENEWED):
                self.stopped_at = "the core failed in the recording; what came afterwards is left out"
                return
            yield event  # the core has it when we go on
            self._note(event)
            self._hear(event.now)

    def _note(self, event: Event) -> None:
        match event.verb, event.message:
            case Verb.ADD, AddRequest() as add:
                self._added(add, event.frontend, event.now)
            case Verb.PLAN, StepPlan() as plan:
                self._planned(plan, event.now)
            case Verb.APPLY, StepResult() as result:
                self._applied(result, event.now)
            case Verb.WORKER_JOINED, WorkerHello(facts=facts):
                self.facts, self.epochs = facts, self.epochs + 1
                self._worker, self._in_flight = VirtualWorker(facts, _NoCost()), []
            case Verb.WORKER_LOST, _:
                self._in_flight = []
            case Verb.SET_POLICY, _:
                self.policies.add(self.core.policy.name)

    def _added(self, add: AddRequest, frontend: int, now: int) -> None:
        header, deadline_ns = add.header, max(1, add.header.deadline_ns - now) if add.header.deadline_ns else 0
        first = len(self._of_output)
        asked = _Asked(add, now, first, not self.core.has_handle(frontend, header.handle))
        self.asked.append(asked)
        for i in range(header.num_outputs):
            index = self.log.added(now, len(add.prompt), header.priority, deadline_ns)
            self._of_output.append(asked)
            asked.tokens.append([])
            if asked.refused:
                self.log.was_refused(index, "recorded", now)
            else:
                self._index[frontend, header.handle + i] = index

    def _planned(self, plan: StepPlan, now: int) -> None:
        assert self._worker is not None
        work, result = self._worker.run(plan)
        flight, core = self.core.in_flight[-1], self.core
        shared = int(core.kv.tables.num_blocks.sum()) - flight.held_blocks
        used = flight.kv_tokens - max(0, shared) * core.kv.block_size
        self._in_flight.append(
            _Step(
                now,
                work,
                plan,
                len(result.slots),
                flight.held_blocks,
                used,
                flight.num_waiting,
                follows=len(core.in_flight) > 1,
            )
        )

    def _applied(self, result: StepResult, now: int) -> None:
        if result.header.epoch != self.core.epoch or not self._in_flight:
            return
        step = self._in_flight.pop(0)
        step.duration_ns, step.applied_ns = result.header.duration_ns, now
        self.steps.append(step)
        work, plan = step.work, step.plan
        padding = len(plan.padding)
        self.log.step(
            now - step.duration_ns,
            now,
            len(plan.slots),
            padding,
            work.tokens - padding,
            work.decode_context,
            work.chunk_pairs,
            step.sampled,
            step.held_blocks,
            step.used_tokens,
            step.waiting,
        )

    def _hear(self, now: int) -> None:
        heard, self.core.heard = self.core.heard, []
        for output in heard:
            batch = output.batch
            indices = [self._index[output.frontend, handle] for handle in batch.handles.tolist()]
            if indices:
                self.log.gaps.heard(np.array(indices, np.uint32), now)
            for index, token in zip(indices, batch.tokens.tolist(), strict=True):
                asked = self._of_output[index]
                asked.tokens[index - asked.first].append(token)
            for ended in batch.header.ended:
                index = self._index.pop((output.frontend, ended.handle))
                asked = self._of_output[index]
                asked.reasons.append(ended.reason)
                asked.end_ns = now
                ended.handle = index
                self.log.ended(ended, now)


def read(path: Path) -> Shadow:
    """Raises ShadowError."""
    try:
        recording = Recording(path)
    except RecordingError as error:
        raise ShadowError(str(error)) from None
    header = recording.header
    if header.first_event:
        raise ShadowError(f"{path} begins in the middle ({header.first_event} events are gone): it can't be replayed")
    observer, replay = _Observer(header.core), Replay(header)
    replay.core = observer.core
    report = replay.run(observer.watch(recording.events()))
    if report.difference:
        raise ShadowError(f"{path} can't be used, this version of the core plans differently: {report.difference[0]}")
    if observer.facts is None or not observer.asked or not observer.steps:
        raise ShadowError(f"{path} holds no request that was computed")
    return _shadow(path, header.core, observer, report.error)


def _shadow(path: Path, config: CoreConfig, observer: _Observer, error: str) -> Shadow:
    facts, log = observer.facts, observer.log
    assert facts is not None
    notes = [note for note in (error, observer.stopped_at) if note]
    if observer.epochs > 1:
        notes.append(f"the worker joined {observer.epochs} times; in the simulation it is never lost")
    if len(observer.policies) > 1:
        notes.append(f"the policy was changed while it was recorded: {', '.join(sorted(observer.policies))}")
    cut = sum(len(asked.reasons) < asked.add.header.num_outputs for asked in observer.asked if not asked.refused)
    if cut:
        notes.append(f"{cut} requests had not ended; they end in the simulation with the tokens that they had")
    first_ns = observer.asked[0].at_ns
    run = Run(
        requests=log.columns(),
        steps=log.steps(),
        gap_ns=log.gaps.counted()[0],
        gap_counts=log.gaps.counted()[1],
        num_rows=observer.core.rows.max_rows,
        block_size=facts.block_size,
        refused=log.refused,
        counters={name: int(value) for name, value in _counters(observer.core).items()},
        wall_s=0.0,
        complete=not error,
    )
    return Shadow(
        name=path.name,
        shares_prefixes=any(asked.add.header.prefix_key for asked in observer.asked),
        requests=tuple(_job(asked, facts, first_ns) for asked in observer.asked),
        config=config,
        facts=facts,
        costs=_costs(observer.steps, path.name),
        run=run,
        notes=tuple(notes),
    )


def _counters(core: Core) -> dict[str, int]:
    return {name: getattr(core.counters, name) for name in core.counters.__slots__}


def _job(asked: _Asked, facts: WorkerFacts, first_ns: int) -> Job:
    header, num_prompt = asked.add.header, len(asked.add.prompt)
    came = max((len(tokens) for tokens in asked.tokens), default=0)
    cancelled = EndReason.CANCELLED in asked.reasons
    if asked.refused or cancelled or EndReason.DEADLINE in asked.reasons:  # nobody knows how long it would have been
        room = min(facts.max_model_len, facts.num_blocks * facts.block_size + 1) - num_prompt
        came = header.max_tokens or max(1, room)
    return Job(
        arrival_ns=asked.at_ns - first_ns,
        prompt=(Part(1, num_prompt),),
        output_tokens=max(1, came),
        tenant=header.tenant,
        priority=header.priority,
        deadline_ns=max(1, header.deadline_ns - asked.at_ns) if header.deadline_ns else 0,
        num_outputs=header.num_outputs,
        cancel_ns=max(1, asked.end_ns - asked.at_ns) if cancelled else 0,
        recorded=asked.add,
        replies=tuple(np.array(tokens, np.int32) for tokens in asked.tokens) if header.prefix_key else (),
    )


def _costs(steps: Sequence[_Step], name: str) -> Line:
    """Fitted to the worker's own times, and with what passes between two steps of a worker that has the next plan already."""
    features = np.array(
        [(1, w.tokens, w.decodes + w.chunks, w.decode_context + w.chunk_pairs) for w in (s.work for s in steps)]
    )
    took = np.array([step.duration_ns for step in steps], float)
    numbers = relative(features.astype(float), np.maximum(took, 1.0))
    errors = np.abs(features @ numbers / np.maximum(took, 1) - 1)
    between = [
        step.applied_ns - before.applied_ns - step.duration_ns
        for before, step in pairwise(steps)
        if step.follows and step.planned_ns <= before.applied_ns
    ]
    more = max(0.0, float(np.median(between))) if between else 0.0
    about = {
        "recording": name,
        "steps": len(steps),
        "median_error": float(np.median(errors)),
        "p90_error": float(np.quantile(errors, 0.9)),
        "between_steps_ns": more,
        "ns": dict(zip(("base", "token", "row", "pair"), numbers.tolist(), strict=True)),
    }
    base, token, row, pair = (float(number) for number in numbers)
    return Line(base + more, token, row, pair, about)
