"""The Python client, blocking and asyncio, against a real gRPC server with scripted streams."""

from __future__ import annotations

import asyncio
import inspect
import threading

import grpc
import pytest

from carousel.v1 import control_pb2, generation_pb2, inspect_pb2
from client import (
    AsyncCarouselClient,
    AsyncGenerateStream,
    AsyncMany,
    AsyncStream,
    CarouselClient,
    CarouselError,
    GenerateStream,
    Many,
    ServerUnreachableError,
    Stream,
)
from client.retries import RESUME_WINDOW_MS
from tests.helpers.driven import DrivenClient, run
from tests.helpers.fake_server import (
    WAIT_S,
    FakeServer,
    bad_request,
    delta,
    ending,
    error_info,
    finished,
    refuse,
    retry_after,
    summary,
    words,
)


@pytest.fixture
def server():
    with FakeServer() as running:
        yield running


@pytest.fixture(params=[CarouselClient, DrivenClient], ids=["blocking", "asyncio"])
def connect(request):
    return request.param


@pytest.fixture
def client(server, connect):
    with connect(server.target, retries=0) as connected:
        yield connected


def test_text_comes_piece_by_piece_and_the_summary_last(server, client):
    server.script = words("def", " f", "(")
    stream = client.generate("prompt")
    assert list(stream.text()) == ["def", " f", "("]
    assert stream.summary.usage.output_tokens == 3
    assert stream.finished[0].reason == generation_pb2.FINISH_REASON_LENGTH


def test_only_what_was_given_is_sent(server, client):
    list(client.generate("prompt", temperature=0, max_tokens=7, stop="x"))
    request = server.requests.get(timeout=WAIT_S)
    assert request.text == "prompt"
    assert request.sampling.HasField("temperature") and request.sampling.temperature == 0
    assert request.stopping.max_tokens == 7 and list(request.stopping.stop) == ["x"]
    given = {field.name for message in (request.sampling, request.stopping) for field, _ in message.ListFields()}
    assert given == {"temperature", "max_tokens", "stop"}
    assert request.scheduling == generation_pb2.SchedulingParams(resume_window_ms=RESUME_WINDOW_MS)


def test_every_argument_reaches_its_field(server, client):
    arguments = {"top_k": 5, "top_p": 0.5, "min_p": 0.25, "seed": 2**63, "min_tokens": 1, "stop_token_ids": [1, 2]}
    arguments |= {"num_outputs": 3, "tenant": "team-a", "max_time_ms": 900, "on_timeout": "partial", "cache_salt": "s"}
    arguments |= {"resume_window_ms": 7, "whole_by_deadline": True}
    list(client.generate([3, 4], request_id="me", ignore_eos=True, echo=True, priority="interactive", **arguments))
    request = server.requests.get(timeout=WAIT_S)
    assert request.request_id == "me" and list(request.token_ids.ids) == [3, 4]
    sampling, stopping = request.sampling, request.stopping
    assert (sampling.top_k, sampling.top_p, sampling.min_p, sampling.seed) == (5, 0.5, 0.25, 2**63)
    assert (stopping.min_tokens, list(stopping.stop_token_ids), stopping.ignore_eos) == (1, [1, 2], True)
    assert request.output.echo and sampling.num_outputs == 3
    scheduling = request.scheduling
    assert (scheduling.priority, scheduling.tenant) == (generation_pb2.PRIORITY_CLASS_INTERACTIVE, "team-a")
    assert (scheduling.max_time_ms, scheduling.cache_salt) == (900, "s")
    assert (scheduling.resume_window_ms, scheduling.whole_by_deadline) == (7, True)
    assert scheduling.on_timeout == generation_pb2.ON_TIMEOUT_RETURN_PARTIAL


def test_empty_prompts_are_sent_as_what_they_are_for_the_server_to_refuse(server, client):
    list(client.generate(""))
    list(client.generate([]))
    assert [server.requests.get(timeout=WAIT_S).WhichOneof("prompt") for _ in range(2)] == ["text", "token_ids"]


