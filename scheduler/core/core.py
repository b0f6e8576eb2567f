"""The core: takes requests and results, gives plans. See the package's docstring for what it may not do.

Two plans may be in flight. A plan is made on what is known plus what the plans in flight will bring: a row whose token is
being sampled counts as one token longer, and the worker feeds that token to itself. What cannot be foreseen (an end token, a
cancel) is found when the result arrives; at most one row of one step has then been computed in vain.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

import numpy as np

from kvcache.block_table import Slots
from kvcache.manager import KVCacheManager
from scheduler.core import policies
from scheduler.core.config import CoreConfig
from scheduler.core.policies import Selection
from scheduler.core.queue import Queue
from scheduler.core.request import Request, State
from scheduler.core.rows import PADDING, PREEMPTED, RETIRING, RUNNING, Rows
from wire import (
    AddRequest,
    CancelOutcome,
    EndReason,
    LoadReply,
    OutputEnded,
    PlanHeader,
    Refused,
    SequenceStart,
    StepPlan,
    StepResult,
    TokenBatch,
    TokenBatchHeader,
    WorkerFacts,
)
from wire.messages import I32

PIPELINE_DEPTH = 2
_REMEMBERED_IDS = 10_000  # ended requests that Cancel still knows
_WATERMARK = 100  # one block in so many stays free at admission, for the growth of those running
_SECOND = 1_000_000_000


class ProtocolError(Exception):
    """The worker answered what was not asked; its mirror can't be trusted any more."""


@dataclass(frozen=True, slots=True)
class Output:
    """Something for a front end."""

    frontend: int
    batch: TokenBatch


@dataclass(slots=True)
class InFlight:
    """A plan whose result has not arrived."""

    step_id: int
    planned_ns: int
    plan: StepPlan
    sampled: Slots  # slots that sample, in the order of the plan's rows
    joined: Slots  # slots that compute their first token since admission
    held_blocks: int
    kv_tokens: int
    num_waiting: int


@dataclass(slots=True)
class Counters:
    """Since the start."""

    steps: int = 0
    output_tokens: int = 0
    accepted: int = 0
    finished: int = 0
    cancelled: int = 0
    refused: int = 0
    preemptions: int = 0


@dataclass(slots=True)
class _Emitted:
    """What goes to the front ends, gathered while a verb runs."""

    tokens: dict[int, tuple[np.ndarray[tuple[int], np.dtype[np.uint32]], I32]] = field(default_factory=dict)
    ended: dict[int, list[OutputEnded]] = field(default_factory=dict)


