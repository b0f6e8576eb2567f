"""The steps of a core, for pictures: of one that replays a recording, and of one on the simulator's virtual clock.

The shipped core runs as it is and is looked at from outside. Reads recordings; draws nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np

from bench.jobs import Job
from bench.pictures.steps import Memory, Step
from bench.shadow import Shadow, ShadowError
from bench.simulator import Setup, Simulation
from scheduler.core import Core, CoreConfig, Output
from scheduler.core.observe import step_record
from scheduler.recording import Event, Recording, RecordingError, Verb
from scheduler.replay import Replay
from wire import StepPlan, StepResult


@dataclass(frozen=True)
class Observed:
    """num_rows: of the batch. notes: for people, what of it is not shown."""

    name: str
    steps: list[Step]
    num_rows: int
    notes: tuple[str, ...] = ()


class Watched(Core):
    """The core, with a record of each step whose result it took."""

    def __init__(self, config: CoreConfig) -> None:
        super().__init__(config)
        self.seen: list[Step] = []
        self._memory: dict[tuple[int, int], Memory] = {}  # by epoch and step, of those in flight

    def plan(self, now: int) -> StepPlan | None:
        plan = super().plan(now)
        if plan is not None:
            self._memory[plan.header.epoch, plan.header.step_id] = self._memory_now()
        return plan

    def apply(self, result: StepResult, now: int) -> list[Output]:
        header = result.header
        if header.epoch != self.epoch or not self.in_flight or self.in_flight[0].step_id != header.step_id:
            return super().apply(result, now)
        flight = self.in_flight[0]
        record = step_record(self, flight, 0, header.duration_ns)
        outputs = super().apply(result, now)
        leaves, self.leaves = self.leaves, []
        begin_ns = max(self.seen[-1].end_ns if self.seen else 0, now - header.duration_ns)
        memory = self._memory.pop((header.epoch, header.step_id))
        self.seen.append(Step(begin_ns, now, record.rows, leaves, flight.num_waiting, record.policy, memory))
        return outputs

    def _memory_now(self) -> Memory:
        """kv_tokens of a plan counts a shared block for each table that holds it."""
        pool, kv = self.kv.pool, self.kv
        again = int(kv.tables.num_blocks.sum()) - pool.num_held
        used = self.in_flight[-1].kv_tokens - max(0, again) * kv.block_size
        blocks = (pool.num_blocks, pool.num_held, pool.num_shared, pool.num_cached, pool.num_free)
        return Memory(*blocks, max(0, used), kv.block_size, self._reserved())

    def _reserved(self) -> int:
        """Blocks for the longest that each sequence in the batch may become."""
        assert self.facts is not None
        blocks, longest = 0, self.facts.max_model_len
        for slot in np.flatnonzero(self.kv.tables.num_blocks).tolist():
            sequence = self.rows.sequences[slot]
            assert sequence is not None
            most = sequence.num_prompt_tokens + (sequence.header.max_tokens or longest)
            blocks += self.kv.blocks_for(min(most, longest))
        return blocks


def recorded(path: Path) -> Observed:
    """What was recorded, as it was. Raises ShadowError."""
    try:
        recording = Recording(path)
    except RecordingError as error:
        raise ShadowError(str(error)) from None
    header = recording.header
    if header.first_event:
        raise ShadowError(f"{path} begins in the middle ({header.first_event} events are gone): it can't be replayed")
    core, replay = Watched(header.core), Replay(header)
    replay.core = core
    report = replay.run(_until_failure(recording.events()))
    if report.difference:
        raise ShadowError(f"{path} can't be used, this version of the core plans differently: {report.difference[0]}")
    if not core.seen:
        raise ShadowError(f"{path} holds no step that was computed")
    notes = (report.error,) if report.error else ()
    return Observed(path.name, core.seen, core.rows.max_rows, notes)


def _until_failure(events: Iterator[Event]) -> Iterator[Event]:
    """A core that failed is not drawn on."""
    for event in events:
        if event.verb in (Verb.FAILED, Verb.RENEWED):
            return
        yield event


@dataclass(frozen=True)
class Workload:
    """Requests, and the service that they met."""

    jobs: tuple[Job, ...]
    setup: Setup
    shares_prefixes: bool


def workload_of(shadow: Shadow, requests: int, num_rows: int) -> Workload:
    """The first so many requests of a recording. num_rows: of the simulated batch; 0: as recorded."""
    config, facts = shadow.config, shadow.facts
    if num_rows:  # each row computes a token in a step at least
        tokens = max(config.max_step_tokens, num_rows)
        config = replace(config, max_batch_rows=num_rows, max_step_tokens=tokens, static_batch_size=0)
        facts = msgspec.structs.replace(facts, max_batch_rows=num_rows, max_step_tokens=max(facts.max_step_tokens, num_rows))
    jobs = tuple(islice(shadow.jobs(0.0, 0, 0), requests or None))
    return Workload(jobs, Setup(facts, shadow.costs, config), shadow.shares_prefixes)


def simulated(workload: Workload, policy: str) -> Observed:
    """The same requests under another policy, on a virtual clock. static: a batch as wide as the continuous one."""
    cores: list[Watched] = []

    def core_of(config: CoreConfig) -> Core:
        cores.append(Watched(config))
        return cores[0]

    setup = replace(workload.setup, core=replace(workload.setup.core, policy=policy))
    Simulation(setup, iter(workload.jobs), shares_prefixes=workload.shares_prefixes, core_of=core_of).run()
    core = cores[0]
    return Observed(policy, core.seen, core.rows.max_rows)
