"""carousel.v1.Control: facts that the core told; its load, its requests and why they wait, asked for; policy and end."""

from __future__ import annotations

import asyncio
import base64
import binascii
import time

from carousel.v1 import control_pb2 as pb
from carousel.v1.control_pb2_grpc import ControlServicer
from carousel.v1.generation_pb2 import PriorityClass
from scheduler.errors import InvalidFieldError, NotFoundError, NotReplacedError, UnavailableError
from scheduler.frontend.callers import clear_id, core_id
from scheduler.frontend.core_link import CoreLink
from scheduler.frontend.defaults import ModelDefaults
from scheduler.frontend.server.authentication import caller
from scheduler.frontend.server.stats import FINISH_REASONS, timing, usage
from scheduler.frontend.server.status import Context, answers_with_status
from scheduler.frontend.validation import check_id
from wire import EndReason, Explanation, Facts, Hindrance, RequestSummary

DEFAULT_PAGE, MAX_PAGE = 100, 1000  # requests
DEFAULT_INTERVAL_MS, MIN_INTERVAL_MS, MAX_INTERVAL_MS = 1_000, 100, 60_000  # of WatchLoad
_TOKEN_BYTES = 8
_DEVICES = ("auto", "cpu", "cuda", "sim")
_STATES = {
    "waiting": pb.REQUEST_STATE_WAITING,
    "running": pb.REQUEST_STATE_RUNNING,
    "preempted": pb.REQUEST_STATE_PREEMPTED,
    "ended": pb.REQUEST_STATE_ENDED,
}
_HINDRANCES = {
    Hindrance.NONE: pb.HINDRANCE_NONE,
    Hindrance.ORDER: pb.HINDRANCE_ORDER,
    Hindrance.ROWS: pb.HINDRANCE_ROWS,
    Hindrance.BLOCKS: pb.HINDRANCE_BLOCKS,
    Hindrance.QUOTA: pb.HINDRANCE_QUOTA,
    Hindrance.READER: pb.HINDRANCE_READER,
    Hindrance.SIBLING: pb.HINDRANCE_SIBLING,
    Hindrance.WORKER: pb.HINDRANCE_WORKER,
    Hindrance.POLICY: pb.HINDRANCE_POLICY,
}


