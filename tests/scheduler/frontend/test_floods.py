"""Callers that mean harm, or are broken: they hold connections and say nothing, open streams and reset them, ping, never read,
send too much. All others are served meanwhile, and nothing remains of them.
"""

from __future__ import annotations

import contextlib
import itertools
import resource
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from carousel.v1 import generation_pb2 as pb
from carousel.v1 import tokenization_pb2
from scheduler.frontend.server.tokenization import MOST
from tests.helpers import http2, tokenizer_files
from tests.helpers.fake_core import PATIENCE_S, FakeCore
from tests.helpers.frontend import Frontend, running
from tests.helpers.http2 import Connection, frame, headers, message
from tests.helpers.streams import bad_field, collect, failure, make
from wire import AddRequest

GENERATE, MANY = "/carousel.v1.Generation/Generate", "/carousel.v1.Generation/GenerateMany"
LIMIT = 64 << 20  # bytes of a message
MEMORY_LIMIT = 100 << 20  # bytes that a flood may cost


def resident_bytes(frontend: Frontend) -> int:
    return int(Path(f"/proc/{frontend.process.pid}/statm").read_text().split()[1]) * resource.getpagesize()


def is_served(frontend: Frontend) -> None:
    """Somebody new, by a connection of his own."""
    with grpc.insecure_channel(frontend.target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        stream = channel.unary_stream(GENERATE, pb.GenerateRequest.SerializeToString, pb.GenerateResponse.FromString)
        assert len(collect(stream(make(max_tokens=5), timeout=PATIENCE_S)).tokens) == 5


def request(max_tokens: int = 200) -> bytes:
    return make(max_tokens=max_tokens).SerializeToString()


# ---------------------------------------------------------------------------------------------------------- slow loris

_CALL = headers(GENERATE, 1)
BEGINNINGS = {
    "nothing": b"",
    "half a preface": http2.PREFACE[:10],
    "a preface": http2.PREFACE,
    "no call": http2.PREFACE + frame(http2.SETTINGS),
    "half a header": http2.PREFACE + frame(http2.SETTINGS) + _CALL[: len(_CALL) // 2],
    "a header without an end": http2.PREFACE + frame(http2.SETTINGS) + _CALL[:4] + b"\0" + _CALL[5:],
    "no message": http2.PREFACE + frame(http2.SETTINGS) + _CALL,
    "half a message": http2.PREFACE + frame(http2.SETTINGS) + _CALL + message(request(), 1)[:20],
    "a length and nothing": http2.PREFACE
    + frame(http2.SETTINGS)
    + _CALL
    + message(b"", 1, 0)[:9]
    + struct.pack(">BL", 0, LIMIT),
}


def test_two_hundred_connections_that_say_little_hold_up_nobody(core: FakeCore, frontend: Frontend) -> None:
    before = resident_bytes(frontend)
    with contextlib.ExitStack() as stack:
        for beginning in itertools.islice(itertools.cycle(BEGINNINGS.values()), 200):
            stack.enter_context(Connection(frontend.target, begin=False)).send(beginning)
        for _ in range(5):
            is_served(frontend)
        frontend.wait_serving()
        assert resident_bytes(frontend) - before < MEMORY_LIMIT
        assert core.call(core.is_idle), "none of them is a request yet"
    is_served(frontend)


@pytest.mark.slow
def test_a_connection_that_does_not_begin_is_closed(core: FakeCore, frontend: Frontend) -> None:
    beginnings = ("nothing", "half a preface", "a preface")
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(Connection(frontend.target, begin=False)) for _ in beginnings]
        for connection, beginning in zip(connections, beginnings, strict=True):
            connection.send(BEGINNINGS[beginning])
        until = time.monotonic() + 90
        while any(connection.is_open() for connection in connections):
            assert time.monotonic() < until
            time.sleep(0.5)


# -------------------------------------------------------------------------------------------------------- rapid resets


@pytest.mark.parametrize("with_message", [False, True], ids=["before its message", "with its message"])
def test_thousands_of_streams_opened_and_reset_leave_nothing(with_message: bool, core: FakeCore, frontend: Frontend) -> None:
    before = resident_bytes(frontend)
    for _ in range(4):
        with Connection(frontend.target) as connection:
            said = message(request(), 1, http2.END_STREAM) if with_message else b""
            for first in range(1, 2000, 200):
                streams = range(first, first + 200, 2)
                frames = [
                    headers(GENERATE, stream)
                    + said[:5]
                    + struct.pack(">L", stream) * with_message
                    + said[9:]
                    + frame(http2.RST_STREAM, 0, stream, http2.CANCEL)
                    for stream in streams
                ]
                try:
                    connection.send(*frames)
                except ConnectionError:  # it may have had enough of this connection
                    break
            is_served(frontend)
    core.wait_until(core.is_idle)
    is_served(frontend)
    assert resident_bytes(frontend) - before < MEMORY_LIMIT


def test_requests_that_are_reset_while_they_run_end(core: FakeCore, frontend: Frontend) -> None:
    core.hold()
    with Connection(frontend.target) as connection:
        for stream in range(1, 61, 2):
            connection.send(headers(GENERATE, stream), message(request(), stream))
        for _ in range(30):
            core.wait_for(AddRequest)
        connection.send(*(frame(http2.RST_STREAM, 0, stream, http2.CANCEL) for stream in range(1, 61, 2)))
        core.wait_until(core.is_idle)
    core.hold(False)
    is_served(frontend)


# ------------------------------------------------------------------------------------------------- those who never read


def test_readers_without_a_window_hold_up_nobody(core: FakeCore, frontend: Frontend) -> None:
    """Not even the first byte may be sent to them."""
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            connection = stack.enter_context(Connection(frontend.target, {http2.INITIAL_WINDOW_SIZE: 0}))
            connection.send(headers(GENERATE, 1), message(request(), 1))
            submit = pb.GenerateManyRequest(submit=pb.Submit(request=make(max_tokens=200, request_id=str(id(connection)))))
            connection.send(headers(MANY, 3), message(submit.SerializeToString(), 3))
        for _ in range(40):
            core.wait_for(AddRequest)
        for _ in range(5):
            is_served(frontend)
    core.wait_until(core.is_idle)


# --------------------------------------------------------------------------------------------------------------- pings


def test_a_flood_of_pings_is_told_to_go_away(core: FakeCore, frontend: Frontend) -> None:
    with Connection(frontend.target) as connection:
        connection.send(*(frame(http2.PING, payload=bytes(8)) for _ in range(50)))
        assert b"too_many_pings" in connection.read_until(http2.GOAWAY)
    is_served(frontend)


@pytest.mark.slow
def test_a_client_that_pings_every_ten_seconds_stays_and_one_that_is_dead_goes(core: FakeCore, frontend: Frontend) -> None:
    """The dead one has a request that runs: within a minute or so it is noticed, and its request ends."""
    core.hold()
    with Connection(frontend.target) as dead, Connection(frontend.target) as alive:
        dead.send(headers(GENERATE, 1), message(request(), 1))
        core.wait_for(AddRequest)
        for _ in range(4):
            alive.send(frame(http2.PING, payload=bytes(8)))
            alive.read_until(http2.PING)
            time.sleep(10.5)
        assert alive.is_open()
        until = time.monotonic() + 60
        while not core.call(core.is_idle):
            assert time.monotonic() < until
            time.sleep(0.5)
    core.hold(False)


# --------------------------------------------------------------------------------------------------- messages too large


@pytest.fixture
def unlimited(frontend: Frontend) -> Iterator[grpc.Channel]:
    """A caller who sends and takes anything."""
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(frontend.target, options) as channel:
        yield channel


@pytest.mark.parametrize(
    "method", [GENERATE, "/carousel.v1.Tokenization/Tokenize", "/inference.GRPCInferenceService/ModelInfer"]
)
def test_a_message_beyond_the_limit_is_refused_and_the_connection_lives(
    method: str, core: FakeCore, frontend: Frontend, unlimited: grpc.Channel
) -> None:
    error = failure(unlimited.unary_stream(method)(bytes(LIMIT + 1), timeout=PATIENCE_S))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger" in error.details()
    count = unlimited.unary_unary("/carousel.v1.Control/GetLoad")(b"", timeout=PATIENCE_S)
    assert count
    is_served(frontend)


def test_more_text_or_tokens_than_are_worth_it_are_refused_by_name(core: FakeCore, frontend: Frontend) -> None:
    """A message of 64 MiB would keep the tokenizer for minutes, and take gigabytes."""
    tokenization = frontend.tokenization
    error = refused(lambda: tokenization.Tokenize(tokenization_pb2.TokenizeRequest(text="a" * (MOST + 1)), timeout=PATIENCE_S))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and bad_field(error) == "text"
    ids = tokenization_pb2.DetokenizeRequest(token_ids=[5] * (MOST + 1))
    error = refused(lambda: tokenization.Detokenize(ids, timeout=PATIENCE_S))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and bad_field(error) == "token_ids"
    is_served(frontend)


def test_a_conversation_that_is_too_long_is_refused_by_name(tmp_path: Path, shared_core: FakeCore) -> None:
    model_dir = tokenizer_files.save(tokenizer_files.byte_level(), tmp_path / "model")
    (model_dir / "chat_template.jinja").write_text("{% for i in range(1000) %}{{ messages[0].content }}{% endfor %}")
    asked = tokenization_pb2.ApplyChatTemplateRequest(messages=[tokenization_pb2.ChatMessage(role="user", content="a" * 3000)])
    with running(model_dir, shared_core.endpoint) as frontend:
        error = refused(lambda: frontend.tokenization.ApplyChatTemplate(asked, timeout=PATIENCE_S))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and bad_field(error) == "messages"


def refused(call: Callable[[], object]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value
