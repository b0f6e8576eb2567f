"""GenerateMany over real gRPC and ZeroMQ: what each request gets is what Generate gives; one that fails, waits or is cancelled
leaves the others alone."""

from __future__ import annotations

from collections.abc import Callable

import grpc
import pytest
from google.rpc import error_details_pb2

from carousel.v1 import generation_pb2 as pb
from client.many import Many
from tests.helpers.fake_core import FakeCore
from tests.helpers.frontend import Frontend
from tests.helpers.streams import Got, make
from wire import AbortRequest, AddRequest, EndReason, Refused


class Collected:
    """Events by request, put together as those of Generate are: offsets and order are checked."""

    def __init__(self) -> None:
        self.got: dict[str, Got] = {}
        self.failed: dict[str, pb.Failed] = {}
        self.num_messages = 0

    def take(self, event: pb.RequestEvent) -> None:
        assert event.request_id not in self.failed
        if event.HasField("failed"):
            assert event.failed.request_id == event.request_id
            self.failed[event.request_id] = event.failed
            return
        response = pb.GenerateResponse()
        getattr(response, event.WhichOneof("event")).CopyFrom(getattr(event, event.WhichOneof("event")))
        self.got.setdefault(event.request_id, Got()).take(response)


def connect(frontend: Frontend) -> Many:
    return Many(frontend.generation, frontend.target, timeout_s=30)


def collect(many: Many, until: Callable[[Collected], bool] = lambda _: False) -> Collected:
    collected = Collected()
    for event in many:
        collected.take(event)
        if until(collected):
            break
    return collected


def test_many_requests_get_what_generate_gives_each(core: FakeCore, frontend: Frontend) -> None:
    requests = [
        make(f"fox {i}" * (1 + i % 3), request_id=f"r{i}", max_tokens=3 + i, num_outputs=1 + i % 2, echo=i % 3 == 0)
        for i in range(40)
    ]
    with connect(frontend) as many:
        for request in requests:
            many._commands.put(pb.GenerateManyRequest(submit=pb.Submit(request=request)))
        many.finish()
        collected = collect(many)
    assert not collected.failed and set(collected.got) == {request.request_id for request in requests}
    for request in requests:
        alone = Got()
        for event in frontend.generation.Generate(request):
            alone.take(event)
        got = collected.got[request.request_id]
        assert {i: (o.tokens, o.text, o.finished) for i, o in got.outputs.items()} == {
            i: (o.tokens, o.text, o.finished) for i, o in alone.outputs.items()
        }
        assert got.summary is not None and alone.summary is not None
        assert got.summary.usage == alone.summary.usage and got.summary.request_id == request.request_id


def test_events_that_are_new_together_come_in_one_message(core: FakeCore, frontend: Frontend) -> None:
    core.hold()
    with connect(frontend) as many:
        for i in range(20):
            many.submit("fox", request_id=f"r{i}", max_tokens=2)
        many.finish()
        for i in range(20):
            core.wait_for(AddRequest, lambda add, i=i: add.header.request_id == f"r{i}")
        core.hold(False)
        messages = [[event.request_id for event in message.events] for message in many._call]
    assert 20 * 3 <= sum(map(len, messages)) <= 20 * 4 and len(messages) < 20


