"""A whole server, its connections broken and its front ends killed: with a resume window no token is lost, none comes twice."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from itertools import islice

import grpc
import pytest

from carousel.v1 import generation_pb2 as pb
from carousel.v1 import generation_pb2_grpc
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.resuming import Had, whole
from tests.helpers.server import Server, eventually, kill, running
from tests.helpers.streams import Got, collect, make


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two front ends; the reader's side may be little behind, so that much is computed for nobody."""
    model = make_checkpoint(tmp_path_factory.mktemp("model"), "llama", tokenizer=True, max_position_embeddings=2048)
    options = ["--device", "cpu", "--num-blocks", "400", "--frontends", "2", "--max-unread-tokens", "8"]
    with running("--model", str(model), *options) as server:
        yield server


class Cable:
    """A TCP connection to the server that can be cut: everything through it, at once and without a farewell."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._server = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._listener.close()
        for end in self._sockets:
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._server)
                self._sockets += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=pair, daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)


@contextlib.contextmanager
def connected(target: str) -> Iterator[generation_pb2_grpc.GenerationStub]:
    with grpc.insecure_channel(target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield generation_pb2_grpc.GenerationStub(channel)


def asked(request_id: str = "", **options: object) -> pb.GenerateRequest:
    sampled = dict(max_tokens=150, temperature=0.9, seed=11, ignore_eos=True) | options
    if request_id:
        sampled |= dict(request_id=request_id, resume_window_ms=60_000)
    return make("def main", **sampled)


def undisturbed(server: Server, **options: object) -> Got:
    with connected(server.target) as generation:
        return collect(generation.Generate(asked(**options)))


def nothing_is_held(server: Server) -> bool:
    load = server.load()
    return (load.running_requests, load.waiting_requests, load.held_blocks) == (0, 0, 0)


def test_broken_connections_lose_nothing(server: Server) -> None:
    expected, had = undisturbed(server, num_outputs=2, echo=True), Had("broken")
    cable = Cable(server.target)
    with connected(cable.target) as generation:
        stream = generation.Generate(asked("broken", num_outputs=2, echo=True))
        had.take(islice(stream, 3))
        cable.cut()
        with contextlib.suppress(grpc.RpcError):  # what had arrived
            had.take(stream)
    for num_messages in (2, 5, 9):
        cable = Cable(server.target)
        with connected(cable.target) as generation:
            stream = generation.Resume(had.rest())
            had.take(islice(stream, num_messages))
            cable.cut()
            with contextlib.suppress(grpc.RpcError):
                had.take(stream)
    with connected(server.target) as generation:
        had.take(generation.Resume(had.rest()))
    assert whole(had.got) == whole(expected)
    assert eventually(lambda: nothing_is_held(server)), server.load()


def test_a_killed_front_end_loses_nothing(server: Server) -> None:
    expected, had = undisturbed(server), Had("killed")
    frontends = server.children()["frontend"]
    with connected(server.target) as generation:
        stream = generation.Generate(asked("killed"))
        had.take(islice(stream, 2))
        for frontend in frontends:
            kill(frontend)
        with contextlib.suppress(grpc.RpcError):
            had.take(stream)
    assert eventually(lambda: len(set(server.children().get("frontend", [])) - set(frontends)) == 2)
    with connected(server.target) as generation:
        had.take(generation.Resume(had.rest(), wait_for_ready=True, timeout=60))
    assert whole(had.got) == whole(expected)
    assert eventually(lambda: nothing_is_held(server)), server.load()


def test_without_a_window_a_broken_connection_ends_the_request(server: Server) -> None:
    cable = Cable(server.target)
    cancelled = server.load().cancelled_requests
    with connected(cable.target) as generation:
        stream = generation.Generate(asked(max_tokens=1900))
        next(stream)
        cable.cut()
        assert eventually(lambda: server.load().cancelled_requests == cancelled + 1)
    assert eventually(lambda: nothing_is_held(server)), server.load()
