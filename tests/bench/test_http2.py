from __future__ import annotations

import asyncio
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.rpc import status_pb2
from grpc_status import rpc_status

from bench.http2 import Answer, Call, Caller, CallError, Peer
from tests.helpers.certificates import Authority

_UP, _DOWN, _REFUSED, _MIXED, _SAID = "/t.T/Up", "/t.T/Down", "/t.T/Refused", "/t.T/Mixed", "/t.T/Said"
_DETAILED = "/t.T/Detailed"


async def _down(asked: bytes, context: Any) -> None:
    count, size = struct.unpack(">LL", asked)
    for number in range(count):
        await context.write(struct.pack(">L", number) + bytes(size))


async def _up(asked: Any, context: Any) -> None:
    sizes = [len(message) async for message in asked]
    await context.write(struct.pack(f">{len(sizes)}L", *sizes))


async def _refused(asked: bytes, context: Any) -> None:
    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no room")


async def _detailed(asked: bytes, context: Any) -> None:
    """Refused with a status that says what was asked."""
    said = status_pb2.Status(code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], message=asked.decode())
    await context.abort_with_status(rpc_status.to_status(said))


async def _mixed(asked: bytes, context: Any) -> None:
    for size in (0, 1, 16_379, 16_380, 100_000, 0, 3):
        await context.write(bytes(size))


async def _said(asked: bytes, context: Any) -> None:
    """What the metadata say of the caller, and whether it came over TLS."""
    said = dict(context.invocation_metadata()).get("authorization", "")
    await context.write(said.encode())
    await context.write(context.auth_context()["transport_security_type"][0])


class _Service(grpc.GenericRpcHandler):
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return {
            _DOWN: grpc.unary_stream_rpc_method_handler(_down),
            _UP: grpc.stream_stream_rpc_method_handler(_up),
            _REFUSED: grpc.unary_stream_rpc_method_handler(_refused),
            _DETAILED: grpc.unary_stream_rpc_method_handler(_detailed),
            _MIXED: grpc.unary_stream_rpc_method_handler(_mixed),
            _SAID: grpc.unary_stream_rpc_method_handler(_said),
        }.get(handler_call_details.method)


@contextmanager
def _serving(credentials: grpc.ServerCredentials | None = None) -> Iterator[int]:
    """The port of a grpc.aio server in a thread: the frames that it speaks are not ours."""
    started, ended = Future[tuple[int, asyncio.AbstractEventLoop]](), asyncio.Event()

    async def serve() -> None:
        server = grpc.aio.server(handlers=[_Service()], options=[("grpc.max_receive_message_length", -1)])
        to = "127.0.0.1:0"
        port = server.add_secure_port(to, credentials) if credentials is not None else server.add_insecure_port(to)
        await server.start()
        started.set_result((port, asyncio.get_running_loop()))
        await ended.wait()
        await server.stop(0)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    port, loop = started.result(20)
    try:
        yield port
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(20)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with _serving() as found:
        yield found


def _run(port: int | Peer, calls: list[Call], at_once: int = 100, holds: bool = False) -> list[Answer]:
    caller = Caller(port, connections=2, holds=holds, patience_s=10)
    try:
        return caller.run(calls, at_once)
    finally:
        caller.close()


def _asks(count: int, size: int) -> Call:
    return Call(_DOWN, (struct.pack(">LL", count, size),))


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_every_message_arrives_once_and_in_order(port: int, at_once: int) -> None:
    answers = _run(port, [_asks(50, 10)] * 7, at_once)
    assert len(answers) == 7
    for answer in answers:
        assert answer.status == 0
        assert answer.messages == [struct.pack(">L", number) + bytes(10) for number in range(50)]
        assert 0 < answer.started_ns < answer.heard_ns <= answer.first_ns <= answer.ended_ns


def test_messages_of_any_size_are_whole(port: int) -> None:
    (answer,) = _run(port, [Call(_MIXED, (b"",))])
    assert [len(message) for message in answer.messages] == [0, 1, 16_379, 16_380, 100_000, 0, 3]