def test_texts_of_several_outputs_come_with_their_index(server, client):
    def script(request, context):
        for offset, text in enumerate("ab"):
            for index in (1, 0):
                yield delta(f"{text}{index}", offset, index)
        yield finished(1, generation_pb2.FINISH_REASON_STOP)
        yield finished(0)
        yield summary(request, 4)

    server.script = script
    stream = client.generate("p", num_outputs=2)
    assert list(stream.texts()) == [(1, "a1"), (0, "a0"), (1, "b1"), (0, "b0")]
    assert stream.finished[1].reason == generation_pb2.FINISH_REASON_STOP and len(stream.finished) == 2
    assert list(client.generate("p", num_outputs=2).text()) == ["a0", "b0"], "those of output 0"


def test_a_request_without_an_id_gets_one_of_its_own(server, client):
    streams = [client.generate("p") for _ in range(2)]
    assert streams[0].request_id != streams[1].request_id
    assert {server.requests.get(timeout=WAIT_S).request_id for _ in streams} == {stream.request_id for stream in streams}


def endless(request, context):
    offset = 0
    while context.is_active():
        yield delta("x", offset)
        offset += 1


@pytest.mark.parametrize("leave", ["with", "close", "text", "drop"])
def test_leaving_a_stream_cancels_its_call(server, client, leave):
    server.script = endless
    stream = client.generate("p", request_id="left")
    next(stream)
    if leave == "with":
        with stream:
            next(stream)
    elif leave == "close":
        stream.close()
    elif leave == "text":
        for _ in stream.text():
            break
    del stream
    assert server.dropped.get(timeout=WAIT_S) == "left"


def test_a_stream_closed_by_another_thread_ends_quietly(server, client):
    waiting = threading.Event()

    def hold(request, context):
        context.add_callback(waiting.set)
        yield delta("x")
        waiting.wait(WAIT_S)

    server.script = hold
    stream = client.generate("p")
    next(stream)
    threading.Thread(target=stream.close).start()
    assert list(stream) == []


def test_many_streams_run_on_one_client(server, client):
    together = threading.Barrier(8, timeout=WAIT_S)

    def script(request, context):
        together.wait()  # only passes when all eight are under way at once
        yield delta(request.text)
        yield from ending(request, 1)

    server.script = script
    streams = [client.generate(f"prompt {i}") for i in range(8)]
    assert ["".join(stream.text()) for stream in streams] == [f"prompt {i}" for i in range(8)]


def test_a_refusal_carries_status_message_and_field(server, client):
    server.script = refuse(grpc.StatusCode.INVALID_ARGUMENT, "too long", bad_request("stopping.max_tokens", "at most 512"))
    with pytest.raises(CarouselError) as raised:
        next(client.generate("p"))
    error = raised.value
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.message == "too long" and error.fields == {"stopping.max_tokens": "at most 512"}
    assert str(error) == "INVALID_ARGUMENT: too long"


def test_a_full_queue_says_when_to_come_again(server, client):
    server.script = refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", retry_after(1, 500_000_000))
    with pytest.raises(CarouselError) as raised:
        list(client.generate("p"))
    assert raised.value.retry_after_s == 1.5


def test_a_deadline_that_can_not_be_met_says_why_in_numbers(server, client):
    server.script = refuse(grpc.StatusCode.DEADLINE_EXCEEDED, "too late", error_info("DEADLINE", estimate_ms="350"))
    with pytest.raises(CarouselError) as raised:
        list(client.generate("p", max_time_ms=100))
    error = raised.value
    assert (error.code, error.reason, error.metadata) == (
        grpc.StatusCode.DEADLINE_EXCEEDED,
        "DEADLINE",
        {"estimate_ms": "350"},
    )


def test_a_draining_server_is_not_an_unreachable_one(server, client):
    server.script = refuse(grpc.StatusCode.UNAVAILABLE, "the server is draining", retry_after(5))
    with pytest.raises(CarouselError) as raised:
        list(client.generate("p"))
    assert not isinstance(raised.value, ServerUnreachableError)
    assert raised.value.message == "the server is draining"


def test_nobody_at_the_target_is_named(connect):
    with FakeServer() as server:
        target = server.target
    with connect(target, retries=1) as client:
        with pytest.raises(ServerUnreachableError, match=target):
            list(client.generate("p"))
        with pytest.raises(ServerUnreachableError, match=target):
            client.load()


def test_a_deadline_is_the_calls_own(server, client):
    def script(request, context):
        yield delta("x")
        ended = threading.Event()
        context.add_callback(ended.set)
        ended.wait(WAIT_S)

    server.script = script
    stream = client.generate("p", timeout_s=0.5)
    with pytest.raises(CarouselError) as raised:
        list(stream)
    assert raised.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


