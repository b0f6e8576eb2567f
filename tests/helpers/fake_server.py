"""A real gRPC server with the public services and no model: what a stream does is a function that the test gives.

`script(request, context)` yields the events of one Generate call. Everything that clients did is kept for the test to see.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from carousel.v1 import control_pb2, control_pb2_grpc, generation_pb2, generation_pb2_grpc, inspect_pb2, inspect_pb2_grpc

Script = Callable[[generation_pb2.GenerateRequest, grpc.ServicerContext], Iterator[generation_pb2.GenerateResponse]]
WAIT_S = 20.0  # a test that waits this long has failed


def delta(text: str, token_offset: int = 0, output_index: int = 0) -> generation_pb2.GenerateResponse:
    """One token, with this text."""
    token_ids = [token_offset + 1]
    return generation_pb2.GenerateResponse(
        delta=generation_pb2.Delta(output_index=output_index, token_offset=token_offset, token_ids=token_ids, text=text)
    )


def finished(
    output_index: int = 0, reason: generation_pb2.FinishReason.ValueType = generation_pb2.FINISH_REASON_LENGTH
) -> generation_pb2.GenerateResponse:
    return generation_pb2.GenerateResponse(finished=generation_pb2.Finished(output_index=output_index, reason=reason))


def ending(request: generation_pb2.GenerateRequest, output_tokens: int) -> Iterator[generation_pb2.GenerateResponse]:
    """Finished (by length) and Summary."""
    yield finished()
    yield summary(request, output_tokens)


def summary(request: generation_pb2.GenerateRequest, output_tokens: int) -> generation_pb2.GenerateResponse:
    usage = generation_pb2.Usage(prompt_tokens=5, output_tokens=output_tokens)
    timing = generation_pb2.Timing(queued_ns=1_000_000, time_to_first_token_ns=7_000_000, seed=3)
    return generation_pb2.GenerateResponse(
        summary=generation_pb2.Summary(request_id=request.request_id, usage=usage, timing=timing)
    )


def words(*texts: str) -> Script:
    """Answers with these texts, a token each, and an orderly end."""

    def script(
        request: generation_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[generation_pb2.GenerateResponse]:
        for offset, text in enumerate(texts):
            yield delta(text, offset)
        yield from ending(request, len(texts))

    return script


def refuse(code: grpc.StatusCode, message: str, *details: object) -> Script:
    """Ends the call with this status and these google.rpc details."""

    def script(
        request: generation_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[generation_pb2.GenerateResponse]:
        status = status_pb2.Status(code=code.value[0], message=message)
        for detail in details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        context.abort_with_status(rpc_status.to_status(status))
        yield delta("never")

    return script


def bad_request(field: str, description: str) -> error_details_pb2.BadRequest:
    violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=description)
    return error_details_pb2.BadRequest(field_violations=[violation])


def error_info(reason: str, **metadata: str) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=reason, domain="carousel.v1", metadata=metadata)


def retry_after(seconds: int, nanos: int = 0) -> error_details_pb2.RetryInfo:
    return error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=seconds, nanos=nanos))


class FakeServer(generation_pb2_grpc.GenerationServicer, control_pb2_grpc.ControlServicer, inspect_pb2_grpc.InspectServicer):
    """Listens on a free port of loopback while it is entered."""

    def __init__(self, script: Script | None = None, port: int = 0) -> None:
        self.script = script or words("a", "b", "c")
        self.requests: queue.Queue[generation_pb2.GenerateRequest] = queue.Queue()
        self.cancels: queue.Queue[str] = queue.Queue()  # ids that Cancel was called with
        self.dropped: queue.Queue[str] = queue.Queue()  # ids of streams whose reader went away
        self.cancel_outcome = generation_pb2.CANCEL_OUTCOME_CANCELLED
        self.steps: list[inspect_pb2.WatchStepsResponse] = []
        self.steps_go_on = False  # a watch of the steps ends after those
        self.steps_seen = threading.Event()  # all of them were sent
        self.policy = "continuous"
        self.alive: list[control_pb2.RequestSummary] = []
        self.explanations: dict[str, control_pb2.ExplainRequestResponse] = {}  # by request_id
        self.explained: queue.Queue[control_pb2.ExplainRequestRequest] = queue.Queue()
        self.watched: queue.Queue[control_pb2.WatchLoadRequest] = queue.Queue()
        self.drained: queue.Queue[control_pb2.DrainRequest] = queue.Queue()
        self.watch_goes_on = False  # a watch of the load ends after three messages
        self.live_requests = 0  # that Drain tells of
        self.tables = inspect_pb2.GetBlockTablesResponse()
        self.health = health.HealthServicer()
        options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 64 << 20)]
        self._server = grpc.server(ThreadPoolExecutor(32), options=options)
        generation_pb2_grpc.add_GenerationServicer_to_server(self, self._server)
        control_pb2_grpc.add_ControlServicer_to_server(self, self._server)
        inspect_pb2_grpc.add_InspectServicer_to_server(self, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.target = f"127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._server.start()
        self.say_ready(True)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(0).wait(WAIT_S)

    def say_ready(self, ready: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        self.health.set("", status)

    # ------------------------------------------------------------------------------------------------------- services

    def Generate(self, request, context):
        self.requests.put(request)
        done = False

        def gone() -> None:
            if not done:
                self.dropped.put(request.request_id)

        if not context.add_callback(gone):
            gone()  # before it began
        yield from self.script(request, context)
        done = True

    def Cancel(self, request, context):
        self.cancels.put(request.request_id)
        return generation_pb2.CancelResponse(outcome=self.cancel_outcome)

    def GetServerInfo(self, request, context):
        return control_pb2.GetServerInfoResponse(version="0", served_model_name="fake", policy=self.policy, max_batch_rows=4)

    def GetModelInfo(self, request, context):
        return control_pb2.GetModelInfoResponse(served_model_name="fake", vocab_size=100, max_model_len=512, block_size=16)

    def GetLoad(self, request, context):
        return control_pb2.GetLoadResponse(total_blocks=10, free_blocks=10)

    def WatchLoad(self, request, context):
        self.watched.put(request)
        for steps in range(3):
            yield control_pb2.WatchLoadResponse(load=control_pb2.GetLoadResponse(total_blocks=10, free_blocks=10, steps=steps))
        if self.watch_goes_on:
            gone = threading.Event()
            context.add_callback(gone.set)
            gone.wait(WAIT_S)

    def ReplaceWorker(self, request, context):
        if request.device == "cuda":
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the new worker did not start")
        return control_pb2.ReplaceWorkerResponse(pid=4711, epoch=4)

    def Drain(self, request, context):
        self.drained.put(request)
        return control_pb2.DrainResponse(live_requests=self.live_requests, left_ms=4_200)

    def SetPolicy(self, request, context):
        if request.policy not in ("continuous", "prefill_first", "static"):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"policy is not changed: unknown policy {request.policy!r}")
        self.policy = request.policy
        return control_pb2.SetPolicyResponse(policy=self.policy)

    def ListRequests(self, request, context):
        first = int(request.page_token or 0)
        after = first + request.page_size
        return control_pb2.ListRequestsResponse(
            requests=self.alive[first:after],
            next_page_token=str(after) if after < len(self.alive) else "",
            total_requests=len(self.alive),
            now_ns=20_000_000_000,
        )

    def ExplainRequest(self, request, context):
        self.explained.put(request)
        if request.request_id not in self.explanations:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no request {request.request_id!r} is known")
        return self.explanations[request.request_id]

    def GetBlockTables(self, request, context):
        return self.tables

    def WatchSteps(self, request, context):
        yield from self.steps
        self.steps_seen.set()
        if self.steps_go_on:
            gone = threading.Event()
            context.add_callback(gone.set)
            gone.wait(WAIT_S)