class Control(ControlServicer):
    def __init__(self, link: CoreLink, defaults: ModelDefaults, served_model_name: str) -> None:
        self._link = link
        self._defaults = defaults
        self._served_model_name = served_model_name

    @answers_with_status
    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.GetServerInfoResponse:
        facts = self._facts()
        return pb.GetServerInfoResponse(
            version=facts.version,
            served_model_name=self._served_model_name,
            policy=facts.policy,
            uptime_ns=max(0, time.monotonic_ns() - facts.started_ns),
            max_step_tokens=facts.max_step_tokens,
            max_batch_rows=facts.max_batch_rows,
            max_queue_requests=facts.max_queue_requests,
            max_queue_tokens=facts.max_queue_tokens,
            workers=[
                pb.WorkerInfo(group=group, epoch=epoch, device=worker.device, pid=worker.pid, description=worker.description)
                for group, epoch, worker in facts.workers
            ],
        )

    @answers_with_status
    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        facts = self._facts()
        if not facts.workers:
            raise UnavailableError(facts.reason or "no worker has loaded the model yet")
        worker = facts.workers[0][2]
        return pb.GetModelInfoResponse(
            served_model_name=self._served_model_name,
            architecture=worker.architecture,
            dtype=worker.dtype,
            vocab_size=worker.vocab_size,
            max_model_len=worker.max_model_len,
            block_size=worker.block_size,
            num_blocks=worker.num_blocks,
            kv_bytes_per_token=worker.kv_bytes_per_token,
            num_parameters=worker.num_parameters,
            eos_token_ids=self._defaults.eos_token_ids,
        )

    @answers_with_status
    async def GetLoad(self, request: pb.GetLoadRequest, context: Context) -> pb.GetLoadResponse:
        return await self._load()

    @answers_with_status
    async def WatchLoad(self, request: pb.WatchLoadRequest, context: Context) -> None:  # type: ignore[override]
        """The load is asked for when the transport is free: a slow reader gets fewer messages, none of them old."""
        interval_ms = request.interval_ms if request.HasField("interval_ms") else DEFAULT_INTERVAL_MS
        if not MIN_INTERVAL_MS <= interval_ms <= MAX_INTERVAL_MS:
            raise InvalidFieldError("interval_ms", f"must be {MIN_INTERVAL_MS} to {MAX_INTERVAL_MS}, not {interval_ms}")
        while True:
            next_s = time.monotonic() + interval_ms / 1000
            await context.write(pb.WatchLoadResponse(load=await self._load()))
            await asyncio.sleep(max(0.0, next_s - time.monotonic()))

    async def _load(self) -> pb.GetLoadResponse:
        """Raises UnavailableError."""
        load = await self._link.load()
        facts = self._link.facts
        block_size = facts.workers[0][2].block_size if facts is not None and facts.workers else 0
        held_tokens = load.held_blocks * block_size
        return pb.GetLoadResponse(
            running_requests=load.running_requests,
            waiting_requests=load.waiting_requests,
            waiting_tokens=load.waiting_tokens,
            total_blocks=load.total_blocks,
            free_blocks=load.free_blocks,
            held_blocks=load.held_blocks,
            retiring_blocks=load.retiring_blocks,
            cached_blocks=load.cached_blocks,
            kv_tokens=load.kv_tokens,
            kv_waste=max(0.0, (held_tokens - load.kv_tokens) / held_tokens) if held_tokens else 0.0,
            steps=load.steps,
            output_tokens=load.output_tokens,
            accepted_requests=load.accepted_requests,
            finished_requests=load.finished_requests,
            cancelled_requests=load.cancelled_requests,
            refused_requests=load.refused_requests,
            preemptions=load.preemptions,
            recomputed_tokens=load.recomputed_tokens,
            cached_tokens=load.cached_tokens,
            prompt_tokens=load.prompt_tokens,
            held_host_blocks=load.held_host_blocks,
            swapped_blocks=load.swapped_blocks,
        )

    @answers_with_status
    async def ListRequests(self, request: pb.ListRequestsRequest, context: Context) -> pb.ListRequestsResponse:
        size = request.page_size if request.HasField("page_size") else DEFAULT_PAGE
        if not 1 <= size <= MAX_PAGE:
            raise InvalidFieldError("page_size", f"must be 1 to {MAX_PAGE}, not {size}")
        started_ns = self._facts().started_ns
        reply = await self._link.list_requests(_after(request.page_token), size)
        return pb.ListRequestsResponse(
            requests=[_request(summary, started_ns) for summary in reply.requests],
            next_page_token=_page_token(reply.next) if reply.next else "",
            total_requests=reply.total,
            now_ns=max(0, time.monotonic_ns() - started_ns),
        )

    @answers_with_status
    async def ExplainRequest(self, request: pb.ExplainRequestRequest, context: Context) -> pb.ExplainRequestResponse:
        check_id("request_id", request.request_id)
        if request.HasField("tenant"):
            check_id("tenant", request.tenant)
        started_ns = self._facts().started_ns
        reply = await self._link.explain(core_id(caller(), request.request_id, request.tenant))
        if reply.explanation is None or request.tenant not in ("", reply.explanation.tenant):
            raise NotFoundError(f"no request {request.request_id!r} is known: it never came, or has ended too long ago")
        return _explanation(reply.explanation, started_ns)

    @answers_with_status
    async def SetPolicy(self, request: pb.SetPolicyRequest, context: Context) -> pb.SetPolicyResponse:
        reply = await self._link.set_policy(request.policy)
        if reply.error:
            raise InvalidFieldError("policy", f"is not changed: {reply.error}")
        return pb.SetPolicyResponse(policy=reply.policy)

    @answers_with_status
    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        reply = await self._link.drain(request.timeout_ms if request.HasField("timeout_ms") else -1)
        return pb.DrainResponse(live_requests=reply.num_requests, left_ms=reply.left_ns // 1_000_000)

    @answers_with_status
    async def ReplaceWorker(self, request: pb.ReplaceWorkerRequest, context: Context) -> pb.ReplaceWorkerResponse:
        device = request.device
        if request.HasField("device") and device not in _DEVICES:
            raise InvalidFieldError("device", f"must be one of {', '.join(_DEVICES)}, not {device!r}")
        reply = await self._link.replace_worker(device, request.group if request.HasField("group") else -1)
        if reply.error:
            raise NotReplacedError(reply.error)
        return pb.ReplaceWorkerResponse(pid=reply.pid, epoch=reply.epoch)

    def _facts(self) -> Facts:
        if self._link.facts is None:
            raise UnavailableError("the scheduler core is not connected")
        return self._link.facts


def _page_token(after: int) -> str:
    return base64.urlsafe_b64encode(after.to_bytes(_TOKEN_BYTES)).decode()


def _after(page_token: str) -> int:
    """Raises InvalidFieldError."""
    if not page_token:
        return 0
    try:
        after = base64.b64decode(page_token, altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        after = b""
    if len(after) != _TOKEN_BYTES or after[0] >= 0x80:  # the core counts in 63 bits
        raise InvalidFieldError("page_token", "is not the next_page_token of an answer")
    return int.from_bytes(after)


def _request(summary: RequestSummary, started_ns: int) -> pb.RequestSummary:
    return pb.RequestSummary(
        request_id=clear_id(caller(), summary.request_id),
        state=_STATES[summary.state],
        tenant=summary.tenant,
        priority=PriorityClass.ValueType(summary.priority),
        arrival_ns=max(0, summary.arrival_ns - started_ns),
        prompt_tokens=summary.num_prompt_tokens,
        output_tokens=summary.num_output_tokens,
        num_outputs=summary.num_outputs,
        held_blocks=summary.held_blocks,
        group=summary.group,
    )


def _explanation(told: Explanation, started_ns: int) -> pb.ExplainRequestResponse:
    response = pb.ExplainRequestResponse(
        request_id=clear_id(caller(), told.request_id),
        state=_STATES[told.state],
        tenant=told.tenant,
        priority=PriorityClass.ValueType(told.priority),
        now_ns=max(0, told.now_ns - started_ns),
        arrival_ns=max(0, told.arrival_ns - started_ns),
        hindrance=_HINDRANCES[told.hindrance],
        rank=told.rank,
        missing_rows=told.missing_rows,
        missing_blocks=told.missing_blocks,
        needed_blocks=told.needed_blocks,
        tenant_tokens=told.tenant_tokens,
        least_tenant_tokens=told.least_tenant_tokens,
        computed_tokens=told.num_computed_tokens,
        preemptions=[
            pb.Preemption(
                at_ns=max(0, preemption.at_ns - started_ns),
                by_request_id=clear_id(caller(), preemption.by_request_id),
                lost_tokens=preemption.lost_tokens,
                swapped=preemption.swapped,
            )
            for preemption in told.preemptions
        ],
        usage=usage(told.stats),
        timing=timing(told.stats),
        text=told.text,
        group=told.group,
    )
    if told.predicted_start_ns >= 0:
        response.predicted_start_ns = max(0, told.predicted_start_ns - started_ns)
    if told.end_reason:
        response.finish_reason = FINISH_REASONS[EndReason(told.end_reason)]
    return response
