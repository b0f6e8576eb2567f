"""More requests at once than a server takes: each gets its own tokens or is refused at once, and nothing of them stays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2

from bench.server import Server
from carousel.v1 import control_pb2, control_pb2_grpc, generation_pb2_grpc
from tests.helpers.server import eventually
from tests.helpers.streams import collect, details, make

MODEL = Path(__file__).parents[2] / "demo" / "model"
ROWS, QUEUE, TOKENS = 4, 4, 60
PROMPTS = [f"The number {number} is" for number in range(8)]
AT_ONCE = 96  # requests; those that run and wait are 8
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A request takes 0.3 s at least, by its steps' times: nobody sends 96 of them one after the other by mistake."""
    options = ["--model", MODEL, "--device", "sim", "--sim-base-ns", 5_000_000]
    limits = ["--max-batch-rows", ROWS, "--max-queue-requests", QUEUE]
    with Server([str(option) for option in (*options, *limits)], module="bench.sim_server") as server:
        yield server


@pytest.fixture
def channel(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.target) as channel:
        yield channel


def load(channel: grpc.Channel) -> control_pb2.GetLoadResponse:
    return control_pb2_grpc.ControlStub(channel).GetLoad(control_pb2.GetLoadRequest(), timeout=PATIENCE_S)


def test_each_request_is_served_whole_or_refused_at_once(channel: grpc.Channel) -> None:
    generation = generation_pb2_grpc.GenerationStub(channel)

    def start(number: int) -> grpc.RpcContext:
        asked = make(PROMPTS[number % len(PROMPTS)], max_tokens=TOKENS, ignore_eos=True, seed=1)
        return generation.Generate(asked, timeout=PATIENCE_S)

    alone = [collect(start(number)).tokens for number in range(len(PROMPTS))]
    assert all(len(tokens) == TOKENS for tokens in alone) and len({tuple(tokens) for tokens in alone}) == len(alone)
    served, refusals = 0, 0
    for number, stream in enumerate([start(number) for number in range(AT_ONCE)]):
        try:
            got = collect(stream)
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            told = details(error)
            retry, why = told["RetryInfo"], told["ErrorInfo"]
            assert isinstance(retry, error_details_pb2.RetryInfo) and isinstance(why, error_details_pb2.ErrorInfo)
            assert retry.retry_delay.ToNanoseconds() > 0 and why.reason == "QUEUE_FULL"
            assert int(why.metadata["waiting_requests"]) >= QUEUE
            refusals += 1
        else:
            assert got.tokens == alone[number % len(PROMPTS)], "the same tokens as without company"
            served += 1
    assert served >= ROWS + QUEUE and served + refusals == AT_ONCE
    assert refusals, "it was no overload"

    def is_empty() -> bool:
        now = load(channel)
        return not (now.running_requests or now.waiting_requests or now.held_blocks or now.retiring_blocks)

    assert eventually(is_empty), load(channel)
    assert load(channel).refused_requests == refusals
    assert collect(start(0)).tokens == alone[0], "a fresh request is served"