def test_a_call_without_messages_ends_well(port: int) -> None:
    (answer,) = _run(port, [_asks(0, 0)])
    assert answer.status == 0 and not answer.messages and not answer.first_ns


def test_what_is_said_passes_the_peers_windows_in_whole(port: int) -> None:
    sizes = [10, 200_000, 0, 70_000]
    answers = _run(port, [Call(_UP, tuple(map(bytes, sizes)))] * 3)
    assert [answer.messages for answer in answers] == [[struct.pack(">4L", *sizes)]] * 3


def test_a_status_is_told(port: int) -> None:
    refused, unknown = (_run(port, [Call(path, (b"",))])[0] for path in (_REFUSED, "/t.T/None"))
    assert (refused.status, unknown.status) == (grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], 12)
    assert not refused.messages


@pytest.mark.parametrize("size", [0, 10, 100, 120, 121, 122, 123, 124, 125, 126, 127, 250, 1000])
def test_the_details_of_a_status_arrive_as_they_were_sent(port: int, size: int) -> None:
    (answer,) = _run(port, [Call(_DETAILED, (b"x" * size,))])
    assert answer.status == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert status_pb2.Status.FromString(answer.details).message == "x" * size
    assert not _run(port, [Call(_REFUSED, (b"",))])[0].details


def test_held_calls_are_all_heard_of_before_any_message(port: int) -> None:
    answers = _run(port, [_asks(3, 5)] * 20, holds=True)
    assert max(answer.heard_ns for answer in answers) < min(answer.first_ns for answer in answers)
    assert all(len(answer.messages) == 3 for answer in answers)


def test_a_server_that_says_nothing_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        caller = Caller(silent.getsockname()[1], 1, patience_s=0.1)
        with pytest.raises(CallError, match="nothing came"):
            caller.run([_asks(1, 1)], 1)
        caller.close()


@pytest.mark.parametrize("size", [10, 126, 127, 300, 5000])
def test_a_header_of_any_length_arrives(port: int, size: int) -> None:
    token = "x" * size
    (answer,) = _run(Peer("127.0.0.1", port, headers=(("authorization", token),)), [Call(_SAID, (b"",))])
    assert answer.messages == [token.encode(), b"insecure"]


def test_messages_of_any_size_are_whole_over_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "authority")
    pair = authority.vouch_for("server")
    credentials = grpc.ssl_server_credentials([(pair.key.read_bytes(), pair.certificate.read_bytes())])
    context = ssl.create_default_context(cafile=authority.file)
    context.set_alpn_protocols(["h2"])
    with _serving(credentials) as port:
        to = Peer("127.0.0.1", port, context)
        said, mixed, up = _run(to, [Call(_SAID, (b"",)), Call(_MIXED, (b"",)), Call(_UP, (bytes(200_000), b""))], at_once=1)
    assert said.messages[1] == b"ssl"
    assert [len(message) for message in mixed.messages] == [0, 1, 16_379, 16_380, 100_000, 0, 3]
    assert up.messages == [struct.pack(">2L", 200_000, 0)]


def test_every_message_has_its_time_and_every_answer_its_key(port: int) -> None:
    answers = _run(port, [Call(_DOWN, (struct.pack(">LL", 20, 3),), key) for key in range(5)])
    assert sorted(answer.key for answer in answers) == list(range(5))
    for answer in answers:
        assert len(answer.at_ns) == 20 and answer.at_ns == sorted(answer.at_ns)
        assert answer.first_ns == answer.at_ns[0]


def test_a_connection_that_breaks_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        caller = Caller(server.getsockname()[1], 1, patience_s=5)
        accepted, _ = server.accept()
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        accepted.close()  # with a reset
        with pytest.raises(CallError, match=r"broke|closed"):
            caller.run([_asks(1, 1)], 1)
        caller.close()