def test_what_is_refused_is_an_event_with_details(core: FakeCore, frontend: Frontend) -> None:
    core.refuse = lambda add: (
        Refused(add.header.handle, "RESOURCE_EXHAUSTED", "the queue is full", retry_after_ns=2 * 10**9)
        if add.header.request_id == "full"
        else None
    )
    with connect(frontend) as many:
        many.submit("fox", request_id="hot", temperature=101)
        many.submit("fox", request_id="full")
        many.submit("", request_id="empty")
        many.submit("fox", request_id="good", max_tokens=2)
        many._commands.put(pb.GenerateManyRequest(submit=pb.Submit(request=make())))
        many._commands.put(pb.GenerateManyRequest())
        many.finish()
        collected = collect(many)
    codes = {name: grpc_code(failed.code) for name, failed in collected.failed.items()}
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    assert codes == {"hot": invalid, "empty": invalid, "": invalid, "full": grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert "sampling.temperature" in collected.failed["hot"].message
    bad, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    assert collected.failed["hot"].details[0].Unpack(bad) and bad.field_violations[0].field == "sampling.temperature"
    assert collected.failed["full"].details[0].Unpack(retry) and retry.retry_delay.seconds == 2
    assert collected.got["good"].summary is not None


def grpc_code(number: int) -> grpc.StatusCode:
    return next(code for code in grpc.StatusCode if code.value[0] == number)


def test_an_id_that_is_alive_is_refused_and_the_first_goes_on(core: FakeCore, frontend: Frontend) -> None:
    core.hold()
    with connect(frontend) as many:
        many.submit("fox", request_id="a", max_tokens=4)
        many.submit("fox", request_id="a")
        many.finish()
        events = iter(many)
        first = next(events)
        assert grpc_code(first.failed.code) is grpc.StatusCode.ALREADY_EXISTS
        core.hold(False)
        rest = list(events)
    assert rest[-1].HasField("summary") and rest[-1].summary.usage.output_tokens == 4


def test_one_is_cancelled_and_the_others_go_on(core: FakeCore, frontend: Frontend) -> None:
    core.hold()
    with connect(frontend) as many:
        for name in ("a", "b"):
            many.submit("fox", request_id=name, max_tokens=5)
            core.wait_for(AddRequest, lambda add, name=name: add.header.request_id == name)
        many.cancel("a")
        many.cancel("nobody")
        events = iter(many)
        ended = [next(events), next(events)]
        assert ended[0].finished.reason == pb.FINISH_REASON_CANCELLED
        assert grpc_code(ended[1].failed.code) is grpc.StatusCode.CANCELLED and ended[1].request_id == "a"
        core.hold(False)
        many.finish()
        rest = list(events)
    assert {event.request_id for event in rest} == {"b"} and rest[-1].summary.usage.output_tokens == 5


def test_a_connection_that_goes_away_drops_its_requests(core: FakeCore, frontend: Frontend) -> None:
    core.hold()
    with connect(frontend) as many:
        many.submit("fox", request_id="a", max_tokens=50)
        many.submit("fox", request_id="b", max_tokens=50)
        adds = [core.wait_for(AddRequest, lambda add, name=name: add.header.request_id == name) for name in ("a", "b")]
    for add in adds:
        core.wait_for(AbortRequest, lambda abort, add=add: abort.handle == add.header.handle)


def test_a_window_holds_up_its_own_request_only(core: FakeCore, frontend: Frontend) -> None:
    """Nobody gives credit for "slow": after its window nothing of it comes, and "fast" ends."""
    core.script = lambda add: iter(range(50, 400))
    slow = make("fox", request_id="slow", max_tokens=200, stop=["\x00never"])
    with connect(frontend) as many:
        many._commands.put(pb.GenerateManyRequest(submit=pb.Submit(request=slow, window_tokens=5)))
        many.submit("fox", request_id="fast", max_tokens=150)
        collected = collect(many, until=lambda seen: "fast" in seen.got and seen.got["fast"].summary is not None)
        got = collected.got["slow"].outputs[0].tokens
        assert 5 <= len(got) < 200
        assert collected.got["slow"].summary is None
        give = pb.AddCredit(request_id="slow", num_tokens=200)
        many._commands.put(pb.GenerateManyRequest(credit=pb.AddCredit(request_id="nobody", num_tokens=1)))
        many._commands.put(pb.GenerateManyRequest(credit=give))
        many.finish()
        for event in many:
            collected.take(event)
    output = collected.got["slow"].outputs[0]
    assert output.tokens == list(range(50, 250)) and collected.got["slow"].summary is not None


def test_a_cancel_ends_a_request_whose_window_is_full(core: FakeCore, frontend: Frontend) -> None:
    """Both outputs, one of which was waiting for credit; none of them ends twice when credit comes after all."""
    core.script = lambda add: iter(range(50, 400))
    asked = make("fox", request_id="a", max_tokens=100, num_outputs=2)
    with connect(frontend) as many:
        many._commands.put(pb.GenerateManyRequest(submit=pb.Submit(request=asked, window_tokens=5)))
        core.hold()
        core.wait_for(AddRequest)
        core.step(20)
        events = iter(many)
        collected = Collected()
        while sum(len(output.tokens) for got in collected.got.values() for output in got.outputs.values()) < 5:
            collected.take(next(events))
        many.cancel("a")
        many._commands.put(pb.GenerateManyRequest(credit=pb.AddCredit(request_id="a", num_tokens=1)))
        many.finish()
        for event in events:
            collected.take(event)
    assert grpc_code(collected.failed["a"].code) is grpc.StatusCode.CANCELLED
    assert all(output.finished is not None for output in collected.got["a"].outputs.values())


def test_the_client_gives_credit_by_itself(core: FakeCore, frontend: Frontend) -> None:
    with connect(frontend) as many:
        many.submit("fox", request_id="a", max_tokens=100, window_tokens=3)
        collected = collect(many, until=lambda seen: seen.got["a"].summary is not None)
    assert len(collected.got["a"].outputs[0].tokens) == 100


def test_a_connection_without_requests_ends_with_its_callers_side(frontend: Frontend, core: FakeCore) -> None:
    with connect(frontend) as many:
        many.finish()
        assert list(many) == []


def test_our_own_fault_fails_the_request_with_an_id_of_the_log(core: FakeCore, frontend: Frontend) -> None:
    core.hold()
    with connect(frontend) as many:
        many.submit("fox", request_id="a", max_tokens=5)
        core.wait_for(AddRequest, lambda add: add.header.request_id == "a")
        core.end_all(EndReason.ERROR, "out of luck")
        many.finish()
        collected = collect(many)
    failed = collected.failed["a"]
    assert grpc_code(failed.code) is grpc.StatusCode.INTERNAL and "out of luck" not in failed.message


def test_a_message_that_can_not_be_read_ends_the_connection_and_is_no_fault_of_ours(frontend: Frontend, core: FakeCore) -> None:
    call = frontend.channel.stream_stream("/carousel.v1.Generation/GenerateMany")(iter([b"\xff\xff\xff"]), timeout=20)
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT and "can't be read" in caught.value.details()
    assert "Traceback" not in frontend.log()