class Core:
    """Scheduler of one worker group. Its public methods are its whole list of inputs; `now` is in nanoseconds."""

    def __init__(self, config: CoreConfig) -> None:
        self.config = config
        self.policy = policies.by_name(config.policy)
        self.queue = Queue(config.max_queue_requests, config.max_queue_tokens)
        self.counters = Counters()
        self.facts: WorkerFacts | None = None  # of the last worker that joined; its limits hold while it is away
        self.connected = False
        self.draining = False
        self.epoch = 0
        self.in_flight: deque[InFlight] = deque()
        self.leaves: list[tuple[str, str]] = []  # (request_id, reason) since the watcher's last look; bounded
        self.token_budget = config.max_step_tokens
        self.static_batch_size = config.static_batch_size or config.max_batch_rows
        self._requests: dict[str, Request] = {}
        self._by_handle: dict[tuple[int, int], Request] = {}
        self._ended_ids: OrderedDict[str, None] = OrderedDict()
        self._end_times: deque[int] = deque(maxlen=64)
        self._next_sequence_id = 0
        self._next_step = 0
        self._now = 0  # of the plan being made
        self._kv_tokens = 0  # computed tokens of all that run, counting plans in flight
        self._emitted = _Emitted()
        self._starts: list[int] = []  # slots admitted for the plan being made
        self._grown: list[tuple[Slots, I32]] = []  # blocks appended for the plan being made
        self._ended: list[int] = []  # slots that the worker may forget with the next plan
        self._retiring: list[int] = []  # slots that left, until their last plan has returned
        self._new_epoch(config.max_batch_rows, 1, 1, 1)

    # ------------------------------------------------------------------------------------------------ requests

    def add(self, add: AddRequest, frontend: int, now: int) -> Refused | None:
        """A new request. None: accepted, its tokens will come; else why not."""
        refused = self._why_not(add, frontend)
        if refused is not None:
            self.counters.refused += 1
            return refused
        assert self.facts is not None
        header = add.header
        request = Request(
            header=header,
            frontend=frontend,
            sequence_id=self._next_sequence_id,
            prompt=add.prompt,
            max_outputs=self._max_outputs(len(add.prompt), header.max_tokens),
        )
        self._next_sequence_id += 1
        self._requests[header.request_id] = request
        self._by_handle[frontend, header.handle] = request
        self.queue.push(request)
        self.counters.accepted += 1
        return None

    def abort(self, frontend: int, handle: int, now: int) -> list[Output]:
        """The stream was dropped. Unknown handles are those that have just ended: nothing happens."""
        request = self._by_handle.get((frontend, handle))
        if request is not None:
            self._end(request, EndReason.CANCELLED, now)
        return self._take_outputs()

    def cancel(self, request_id: str, now: int) -> tuple[CancelOutcome, list[Output]]:
        """Ends a request by its id, whichever front end it came from."""
        request = self._requests.get(request_id)
        if request is not None:
            self._end(request, EndReason.CANCELLED, now)
            return CancelOutcome.CANCELLED, self._take_outputs()
        known = request_id in self._ended_ids
        return (CancelOutcome.ALREADY_FINISHED if known else CancelOutcome.NOT_FOUND), []

    def truncate(self, frontend: int, handle: int, num_outputs: int, now: int) -> list[Output]:
        """The front end found a stop string in the text: the output ends with STOP and has `num_outputs` tokens."""
        request = self._by_handle.get((frontend, handle))
        if request is not None:
            self._end(request, EndReason.STOP, now, num_outputs=num_outputs)
        return self._take_outputs()

    def frontend_lost(self, frontend: int, now: int) -> None:
        """A front end is gone, and with it the readers of its requests."""
        for request in [request for (owner, _), request in self._by_handle.items() if owner == frontend]:
            self._end(request, EndReason.CANCELLED, now)
        self._take_outputs()

    # ------------------------------------------------------------------------------------------------- workers

    def worker_joined(self, facts: WorkerFacts, now: int) -> list[Output]:
        """A worker with an empty mirror is there: a new epoch begins, and steps count from 0 again."""
        self._lose_worker(now)
        other_model = self.facts is not None and self.facts.vocab_size != facts.vocab_size
        self.facts = facts
        self.connected = True
        self.epoch += 1
        self.token_budget = min(self.config.max_step_tokens, facts.max_step_tokens)
        rows = min(self.config.max_batch_rows, facts.max_batch_rows, self.token_budget)  # every row can decode in every step
        self.static_batch_size = min(self.config.static_batch_size or rows, rows)
        self._new_epoch(rows, facts.num_blocks, facts.block_size, facts.vocab_size)
        for request in list(self._requests.values()):  # accepted on the last worker's word
            room = self._max_outputs(request.num_prompt_tokens, request.max_outputs)
            if other_model:
                self._end(request, EndReason.ERROR, now, message="the new worker has another model")
            elif room > len(request.outputs) and not request.header.max_tokens:
                request.max_outputs = room
            elif room < request.max_outputs:
                self._end(request, EndReason.ERROR, now, message="the new worker's KV cache is too small for this request")
        return self._take_outputs()

    def worker_lost(self, now: int) -> list[Output]:
        """The worker is gone, or its mirror is void. Everything running waits again, with the tokens emitted so far."""
        self._lose_worker(now)
        return self._take_outputs()

    def _lose_worker(self, now: int) -> None:
        if not self.connected:
            return
        self.connected = False
        self.in_flight.clear()
        order = self.rows.in_order()
        running = [int(slot) for slot in order[self.rows.state[order] == RUNNING]]
        for slot in reversed(running):
            self._preempt(slot, now).crashes += 1
        self.release_padding()
        self.kv.pool.returned(self._next_step)
        self._free_slots(self._next_step)
        for request in [request for request in self._requests.values() if request.crashes > self.config.max_crashes]:
            self._end(request, EndReason.ERROR, now, message=f"the worker failed {request.crashes} times while it ran")

    def drop_all(self, message: str, now: int) -> list[Output]:
        """The server stops before they have finished."""
        for request in list(self._requests.values()):
            self._end(request, EndReason.UNAVAILABLE, now, message=message)
        return self._take_outputs()

    def drain(self) -> None:
        """No new requests from now on; those accepted go on."""
        self.draining = True

    # --------------------------------------------------------------------------------------------------- steps

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    @property
    def is_idle(self) -> bool:
        return not self._requests and not self.in_flight

    def plan(self, now: int) -> StepPlan | None:
        """The next step, or None when there is nothing to compute yet or the pipeline is full."""
        if not self.connected or len(self.in_flight) >= PIPELINE_DEPTH:
            return None
        self._now = now
        selection = self.policy.select(self)
        if not len(selection.slots) and not len(selection.padding):
            return None
        return self._build(selection, now)

    def apply(self, result: StepResult, now: int) -> list[Output]:
        """The result of the oldest plan in flight. Raises ProtocolError when it does not fit that plan."""
        if result.header.group != self.config.group:
            raise ProtocolError(f"result of group {result.header.group}, this is group {self.config.group}")
        if result.header.epoch != self.epoch or not self.connected:
            return []  # late words of a worker that was given up
        if not self.in_flight or result.header.step_id != self.in_flight[0].step_id:
            raise ProtocolError(f"result of step {result.header.step_id}, which was not the next one in flight")
        step = self.in_flight[0]
        if not np.array_equal(result.slots, step.sampled) or len(result.tokens) != len(step.sampled):
            raise ProtocolError(f"step {step.step_id} sampled other rows than its plan")
        assert self.facts is not None
        if len(result.tokens) and not 0 <= int(result.tokens.min()) <= int(result.tokens.max()) < self.facts.vocab_size:
            raise ProtocolError(f"step {step.step_id} sampled a token outside the vocabulary")
        self.in_flight.popleft()
        self.kv.pool.returned(step.step_id)
        self._take_tokens(step.sampled, result.tokens, now)
        self._free_slots(step.step_id)
        return self._take_outputs()

    # ----------------------------------------------------------------------------- the batch, as policies see it

    def running(self) -> Slots:
        order = self.rows.in_order()
        slots: Slots = order[self.rows.num_tokens[order] < self.rows.max_tokens[order]]
        return slots

    def padding(self) -> Slots:
        order = self.rows.in_order()
        slots: Slots = order[self.rows.state[order] == PADDING]
        return slots

    def missing(self, slots: Slots) -> I32:
        missing: I32 = self.rows.num_tokens[slots] - self.rows.num_computed[slots]
        return missing

    def with_blocks(self, slots: Slots) -> Slots:
        rows, pool = self.rows, self.kv.pool
        full = self.kv.full(slots, rows.num_computed[slots])
        while np.count_nonzero(full) > pool.num_free + pool.num_retiring:
            victim = int(rows.in_order()[-1])
            self._preempt(victim, self._now)
            full, slots = full[slots != victim], slots[slots != victim]
        wanting = slots[full]
        growing = wanting[: pool.num_free]
        if len(growing):
            self._grown.append((growing, self.kv.grow(growing)))
            rows.grown_ns[growing] += self._now - rows.started_ns[growing]
        if len(growing) == len(wanting):
            return slots
        served = ~full
        served[full.nonzero()[0][: len(growing)]] = True
        return slots[served]

    def admit(self, reserve_outputs: bool) -> int | None:
        request = self.queue.head()
        if request is None or request.slot >= 0 or not self.rows.num_free:
            return None
        num_tokens = request.num_prompt_tokens + (request.max_outputs - 1 if reserve_outputs else len(request.outputs))
        growing = len(self.rows.in_order()) and not reserve_outputs
        spare = max(1, self.kv.pool.num_blocks // _WATERMARK) if growing else 0
        if self.kv.blocks_for(num_tokens) + spare > self.kv.pool.num_free:
            return None
        self.queue.remove(request)
        request.become(State.RUNNING)
        slot = self.rows.start(request, self._now)
        self.kv.start(slot, num_tokens)
        self._starts.append(slot)
        if request.admitted_ns < 0:
            request.admitted_ns = self._now
        request.preempted_ns = request.preempted_until(self._now)
        request.preempted_since_ns = -1
        return slot

    def is_empty(self) -> bool:
        return self.rows.num_free == self.rows.max_rows

    def release_padding(self) -> None:
        for slot in self.padding().tolist():
            self._leave(slot, RETIRING)

    # --------------------------------------------------------------------------------------------------- facts

    def load(self, query_id: int) -> LoadReply:
        """Requests, rows and blocks at this moment."""
        pool, counters = self.kv.pool, self.counters
        num_waiting = len(self.queue)
        return LoadReply(
            query_id=query_id,
            running_requests=len(self._requests) - num_waiting,
            waiting_requests=num_waiting,
            waiting_tokens=self.queue.num_tokens,
            total_blocks=pool.num_blocks,
            free_blocks=pool.num_free,
            held_blocks=pool.num_held,
            retiring_blocks=pool.num_retiring,
            cached_blocks=0,
            kv_tokens=self._kv_tokens,
            steps=counters.steps,
            output_tokens=counters.output_tokens,
            accepted_requests=counters.accepted,
            finished_requests=counters.finished,
            cancelled_requests=counters.cancelled,
            refused_requests=counters.refused,
            preemptions=counters.preemptions,
        )

    def request_of(self, slot: int) -> Request | None:
        """Who holds, or last held, the row; for watchers."""
        return self.rows.requests[slot]

    def check_invariants(self) -> None:
        """Raises AssertionError when blocks, rows and requests contradict one another."""
        self.kv.check_invariants()
        rows, kv_tokens = self.rows, 0
        for slot in range(rows.max_rows):
            request, state = rows.requests[slot], int(rows.state[slot])
            assert (request is None) == (state == 0), f"slot {slot}"
            assert state in (RUNNING, PADDING) or self.kv.tables.num_blocks[slot] == 0, f"slot {slot} left with blocks"
            if request is not None and state in (RUNNING, PREEMPTED):
                expected = State.RUNNING if state == RUNNING else State.PREEMPTED
                assert request.slot == slot and request.state == expected, f"slot {slot}"
            if state == RUNNING and request is not None:
                kv_tokens += int(rows.num_computed[slot])
                room = int(self.kv.tables.num_blocks[slot]) * self.kv.block_size
                assert rows.num_computed[slot] <= min(room, int(rows.num_tokens[slot])), f"slot {slot} computed too much"
                planned = int(rows.num_tokens[slot]) - request.num_prompt_tokens  # output tokens arrived or in flight
                assert rows.num_outputs[slot] <= planned <= rows.max_outputs[slot], f"slot {slot} miscounts outputs"
                assert rows.max_tokens[slot] == request.num_prompt_tokens + request.max_outputs, f"slot {slot}"
        assert kv_tokens == self._kv_tokens, "computed tokens are miscounted"
        for request in self._requests.values():
            assert (request in self.queue) == (request.state in (State.WAITING, State.PREEMPTED)), request.request_id
        assert len(self._requests) == len(self._by_handle)

    # ------------------------------------------------------------------------------------------------ plan, inside

    def _build(self, selection: Selection, now: int) -> StepPlan:
        rows, slots, grown = self.rows, selection.slots, self._grown
        starts = [self._start_of(slot) for slot in self._starts]
        plan = StepPlan(
            PlanHeader(self.config.group, self.epoch, self._next_step, tuple(starts)),
            num_tokens=selection.num_tokens,
            slots=slots.astype(np.uint16),
            padding=selection.padding.astype(np.uint16),
            ended=np.array(self._ended, np.uint16),
        )
        if grown:
            plan.grow_slots = np.concatenate([slots for slots, _ in grown]).astype(np.uint16)
            plan.grow_blocks = np.concatenate([blocks for _, blocks in grown])
        if starts:
            requests = [rows.requests[slot] for slot in self._starts]
            plan.start_tokens = np.concatenate([request.tokens() for request in requests if request is not None])
            plan.start_blocks = np.concatenate([self.kv.tables.row(slot) for slot in self._starts])
            rows.last_step[self._starts] = self._next_step  # also of those that have to wait for the budget
        assert len(slots) + len(selection.padding) <= rows.max_rows
        num_tokens = int(selection.num_tokens.sum())
        assert num_tokens <= self.token_budget

        before = rows.num_computed[slots]
        computed = before + selection.num_tokens
        sampled = slots[computed == rows.num_tokens[slots]]
        rows.num_computed[slots] = computed
        rows.num_tokens[sampled] += 1
        self._kv_tokens += num_tokens
        rows.last_step[slots] = self._next_step
        rows.last_step[selection.padding] = self._next_step
        self.in_flight.append(
            InFlight(
                step_id=self._next_step,
                planned_ns=now,
                plan=plan,
                sampled=sampled,
                joined=slots[before == 0],
                held_blocks=self.kv.pool.num_held,
                kv_tokens=self._kv_tokens,
                num_waiting=len(self.queue),
            )
        )
        self._ended, self._grown, self._starts = [], [], []
        self._next_step += 1
        self.counters.steps += 1
        return plan

    def _start_of(self, slot: int) -> SequenceStart:
        request = self.rows.requests[slot]
        assert request is not None
        return SequenceStart(
            slot=slot,
            sequence_id=request.sequence_id,
            output_index=0,
            num_prompt_tokens=request.num_prompt_tokens,
            num_tokens=request.num_prompt_tokens + len(request.outputs),
            num_computed_tokens=0,
            num_blocks=int(self.kv.tables.num_blocks[slot]),
            sampling=request.header.sampling,
        )

    def _preempt(self, slot: int, now: int) -> Request:
        """Recompute later: the request keeps its tokens, its row and blocks go. Back to the head of its class."""
        request = self.rows.requests[slot]
        assert request is not None
        request.become(State.PREEMPTED)
        request.preemptions += 1
        request.preempted_since_ns = now
        request.recomputed_tokens += int(self.rows.num_computed[slot])
        self.counters.preemptions += 1
        self._note_leave(request, "preempted")
        self.queue.push_front(request)
        self._stop_running(request, now)
        self._leave(slot, PREEMPTED)
        return request

    def _stop_running(self, request: Request, now: int) -> None:
        """Closes the books of the row: its blocks × nanoseconds, and the tokens that counted as held for somebody."""
        rows, slot = self.rows, request.slot
        held_ns = int(self.kv.tables.num_blocks[slot]) * (now - int(rows.started_ns[slot])) - int(rows.grown_ns[slot])
        request.block_ns += max(0, held_ns)
        self._kv_tokens -= int(rows.num_computed[slot])

    # ----------------------------------------------------------------------------------------------- apply, inside

    def _take_tokens(self, slots: Slots, tokens: I32, now: int) -> None:
        rows = self.rows
        state = rows.state[slots]
        live = (state == RUNNING) | (state == PREEMPTED)
        slots, tokens = slots[live], tokens[live]
        if not len(slots):
            return
        counts = rows.append_outputs(slots, tokens)
        self.counters.output_tokens += len(slots)
        self._emit_tokens(slots, tokens)
        for slot in slots[counts == 1].tolist():
            request = rows.requests[slot]
            assert request is not None
            request.first_token_ns = now
            request.preempted_first_ns = request.preempted_until(now)
        stopped = rows.stopped(slots, tokens)
        for i in (stopped | (counts == rows.max_outputs[slots])).nonzero()[0].tolist():
            request = rows.requests[int(slots[i])]
            assert request is not None
            if stopped[i]:
                self._end(request, EndReason.STOP, now, stop_token_id=int(tokens[i]))
            else:
                self._end(request, EndReason.LENGTH, now)

    def _emit_tokens(self, slots: Slots, tokens: I32) -> None:
        frontends, handles = self.rows.frontend[slots], self.rows.handle[slots]
        for frontend in np.bincount(frontends).nonzero()[0].tolist():
            mine = frontends == frontend
            self._emitted.tokens[frontend] = (handles[mine], tokens[mine])

    def _end(
        self,
        request: Request,
        reason: EndReason,
        now: int,
        *,
        num_outputs: int | None = None,
        stop_token_id: int = -1,
        message: str = "",
    ) -> None:
        """The request is over, wherever it was. Its blocks come back when the last plan that names them has returned."""
        slot, rows = request.slot, self.rows
        num_arrived = int(rows.num_outputs[slot]) if slot >= 0 else len(request.outputs)
        num_outputs = num_arrived if num_outputs is None else min(num_outputs, num_arrived)
        if request.state is State.RUNNING:
            self._stop_running(request, now)
            if self.policy.keeps_ended_rows and reason in (EndReason.STOP, EndReason.LENGTH):
                rows.pad(slot)
            else:
                self._leave(slot, RETIRING)
        else:
            self.queue.remove(request)
            if slot >= 0:  # preempted, its last plan still in flight
                rows.state[slot] = RETIRING
        request.preempted_ns = request.preempted_until(now)
        request.ended_ns = now
        request.become(State.ENDED)
        del self._requests[request.request_id]
        del self._by_handle[request.frontend, request.header.handle]
        self._ended_ids[request.request_id] = None
        if len(self._ended_ids) > _REMEMBERED_IDS:
            self._ended_ids.popitem(last=False)
        self._end_times.append(now)
        if reason is EndReason.CANCELLED:
            self.counters.cancelled += 1
        else:
            self.counters.finished += 1
        self._note_leave(request, reason.value)
        ended = OutputEnded(request.header.handle, reason, request.stats(num_outputs), stop_token_id, message)
        self._emitted.ended.setdefault(request.frontend, []).append(ended)

    def _leave(self, slot: int, state: int) -> None:
        """The row is in no plan from now on."""
        returned = self._returned_step()
        last = int(self.rows.last_step[slot])
        assert last >= 0, "a row left before any plan named it"
        self.kv.release(slot, last, returned)
        self.rows.leave(slot, state)
        self._ended.append(slot)
        if last <= returned:
            self._free_slot(slot)
        else:
            self._retiring.append(slot)

    def _free_slots(self, returned_step: int) -> None:
        """Slots whose last plan has returned can be taken again; a preempted request takes its tokens along."""
        for slot in [slot for slot in self._retiring if self.rows.last_step[slot] <= returned_step]:
            self._retiring.remove(slot)
            self._free_slot(slot)

    def _free_slot(self, slot: int) -> None:
        was_preempted = self.rows.state[slot] == PREEMPTED
        outputs = self.rows.outputs[slot, : self.rows.num_outputs[slot]].copy()
        request = self.rows.free(slot)
        if was_preempted:
            request.outputs = outputs
        request.slot = -1

    def _returned_step(self) -> int:
        """The latest step up to which all results have arrived."""
        return self.in_flight[0].step_id - 1 if self.in_flight else self._next_step - 1

    # ------------------------------------------------------------------------------------------------------ small

    def _why_not(self, add: AddRequest, frontend: int) -> Refused | None:
        header, num_prompt = add.header, len(add.prompt)

        def refused(code: str, message: str, field: str = "", retry_after_ns: int = 0) -> Refused:
            return Refused(header.handle, code, message, field, retry_after_ns)

        if self.facts is None or self.draining:
            why = "the server is draining" if self.draining else "no worker has joined yet"
            return refused("UNAVAILABLE", why, retry_after_ns=_SECOND)
        if header.request_id in self._requests or (frontend, header.handle) in self._by_handle:
            return refused("ALREADY_EXISTS", f"request_id {header.request_id!r} is alive")
        if not self.queue.knows(header.priority):
            return refused("INVALID_ARGUMENT", f"unknown priority class {header.priority}", "scheduling.priority")
        if num_prompt == 0:
            return refused("INVALID_ARGUMENT", "the prompt is empty", "prompt")
        if int(add.prompt.min()) < 0 or int(add.prompt.max()) >= self.facts.vocab_size:
            return refused("INVALID_ARGUMENT", f"a token id is not below {self.facts.vocab_size}", "prompt.token_ids")
        if not all(0 <= token < self.facts.vocab_size for token in header.sampling.stop_token_ids):
            return refused("INVALID_ARGUMENT", f"a token id is not below {self.facts.vocab_size}", "stopping.stop_token_ids")
        if num_prompt >= self.facts.max_model_len:
            limit = self.facts.max_model_len
            return refused("INVALID_ARGUMENT", f"the prompt has {num_prompt} tokens, the model's length is {limit}", "prompt")
        if num_prompt + header.max_tokens > self.facts.max_model_len:
            what = f"prompt ({num_prompt}) + max_tokens ({header.max_tokens})"
            return refused(
                "INVALID_ARGUMENT", f"{what} pass the model's length ({self.facts.max_model_len})", "stopping.max_tokens"
            )
        wanted = num_prompt + max(header.max_tokens, 1)
        if self._max_outputs(num_prompt, header.max_tokens) < max(header.max_tokens, 1):
            return refused(
                "FAILED_PRECONDITION",
                f"the request needs {self.kv.blocks_for(wanted - 1)} blocks for {wanted} tokens, "
                f"the whole KV cache has {self.kv.pool.num_blocks} of {self.kv.block_size} tokens",
            )
        if not self.queue.has_room_for(num_prompt):
            return refused(
                "RESOURCE_EXHAUSTED",
                f"{len(self.queue)} requests with {self.queue.num_tokens} prompt tokens wait already",
                retry_after_ns=self._drain_time(),
            )
        return None

    def _max_outputs(self, num_prompt: int, max_tokens: int) -> int:
        """Output tokens that the request may have: what it asks for (0: no limit of its own), as far as the model's length and
        the whole pool allow. The last one needs no block: nothing is computed after it."""
        assert self.facts is not None
        room = min(self.facts.max_model_len, self.facts.num_blocks * self.facts.block_size + 1) - num_prompt
        return min(max_tokens, room) if max_tokens else room

    def _drain_time(self) -> int:
        """Nanoseconds until a place in the queue should be free, from the rate at which requests have been ending."""
        if len(self._end_times) < 2:
            return _SECOND
        per_request = (self._end_times[-1] - self._end_times[0]) // (len(self._end_times) - 1)
        return min(max(per_request, _SECOND // 100), 60 * _SECOND)

    def _note_leave(self, request: Request, reason: str) -> None:
        if len(self.leaves) < 10_000:
            self.leaves.append((request.request_id, reason))

    def _take_outputs(self) -> list[Output]:
        emitted, self._emitted = self._emitted, _Emitted()
        outputs = []
        for frontend in sorted(set(emitted.tokens) | set(emitted.ended)):
            batch = TokenBatch(TokenBatchHeader(self._returned_step(), tuple(emitted.ended.get(frontend, ()))))
            if frontend in emitted.tokens:
                batch.handles, batch.tokens = emitted.tokens[frontend]
            outputs.append(Output(frontend, batch))
        return outputs

    def _new_epoch(self, max_rows: int, num_blocks: int, block_size: int, vocab_size: int) -> None:
        self.rows = Rows(max_rows, vocab_size)
        self.kv = KVCacheManager(num_blocks, block_size, max_rows)
        self.in_flight.clear()
        self._next_step = 0
        self._starts, self._grown, self._ended, self._retiring = [], [], [], []
