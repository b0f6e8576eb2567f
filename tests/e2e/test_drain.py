"""The end of a live server when somebody calls Drain: as after SIGTERM, those alive run to their end; exit code 0."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tokenizers import AddedToken

from carousel.v1 import control_pb2, control_pb2_grpc, generation_pb2_grpc, inspect_pb2, inspect_pb2_grpc
from carousel.v1 import generation_pb2 as pb
from tests.helpers import tokenizer_files
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.server import CAROUSEL, Server, is_alive
from tests.helpers.streams import collect, details, failure, make

PATIENCE_S = 30.0
MANY = 800  # tokens, 640 KB: far more than the transport and the bound on unread ones take from a reader that does not read
NUM_BLOCKS = 8000


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token in five has 4,000 characters."""
    folder = make_checkpoint(tmp_path_factory.mktemp("model"), "llama", vocab_size=384, max_position_embeddings=2 * MANY)
    backend = tokenizer_files.byte_level(vocab_size=300)
    backend.add_tokens([AddedToken(f"{i:04}" * 1000, normalized=False) for i in range(84)])
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def start(model_dir: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def started(*options: str) -> Server:
        servers.append(
            Server(
                "--model",
                str(model_dir),
                "--device",
                "sim",
                "--num-blocks",
                str(NUM_BLOCKS),
                "--max-unread-tokens",
                "64",
                *options,
            )
        )
        servers[-1].wait_ready()
        return servers[-1]

    yield started
    for server in servers:
        server.stop()


@pytest.fixture
def connect() -> Iterator[Callable[[Server], grpc.Channel]]:
    """Connections that keep their windows: the transport takes 64 KiB of a stream that nobody reads."""
    channels: list[grpc.Channel] = []

    def connected(server: Server) -> grpc.Channel:
        channels.append(grpc.insecure_channel(server.target, [("grpc.http2.bdp_probe", 0)]))
        return channels[-1]

    yield connected
    for channel in channels:
        channel.close()


def begun(channel: grpc.Channel) -> Iterator[pb.GenerateResponse]:
    """A stream whose first message has come, and which can't end before it is read on."""
    stream = generation_pb2_grpc.GenerationStub(channel).Generate(make("x = 1", max_tokens=MANY, ignore_eos=True))
    return itertools.chain([next(stream)], stream)


def test_those_alive_run_to_their_end_and_nobody_new_comes_in(
    start: Callable[..., Server], connect: Callable[[Server], grpc.Channel]
) -> None:
    server = start()
    pids = [pid for pids in server.children().values() for pid in pids]
    channel = connect(server)
    stream, control = begun(channel), control_pb2_grpc.ControlStub(channel)
    told = control.Drain(control_pb2.DrainRequest(), timeout=PATIENCE_S)
    assert told.live_requests == 1 and 0 < told.left_ms <= 30_000, "the default of --drain-timeout"
    error = failure(generation_pb2_grpc.GenerationStub(channel).Generate(make(max_tokens=1), timeout=PATIENCE_S))
    assert error.code() is grpc.StatusCode.UNAVAILABLE and "RetryInfo" in details(error)
    health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
    assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert control.Drain(control_pb2.DrainRequest(), timeout=PATIENCE_S).live_requests == 1, "it may be called again"
    assert len(collect(stream).tokens) == MANY
    assert server.process.wait(PATIENCE_S) == 0, server.log()
    assert not any(is_alive(pid) for pid in pids)
    assert "Traceback" not in server.log() and "were cut off" not in server.log(), server.log()


def test_a_time_that_was_asked_for_cuts_those_alive_short(
    start: Callable[..., Server], connect: Callable[[Server], grpc.Channel]
) -> None:
    server = start()
    channel = connect(server)
    stream = begun(channel)
    told = control_pb2_grpc.ControlStub(channel).Drain(control_pb2.DrainRequest(timeout_ms=0), timeout=PATIENCE_S)
    assert (told.live_requests, told.left_ms) == (1, 0)
    assert failure(stream).code() is grpc.StatusCode.UNAVAILABLE
    assert server.process.wait(PATIENCE_S) == 0, server.log()


def test_drain_does_not_wait_for_those_who_watch(
    start: Callable[..., Server], connect: Callable[[Server], grpc.Channel]
) -> None:
    server = start("--drain-timeout", "60")
    channel = connect(server)
    loads = control_pb2_grpc.ControlStub(channel).WatchLoad(control_pb2.WatchLoadRequest(interval_ms=100))
    steps = inspect_pb2_grpc.InspectStub(channel).WatchSteps(inspect_pb2.WatchStepsRequest())
    steps.initial_metadata()
    assert next(loads).load.total_blocks == NUM_BLOCKS
    command = [CAROUSEL, "drain", "--target", server.target]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert done.stdout.startswith("draining: no request is alive; ends within ")
    for watched in (loads, steps):
        with pytest.raises(grpc.RpcError) as ended:
            list(watched)
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    assert server.process.wait(PATIENCE_S) == 0, server.log()
    assert "Traceback" not in server.log(), server.log()