def test_facts_and_cancel(server, client):
    assert client.server_info().served_model_name == "fake"
    assert client.model_info().vocab_size == 100
    assert client.load().total_blocks == 10
    assert client.cancel("some-id") == generation_pb2.CANCEL_OUTCOME_CANCELLED
    assert server.cancels.get(timeout=WAIT_S) == "some-id"


def test_a_policy_is_set(server, client):
    assert client.set_policy("static") == "static" == client.server_info().policy
    with pytest.raises(CarouselError) as raised:
        client.set_policy("fifo")
    assert raised.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_requests_are_listed_in_pages(server, client):
    server.alive = [control_pb2.RequestSummary(request_id=f"r{i}") for i in range(5)]
    page = client.list_requests(3)
    assert ([request.request_id for request in page.requests], page.total_requests) == (["r0", "r1", "r2"], 5)
    page = client.list_requests(3, page.next_page_token)
    assert ([request.request_id for request in page.requests], page.next_page_token) == (["r3", "r4"], "")


def test_a_request_is_explained(server, client):
    server.explanations["r"] = control_pb2.ExplainRequestResponse(request_id="r", text="Waiting: it is next.")
    assert client.explain("r").text == "Waiting: it is next."
    with pytest.raises(CarouselError) as raised:
        client.explain("other")
    assert raised.value.code is grpc.StatusCode.NOT_FOUND


def test_block_tables_are_told(server, client):
    server.tables = inspect_pb2.GetBlockTablesResponse(num_blocks=3, ref_counts=[1, 0, 0])
    assert list(client.block_tables().ref_counts) == [1, 0, 0]


def test_steps_can_be_watched(server, client):
    server.steps = [inspect_pb2.WatchStepsResponse(step_id=i) for i in range(3)]
    with client.watch_steps() as steps:
        assert [step.step_id for step in steps] == [0, 1, 2]


def test_wait_ready_returns_when_health_says_serving(server, client):
    server.say_ready(False)
    done = threading.Event()
    waiter = threading.Thread(target=lambda: (client.wait_ready(WAIT_S), done.set()))
    waiter.start()
    server.say_ready(True)
    assert done.wait(WAIT_S)
    waiter.join()


def test_wait_ready_gives_up_in_time(server, client):
    server.say_ready(False)
    with pytest.raises(CarouselError, match=r"not ready within 0\.2 s"):
        client.wait_ready(0.2)


def test_a_message_of_ten_megabytes_passes(server, client):
    assert "".join(client.generate("p" * (10 << 20)).text()) == "abc"


PAIRS = [(CarouselClient, AsyncCarouselClient), (Stream, AsyncStream), (GenerateStream, AsyncGenerateStream), (Many, AsyncMany)]


@pytest.mark.parametrize(("blocking", "asynchronous"), PAIRS, ids=lambda kind: kind.__name__)
def test_both_clients_have_the_same_methods_with_the_same_parameters(blocking, asynchronous):
    def face(kind: type) -> dict[str, list[tuple[object, ...]]]:
        public = {name: getattr(kind, name) for name in dir(kind) if not name.startswith("_")}
        public |= {"__init__": kind.__init__} if kind in (CarouselClient, AsyncCarouselClient) else {}
        methods = {name: inspect.signature(found) for name, found in public.items() if callable(found)}
        return {
            name: [
                (parameter.name, parameter.kind, parameter.default, parameter.annotation)
                for parameter in found.parameters.values()
            ]
            for name, found in methods.items()
        }

    assert face(blocking) == face(asynchronous)


