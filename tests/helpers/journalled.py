"""A whole server with a journal, whose parts are killed, and callers that go on."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import grpc

from carousel.v1 import generation_pb2 as pb
from carousel.v1 import generation_pb2_grpc
from tests.helpers.resuming import Had
from tests.helpers.server import Server, eventually, kill
from tests.helpers.streams import Got, collect, make

PATIENCE_S = 60.0
LONG = 900  # tokens; about a second


def options_of(model_dir: Path, journal: Path) -> list[str]:
    """Few blocks and a short leash: whoever is restored waits, is preempted, is credited."""
    limits = ["--num-blocks", "700", "--max-batch-rows", "32", "--max-unread-tokens", "64"]
    return ["--model", str(model_dir), "--device", "sim", *limits, "--journal", str(journal)]


def core(server: Server) -> int:
    [pid] = server.children()["engine"]
    return pid


def kill_core(server: Server) -> None:
    """And waits for the next one."""
    old = core(server)
    kill(old)
    assert eventually(lambda: server.children().get("engine", [old]) != [old], PATIENCE_S), server.log()


def nothing_is_held(server: Server) -> bool:
    with contextlib.suppress(grpc.RpcError):
        load = server.load()
        return (load.running_requests, load.waiting_requests, load.held_blocks) == (0, 0, 0)
    return False


@contextlib.contextmanager
def connected(target: str) -> Iterator[generation_pb2_grpc.GenerationStub]:
    with grpc.insecure_channel(target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield generation_pb2_grpc.GenerationStub(channel)


def asked(request_id: str = "", window_ms: int = 60_000, **options: object) -> pb.GenerateRequest:
    sampled = dict(max_tokens=LONG, temperature=0.9, seed=11, ignore_eos=True) | options
    if request_id:
        sampled |= dict(request_id=request_id, resume_window_ms=window_ms)
    return make("def main", **sampled)


def undisturbed(server: Server, **options: object) -> Got:
    with connected(server.target) as generation:
        return collect(generation.Generate(asked(**options)))


def resumed(generation: generation_pb2_grpc.GenerationStub, had: Had) -> Iterator[pb.GenerateResponse]:
    """The rest, once the core is there again."""
    until = time.monotonic() + PATIENCE_S
    while True:
        stream = generation.Resume(had.rest())
        try:
            return itertools.chain([next(stream)], stream)
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE and time.monotonic() < until, error
        time.sleep(0.05)
