"""The real core on a virtual clock: jobs come, plans take the time that a cost model says, and everything is written down.

One loop over three kinds of events: an arrival, a result, a moment that the core asked to be woken at. Two plans are in flight
per core, as in the engine, and its worker computes one after the other. Nothing here decides anything.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import count

import msgspec
import numpy as np

from bench.cost_models import CostModel
from bench.jobs import Job, token_ids
from bench.runs import Run, RunLog
from bench.virtual_worker import STOP, VirtualWorker
from kvcache.prefix_index import hash_blocks, root
from scheduler.core import Core, CoreConfig, Output
from scheduler.core.placement import GroupLoad, load_of, place
from wire import AddHeader, AddRequest, SamplingSpec, StepPlan, StepResult, WorkerFacts
from wire.messages import I32, U32

_IGNORES_EOS = SamplingSpec(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)
_ENDS_BY_ITSELF = msgspec.structs.replace(_IGNORES_EOS, stop_token_ids=(STOP,))
_NO_LIMIT = 1 << 30  # readers that always read
_FRONTEND = 0
_KEY = root("simulated", "", "")
_NEVER_NS = 1 << 62
_TICK = 4096  # events between two looks at the progress


@dataclass(frozen=True)
class Setup:
    """The simulated service."""

    facts: WorkerFacts
    costs: CostModel
    core: CoreConfig = field(default_factory=CoreConfig)
    num_workers: int = 1  # worker groups, each with a core and a pool of its own
    hop_ns: int = 0  # on the way between core and worker, each way
    hash_prompts: bool = False  # even where no two prompts begin alike


@dataclass(slots=True)
class Group:
    core: Core
    worker: VirtualWorker
    results: deque[StepResult] = field(default_factory=deque)  # of the plans in flight
    free_ns: int = 0  # when the worker has computed all that it was given


Tell = Callable[[int, int], None]  # requests ended so far, virtual time


class Simulation:
    """One run. Set `stop` from outside (a signal) to end it early; `outcome` says what was done up to then."""

    def __init__(
        self,
        setup: Setup,
        jobs: Iterator[Job],
        *,
        shares_prefixes: bool = False,
        tell: Tell | None = None,
        core_of: Callable[[CoreConfig], Core] = Core,
    ) -> None:
        """shares_prefixes: prompts have content, and are hashed as a front end would. core_of: makes a core, or what stands for
        one, such as a recorder in front of it."""
        self.stop = False
        self.end_ns = 0  # a time at which it stops, as if from outside; 0: none
        self.plans: list[tuple[int, StepPlan]] | None = None  # a list: plans and their times are kept in it
        self.tokens: list[tuple[int, U32]] | None = None  # a list: times and whose tokens came then are kept in it
        self._setup, self._jobs, self._tell = setup, jobs, tell
        self._hashes = (shares_prefixes or setup.hash_prompts) and setup.core.prefix_caching
        self._groups = [self._group(core_of, number) for number in range(setup.num_workers)]
        self._log = RunLog()
        self._results: list[tuple[int, int]] = []  # heap of (time, group)
        self._follow_ups: list[tuple[int, int, Job]] = []  # heap of (time, counter, job)
        self._counter = count()
        self._waiting_turns: dict[int, Job] = {}  # by handle of the turn before
        self._cancels: list[tuple[int, int, int]] = []  # heap of (time, group, handle)
        self._ends: dict[int, int] = {}  # by handle: output tokens, of those that end by themselves
        self._replies: dict[int, I32] = {}  # by handle, where they are known
        self._has_deadlines = False
        self._next_job = next(jobs, None)
        self._blank = np.zeros(1 << 10, np.int32)
        self._now = 0
        self._wall_s = 0.0
        self._complete = False

    def _group(self, core_of: Callable[[CoreConfig], Core], number: int) -> Group:
        setup = self._setup
        core = core_of(replace(setup.core, group=number, max_unread_tokens=_NO_LIMIT))
        core.worker_joined(setup.facts, 0)
        return Group(core, VirtualWorker(setup.facts, setup.costs))

    # ---------------------------------------------------------------------------------------------------------- time

    def run(self) -> Run:
        """Until every request has ended, or `stop` was set."""
        began = time.perf_counter()
        ticks = 0
        while not self.stop and (now := self._next_ns()) >= 0:
            if 0 < self.end_ns <= now:
                self.stop = True
                break
            self._arrivals(now)
            while self._cancels and self._cancels[0][0] <= now:
                _, number, handle = heapq.heappop(self._cancels)
                self._hear(self._groups[number].core.abort(_FRONTEND, handle, now), now)
            while self._results and self._results[0][0] <= now:
                self._result(heapq.heappop(self._results)[1], now)
            for group in self._groups:
                self._plan(group, now)
            ticks += 1
            if ticks % _TICK == 0 and self._tell is not None:
                self._tell(self._log.num_ended, now)
        self._complete = not self.stop
        assert self.stop or all(group.core.is_idle for group in self._groups), "the batch stands still with requests in it"
        self._wall_s += time.perf_counter() - began
        return self.outcome()

    def _next_ns(self) -> int:
        """Of the next event; -1: nothing will happen any more."""
        least = self._results[0][0] if self._results else _NEVER_NS
        if self._next_job is not None and self._next_job.arrival_ns < least:
            least = self._next_job.arrival_ns
        for events in (self._follow_ups, self._cancels):
            if events and events[0][0] < least:
                least = events[0][0]
        if self._has_deadlines:
            least = min(least, *(group.core.next_wakeup_ns or _NEVER_NS for group in self._groups))
        if least == _NEVER_NS:
            return -1
        self._now = max(self._now, least)
        return self._now

    # ------------------------------------------------------------------------------------------------------ arrivals

    def _arrivals(self, now: int) -> None:
        while self._next_job is not None and self._next_job.arrival_ns <= now:
            self._arrive(self._next_job, now)
            self._next_job = next(self._jobs, None)
        while self._follow_ups and self._follow_ups[0][0] <= now:
            self._arrive(heapq.heappop(self._follow_ups)[2], now)

    def _arrive(self, job: Job, now: int) -> None:
        num_tokens = job.prompt_tokens
        handle, *others = (self._log.added(now, num_tokens, job.priority, job.deadline_ns) for _ in range(job.num_outputs))
        add = self._recorded(job, handle, now) if job.recorded is not None else self._drawn(job, handle, num_tokens, now)
        self._has_deadlines |= bool(job.deadline_ns)
        number = self._place(add)
        refused = self._groups[number].core.add(add, _FRONTEND, now)
        if refused is not None:
            for refused_handle in (handle, *others):
                self._log.was_refused(refused_handle, refused.code, now)
            return
        if job.then is not None:
            self._waiting_turns[handle] = job.then
        if job.max_tokens > job.output_tokens:
            self._ends.update(dict.fromkeys((handle, *others), job.output_tokens))
        if job.cancel_ns:
            heapq.heappush(self._cancels, (now + job.cancel_ns, number, handle))
        self._replies.update(zip((handle, *others), job.replies, strict=False))

    def _drawn(self, job: Job, handle: int, num_tokens: int, now: int) -> AddRequest:
        """A job with lengths and no text of its own."""
        header = AddHeader(
            handle,
            str(handle),
            now,
            job.priority,
            job.max_tokens or job.output_tokens,
            _ENDS_BY_ITSELF if job.max_tokens > job.output_tokens else _IGNORES_EOS,
            job.num_outputs,
            job.tenant,
            now + job.deadline_ns if job.deadline_ns else 0,
        )
        if not self._hashes and not self._setup.hash_prompts:
            if num_tokens > len(self._blank):
                self._blank = np.zeros(2 * num_tokens, np.int32)
            return AddRequest(header, self._blank[:num_tokens])
        began = time.perf_counter()
        prompt, block_size = token_ids(job.prompt, self._setup.facts.vocab_size), self._setup.facts.block_size
        header.prefix_key, header.hash_block_size = _KEY, block_size
        hashes = np.frombuffer(hash_blocks(_KEY, prompt, block_size), np.uint8)
        self._wall_s -= time.perf_counter() - began  # a front end's work
        return AddRequest(header, prompt, hashes)

    def _recorded(self, job: Job, handle: int, now: int) -> AddRequest:
        """A job that was recorded: as it was, but for its time and for how it ended."""
        assert job.recorded is not None
        header = msgspec.structs.replace(
            job.recorded.header,
            handle=handle,
            request_id=str(handle),
            arrival_ns=now,
            max_tokens=job.output_tokens,
            sampling=_IGNORES_EOS,
            deadline_ns=now + job.deadline_ns if job.deadline_ns else 0,
        )
        return AddRequest(header, job.recorded.prompt, job.recorded.prefix_hashes)

    def _place(self, add: AddRequest) -> int:
        """Whose the request is."""
        if len(self._groups) == 1:
            return 0
        group = place(len(add.prompt), [self._load(group.core, add) for group in self._groups])
        assert group is not None
        return group

    def _load(self, core: Core, add: AddRequest) -> GroupLoad:
        return load_of(core, len(add.prompt), add.prefix_hashes.tobytes() if self._hashes else b"")

    # --------------------------------------------------------------------------------------------------------- steps

    def _result(self, number: int, now: int) -> None:
        group = self._groups[number]
        self._hear(group.core.apply(group.results.popleft(), now), now)

    def _plan(self, group: Group, now: int) -> None:
        core, hop_ns = group.core, self._setup.hop_ns
        while (plan := core.plan(now)) is not None:
            if self._ends:
                for start in plan.header.starts:
                    group.worker.will_end(start, self._ends.get(int(core.rows.handle[start.slot]), 0))
            work, result = group.worker.run(plan)
            if self._replies:
                result.tokens = self._known_tokens(group, result)
            begin_ns = max(now + hop_ns, group.free_ns)
            group.free_ns = begin_ns + result.header.duration_ns
            group.results.append(result)
            heapq.heappush(self._results, (group.free_ns + hop_ns, core.config.group))
            step = core.in_flight[-1]
            used = step.kv_tokens
            if self._hashes:  # what several tables share counts once
                used -= (int(core.kv.tables.num_blocks.sum()) - step.held_blocks) * core.kv.block_size
            self._log.step(
                begin_ns,
                group.free_ns,
                len(plan.slots),
                len(plan.padding),
                work.tokens - len(plan.padding),
                work.decode_context,
                work.chunk_pairs,
                len(result.slots),
                step.held_blocks,
                used,
                step.num_waiting,
            )
            if self.plans is not None:
                self.plans.append((now, plan))
        if self._has_deadlines:
            self._hear(core.take_outputs(), now)

    def _known_tokens(self, group: Group, result: StepResult) -> I32:
        """Those that were answered, where that is known."""
        tokens = result.tokens.copy()
        handles, positions = group.core.rows.handle[result.slots].tolist(), group.worker.positions(result.slots).tolist()
        for row, (handle, position) in enumerate(zip(handles, positions, strict=True)):
            reply = self._replies.get(handle)
            if reply is not None and position < len(reply):
                tokens[row] = reply[position]
        return tokens

    def _hear(self, outputs: Sequence[Output], now: int) -> None:
        for output in outputs:
            batch = output.batch
            if len(batch.handles):
                self._log.gaps.heard(batch.handles, now)
                if self.tokens is not None:
                    self.tokens.append((now, batch.handles))
            for ended in batch.header.ended:
                self._log.ended(ended, now)
                self._ends.pop(ended.handle, None)
                self._replies.pop(ended.handle, None)
                if self._waiting_turns and (job := self._waiting_turns.pop(ended.handle, None)) is not None:
                    heapq.heappush(self._follow_ups, (now + job.arrival_ns, next(self._counter), job))

    # ------------------------------------------------------------------------------------------------------- outcome

    def outcome(self) -> Run:
        """What was done so far."""
        gap_ns, gap_counts = self._log.gaps.counted()
        counters: dict[str, int] = {}
        for group in self._groups:
            for name, value in asdict(group.core.counters).items():
                counters[name] = counters.get(name, 0) + value
        return Run(
            requests=self._log.columns(),
            steps=self._log.steps(),
            gap_ns=gap_ns,
            gap_counts=gap_counts,
            num_rows=sum(group.core.rows.max_rows for group in self._groups),
            block_size=self._setup.facts.block_size,
            refused=self._log.refused,
            counters=counters,
            wall_s=self._wall_s,
            complete=self._complete,
        )


def simulate(setup: Setup, jobs: Iterator[Job], *, shares_prefixes: bool = False) -> Run:
    return Simulation(setup, jobs, shares_prefixes=shares_prefixes).run()
