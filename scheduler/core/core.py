"""The core: takes requests and results, gives plans. See the package's docstring for what it may not do.

Two plans may be in flight. A plan is made on what is known plus what the plans in flight will bring: a row whose token is
being sampled counts as one token longer, and the worker feeds that token to itself. What cannot be foreseen (an end token, a
cancel) is found when the result arrives; at most one row of one step has then been computed in vain.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvcache.block_table import Slots
from kvcache.manager import KVCacheManager
from kvcache.prefix_index import hash_blocks
from scheduler.core import admission, arrival, invariants, moving, policies, preemption, publishing
from scheduler.core.admission import Hindered, Place
from scheduler.core.arrival import NOTHING_ELSEWHERE, Elsewhere
from scheduler.core.config import CoreConfig
from scheduler.core.deadlines import Deadlines, expiry
from scheduler.core.policies import Selection
from scheduler.core.queue import Queue
from scheduler.core.request import QUEUED, Request, Sequence, State
from scheduler.core.rows import PADDING, PREEMPTED, RETIRING, RUNNING, Rows
from scheduler.core.step_cost import StepCost
from scheduler.core.tenants import Tenants
from scheduler.core.trials import Trials
from wire import (
    AddRequest,
    CancelOutcome,
    EndReason,
    LoadReply,
    MovedRequest,
    OutputEnded,
    PlanHeader,
    Preemption,
    Refused,
    RestoreRequest,
    SequenceStart,
    StepPlan,
    StepResult,
    TokenBatch,
    TokenBatchHeader,
    WorkerFacts,
)
from wire.messages import I32, U32

PIPELINE_DEPTH = 2
_REMEMBERED_IDS = 10_000  # ended requests that Cancel still knows
_SECOND = 1_000_000_000
_sum, _max = np.add.reduce, np.maximum.reduce  # as the methods, in half the time
_PUBLISH_EVERY = 8  # steps
_LEAST_CHUNK = 16  # tokens of prompts in a step whose decodes alone pass the inter-token time: prompts get on all the same
_NO_LIMIT = np.iinfo(np.int32).max  # output tokens: until a worker says how many there may be
_PATIENCE_NS = 30 * _SECOND  # a request without a deadline goes before those whose latest start is so long after its arrival


class ProtocolError(Exception):
    """The worker answered what was not asked; its mirror can't be trusted any more."""


@dataclass(frozen=True, slots=True)
class Output:
    """Something for a front end."""

    frontend: int
    batch: TokenBatch
    kept: tuple[tuple[int, I32], ...] = ()  # (handle, all tokens) of outputs that ended, where the request has a resume window


@dataclass(slots=True)
class InFlight:
    """A plan whose result has not arrived."""

    step_id: int
    planned_ns: int
    plan: StepPlan
    num_tokens: int  # of all rows, those that pad too
    sampled: Slots  # slots that sample, in the order of the plan's rows
    before: I32  # tokens computed before it, of the plan's rows
    context: int  # what its tokens attend to, summed
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
    prompt_tokens: int = 0  # of requests admitted
    cached_tokens: int = 0  # of these, taken from the prefix cache
    recomputed_tokens: int = 0
    swapped_blocks: int = 0


@dataclass(slots=True)
class _Emitted:
    """What goes to the front ends, gathered while a verb runs."""

    tokens: dict[int, tuple[U32, I32]] = field(default_factory=dict)
    ended: dict[int, list[OutputEnded]] = field(default_factory=dict)
    kept: dict[int, list[tuple[int, I32]]] = field(default_factory=dict)


