"""Drives the core with a worker in memory and a clock that moves by hand, and holds the laws after every input.

Whoever uses it says what arrives and when the worker answers; the driver knows what every request must get: the tokens of
an undisturbed run, each once and in order, and one end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kvcache.prefix_index import hash_blocks, root
from scheduler.core import Core, CoreConfig, Output
from tests.helpers.fake_worker import PIPELINE_DEPTH, FakeWorker, undisturbed, worker_facts
from wire import (
    AddHeader,
    AddRequest,
    CancelOutcome,
    EndReason,
    OutputEnded,
    Refused,
    SamplingSpec,
    StepPlan,
    WorkerFacts,
)

NATURAL = (EndReason.STOP, EndReason.LENGTH)


@dataclass(slots=True)
class Tracked:
    """One output of an accepted request: what it must get and what it has got."""

    frontend: int
    handle: int
    request_id: str
    sequence_id: int  # counts up per accepted output
    prompt: list[int]
    max_tokens: int  # as asked; 0: no limit of its own
    max_outputs: int  # what the model's length and the pool leave of it
    sampling: SamplingSpec
    expected: list[int]
    got: list[int] = field(default_factory=list)
    end: OutputEnded | None = None
    gone: bool = False  # its front end is lost: nothing is heard of it
    crashes_alone: int = 0  # failed steps and lost workers while nobody else was computed
    crashes_in_a_row: int = 0  # of these, without any answer that names it in between
    doomed: bool = False  # must end with ERROR
    truncated_to: int | None = None
    output_index: int = 0
    deadline_ns: int = 0
    siblings: list[Tracked] = field(default_factory=list)  # all outputs of the request, itself too
    is_kept: bool = False  # it has a resume window: its tokens come once more with its end

    @property
    def over(self) -> bool:
        return self.end is not None or self.gone


class CoreDriver:
    """A core, its worker (None while it is away) and everything that was ever asked of them."""

    def __init__(self, config: CoreConfig | None = None, facts: WorkerFacts | None = None, *, tick: int = 10) -> None:
        self.core = Core(config or CoreConfig())
        self.worker: FakeWorker | None = None
        self.facts = facts or worker_facts()
        self.now = 0
        self.tick = tick  # nanoseconds that pass before each input
        self.requests: list[Tracked] = []  # outputs, by sequence_id
        self.num_accepted = 0
        self._next_handle = 0
        self.plans: list[StepPlan] = []
        self.num_refused = 0
        self._in_slot: dict[int, int] = {}  # slot -> sequence_id; not another's while a plan in flight names it
        self.crashes: list[list[str]] = []  # whom the worker computed when it was lost, each time
        self.joined()

    # ------------------------------------------------------------------------------------------------------ inputs

    def add(
        self,
        prompt: Sequence[int],
        max_tokens: int = 0,
        *,
        frontend: int = 0,
        priority: int = 2,
        stop: Sequence[int] = (),
        min_tokens: int = 0,
        request_id: str | None = None,
        handle: int | None = None,
        num_outputs: int = 1,
        tenant: str = "",
        salt: str | None = None,
        deadline_ns: int = 0,
        partial: bool = False,
        whole: bool = False,
    ) -> Tracked | Refused:
        """salt: None keeps the request away from the prefix cache. With several outputs, the first one is returned.
        Every second request has a resume window."""
        now = self._pass_time()
        number = self.num_accepted + self.num_refused
        handle = self._next_handle if handle is None else handle
        self._next_handle = max(self._next_handle, handle + num_outputs)
        request_id = f"r{number}" if request_id is None else request_id
        sampling = SamplingSpec(0.0, 0, 1.0, 0.0, 0, min_tokens, tuple(stop))
        header = AddHeader(
            handle=handle,
            request_id=request_id,
            arrival_ns=now,
            priority=priority,
            max_tokens=max_tokens,
            sampling=sampling,
            num_outputs=num_outputs,
            tenant=tenant,
            deadline_ns=deadline_ns,
            partial_at_deadline=partial,
            whole_by_deadline=whole,
            resume_window_ms=1 if number % 2 else 0,
        )
        refused = self.core.add(self._hashed(AddRequest(header, np.array(prompt, np.int32)), salt), frontend, now)
        if refused is not None:
            self.num_refused += 1
            self.check()
            return refused
        self.num_accepted += 1
        room = self._room(max_tokens, len(prompt), tenant)
        siblings: list[Tracked] = []
        for index in range(num_outputs):
            expected = undisturbed(prompt, room, self.facts.vocab_size, sampling, index)
            tracked = Tracked(
                frontend, handle + index, request_id, len(self.requests), list(prompt), max_tokens, room, sampling, expected
            )
            tracked.output_index, tracked.deadline_ns, tracked.siblings = index, deadline_ns, siblings
            tracked.is_kept = header.resume_window_ms > 0
            siblings.append(tracked)
            self.requests.append(tracked)
        self.check()
        return siblings[0]

    def _hashed(self, add: AddRequest, salt: str | None) -> AddRequest:
        """As a front end does it; every third leaves it to the core."""
        if salt is not None:
            add.header.prefix_key = root("model", "", salt)
            if self.num_accepted % 3:
                add.header.hash_block_size = self.facts.block_size
                hashes = hash_blocks(add.header.prefix_key, add.prompt, self.facts.block_size)
                add.prefix_hashes = np.frombuffer(hashes, np.uint8)
        return add

    def accepted(self, prompt: Sequence[int], max_tokens: int = 0, **options: object) -> Tracked:
        """`add`, for a request that must be taken."""
        tracked = self.add(prompt, max_tokens, **options)  # type: ignore[arg-type]
        assert isinstance(tracked, Tracked), tracked
        return tracked

    def abort(self, request: Tracked) -> None:
        self._hear(self.core.abort(request.frontend, request.handle, self._pass_time()))
        assert all(sibling.over for sibling in request.siblings)

    def cancel(self, request_id: str) -> CancelOutcome:
        outcome, outputs = self.core.cancel(request_id, self._pass_time())
        self._hear(outputs)
        return outcome

    def truncate(self, request: Tracked, num_outputs: int) -> None:
        if not request.over:
            request.truncated_to = num_outputs
        self._hear(self.core.truncate(request.frontend, request.handle, num_outputs, self._pass_time()))
        assert request.over

    def credit(self, *taken: tuple[Tracked, int]) -> None:
        """The reader of each output took so many more tokens."""
        for frontend in sorted({request.frontend for request, _ in taken}):
            mine = [(request.handle, count) for request, count in taken if request.frontend == frontend]
            handles = np.array([handle for handle, _ in mine], np.uint32)
            self.core.credit(frontend, handles, np.array([count for _, count in mine], np.int32), self._pass_time())
        self.check()

    def set_policy(self, name: str) -> str:
        error = self.core.set_policy(name, self._pass_time())
        self.check()
        return error

    def frontend_lost(self, frontend: int) -> None:
        self.core.frontend_lost(frontend, self._pass_time())
        for request in self.requests:
            if request.frontend == frontend and request.end is None:
                request.gone = True
        self.check()

    def joined(self, facts: WorkerFacts | None = None) -> None:
        """A worker with an empty mirror has come; the one before, if any, is gone."""
        self.facts = facts or self.facts
        self._count_crashes()
        for request in self._alive():
            tenant = self.core.request(request.request_id).header.tenant
            room = self._room(request.max_outputs, len(request.prompt), tenant)
            if request.max_tokens == 0 and room > max(len(sibling.got) for sibling in request.siblings if not sibling.over):
                request.max_outputs, request.expected = room, request.expected[:room]
            elif room < request.max_outputs:
                request.doomed = True
        outputs = self.core.worker_joined(self.facts, self._pass_time())
        self.worker = FakeWorker(self.facts, self.core.epoch)
        self._hear(outputs)

    def lost(self) -> None:
        self._count_crashes()
        self.worker = None
        self._hear(self.core.worker_lost(self._pass_time()))

    def step_failed(self) -> None:
        """The worker says that the oldest step failed; the core begins a new epoch with it."""
        assert self.worker is not None
        failed = self.worker.fail()
        assert (failed.epoch, failed.step_id) == (self.core.epoch, self.core.in_flight[0].step_id)
        self.lost()
        self.joined()

    def plan(self) -> StepPlan | None:
        plan = self.core.plan(self._pass_time())
        if plan is not None:
            assert self.worker is not None, "a plan without a worker"
            assert int(plan.num_tokens.sum()) <= self.core.token_budget
            self.worker.submit(plan)
            self.plans.append(plan)
            self._in_slot |= {start.slot: start.sequence_id for start in plan.header.starts}
        self._hear(self.core.take_outputs())
        if plan is not None:
            self._check_no_ended_request_in(plan)
        self.check()
        return plan

    def answer(self) -> None:
        """The oldest step's result arrives."""
        assert self.worker is not None
        answered = {self._in_slot[slot] for slot in self.worker.unanswered[0].plan.slots.tolist()}
        self._hear(self.core.apply(self.worker.answer(), self._pass_time()))
        for request in self.requests:
            if any(sibling.sequence_id in answered for sibling in request.siblings):
                request.crashes_in_a_row = 0

    # --------------------------------------------------------------------------------------------------- in longer

    def step(self) -> StepPlan | None:
        """One plan and its answer, nothing else in flight afterwards."""
        plan = self.plan()
        if plan is not None:
            while self.core.in_flight:
                self.answer()
        return plan

    def turn(self) -> bool:
        """Fills the pipeline, then takes one answer. False: nothing was there to do."""
        moved = False
        while self.plan() is not None:
            moved = True
        if self.core.in_flight:
            self.answer()
            moved = True
        return moved

    def finish(self, max_turns: int = 20_000) -> None:
        """Runs until nothing is left; then nothing may be held, and the counts must agree."""
        if self.worker is None:
            self.joined()
        for _ in range(max_turns):
            self._take_all()
            if not self.turn():
                break
        assert self.core.is_idle, "the batch stands still with requests in it"
        assert all(request.over for request in self.requests)
        load = self.core.load(7)
        assert (load.query_id, load.total_blocks) == (7, self.facts.num_blocks)
        assert load.free_blocks + load.cached_blocks == load.total_blocks
        assert load.held_blocks == load.retiring_blocks == load.held_host_blocks == load.kv_tokens == 0
        assert load.running_requests == load.waiting_requests == load.waiting_tokens == 0
        assert self.core.rows.num_free == self.core.rows.max_rows
        if not any(request.gone for request in self.requests):
            assert load.output_tokens == sum(len(request.got) for request in self.requests)

    def _take_all(self) -> None:
        """Every reader has taken all that came."""
        behind = [(request, len(request.got)) for request in self._alive() if request.got]
        if behind:
            self.credit(*behind)

    def next_rows(self) -> dict[str, int]:
        """Makes the next plan: how many tokens each request computes in it, in the plan's order. Nothing: no plan."""
        plan = self.plan()
        if plan is None:
            return {}
        return dict(zip(self._names(plan.slots.tolist()), plan.num_tokens.tolist(), strict=True))

    def next_padding(self) -> list[str]:
        """Makes the next plan: whose rows are padding in it."""
        plan = self.plan()
        return self._names(plan.padding.tolist()) if plan is not None else []

    def _names(self, slots: Sequence[int]) -> list[str]:
        assert self.worker is not None
        return [self.requests[self.worker.sequences[slot].start.sequence_id].request_id for slot in slots]

    # -------------------------------------------------------------------------------------------------------- laws

    def check(self) -> None:
        """What must hold between any two inputs."""
        core, load = self.core, self.core.load(0)
        core.check_invariants()
        assert len(core.in_flight) <= PIPELINE_DEPTH
        assert load.free_blocks + load.held_blocks + load.retiring_blocks + load.cached_blocks == load.total_blocks
        alive = self._alive()
        assert not any(request.doomed for request in alive)
        num_alive = len({request.request_id for request in alive})
        assert load.running_requests + load.waiting_requests == num_alive == core.num_requests
        assert load.accepted_requests == self.num_accepted and load.refused_requests == self.num_refused
        assert load.finished_requests + load.cancelled_requests == self.num_accepted - num_alive
        assert load.waiting_tokens <= sum(len(request.prompt) for request in alive)
        self._check_retiring()

    def _check_retiring(self) -> None:
        """A block that nobody holds is free, unless a plan in flight still names it."""
        states = self.core.kv.pool.states()
        retiring = set((np.flatnonzero(states == 2) + 1).tolist())
        named = self.worker.blocks_in_flight() if self.worker is not None else frozenset()
        swaps = self.worker is not None and any(len(step.plan.swap_out_blocks) for step in self.worker.unanswered)
        if not swaps:  # the empty blocks of a table that is swapped out retire with the others
            assert retiring <= named, "blocks retire that no plan in flight names"
        available = set((np.flatnonzero((states == 0) | (states == 3)) + 1).tolist())
        assert not available & named, "a block is available that a plan in flight names"

    def _check_no_ended_request_in(self, plan: StepPlan) -> None:
        assert self.worker is not None
        for slot in plan.slots.tolist():
            request = self.requests[self.worker.sequences[slot].start.sequence_id]
            assert not request.over, f"{request.request_id} is over and in a plan"
        for slot in plan.padding.tolist():
            request = self.requests[self.worker.sequences[slot].start.sequence_id]
            natural = request.end is not None and request.end.reason in NATURAL
            assert self.core.policy.keeps_ended_rows and natural, f"{request.request_id} pads without a right to"

    # ----------------------------------------------------------------------------------------------------- outputs

    def _alive(self) -> list[Tracked]:
        return [request for request in self.requests if not request.over]

    def _room(self, max_tokens: int, num_prompt: int, tenant: str = "") -> int:
        quotas = {limits.name: limits.max_blocks for limits in self.core.config.tenants}
        quota = quotas.get(tenant, quotas.get("*", 0)) or self.facts.num_blocks
        room = min(self.facts.max_model_len, min(quota, self.facts.num_blocks) * self.facts.block_size + 1) - num_prompt
        return min(max_tokens or room, room)

    def _count_crashes(self) -> None:
        """The worker is given up: a request that it computed alone has a crash more, and too many in a row are the end."""
        if self.worker is None:
            return
        self.crashes.append(self.computing())
        if len(self.crashes[-1]) != 1:
            return
        for request in self._alive():
            if request.request_id in self.crashes[-1]:
                request.crashes_alone += 1
                request.crashes_in_a_row += 1
                request.doomed |= request.crashes_in_a_row >= self.core.config.max_crashes

    def computing(self) -> list[str]:
        """Ids of the requests that the plans in flight compute, by arrival."""
        assert self.worker is not None
        named = {slot for step in self.worker.unanswered for slot in step.plan.slots.tolist()}
        started = {self._in_slot[slot] for slot in named}
        return list(dict.fromkeys(request.request_id for request in self._alive() if request.sequence_id in started))

    def _pass_time(self) -> int:
        self.now += self.tick
        return self.now

    def _hear(self, outputs: Sequence[Output]) -> None:
        assert len({output.frontend for output in outputs}) == len(outputs), "one message per front end"
        for output in outputs:
            batch = output.batch
            handles = batch.handles.tolist()
            assert len(set(handles)) == len(handles) == len(batch.tokens), "at most one token per handle"
            for handle, token in zip(handles, batch.tokens.tolist(), strict=True):
                self._hear_token(self._waiting_for(output.frontend, handle), token)
            kept = {handle: tokens.tolist() for handle, tokens in output.kept}
            for end in batch.header.ended:
                request = self._waiting_for(output.frontend, end.handle)
                self._hear_end(request, end)
                assert kept.pop(end.handle, None) == (request.got[: end.stats.output_tokens] if request.is_kept else None)
            assert not kept, "tokens of what has not ended"
        self.check()

    def _waiting_for(self, frontend: int, handle: int) -> Tracked:
        found = [r for r in self.requests if (r.frontend, r.handle) == (frontend, handle) and not r.over]
        assert len(found) == 1, f"words for handle {handle} of front end {frontend}, which nobody waits for"
        return found[0]

    def _hear_token(self, request: Tracked, token: int) -> None:
        at = len(request.got)
        assert request.expected[at : at + 1] == [token], f"{request.request_id}: output {at} differs from a run alone"
        request.got.append(token)

    def _hear_end(self, request: Tracked, end: OutputEnded) -> None:
        request.end = end
        is_culprit = "while it computed this request alone" in end.message
        assert not is_culprit or request.crashes_alone >= self.core.config.max_crashes
        assert request.doomed or is_culprit or end.reason is not EndReason.ERROR
        assert not request.doomed or end.reason is EndReason.ERROR
        stats, got = end.stats, len(request.got)
        stop = request.got[-1] if got and request.got[-1] in request.sampling.stop_token_ids else -1
        if end.reason is EndReason.STOP and request.truncated_to is not None:
            assert end.stop_token_id == -1 and stats.output_tokens == min(request.truncated_to, got)
        else:
            assert stats.output_tokens == got
            assert end.stop_token_id == stop and (stop >= 0) == (end.reason is EndReason.STOP)
        if end.reason is EndReason.LENGTH:
            assert request.got == request.expected
        assert bool(end.message) == (end.reason in (EndReason.ERROR, EndReason.UNAVAILABLE, EndReason.DEADLINE))
        assert request.deadline_ns or end.reason is not EndReason.DEADLINE
        assert stats.prompt_tokens == len(request.prompt)
        assert min(stats.queued_ns, stats.prefill_ns, stats.decode_ns, stats.preempted_ns, stats.block_ns) >= 0
        assert (stats.first_token_ns > 0) == (got > 0)