def test_the_whole_answer_is_put_together_where_it_is_wanted_so(server, client):
    def script(request, context):
        yield generation_pb2.GenerateResponse(delta=generation_pb2.Delta(token_ids=[9], text="p", is_prompt=True))
        for offset, (index, text) in enumerate([(1, "x"), (0, "a"), (1, ""), (0, "b")]):
            yield delta(text, offset // 2, index)
        yield finished(1, generation_pb2.FINISH_REASON_STOP)
        yield finished(0)
        yield summary(request, 4)

    server.script = script
    result = client.generate("p", num_outputs=2, echo=True, request_id="me").result()
    assert (result.text, result.token_ids, result.request_id) == ("ab", [1, 2], "me")
    assert [(output.text, output.token_ids) for output in result.outputs] == [("ab", [1, 2]), ("x", [1, 2])]
    assert result.outputs[0].prompt.text == "p" and result.outputs[1].prompt is None
    assert result.outputs[1].finished.reason == generation_pb2.FINISH_REASON_STOP
    assert result.summary.usage.output_tokens == 4


@pytest.mark.parametrize("leave", ["close", "drop", "client", "error"])
def test_a_request_that_outlives_its_stream_is_cancelled_by_its_id_when_it_is_left(server, connect, leave):
    server.script = endless
    with connect(server.target, resume_window_ms=30_000) as client:
        stream = client.generate("p", request_id="left")
        next(stream)
        if leave == "close":
            stream.close()
        elif leave == "drop":
            del stream
        elif leave == "error":
            with pytest.raises(AssertionError), stream:
                raise AssertionError
        if leave != "client":
            assert server.cancels.get(timeout=WAIT_S) == "left"
    if leave == "client":
        assert server.cancels.get_nowait() == "left", "the server has heard of it when the client is closed"
    assert server.cancels.empty(), "it is told once"


def test_what_has_ended_and_what_ends_with_its_stream_is_not_cancelled_by_its_id(server, connect):
    with connect(server.target, resume_window_ms=30_000, retries=0) as client:
        list(client.generate("p"))
        server.script = refuse(grpc.StatusCode.INTERNAL, "no")
        with pytest.raises(CarouselError):
            list(client.generate("p"))
        server.script = endless
        with client.generate("p", resume_window_ms=0) as stream:
            next(stream)
    assert server.cancels.empty()


def test_a_message_is_sent_as_a_copy(server, client):
    """The caller's own may be sent again, and is then another request."""
    request = generation_pb2.GenerateRequest(text="p")
    for _ in range(2):
        list(client.stream(request))
    sent = [server.requests.get(timeout=WAIT_S).request_id for _ in range(2)]
    assert sent[0] != sent[1] and not request.request_id


def test_the_window_is_not_asked_for_with_what_is_not_kept_for_it(server, connect):
    with connect(server.target, resume_window_ms=30_000) as client:
        for options in (dict(logprobs=0), dict(prompt_logprobs=1)):
            list(client.generate("p", **options))
            assert not server.requests.get(timeout=WAIT_S).scheduling.resume_window_ms
        list(client.generate("p"))
        assert server.requests.get(timeout=WAIT_S).scheduling.resume_window_ms == 30_000


@pytest.mark.parametrize("wrong", [dict(retries=-1), dict(resume_window_ms=-1), dict(resume_window_ms=600_001)])
def test_retries_and_window_have_bounds(connect, wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        connect(**wrong)


def test_the_most_that_a_window_may_be_is_the_servers():
    from client.retries import MAX_RESUME_WINDOW_MS
    from scheduler.frontend import validation

    assert validation.MAX_RESUME_WINDOW_MS == MAX_RESUME_WINDOW_MS


def test_an_asyncio_client_without_a_loop_says_so():
    with pytest.raises(RuntimeError, match="no running event loop"):
        AsyncCarouselClient()


def test_a_task_that_is_cancelled_while_it_waits_for_a_token_ends_its_request(server):
    waiting = threading.Event()

    def hold(request, context):
        yield delta("x")
        context.add_callback(waiting.set)
        waiting.wait(WAIT_S)

    async def leave():
        async with AsyncCarouselClient(server.target, resume_window_ms=30_000) as client:
            stream = client.generate("p", request_id="slow")
            await anext(stream)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(stream), 0.1)
            assert [event async for event in stream] == []

    server.script = hold
    run(leave())
    assert server.cancels.get_nowait() == "slow" == server.dropped.get(timeout=WAIT_S)


def test_many_streams_run_in_one_loop(server):
    async def gather():
        async with AsyncCarouselClient(server.target) as client:
            results = await asyncio.gather(*(client.generate(f"prompt {i}").result() for i in range(8)))
            return [result.text for result in results]

    together = threading.Barrier(8, timeout=WAIT_S)

    def script(request, context):
        together.wait()  # only passes when all eight are under way at once
        yield delta(request.text)
        yield from ending(request, 1)

    server.script = script
    assert run(gather()) == [f"prompt {i}" for i in range(8)]
