"""Both clients against a real server whose connections break and which refuses for a while: what the caller gets is whole."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from carousel.v1 import generation_pb2 as pb
from client import CarouselClient, CarouselError, ServerUnreachableError
from tests.helpers.driven import DrivenClient
from tests.helpers.fake_server import WAIT_S, bad_request, refuse, retry_after
from tests.helpers.fake_server_breaks import BreakingServer, Cable

WORDS = ["a", "né", "轮", "", "🎠x", "end"]
BUSY = refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", retry_after(0, 1_000_000))
DRAINING = refuse(grpc.StatusCode.UNAVAILABLE, "the server is draining", retry_after(0, 1_000_000))


@pytest.fixture
def server() -> Iterator[BreakingServer]:
    with BreakingServer([WORDS]) as running:
        yield running


@pytest.fixture
def cable(server: BreakingServer) -> Iterator[Cable]:
    with Cable(server.port) as plugged:
        yield plugged


@pytest.fixture(params=[CarouselClient, DrivenClient], ids=["blocking", "asyncio"])
def connect(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def client(cable: Cable, connect: Any) -> Iterator[Any]:
    with connect(cable.target, resume_window_ms=30_000) as connected:
        yield connected


def take(stream: Any, count: int) -> list[pb.GenerateResponse]:
    return [next(stream) for _ in range(count)]


def text(events: list[pb.GenerateResponse], index: int = 0) -> str:
    return "".join(event.delta.text for event in events if event.delta.output_index == index)


def offsets(events: list[pb.GenerateResponse], index: int = 0) -> list[int]:
    deltas = [event.delta for event in events if event.HasField("delta") and event.delta.output_index == index]
    return [delta.token_offset + i for delta in deltas for i in range(len(delta.token_ids))]


# -------------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "end"])
@pytest.mark.parametrize("repeats", [False, True])
def test_a_cut_connection_leaves_no_gap_and_no_repeat(server, cable, client, reset, repeats):
    server.stops.append(3)
    server.repeats = repeats
    stream = client.generate("p")
    events = take(stream, 3)
    cable.cut(reset=reset)
    events += stream
    assert text(events) == "".join(WORDS) and offsets(events) == list(range(6))
    assert [event.WhichOneof("event") for event in events[-2:]] == ["finished", "summary"]
    asked = server.resumes.get_nowait()
    assert asked.request_id == stream.request_id == stream.summary.request_id
    assert [(each.output_index, each.token_offset, each.text_offset) for each in asked.outputs] == [(0, 3, 7)]
    assert cable.num_connections == 2 and server.requests.qsize() == 1


def test_a_connection_that_breaks_after_the_summary_is_no_error(server, cable, client):
    events_in_all = len(WORDS) + 2
    server.stops.append(events_in_all)
    stream = client.generate("p")
    events = take(stream, events_in_all)
    assert events[-1].HasField("summary")
    cable.cut()
    assert list(stream) == []
    assert server.resumes.empty() and server.requests.qsize() == 1


def test_it_may_be_cut_again_and_again(server, cable, client):
    server.stops.extend([1, 2, 1, 1])
    stream, events = client.generate("p"), []
    for count in (1, 2, 1, 1):
        events += take(stream, count)
        cable.cut()
    events += stream
    assert text(events) == "".join(WORDS) and offsets(events) == list(range(6))
    assert server.resumes.qsize() == 4


def test_several_outputs_and_their_prompt_go_on_each_where_it_was(server, cable, client):
    server.texts = [["a", "b", "c"], ["né"], ["x", "y", "z", "w"]]
    server.stops.extend([6, 3])
    stream = client.generate("the prompt", num_outputs=3, echo=True)
    events = take(stream, 6)  # three prompts, a token of the first, all of the second: its end comes again
    cable.cut()
    events += take(stream, 2)
    cable.cut()
    events += stream
    assert [text(events, index) for index in range(3)] == ["the promptabc", "the promptné", "the promptxyzw"]
    assert sum(event.delta.is_prompt for event in events) == 3
    assert sorted(event.finished.output_index for event in events if event.HasField("finished")) == [0, 1, 2]


def test_text_and_result_go_on_too(server, cable, client):
    server.stops.extend([2, 2])
    pieces = []
    for piece in client.generate("p").text():
        pieces.append(piece)
        cable.cut()
    assert "".join(pieces) == "".join(WORDS)
    server.stops.append(0)
    threading.Timer(0.1, cable.cut).start()
    assert client.generate("p").result().text == "".join(WORDS)


def test_the_server_is_looked_for_until_it_is_there_again(server, cable, client):
    server.stops.append(2)
    server.resume_refusals.extend([DRAINING, BUSY])
    stream = client.generate("p")
    events = take(stream, 2)
    cable.refuse_next = 1
    cable.cut()
    events += stream
    assert text(events) == "".join(WORDS) and server.resumes.qsize() == 3


@pytest.mark.parametrize("code", [grpc.StatusCode.NOT_FOUND, grpc.StatusCode.OUT_OF_RANGE])
def test_what_is_not_kept_any_more_ends_with_the_broken_connection_and_says_why(server, cable, client, code):
    server.stops.append(2)
    server.resume_refusals.append(refuse(code, "it is not kept"))
    stream = client.generate("p")
    take(stream, 2)
    cable.cut()
    with pytest.raises(CarouselError, match=f"{cable.target} broke: .*; it could not be resumed: it is not kept") as raised:
        list(stream)
    assert raised.value.code is grpc.StatusCode.UNAVAILABLE and raised.value.message.count("\n") == 0
    assert server.resumes.qsize() == 1


def test_a_window_of_zero_is_no_window(server, cable, connect):
    with connect(cable.target, resume_window_ms=0) as client:
        for options in ({}, {"resume_window_ms": 0}):
            server.stops.append(2)
            stream = client.generate("p", **options)
            take(stream, 2)
            cable.cut()
            with pytest.raises(CarouselError, match="broke: ") as raised:
                list(stream)
            assert raised.value.code is grpc.StatusCode.UNAVAILABLE
    assert server.resumes.empty()


def test_a_server_that_leaves_a_gap_is_told_of(server, cable, client):
    server.stops.append(2)
    server.skips = True
    stream = client.generate("p")
    take(stream, 2)
    cable.cut()
    with pytest.raises(CarouselError, match="goes on at token 4 of output 0, not 2") as raised:
        list(stream)
    assert raised.value.code is grpc.StatusCode.DATA_LOSS


def test_what_others_ended_is_not_resumed(server, cable, client):
    def script(code: grpc.StatusCode):
        def run(request, context):
            yield pb.GenerateResponse(delta=pb.Delta(token_ids=[1], text="a"))
            context.abort(code, "so it is")

        return run

    for code in (grpc.StatusCode.CANCELLED, grpc.StatusCode.ABORTED, grpc.StatusCode.INTERNAL):
        server.refusals.append(script(code))
        with pytest.raises(CarouselError) as raised:
            list(client.generate("p"))
        assert raised.value.code is code
    assert server.resumes.empty()


def test_the_callers_time_is_for_all_that_is_done(server, cable, client):
    server.stops.append(2)
    stream = client.generate("p", timeout_s=WAIT_S)
    take(stream, 2)
    cable.cut()
    list(stream)
    assert all(0 < server.deadlines_s.get_nowait() <= WAIT_S for _ in ("Generate", "Resume"))


def test_a_stream_that_is_closed_while_the_server_is_looked_for_ends(server, cable, client):
    server.stops.append(2)
    stream = client.generate("p", resume_window_ms=600_000)
    take(stream, 2)
    much_later = retry_after(500)  # longer than a test may take
    server.resume_refusals.append(refuse(grpc.StatusCode.UNAVAILABLE, "later", much_later))
    cable.cut()

    def close() -> None:
        server.resumes.get(timeout=WAIT_S)
        stream.close()

    closer = threading.Thread(target=close)
    closer.start()
    assert list(stream) == []
    closer.join()
    assert server.cancels.get(timeout=WAIT_S) == stream.request_id


def test_another_program_can_go_on_with_a_request(server, cable, client, connect):
    server.stops.append(3)
    stream = client.generate("p", request_id="ours")
    had = take(stream, 3)
    with connect(cable.target) as other:
        attached = other.resume("ours", {0: (2, len("ané".encode()))})
        events = list(attached)
        assert text(had[:2] + events) == "".join(WORDS) and attached.summary.request_id == "ours"
        assert text(list(other.resume("ours"))) == "".join(WORDS)
        with pytest.raises(CarouselError) as raised:
            next(other.resume("unknown"))
        assert raised.value.code is grpc.StatusCode.NOT_FOUND


# --------------------------------------------------------------------------------------------------------------- retries


def test_what_is_refused_for_now_is_asked_for_again(server, client):
    server.refusals.extend([BUSY, DRAINING, BUSY])
    assert "".join(client.generate("p").text()) == "".join(WORDS)
    requests = [server.requests.get_nowait() for _ in range(4)]
    assert len({request.request_id for request in requests}) == 1


def test_the_servers_delay_is_waited_for(server, client):
    server.refusals.append(refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after(0, 400_000_000)))
    began_s = time.monotonic()
    client.generate("p").result()
    assert time.monotonic() - began_s >= 0.4


def test_there_are_no_more_attempts_than_asked_for(server, cable, connect):
    for retries, attempts in ((0, 1), (2, 3)):
        server.refusals.extend([BUSY] * 5)
        with connect(cable.target, retries=retries) as client, pytest.raises(CarouselError) as raised:
            list(client.generate("p"))
        assert raised.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert server.requests.qsize() == attempts
        server.requests.queue.clear()
        server.refusals.clear()


def test_a_delay_past_the_deadline_is_not_waited_for(server, client):
    server.refusals.append(refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after(int(WAIT_S * 3))))
    with pytest.raises(CarouselError, match="full"):
        list(client.generate("p", timeout_s=WAIT_S * 2))
    assert server.requests.qsize() == 1


@pytest.mark.parametrize("code", ["INVALID_ARGUMENT", "UNIMPLEMENTED", "FAILED_PRECONDITION", "UNAUTHENTICATED", "INTERNAL"])
def test_what_will_be_refused_again_is_not_asked_again(server, client, code):
    server.refusals.append(refuse(grpc.StatusCode[code], "no", bad_request("text", "no"), retry_after(0, 1)))
    with pytest.raises(CarouselError) as raised:
        list(client.generate("p"))
    assert raised.value.code.name == code and server.requests.qsize() == 1


def test_a_request_that_got_through_though_its_attempt_broke_is_resumed(server, cable, client):
    """The server has begun it, the connection breaks before the first token: the second attempt hears ALREADY_EXISTS."""
    server.stops.append(0)
    stream = client.generate("p")
    sent = server.requests.get(timeout=WAIT_S)
    while sent.request_id not in server.kept:
        time.sleep(0.001)
    cable.cut()
    assert text(list(stream)) == "".join(WORDS)
    assert server.requests.get_nowait().request_id == sent.request_id
    asked = server.resumes.get_nowait()
    assert asked.request_id == sent.request_id and not asked.outputs


def test_an_id_that_somebody_else_uses_is_an_error(server, client):
    server.kept["taken"] = pb.GenerateRequest()
    with pytest.raises(CarouselError) as raised:
        list(client.generate("p", request_id="taken"))
    assert raised.value.code is grpc.StatusCode.ALREADY_EXISTS and server.resumes.empty()


def test_questions_are_asked_again(server, cable, client):
    assert client.load().total_blocks == 10
    cable.refuse_next = 2
    cable.cut()
    assert client.load().total_blocks == 10
    assert cable.num_connections >= 3


def test_questions_are_not_asked_again_where_no_retries_are_wanted(server, cable, connect):
    with connect(cable.target, retries=0) as client:
        cable.refuse_next = 1
        with pytest.raises(ServerUnreachableError):
            client.load()
