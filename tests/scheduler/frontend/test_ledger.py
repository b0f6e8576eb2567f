"""What is told of each request once its call is over: once, whichever call it came by, and however it ended."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from carousel.v1 import generation_pb2 as pb
from client.many import Many
from scheduler.frontend.ledger import Ended, Ledger, request_fields
from tests.helpers.fake_core import FakeCore
from tests.helpers.frontend import Frontend, running
from tests.helpers.server import eventually
from tests.helpers.streams import make
from wire import AddRequest, Refused, RequestStats


@pytest.fixture(scope="module")
def frontend(shared_core: FakeCore, model_dir: Path) -> Iterator[Frontend]:
    """As the module's own, with a log of requests."""
    with running(model_dir, shared_core.endpoint, request_log=True, log_format="json") as frontend:
        frontend.wait_serving()
        yield frontend
        assert "Traceback" not in frontend.log(), frontend.log()


def told(frontend: Frontend, request_id: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in frontend.log().splitlines() if line.startswith("{")]
    return [line for line in lines if line["message"] == "request" and line["request_id"] == request_id]


def line_of(frontend: Frontend, request_id: str) -> dict[str, Any]:
    """Its one line."""
    assert eventually(lambda: bool(told(frontend, request_id))), frontend.log()
    [line] = told(frontend, request_id)
    return line


def test_a_request_that_ends_well(core: FakeCore, frontend: Frontend) -> None:
    trace = (("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),)
    request = make("fox", request_id="well", max_tokens=5, tenant="alice", num_outputs=2)
    list(frontend.generation.Generate(request, metadata=trace))
    line = line_of(frontend, "well")
    assert (line["status"], line["tenant"], line["finish"], line["output_tokens"]) == ("OK", "alice", "length,length", 10)
    assert line["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
    assert line["whole_ms"] >= line["first_token_ms"] >= 0 and "refused" not in line


def test_requests_that_are_refused_by_the_front_end_and_by_the_core(core: FakeCore, frontend: Frontend) -> None:
    core.refuse = lambda add: Refused(add.header.handle, "RESOURCE_EXHAUSTED", "the queue is full", retry_after_ns=10**9)
    for request_id, temperature in (("hot", 101), ("full", 1)):
        with pytest.raises(grpc.RpcError):
            list(frontend.generation.Generate(make("fox", request_id=request_id, temperature=temperature)))
    hot, full = line_of(frontend, "hot"), line_of(frontend, "full")
    assert hot["status"] == hot["refused"] == "INVALID_ARGUMENT" and "sampling.temperature" in hot["said"]
    assert (full["status"], full["refused"], full["said"]) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL", "the queue is full")


def test_a_reader_who_goes_and_one_whose_request_goes_on_without_him(core: FakeCore, frontend: Frontend) -> None:
    core.hold()
    for request_id, window_ms in (("gone", 0), ("detached", 60_000)):
        call = frontend.generation.Generate(make("fox", request_id=request_id, max_tokens=50, resume_window_ms=window_ms))
        core.wait_for(AddRequest, lambda add, request_id=request_id: add.header.request_id == request_id)
        call.cancel()
    gone, detached = line_of(frontend, "gone"), line_of(frontend, "detached")
    assert (gone["status"], gone["finish"]) == ("CANCELLED", "")
    assert (detached["status"], detached["finish"]) == ("CANCELLED", "detached")
    core.hold(False)


def test_each_request_of_a_connection_for_many(core: FakeCore, frontend: Frontend) -> None:
    with Many(frontend.generation, frontend.target, timeout_s=30) as many:
        many.submit("fox", request_id="many-1", max_tokens=3)
        many.submit("fox", request_id="many-2", max_tokens=4)
        many.submit("fox", request_id="many-hot", temperature=101)
        many.finish()
        list(many)
    assert [line_of(frontend, f"many-{i}")["output_tokens"] for i in (1, 2)] == [3, 4]
    assert line_of(frontend, "many-hot")["refused"] == "INVALID_ARGUMENT"
    core.hold()
    with Many(frontend.generation, frontend.target, timeout_s=30) as many:
        many.submit("fox", request_id="many-gone", max_tokens=3)
        core.wait_for(AddRequest, lambda add: add.header.request_id == "many-gone")
    assert line_of(frontend, "many-gone")["status"] == "CANCELLED"


class Context:
    """Of a call that nobody has left."""

    def done(self) -> bool:
        return False

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()


def test_our_own_fault_is_told_and_a_listener_that_fails_is_not_the_calls_fault() -> None:
    ends: list[Ended] = []

    def fail(ended: Ended) -> None:
        raise ValueError("a mistake in a listener")

    with pytest.raises(ZeroDivisionError), Ledger([ends.append, fail]).open(pb.GenerateRequest(), Context(), None):
        raise ZeroDivisionError
    [ended] = ends
    assert (ended.status, ended.refusal, ended.stats, ended.first_token_ns) == ("INTERNAL", "", RequestStats(), 0)
    assert request_fields(ended)["status"] == "INTERNAL"


def test_what_a_caller_makes_long_is_cut() -> None:
    ends: list[Ended] = []
    with Ledger([ends.append]).open(pb.GenerateRequest(request_id="x" * 10_000), Context(), None):
        pass
    assert len(ends[0].request_id) == 128