class Core:
    """Scheduler of one worker group. Its public methods are its whole list of inputs; `now` is in nanoseconds."""

    def __init__(self, config: CoreConfig) -> None:
        self.config = config
        self.policy = policies.by_name(config.policy)
        self.tenants = Tenants(config)
        self.queue: Queue[Sequence] = Queue(config, self.tenants)
        self.step_cost = StepCost()
        self.trials = Trials(config.max_crashes)
        self.counters = Counters()
        self.facts: WorkerFacts | None = None  # of the last worker that joined; its limits hold while it is away
        self.connected = False
        self.draining = False
        self.epoch = config.first_epoch
        self.in_flight: deque[InFlight] = deque()
        self.leaves: list[tuple[str, str]] = []  # (request_id, reason) since the watcher's last look; bounded
        self.token_budget = config.max_step_tokens
        self.static_batch_size = config.static_batch_size or config.max_batch_rows
        self.hindered: Hindered | None = None
        self._requests: dict[str, Request] = {}
        self._by_handle: dict[tuple[int, int], Sequence] = {}
        self._ended_requests: OrderedDict[str, Request] = OrderedDict()
        self._holding: dict[int, Request] = {}  # by number; those with outputs that wait for a sibling's prompt
        self._deadlines = Deadlines()
        self._end_times: deque[int] = deque(maxlen=64)  # of requests, by a clock that stands still while there is none
        self._busy_ns = 0
        self._busy_since_ns = 0
        self._next_number = 1
        self._next_sequence_id = 0
        self._next_step = 0
        self._num_running = 0  # requests with a row
        self._uses_quotas = any(tenant.max_blocks for tenant in config.tenants)
        self._sit_out = False  # at the last plan some rows had nothing to compute, or a reader far behind
        self._may_publish = False  # tokens have come since `publish_full`
        self._now = 0  # of the plan being made
        self._kv_tokens = 0  # computed tokens of all that run, counting plans in flight
        self._emitted = _Emitted()
        self._given_of: list[Request] | None = None  # those tried together whom the last request given belonged to
        self._starts: list[int] = []  # slots admitted for the plan being made
        self._grown: list[tuple[Slots, I32]] = []  # blocks appended for the plan being made
        self._ended: list[int] = []  # slots that the worker may forget with the next plan
        self._retiring: list[int] = []  # slots that left, until their last plan has returned
        self._copies: list[tuple[int, int]] = []  # blocks copied by the plan being made
        self._swaps_out: list[tuple[I32, I32]] = []  # device and host blocks, likewise
        self._swaps_in: list[tuple[I32, I32]] = []  # host and device blocks, likewise
        self._new_epoch(config.max_batch_rows, 1, 1, 1, 0)

    # ------------------------------------------------------------------------------------------------ requests

    def add(self, add: AddRequest, frontend: int, now: int, elsewhere: Elsewhere = NOTHING_ELSEWHERE) -> Refused | None:
        """A new request. elsewhere: what other cores hold that counts against the same limits. None: accepted, its tokens will
        come; else why not."""
        refused = arrival.why_not(self, add, frontend, now, elsewhere)
        if refused is not None:
            self.counters.refused += 1
            return refused
        header, tenant = add.header, self.tenants.index_of(add.header.tenant)
        assert self.facts is not None and tenant is not None
        request = Request(
            header=header,
            frontend=frontend,
            number=self._next_number,
            prompt=add.prompt,
            tenant=tenant,
            max_outputs=arrival.max_outputs(self, len(add.prompt), header.max_tokens, tenant),
            digests=self._digests(add),
            accepted_ns=now,
            num_live=header.num_outputs,
        )
        self._enter(request, now)
        self.tenants.count(tenant, now, elsewhere.tenant_due_ns)
        latest_start = self._latest_start(request) if header.deadline_ns else 0
        shares = header.num_outputs > 1 and not self.policy.reserves_outputs
        for index in range(header.num_outputs):
            sequence = Sequence(
                request=request,
                output_index=index,
                sequence_id=self._next_sequence_id,
                order_ns=latest_start if header.deadline_ns else now + _PATIENCE_NS,
                state=State.HELD if index and shares else State.WAITING,
                digests=request.digests,
            )
            self._next_sequence_id += 1
            request.sequences.append(sequence)
            self._by_handle[frontend, sequence.handle] = sequence
        for sequence in request.sequences:
            if sequence.state is State.WAITING:
                self.queue.push(sequence)
        if shares:
            self._holding[request.number] = request
        if header.deadline_ns:
            self._deadlines.set(min(latest_start, expiry(request)), request)
        self.counters.accepted += 1
        return None

    def restore(self, restored: RestoreRequest, frontend: int, now: int) -> str:
        """A request of a core that is gone, with its tokens, all of which count as taken; one of its outputs at least goes on.
        Said before any worker has joined. Returns why it can't go on, or nothing."""
        assert self.facts is None and None in restored.header.ended
        header, ends = restored.header.add, restored.header.ended
        tenant = self.tenants.index_of(header.tenant)
        if tenant is None:
            return f"tenant {header.tenant!r} is not served any more"
        request = Request(
            header=header,
            frontend=frontend,
            number=self._next_number,
            prompt=restored.prompt,
            tenant=tenant,
            max_outputs=header.max_tokens or _NO_LIMIT,
            digests=b"",  # made when a worker joins
            accepted_ns=now,
            num_live=ends.count(None),
        )
        self._enter(request, now)
        parts = np.split(restored.tokens, np.cumsum(restored.num_tokens)[:-1])
        for tokens, end in zip(parts, ends, strict=True):
            sequence = self._restored(request, tokens, end, now)
            request.sequences.append(sequence)
            self._by_handle[frontend, sequence.handle] = sequence
            if sequence.state is State.PREEMPTED:
                self.queue.push_back(sequence)
            elif sequence.state is State.WAITING:
                self.queue.push(sequence)
        if header.deadline_ns:
            self._deadlines.set(expiry(request), request)
        self.counters.accepted += 1
        return ""

    def _restored(self, request: Request, tokens: I32, end: OutputEnded | None, now: int) -> Sequence:
        """The next output. When it had its first token is not known: it counts as had by now."""
        sequence = Sequence(request, len(request.sequences), self._next_sequence_id, now + _PATIENCE_NS)
        self._next_sequence_id += 1
        if end is not None:
            sequence.state, sequence.num_ended_outputs = State.ENDED, len(tokens)
            sequence.ended_ns, sequence.end_reason = now, end.reason.value
        elif len(tokens):
            sequence.state, sequence.outputs, sequence.taken = State.PREEMPTED, tokens, len(tokens)
            sequence.lost_tokens, sequence.preempted_since_ns = sequence.num_tokens - 1, now
            sequence.preempted_by.append(Preemption(now, "", sequence.lost_tokens, False))
            sequence.admitted_ns, sequence.first_token_ns = request.header.arrival_ns, now
        return sequence

    def can_give(self, request: Request) -> bool:
        """Whether it may go to another core now: it holds no row and no blocks, and no plan in flight names it."""
        return not any(sequence.slot >= 0 or sequence.host_blocks is not None for sequence in request.sequences)

    def give(self, frontend: int, handle: int, now: int) -> MovedRequest:
        """Takes a request out, with all that is known of it, for another core. Those that are tried apart, as they may crash
        workers, are given in the order in which they would be tried."""
        request = self._by_handle[frontend, handle].request
        assert self.can_give(request), f"{request.request_id} is in the batch"
        trial = next((trial for trial in self.trials.trials if request in trial), None)
        with_last = trial is not None and trial is self._given_of
        self._given_of = trial
        moved = moving.packed(request, self.kv.block_size, is_tried=trial is not None, is_tried_with_last=with_last)
        for sequence in request.sequences:
            if sequence.state in QUEUED:
                self.queue.remove(sequence)
            del self._by_handle[frontend, sequence.handle]
        del self._requests[request.request_id]
        self._holding.pop(request.number, None)
        self.tenants.leave(request.tenant)
        if self.trials.ended(request):
            self._confine()
        self.counters.accepted -= 1  # it is the other one's
        request.num_live = 0  # its alarms are void
        self.hindered = None
        if not self._requests:
            self._busy_ns += now - self._busy_since_ns
        return moved

    def take(self, moved: MovedRequest, frontend: int, now: int) -> None:
        """A request that another core gave, which fits here: it goes on where it was. Limits have let it in once."""
        header, tenant = moved.header.add, self.tenants.index_of(moved.header.add.tenant)
        assert tenant is not None and self.facts is not None, "cores of one server know the same tenants"
        request = Request(
            header=header,
            frontend=frontend,
            number=self._next_number,
            prompt=moved.prompt,
            tenant=tenant,
            max_outputs=arrival.max_outputs(self, len(moved.prompt), header.max_tokens, tenant),
            digests=moved.prefix_hashes.tobytes(),
            accepted_ns=moved.header.accepted_ns,
            crashes=moved.header.crashes,
            crashes_alone=moved.header.crashes_alone,
        )
        self._enter(request, now)
        if moved.header.hash_block_size != self.kv.block_size:
            self._rehash(request)
        parts = np.split(moved.tokens, np.cumsum(moved.num_tokens)[:-1])
        for index, (output, tokens) in enumerate(zip(moved.header.outputs, parts, strict=True)):
            unread = self.config.max_unread_tokens
            sequence = moving.sequence_of(request, index, self._next_sequence_id, output, tokens, unread)
            self._next_sequence_id += 1
            request.sequences.append(sequence)
            self._by_handle[frontend, sequence.handle] = sequence
            if sequence.state is State.PREEMPTED:
                self.queue.push_back(sequence)
            elif sequence.state is State.WAITING:
                self.queue.push(sequence)
        request.num_live = len(request.live())
        assert request.num_live and request.max_outputs > max(len(sequence.outputs) for sequence in request.live())
        self.counters.accepted += 1
        self.trials.take(request, moved.header.is_tried, moved.header.is_tried_with_last)
        self._confine()
        if header.deadline_ns:
            waits = all(sequence.admitted_ns < 0 for sequence in request.sequences)
            self._deadlines.set(min(self._latest_start(request), expiry(request)) if waits else expiry(request), request)

    def _enter(self, request: Request, now: int) -> None:
        if not self._requests:
            self._busy_since_ns = now
        self._next_number += 1
        self._requests[request.request_id] = request
        self.tenants.enter(request.tenant)

    def abort(self, frontend: int, handle: int, now: int) -> list[Output]:
        """The stream was dropped; `handle` is any of the request's. Unknown ones are of requests that have just ended: nothing
        happens."""
        sequence = self._by_handle.get((frontend, handle))
        if sequence is not None:
            self._end_request(sequence.request, EndReason.CANCELLED, now)
        return self.take_outputs()

    def cancel(self, request_id: str, now: int) -> tuple[CancelOutcome, list[Output]]:
        """Ends a request by its id, whichever front end it came from."""
        request = self._requests.get(request_id)
        if request is not None:
            self._end_request(request, EndReason.CANCELLED, now)
            return CancelOutcome.CANCELLED, self.take_outputs()
        known = request_id in self._ended_requests
        return (CancelOutcome.ALREADY_FINISHED if known else CancelOutcome.NOT_FOUND), []

    def truncate(self, frontend: int, handle: int, num_outputs: int, now: int) -> list[Output]:
        """The front end found a stop string in the text: the output ends with STOP and has `num_outputs` tokens."""
        sequence = self._by_handle.get((frontend, handle))
        if sequence is not None and sequence.state is not State.ENDED:
            self._end(sequence, EndReason.STOP, now, num_outputs=num_outputs)
        return self.take_outputs()

    def credit(self, frontend: int, handles: U32, num_tokens: I32, now: int) -> None:
        """Readers took so many more tokens of these outputs; one that had stopped reading is scheduled again."""
        for handle, count in zip(handles.tolist(), num_tokens.tolist(), strict=True):
            sequence = self._by_handle.get((frontend, handle))
            if sequence is None or sequence.state is State.ENDED or count <= 0:
                continue
            if sequence.slot >= 0 and self.rows.sequences[sequence.slot] is sequence:
                self.rows.take(sequence.slot, count, self.config.max_unread_tokens)
                sequence.taken = int(self.rows.taken[sequence.slot])
                unread = int(self.rows.num_tokens[sequence.slot]) - sequence.num_prompt_tokens - sequence.taken
            else:
                sequence.taken = min(sequence.taken + count, len(sequence.outputs))
                unread = len(sequence.outputs) - sequence.taken
            if sequence.state is State.PARKED and unread < self.config.max_unread_tokens:
                sequence.become(State.PREEMPTED)
                self.queue.push_back(sequence)

    def frontend_lost(self, frontend: int, now: int) -> None:
        """A front end is gone, and with it the readers of its requests."""
        for request in [request for request in self._requests.values() if request.frontend == frontend]:
            self._end_request(request, EndReason.CANCELLED, now)
        self._emitted.tokens.pop(frontend, None)  # nobody is there to hear them
        self._emitted.ended.pop(frontend, None)
        self._emitted.kept.pop(frontend, None)

    def set_policy(self, name: str, now: int) -> str:
        """Another policy from the next plan on; nothing running is lost. Says why not, or nothing."""
        try:
            policy = policies.by_name(name)
        except ValueError as error:
            return str(error)
        if not policy.keeps_ended_rows:
            self.release_padding()
        if policy.reserves_outputs:
            for request in list(self._holding.values()):
                self._release_held(request)
        self.policy = policy
        self.hindered = None
        self.queue.resume_all()
        return ""

    # ------------------------------------------------------------------------------------------------- workers

    def worker_joined(self, facts: WorkerFacts, now: int) -> list[Output]:
        """A worker with an empty mirror is there: a new epoch begins, and steps count from 0 again."""
        self._lose_worker(now)
        other_model = self.facts is not None and self.facts.vocab_size != facts.vocab_size
        other_block_size = self.facts is None or self.facts.block_size != facts.block_size
        self.facts = facts
        self.connected = True
        self.epoch += 1
        self.token_budget = min(self.config.max_step_tokens, facts.max_step_tokens)
        rows = min(self.config.max_batch_rows, facts.max_batch_rows, self.token_budget)  # every row can decode in every step
        self.static_batch_size = min(self.config.static_batch_size or rows, rows)
        self._new_epoch(rows, facts.num_blocks, facts.block_size, facts.vocab_size, facts.num_host_blocks)
        for request in list(self._requests.values()):  # accepted on the last worker's word
            room = arrival.max_outputs(self, request.num_prompt_tokens, request.max_outputs, request.tenant)
            if other_model:
                self._end_request(request, EndReason.ERROR, now, message="the new worker has another model")
            elif not request.header.max_tokens and room > max(len(sequence.outputs) for sequence in request.live()):
                request.max_outputs = room
            elif room < request.max_outputs:
                message = "the new worker's KV cache is too small for this request"
                self._end_request(request, EndReason.ERROR, now, message=message)
        if other_block_size:
            for request in self._requests.values():
                self._rehash(request)
        return self.take_outputs()

    def worker_lost(self, now: int) -> list[Output]:
        """The worker is gone, or its mirror is void. Everything running waits again, with the tokens emitted so far. Those that
        it was computing are suspects: see trials.py."""
        self._lose_worker(now)
        return self.take_outputs()

    def _lose_worker(self, now: int) -> None:
        if not self.connected:
            return
        self.connected = False
        culprit = self.trials.crashed(self._computing())
        self._confine()
        self.in_flight.clear()
        order = self.rows.in_order()
        running = [int(slot) for slot in order[self.rows.state[order] == RUNNING]]
        for slot in reversed(running):
            self._preempt(slot, now, None)
        self.release_padding()
        for sequence in self._by_handle.values():
            self._forget_swap(sequence)
        self._copies, self._swaps_out, self._swaps_in = [], [], []
        for pool in (self.kv.pool, self.kv.host):
            pool.returned(self._next_step)
        self._free_slots(self._next_step)
        for sequence in self._by_handle.values():  # the tokens that they were aside for may not come any more
            if sequence.state is State.PARKED and len(sequence.outputs) - sequence.taken < self.config.max_unread_tokens:
                sequence.become(State.PREEMPTED)
                self.queue.push_back(sequence)
        if culprit is not None:
            message = f"the worker failed {culprit.crashes_alone} times while it computed this request alone"
            self._end_request(culprit, EndReason.ERROR, now, message=message)

    def drop_all(self, message: str, now: int) -> list[Output]:
        """The server stops before they have finished."""
        for request in list(self._requests.values()):
            self._end_request(request, EndReason.UNAVAILABLE, now, message=message)
        return self.take_outputs()

    def drain(self) -> None:
        """No new requests from now on; those accepted go on."""
        self.draining = True

    # --------------------------------------------------------------------------------------------------- steps

    @property
    def num_kv_tokens(self) -> int:
        """Computed tokens of all that run, counting plans in flight."""
        return self._kv_tokens

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    @property
    def is_idle(self) -> bool:
        return not self._requests and not self.in_flight

    @property
    def next_wakeup_ns(self) -> int:
        """When `plan` is to be called again even if nothing happens until then; 0: never."""
        return self._deadlines.next_ns()

    def plan(self, now: int) -> StepPlan | None:
        """The next step, or None when there is nothing to compute yet or the pipeline is full. Ends first what the clock ends:
        `take_outputs` has the word of it."""
        self._now = now
        if self._deadlines.next_ns():
            self._keep_deadlines(now)
        if not self.connected or len(self.in_flight) >= PIPELINE_DEPTH:
            return None
        selection = self._select()
        while not len(selection.slots) and not self.in_flight and self.trials.groups:
            self.trials.skip()
            self._confine()
            selection = self._select()
        if not len(selection.slots) and not len(selection.padding) and not self._swaps_out:
            return None
        return self._build(selection, now)

    def _select(self) -> Selection:
        selection = self.policy.select(self)
        if not len(selection.slots) and self._sit_out:  # known only now: those whose readers have stopped may go
            selection = self.policy.select(self)
        return selection

    def apply(self, result: StepResult, now: int) -> list[Output]:
        """The result of the oldest plan in flight. Raises ProtocolError when it does not fit that plan."""
        if result.header.group != self.config.group:
            raise ProtocolError(f"result of group {result.header.group}, this is group {self.config.group}")
        if result.header.epoch != self.epoch or not self.connected:
            return []  # late words of a worker that was given up
        if not self.in_flight or result.header.step_id != self.in_flight[0].step_id:
            raise ProtocolError(f"result of step {result.header.step_id}, which was not the next one in flight")
        step = self.in_flight[0]
        count = len(step.sampled)
        if not len(result.slots) == len(result.tokens) == count or np.count_nonzero(result.slots != step.sampled):
            raise ProtocolError(f"step {step.step_id} sampled other rows than its plan")
        assert self.facts is not None
        if count and int(_max(result.tokens.view(np.uint32))) >= self.facts.vocab_size:  # negative ones too
            raise ProtocolError(f"step {step.step_id} sampled a token outside the vocabulary")
        self.in_flight.popleft()
        self.kv.pool.returned(step.step_id)
        if self.kv.host.num_retiring:
            self.kv.host.returned(step.step_id)
        rows = len(step.plan.slots) + len(step.plan.padding)
        self.step_cost.observe(step.num_tokens, rows, step.context, result.header.duration_ns)
        if self.trials.has_suspects:
            self._clear_suspects(step)
        self._take_tokens(step.sampled, result.tokens, now)
        if not step.step_id % _PUBLISH_EVERY:
            self.publish_full()
        self._free_slots(step.step_id)
        return self.take_outputs()

    # ----------------------------------------------------------------------------- the batch, as policies see it

    def running(self) -> Slots:
        order = self.rows.in_order()
        slots: Slots = order[self.rows.num_tokens[order] < self.rows.limit[order]]
        self._sit_out = len(slots) < len(order)
        return slots

    def padding(self) -> Slots:
        order = self.rows.in_order()
        slots: Slots = order[self.rows.state[order] == PADDING]
        return slots

    def missing(self, slots: Slots) -> I32:
        missing: I32 = self.rows.num_tokens[slots] - self.rows.num_computed[slots]
        return missing

    def priority(self, slots: Slots) -> NDArray[np.int8]:
        priority: NDArray[np.int8] = self.rows.priority[slots]
        return priority

    def next_priority(self) -> int:
        if not self.rows.num_free or (head := self.queue.head()) is None:
            return 0
        hindered = self.hindered
        if (
            hindered is not None
            and hindered.sequence is head
            and self.kv.pool.num_available <= hindered.available
            and len(self.kv.pool.index) <= hindered.num_known
        ):
            return 0  # as when it was last tried
        priority: int = head.priority
        return priority

    def chunk_budget(self, decodes: Slots, prompts: Slots) -> int:
        left = self.token_budget - len(decodes)
        if not self.config.target_itl_ns or not len(decodes):
            return left
        context = int(self.rows.num_computed[decodes].sum()) + len(decodes)
        chunk_context = int(self.rows.num_computed[prompts[0]]) if len(prompts) else 0
        within = self.step_cost.tokens_within(self.config.target_itl_ns, len(decodes), context, chunk_context, left)
        return min(left, max(within, _LEAST_CHUNK))

    def with_blocks(self, slots: Slots) -> Slots:
        rows, pool = self.rows, self.kv.pool
        full = self.kv.full(slots, rows.num_computed[slots])
        if self._uses_quotas:
            slots, full = self._within_quotas(slots, full)
        while (wanted := np.count_nonzero(full)) > pool.num_available + pool.num_retiring:
            victim = preemption.victim(rows, preemption.candidates(rows))
            self._preempt(victim, self._now, self._wanting(slots[full], victim))
            full, slots = full[slots != victim], slots[slots != victim]
        if not wanted:
            return slots
        wanting_slots = slots[full]
        growing = wanting_slots[: pool.num_available]
        if len(growing):
            self._grown.append((growing, self.kv.grow(growing)))
            rows.grown_ns[growing] += self._now - rows.started_ns[growing]
            if self._uses_quotas:
                self.tenants.held_blocks += np.bincount(rows.tenant[growing], minlength=len(self.tenants.held_blocks))
        if len(growing) == wanted:
            return slots
        served = ~full
        served[full.nonzero()[0][: len(growing)]] = True
        return slots[served]

    def _within_quotas(self, slots: Slots, full: NDArray[np.bool_]) -> tuple[Slots, NDArray[np.bool_]]:
        """Preempts rows of tenants that would grow past their quota of blocks."""
        tenants, rows = self.tenants, self.rows
        wanted = np.bincount(rows.tenant[slots[full]], minlength=len(tenants.held_blocks))
        over = (tenants.max_blocks > 0) & (wanted > 0) & (tenants.held_blocks + wanted > tenants.max_blocks)
        for tenant in over.nonzero()[0].tolist():
            while True:
                growing = slots[full & (rows.tenant[slots] == tenant)]
                if tenants.held_blocks[tenant] + len(growing) <= tenants.max_blocks[tenant]:
                    break
                victim = preemption.victim(rows, preemption.candidates(rows, tenant=tenant))
                self._preempt(victim, self._now, self._wanting(growing, victim))
                full, slots = full[slots != victim], slots[slots != victim]
        return slots, full

    def make_room(self) -> None:
        rows, pool = self.rows, self.kv.pool
        if self.policy.reserves_outputs:
            self._put_aside()
            return
        if rows.num_free and self.hindered is None:
            return  # nothing is short, or it was not tried yet
        if not self._sit_out and not rows.has_below(self.queue.highest_priority()):
            return  # nobody could go
        sequence = self._head_within_quota()
        if sequence is None or sequence.slot >= 0:
            return
        lower = preemption.candidates(rows, below=sequence.priority)
        if self.queue.is_aged_turn:  # who has waited longer would be the head in its place, unless its reader has stopped
            is_older = [rows.sequence(slot).sequence_id < sequence.sequence_id for slot in lower.tolist()]
            lower = lower[~(np.array(is_older, np.bool_) & preemption.is_reading(rows, lower))]
        if not len(lower):
            return
        self.publish_full()
        place = admission.place_of(self, sequence)
        if place is None:
            return
        cost, ending = self.kv.cost(place.num_tokens, place.shared, place.copies_last), preemption.ending(rows)
        coming = pool.num_available + pool.num_retiring + self.kv.num_freed_by(np.append(ending, lower))
        if coming < cost + admission.spare_blocks(self):
            return
        while rows.num_free + len(self._retiring) + len(ending) == 0 or (
            pool.num_available + pool.num_retiring + self.kv.num_freed_by(ending) < cost + admission.spare_blocks(self)
        ):
            if not len(lower):
                return
            victim = preemption.victim(rows, lower)
            lower = lower[lower != victim]
            self._preempt(victim, self._now, sequence)

    def _put_aside(self) -> None:
        """When somebody waits, all rows whose readers have stopped, so that a batch that admits only as a whole can end."""
        if self._sit_out and (sequence := self.queue.head()) is not None:
            for slot in preemption.candidates(self.rows, below=0).tolist():
                self._preempt(slot, self._now, sequence)

    def is_oldest_turn(self) -> bool:
        return self._next_step % self.config.oldest_every == 0

    def _head_within_quota(self) -> Sequence | None:
        while (sequence := self.queue.head()) is not None and self._uses_quotas:
            num_blocks = self.kv.blocks_for(admission.tokens_to_place(self, sequence))
            if not admission.passes_quota(self, sequence.tenant, num_blocks):
                break
            self.queue.pass_over(sequence.tenant)
        return sequence

    def admit(self) -> int | None:
        self.publish_full()
        while (sequence := self._head_within_quota()) is not None:
            if sequence.slot >= 0 or not self.rows.num_free:
                return None
            available = self.kv.pool.num_available
            place = admission.place_of(self, sequence)
            if place is None:
                self._hold(sequence)
                continue
            needed = self.kv.cost(place.num_tokens, place.shared, place.copies_last)
            missing = needed + admission.spare_blocks(self) - available
            if missing > 0:
                self.hindered = Hindered(sequence, missing, needed, available, len(self.kv.pool.index))
                return None
            self.hindered = None
            return self._admit(sequence, place)
        self.hindered = None
        return None

    def _admit(self, sequence: Sequence, place: Place) -> int:
        request, rows, kv = sequence.request, self.rows, self.kv
        sequence.is_aged = self.queue.is_aged_turn
        self.queue.take(sequence)
        was_preempted = sequence.state is State.PREEMPTED
        sequence.become(State.RUNNING)
        slot = rows.start(sequence, place.num_computed, self.config.max_unread_tokens, self._now)
        kv.start(slot, place.num_tokens, place.shared)
        if place.copies_last:
            last = len(place.shared) - 1
            self._copies.append(kv.copy_on_write(slot, last, self._next_step, self._returned_step()))
        if sequence.host_blocks is not None:
            self._swap_in(sequence, slot, place)
        rows.is_protected[slot] = sequence.preemptions >= self.config.max_preemptions > 0 or self.policy.reserves_outputs
        self._starts.append(slot)
        if request.digests or self._hashes(request):
            rows.num_published[slot] = place.num_hits
            rows.next_publish[slot] = (place.num_hits + 1) * kv.block_size - request.num_prompt_tokens + 1
        if self._uses_quotas:
            self.tenants.held_blocks[request.tenant] += int(kv.tables.num_blocks[slot])
        if not request.num_running:
            self._num_running += 1
        request.num_running += 1
        self._kv_tokens += place.num_computed
        self._account(sequence, place, was_preempted)
        return slot

    def _account(self, sequence: Sequence, place: Place, was_preempted: bool) -> None:
        """Who is charged for the admission, and what it brought."""
        if was_preempted:
            recomputed = max(0, sequence.lost_tokens - place.num_computed)
            sequence.recomputed_tokens += recomputed
            self.counters.recomputed_tokens += recomputed
            if sequence.preempted_by:
                sequence.preempted_by[-1].until_ns, sequence.preempted_by[-1].until_step = self._now, self._next_step
        elif sequence.admitted_ns < 0:
            sequence.admitted_ns, sequence.first_step = self._now, self._next_step
            if sequence.output_index == 0:
                sequence.cached_tokens = place.num_computed
                self.counters.prompt_tokens += sequence.num_prompt_tokens
                self.counters.cached_tokens += place.num_computed
                self.tenants.charge_input(sequence.tenant, sequence.num_prompt_tokens - place.num_computed)
        sequence.preempted_ns = sequence.preempted_until(self._now)
        sequence.preempted_since_ns = -1

    def _swap_in(self, sequence: Sequence, slot: int, place: Place) -> None:
        """The swapped blocks come back, but for those that the prefix cache still has."""
        host_blocks, first = sequence.host_blocks, len(place.shared)
        assert host_blocks is not None
        if first < len(host_blocks):
            self._swaps_in.append((host_blocks[first:], self.kv.tables.row(slot)[first : len(host_blocks)].copy()))
            self.counters.swapped_blocks += len(host_blocks) - first
        self.kv.host.release(host_blocks, self._next_step, self._returned_step())
        sequence.host_blocks = None

    def _hold(self, sequence: Sequence) -> None:
        """Until a sibling has computed their prompt."""
        self.queue.remove(sequence)
        sequence.become(State.HELD)
        self._holding[sequence.request.number] = sequence.request

    def _release_held(self, request: Request) -> None:
        for sequence in request.sequences:
            if sequence.state is State.HELD:
                sequence.become(State.WAITING)
                self.queue.push(sequence)
        self._holding.pop(request.number, None)

    def is_empty(self) -> bool:
        return self.rows.num_free == self.rows.max_rows

    def release_padding(self) -> None:
        for slot in self.padding().tolist():
            self._leave(slot, RETIRING)

    # --------------------------------------------------------------------------------------------------- facts

    def load(self, query_id: int) -> LoadReply:
        """Requests, rows and blocks at this moment."""
        pool, counters = self.kv.pool, self.counters
        return LoadReply(
            query_id=query_id,
            running_requests=self._num_running,
            waiting_requests=len(self._requests) - self._num_running,
            waiting_tokens=self.queue.num_tokens,
            total_blocks=pool.num_blocks,
            free_blocks=pool.num_free,
            held_blocks=pool.num_held,
            retiring_blocks=pool.num_retiring,
            cached_blocks=pool.num_cached,
            kv_tokens=self._kv_tokens,
            steps=counters.steps,
            output_tokens=counters.output_tokens,
            accepted_requests=counters.accepted,
            finished_requests=counters.finished,
            cancelled_requests=counters.cancelled,
            refused_requests=counters.refused,
            preemptions=counters.preemptions,
            recomputed_tokens=counters.recomputed_tokens,
            cached_tokens=counters.cached_tokens,
            prompt_tokens=counters.prompt_tokens,
            held_host_blocks=self.kv.host.num_held,
            swapped_blocks=counters.swapped_blocks,
        )

    def request(self, request_id: str) -> Request | None:
        """Alive, or ended not long ago."""
        return self._requests.get(request_id) or self._ended_requests.get(request_id)

    def num_outputs(self, sequence: Sequence) -> int:
        """Output tokens that have arrived."""
        if sequence.state is State.ENDED:
            return sequence.num_ended_outputs
        slot = sequence.slot
        held = slot >= 0 and self.rows.sequences[slot] is sequence
        return int(self.rows.num_outputs[slot]) if held else len(sequence.outputs)

    def output_tokens(self, sequence: Sequence) -> I32:
        """Those that have arrived, of an output that has not ended; good until the next verb."""
        slot = sequence.slot
        held = slot >= 0 and self.rows.sequences[slot] is sequence
        tokens: I32 = self.rows.outputs[slot, : self.rows.num_outputs[slot]] if held else sequence.outputs
        return tokens

    def sequence(self, frontend: int, handle: int) -> Sequence:
        """An output of a request that is alive."""
        return self._by_handle[frontend, handle]

    def reader(self, slot: int) -> tuple[int, int] | None:
        """(front end, handle) of whom the next result of this row goes to; None: nobody wants it any more."""
        if self.rows.state[slot] not in (RUNNING, PREEMPTED):
            return None
        return int(self.rows.frontend[slot]), int(self.rows.handle[slot])

    def starts_now(self, slot: int) -> bool:
        """Whether the row starts with the plan being made: what it copies is nobody's source yet."""
        return slot in self._starts

    def publish_full(self) -> None:
        """Blocks that have become full since the last time go to the prefix index."""
        if self._may_publish:
            self._may_publish = False
            publishing.publish_full(self.rows, self.kv)

    def has_handle(self, frontend: int, handle: int) -> bool:
        return (frontend, handle) in self._by_handle

    def live_requests(self) -> Iterable[Request]:
        """By arrival."""
        return self._requests.values()

    def mean_end_interval(self) -> int:
        """Nanoseconds between the last ends of requests, without the time in which there were none; 0: not known yet."""
        if len(self._end_times) < 2:
            return 0
        return (self._end_times[-1] - self._end_times[0]) // (len(self._end_times) - 1)

    def check_invariants(self) -> None:
        """Raises AssertionError when blocks, rows and requests contradict one another."""
        self.kv.check_invariants()
        invariants.check_rows(self.rows, self.kv, self._kv_tokens)
        invariants.check_requests(self._requests, self._holding, self.queue, self._num_running)
        known = sum(len(request.sequences) for request in self._requests.values())
        assert known == len(self._by_handle), "handles are miscounted"
        swapped = [sequence.host_blocks for sequence in self._by_handle.values() if sequence.host_blocks is not None]
        assert sum(map(len, swapped)) == self.kv.host.num_held, "host blocks are miscounted"
        if self._uses_quotas:
            invariants.check_tenants(self.tenants, self.rows, self.kv)

    # ------------------------------------------------------------------------------------------------ plan, inside

    def _keep_deadlines(self, now: int) -> None:
        for request in self._deadlines.due(now):
            end_ns = expiry(request)
            waits = all(sequence.admitted_ns < 0 for sequence in request.sequences)
            if now >= end_ns:
                self._end_request(request, EndReason.DEADLINE, now, message="its deadline has passed")
            elif waits and not request.header.partial_at_deadline:
                latest_start = self._latest_start(request)
                if now < latest_start:  # steps were measured as faster meanwhile, or a prefix was found
                    self._deadlines.set(min(latest_start, end_ns), request)
                    continue
                prefill_ns = request.header.deadline_ns - latest_start
                message = f"its first token would take {prefill_ns / 1e6:.0f} ms, and {(end_ns - now) / 1e6:.0f} ms are left"
                self._end_request(request, EndReason.DEADLINE, now, message=message)
            else:
                self._deadlines.set(end_ns, request)

    def _latest_start(self, request: Request) -> int:
        """When its prompt must begin to be computed to have its first token by its deadline, with what is cached now."""
        num_tokens, pairs = arrival.tokens_to_compute(self, request.num_prompt_tokens, request.digests)
        return request.header.deadline_ns - self.step_cost.prefill_ns(num_tokens, self.token_budget, pairs)

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
        if len(grown) == 1:
            plan.grow_slots, plan.grow_blocks = grown[0][0].astype(np.uint16), grown[0][1]
        elif grown:
            plan.grow_slots = np.concatenate([slots for slots, _ in grown]).astype(np.uint16)
            plan.grow_blocks = np.concatenate([blocks for _, blocks in grown])
        if starts:
            plan.start_tokens = np.concatenate([sequence.tokens() for sequence in self._of(self._starts)])
            plan.start_blocks = np.concatenate([self.kv.tables.row(slot) for slot in self._starts])
            rows.last_step[self._starts] = self._next_step  # also of those that have to wait for the budget
        if self._copies or self._swaps_out or self._swaps_in:
            self._move_blocks(plan)
        assert len(slots) + len(selection.padding) <= rows.max_rows
        num_tokens = int(_sum(selection.num_tokens))
        assert num_tokens <= self.token_budget

        takes = selection.num_tokens
        before = rows.num_computed[slots]
        computed = before + takes
        is_sampled = computed == rows.num_tokens[slots]
        sampled = slots[is_sampled]
        rows.num_computed[slots] = computed
        rows.num_tokens[sampled] = computed[is_sampled] + 1
        self._kv_tokens += num_tokens
        rows.last_step[slots] = self._next_step
        if len(selection.padding):
            rows.last_step[selection.padding] = self._next_step
        context = int(_sum(computed, dtype=np.int64))
        if num_tokens > len(slots):
            chunks = (takes > 1).nonzero()[0]
            context += int((((takes[chunks] - 1).astype(np.int64)) * (2 * before[chunks] + takes[chunks])).sum()) // 2
            for slot in slots[chunks].tolist():
                publishing.publish(rows, self.kv, slot)
        for request in list(self._holding.values()) if self._holding else ():
            self._look_at_held(request)
        self.in_flight.append(
            InFlight(
                step_id=self._next_step,
                planned_ns=now,
                plan=plan,
                num_tokens=num_tokens + len(selection.padding),
                sampled=sampled,
                before=before,
                context=context,
                held_blocks=self.kv.pool.num_held,
                kv_tokens=self._kv_tokens,
                num_waiting=len(self.queue),
            )
        )
        self._ended, self._grown, self._starts = [], [], []
        self._next_step += 1
        self.counters.steps += 1
        return plan

    def _move_blocks(self, plan: StepPlan) -> None:
        if self._copies:
            copies = np.array(self._copies, np.int32)
            plan.copy_from, plan.copy_to = copies[:, 0], copies[:, 1]
        if self._swaps_out:
            plan.swap_out_blocks = np.concatenate([blocks for blocks, _ in self._swaps_out])
            plan.swap_out_host_blocks = np.concatenate([blocks for _, blocks in self._swaps_out])
        if self._swaps_in:
            plan.swap_in_host_blocks = np.concatenate([blocks for blocks, _ in self._swaps_in])
            plan.swap_in_blocks = np.concatenate([blocks for _, blocks in self._swaps_in])
        self._copies, self._swaps_out, self._swaps_in = [], [], []

    def _look_at_held(self, request: Request) -> None:
        """Siblings join once the prompt is computed, or nobody is left who would compute it."""
        prompt = request.num_prompt_tokens
        running = [sequence.slot for sequence in request.sequences if sequence.state is State.RUNNING]
        queued = any(sequence.state in (*QUEUED, State.PARKED) for sequence in request.sequences)
        held = any(sequence.state is State.HELD for sequence in request.sequences)
        if not held or any(self.rows.num_computed[slot] >= prompt for slot in running) or not (running or queued):
            self._release_held(request)

    def _start_of(self, slot: int) -> SequenceStart:
        sequence = self.rows.sequence(slot)
        return SequenceStart(
            slot=slot,
            sequence_id=sequence.sequence_id,
            output_index=sequence.output_index,
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_tokens=sequence.num_tokens,
            num_computed_tokens=int(self.rows.start_computed[slot]),
            num_blocks=int(self.kv.tables.num_blocks[slot]),
            sampling=sequence.header.sampling,
        )

    def _preempt(self, slot: int, now: int, by: Sequence | None) -> Sequence:
        """The sequence keeps its tokens; its row goes, its blocks go or are swapped. Back before the new ones of its class, or
        aside when its reader does not read. by: whose need it was; None: the worker is lost."""
        rows, sequence = self.rows, self.rows.sequence(slot)
        computed = int(rows.num_computed[slot])
        num_blocks = self.kv.blocks_for(computed)
        swaps = by is not None and self._should_swap(computed, num_blocks)
        sequence.lost_tokens = computed
        sequence.preempted_since_ns = now
        whose = by.request_id if by else ""
        sequence.preempted_by.append(Preemption(now, whose, computed, swaps, self._next_step))
        sequence.taken = int(rows.taken[slot])
        if by is not None:
            sequence.preemptions += 1
            self.counters.preemptions += 1
        self._note_leave(sequence, "preempted")
        # What a lost worker was to bring does not come: nobody is behind with reading it.
        unread = (
            int(rows.num_outputs[slot] if by is None else rows.num_tokens[slot] - sequence.num_prompt_tokens) - sequence.taken
        )
        self._stop_running(sequence, now)
        if swaps:
            sequence.host_blocks = self.kv.host.allocate(num_blocks)
            sequence.swap_step = self._next_step
            self._swaps_out.append((self.kv.tables.row(slot)[:num_blocks].copy(), sequence.host_blocks))
            self.counters.swapped_blocks += num_blocks
        self._leave(slot, PREEMPTED, self._next_step if swaps else -1)
        if unread >= self.config.max_unread_tokens:
            sequence.become(State.PARKED)
        else:
            sequence.become(State.PREEMPTED)
            self.queue.push_back(sequence)
        return sequence

    def _wanting(self, slots: Slots, victim: int) -> Sequence:
        """For whose blocks the victim goes: the last of those that want one; itself when nobody else does."""
        others = slots[slots != victim]
        return self.rows.sequence(int(others[-1]) if len(others) else victim)

    def _should_swap(self, num_tokens: int, num_blocks: int) -> bool:
        facts = self.facts
        if facts is None or not num_blocks or self.kv.host.num_available < num_blocks:
            return False
        return preemption.swap_pays(num_blocks, facts.swap_block_ns, self.step_cost.recompute_ns(num_tokens))

    def _forget_swap(self, sequence: Sequence) -> None:
        if sequence.host_blocks is not None:
            self.kv.host.release(sequence.host_blocks, sequence.swap_step, self._returned_step())
            sequence.host_blocks = None

    def _stop_running(self, sequence: Sequence, now: int) -> None:
        """Closes the books of the row: its blocks × nanoseconds, and the tokens that counted as held for somebody."""
        rows, slot = self.rows, sequence.slot
        publishing.publish(rows, self.kv, slot)
        held_ns = int(self.kv.tables.num_blocks[slot]) * (now - int(rows.started_ns[slot])) - int(rows.grown_ns[slot])
        sequence.block_ns += max(0, held_ns)
        self._kv_tokens -= int(rows.num_computed[slot])
        sequence.request.num_running -= 1
        if not sequence.request.num_running:
            self._num_running -= 1

    # ---------------------------------------------------------------------------------------------- prefix cache, inside

    def _hashes(self, request: Request) -> bool:
        return self.config.prefix_caching and bool(request.header.prefix_key)

    def _digests(self, add: AddRequest) -> bytes:
        """Of the prompt's full blocks: as the front end made them, or made here when it did not know the block size."""
        header = add.header
        if not self.config.prefix_caching or not header.prefix_key:
            return b""
        if header.hash_block_size == self.kv.block_size:
            return add.prefix_hashes.tobytes()
        return hash_blocks(header.prefix_key, add.prompt, self.kv.block_size)

    def _rehash(self, request: Request) -> None:
        """For another block size."""
        if self._hashes(request):
            request.digests = hash_blocks(request.header.prefix_key, request.prompt, self.kv.block_size)
            for sequence in request.sequences:
                sequence.digests = request.digests

    # ------------------------------------------------------------------------------------------------ crashes, inside

    def _computing(self) -> Iterator[tuple[Sequence, int]]:
        """Whom the plans in flight compute, and up to how many tokens."""
        slots = {slot: None for step in self.in_flight for slot in step.plan.slots.tolist()}
        for slot in slots:
            sequence = self.rows.sequences[slot]
            if sequence is not None and sequence.state is not State.ENDED:
                yield sequence, int(self.rows.num_computed[slot])

    def _clear_suspects(self, step: InFlight) -> None:
        """Those who were computed past the point of their crash."""
        done = step.before + step.plan.num_tokens
        for slot, num_computed in zip(step.plan.slots.tolist(), done.tolist(), strict=True):
            sequence = self.rows.sequences[slot]
            if sequence is None or sequence.state is State.ENDED or not 0 < sequence.crash_point <= num_computed:
                continue
            if self.trials.passed(sequence):
                self._confine()

    def _confine(self) -> None:
        """Lets only those come in whom the trials let in."""
        self.queue.confine(self.trials.eligible())
        self.hindered = None

    # ----------------------------------------------------------------------------------------------- apply, inside

    def _take_tokens(self, slots: Slots, tokens: I32, now: int) -> None:
        rows = self.rows
        state = rows.state[slots]
        live = (state == RUNNING) | (state == PREEMPTED)
        if np.count_nonzero(live) < len(live):
            slots, tokens = slots[live], tokens[live]
        if not len(slots):
            return
        self._may_publish = True
        counts = rows.append_outputs(slots, tokens)
        self.counters.output_tokens += len(slots)
        self.tenants.charge_outputs(rows.tenant[slots])
        self._emit_tokens(slots, tokens)
        for slot in slots[counts == 1].tolist():
            sequence = self.rows.sequence(slot)
            sequence.first_token_ns = now
            sequence.preempted_first_ns = sequence.preempted_until(now)
        stopped = rows.stopped(slots, tokens)
        for i in (stopped | (counts == rows.max_outputs[slots])).nonzero()[0].tolist():
            sequence = self.rows.sequence(int(slots[i]))
            if stopped[i]:
                self._end(sequence, EndReason.STOP, now, stop_token_id=int(tokens[i]))
            else:
                self._end(sequence, EndReason.LENGTH, now)

    def _emit_tokens(self, slots: Slots, tokens: I32) -> None:
        frontends, handles = self.rows.frontend[slots], self.rows.handle[slots]
        present = np.bincount(frontends).nonzero()[0].tolist()
        if len(present) == 1:
            self._emitted.tokens[present[0]] = (handles, tokens)
            return
        for frontend in present:
            mine = frontends == frontend
            self._emitted.tokens[frontend] = (handles[mine], tokens[mine])

    def _end_request(self, request: Request, reason: EndReason, now: int, *, message: str = "") -> None:
        for sequence in request.live():
            self._end(sequence, reason, now, message=message)

    def _end(
        self,
        sequence: Sequence,
        reason: EndReason,
        now: int,
        *,
        num_outputs: int | None = None,
        stop_token_id: int = -1,
        message: str = "",
    ) -> None:
        """The output is over, wherever it was. Its blocks come back when the last plan that names them has returned."""
        slot, rows, request = sequence.slot, self.rows, sequence.request
        num_arrived = int(rows.num_outputs[slot]) if slot >= 0 else len(sequence.outputs)
        num_outputs = num_arrived if num_outputs is None else min(num_outputs, num_arrived)
        if request.header.resume_window_ms:
            tokens = self.output_tokens(sequence)[:num_outputs].copy()
            self._emitted.kept.setdefault(request.frontend, []).append((sequence.handle, tokens))
        if sequence.state is State.RUNNING:
            self._stop_running(sequence, now)
            if self.policy.keeps_ended_rows and reason in (EndReason.STOP, EndReason.LENGTH):
                if self._uses_quotas:
                    self._release_quota(slot)
                rows.pad(slot)
            else:
                self._leave(slot, RETIRING)
        else:
            if sequence.state in QUEUED:
                self.queue.remove(sequence)
            if slot >= 0:  # preempted, its last plan still in flight
                rows.state[slot] = RETIRING
            self._forget_swap(sequence)
        sequence.preempted_ns = sequence.preempted_until(now)
        sequence.preempted_since_ns = -1
        sequence.ended_ns = now
        sequence.end_reason = reason.value
        sequence.last_step = int(rows.last_step[slot]) if slot >= 0 else sequence.last_step
        sequence.num_ended_outputs = num_outputs
        sequence.become(State.ENDED)
        self._note_leave(sequence, reason.value)
        ended = OutputEnded(sequence.handle, reason, sequence.stats(num_outputs, now), stop_token_id, message)
        self._emitted.ended.setdefault(request.frontend, []).append(ended)
        request.num_live -= 1
        if not request.num_live:
            self._forget(request, reason, now)
        elif request.number in self._holding:
            self._look_at_held(request)

    def _forget(self, request: Request, reason: EndReason, now: int) -> None:
        """All of its outputs are over. What Cancel and ExplainRequest may ask is kept for a while."""
        del self._requests[request.request_id]
        if self.trials.ended(request):
            self._confine()
        for sequence in request.sequences:
            del self._by_handle[request.frontend, sequence.handle]
        self.tenants.leave(request.tenant)
        self._holding.pop(request.number, None)
        if (namesake := self._ended_requests.pop(request.request_id, None)) is not None:
            namesake.forget_outputs()
        self._ended_requests[request.request_id] = request
        if len(self._ended_requests) > _REMEMBERED_IDS:
            self._ended_requests.popitem(last=False)[1].forget_outputs()
        request.forget_tokens()
        self._end_times.append(self._busy_ns + now - self._busy_since_ns)
        if not self._requests:
            self._busy_ns += now - self._busy_since_ns
        if reason is EndReason.CANCELLED:
            self.counters.cancelled += 1
        else:
            self.counters.finished += 1

    def _leave(self, slot: int, state: int, last_step: int = -1) -> None:
        """The row is in no plan from now on. last_step: a later plan that names its blocks."""
        rows, returned = self.rows, self._returned_step()
        last = int(rows.last_step[slot])
        assert last >= 0, "a row left before any plan named it"
        if self._uses_quotas and rows.state[slot] == RUNNING:
            self._release_quota(slot)
        self.kv.release(slot, max(last, last_step), returned)
        rows.leave(slot, state)
        self._ended.append(slot)
        if last <= returned:
            self._free_slot(slot)
        else:
            self._retiring.append(slot)

    def _release_quota(self, slot: int) -> None:
        """The row's blocks no longer count as its tenant's, who may be forgotten when its last request has ended."""
        tenant = int(self.rows.tenant[slot])
        self.tenants.held_blocks[tenant] -= self.kv.tables.num_blocks[slot]
        self.queue.resume(tenant)

    def _free_slots(self, returned_step: int) -> None:
        """Slots whose last plan has returned can be taken again; a preempted request takes its tokens along."""
        for slot in [slot for slot in self._retiring if self.rows.last_step[slot] <= returned_step]:
            self._retiring.remove(slot)
            self._free_slot(slot)

    def _free_slot(self, slot: int) -> None:
        was_preempted = self.rows.state[slot] == PREEMPTED
        outputs = self.rows.outputs[slot, : self.rows.num_outputs[slot]].copy()
        sequence = self.rows.free(slot)
        sequence.slot = -1
        if was_preempted:
            sequence.outputs = outputs
            sequence.digests = self.rows.digests[slot, : self.rows.num_hashed[slot]].tobytes()

    @property
    def returned_step(self) -> int:
        """The latest step of this epoch whose result has arrived; -1: none has."""
        return self._returned_step()

    def _returned_step(self) -> int:
        """The latest step up to which all results have arrived."""
        return self.in_flight[0].step_id - 1 if self.in_flight else self._next_step - 1

    # ------------------------------------------------------------------------------------------------------ small

    def _of(self, slots: list[int]) -> list[Sequence]:
        return [self.rows.sequence(slot) for slot in slots]

    def _note_leave(self, sequence: Sequence, reason: str) -> None:
        if len(self.leaves) < 10_000:
            self.leaves.append((sequence.request_id, reason))

    def take_outputs(self) -> list[Output]:
        emitted, self._emitted = self._emitted, _Emitted()
        outputs = []
        for frontend in sorted(set(emitted.tokens) | set(emitted.ended)):
            batch = TokenBatch(TokenBatchHeader(self._returned_step(), tuple(emitted.ended.get(frontend, ()))))
            if frontend in emitted.tokens:
                batch.handles, batch.tokens = emitted.tokens[frontend]
            outputs.append(Output(frontend, batch, tuple(emitted.kept.get(frontend, ()))))
        return outputs

    def _new_epoch(self, max_rows: int, num_blocks: int, block_size: int, vocab_size: int, num_host_blocks: int) -> None:
        self.rows = Rows(max_rows, vocab_size)
        self.kv = KVCacheManager(num_blocks, block_size, max_rows, num_host_blocks)
        self.tenants.held_blocks[:] = 0
        self.queue.resume_all()
        self.hindered = None
        self.in_flight.clear()
        self._next_step = 0
        self._starts, self._grown, self._ended, self._retiring = [], [], [], []
