"""carousel.v1.Control: facts that the core told, and its load, asked for."""

from __future__ import annotations

import time

from carousel.v1 import control_pb2 as pb
from carousel.v1.control_pb2_grpc import ControlServicer
from scheduler.errors import UnavailableError
from scheduler.frontend.core_link import CoreLink
from scheduler.frontend.defaults import ModelDefaults
from scheduler.frontend.server.status import Context, answers_with_status
from wire import Facts


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
        )

    def _facts(self) -> Facts:
        if self._link.facts is None:
            raise UnavailableError("the scheduler core is not connected")
        return self._link.facts
