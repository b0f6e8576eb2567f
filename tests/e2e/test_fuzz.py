"""Calls that mean nothing, by the thousand, to a live server: every answer is a documented status, and nothing remains of them.

Messages of every service come from its descriptors (tests/helpers/calls.py), some damaged, some noise; a batch of them is in
flight at once, with deadlines and cancels of its own. `Drain` and `ReplaceWorker` are left out: they would be obeyed.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st

from carousel.inference import grpc_service_pb2
from carousel.v1 import control_pb2, control_pb2_grpc, generation_pb2, generation_pb2_grpc, inspect_pb2, tokenization_pb2
from tests.helpers.calls import Call, calls, methods
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.server import Server, eventually, running
from tests.helpers.streams import collect, make

AT_ONCE = 25  # calls in flight
PATIENCE_S = 60.0  # a call without an answer by then has none
MEMORY_LIMIT = 100 << 20  # bytes that the front end may grow by
FILES = (generation_pb2, tokenization_pb2, control_pb2, inspect_pb2, grpc_service_pb2, health_pb2, reflection_pb2)
METHODS = methods(
    [service for file in FILES for service in file.DESCRIPTOR.services_by_name.values()],
    without=["carousel.v1.Control.Drain", "carousel.v1.Control.ReplaceWorker"],
)
OFTEN = ("carousel.v1.Generation.Generate", "carousel.v1.Generation.GenerateMany", "carousel.v1.Generation.Resume")
OFTEN += ("inference.GRPCInferenceService.ModelInfer", "inference.GRPCInferenceService.ModelStreamInfer")
# GenerateMany: a request of it with a window waits for credit, which nobody here gives.
ENDLESS = ("carousel.v1.Inspect.WatchSteps", "carousel.v1.Control.WatchLoad", "grpc.health.v1.Health.Watch")
ENDLESS += ("carousel.v1.Generation.GenerateMany",)
# No UNAVAILABLE: the server is never without worker, nor draining. No UNAUTHENTICATED, PERMISSION_DENIED: nobody needs a token.
DOCUMENTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.CANCELLED,
}
NUMBERS = {status.value[0] for status in DOCUMENTED}
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ message.a }}\n{% endfor %}{{ a }}"
# What grpc's caller says, and no server, when a call has been answered before its last message was sent.
THE_CALLERS_OWN = "Internal error from Core"
QUICK, WHOLE = 500, 10_000  # calls


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_checkpoint(folder, "llama", tokenizer=True, max_position_embeddings=256)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


# ---------------------------------------------------------------------------------------------------------------- calls


async def make_calls(target: str, batch: Sequence[Call]) -> list[grpc.StatusCode | None]:
    async with grpc.aio.insecure_channel(target) as channel:
        return await asyncio.gather(*(answered(channel, call) for call in batch))


async def answered(channel: grpc.aio.Channel, call: Call) -> grpc.StatusCode | None:
    try:
        async with asyncio.timeout(PATIENCE_S):
            return await make_call(channel, call)
    except TimeoutError:
        raise AssertionError(f"{call} has no answer") from None


async def make_call(channel: grpc.aio.Channel, call: Call) -> grpc.StatusCode | None:
    """What comes can be read, and ends with a documented status; None: with the caller's cancel."""
    kind = f"{'stream' if call.client_streams else 'unary'}_{'stream' if call.server_streams else 'unary'}"
    to_send = in_turn(call.messages) if call.client_streams else call.messages[0]
    made = getattr(channel, kind)(call.method)(to_send, timeout=call.timeout_s)
    if call.cancel_after == 0:
        await asyncio.sleep(0)
        made.cancel()
    try:
        if call.server_streams:
            count = 0
            async for message in made:
                check(call, message)
                count += 1
                if count == call.cancel_after:
                    made.cancel()
        else:
            check(call, await made)
        status = await made.code()
    except grpc.aio.AioRpcError as error:
        status = error.code()
        if call.client_streams and error.details() == THE_CALLERS_OWN:
            return None
        assert status in DOCUMENTED, f"{call}: {status} {error.details()}"
    except asyncio.CancelledError:
        assert made.cancelled(), f"{call} is not over"
        return None
    assert status in DOCUMENTED, f"{call}: {status}"
    return status


async def in_turn(messages: Sequence[bytes]) -> AsyncIterator[bytes]:
    for message in messages:
        yield message


def check(call: Call, message: bytes) -> None:
    answer = call.answer.FromString(message)
    if isinstance(answer, generation_pb2.GenerateManyResponse):
        for event in answer.events:
            assert not event.HasField("failed") or event.failed.code in NUMBERS, event
    if isinstance(answer, grpc_service_pb2.ModelStreamInferResponse):
        assert "internal error" not in answer.error_message


# --------------------------------------------------------------------------------------------------------- the server


def resident_bytes(server: Server) -> int:
    [frontend] = server.children()["frontend"]
    return int(Path(f"/proc/{frontend}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def survives(server: Server, num_calls: int) -> None:
    """So many calls, and everything is as it was."""

    @settings(
        max_examples=num_calls // AT_ONCE,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],  # what fails is named with its bytes, and making it smaller would take very long
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )
    @given(st.lists(calls(METHODS, OFTEN, ENDLESS), min_size=AT_ONCE, max_size=AT_ONCE))
    def fuzz(batch: list[Call]) -> None:
        statuses.update(loop.run(make_calls(server.target, batch)))

    statuses: Counter[grpc.StatusCode | None] = Counter()
    children = server.children()
    with grpc.insecure_channel(server.target) as channel:
        generation, control = generation_pb2_grpc.GenerationStub(channel), control_pb2_grpc.ControlStub(channel)

        def answer() -> list[int]:
            got = collect(generation.Generate(make(max_tokens=20, seed=7, ignore_eos=True), timeout=PATIENCE_S))
            assert len(got.tokens) == 20
            return got.tokens

        def is_idle() -> bool:
            load = server.load()
            return (load.running_requests, load.waiting_requests, load.held_blocks, load.retiring_blocks) == (0, 0, 0, 0)

        expected, before = answer(), resident_bytes(server)
        with asyncio.Runner() as loop:  # one for all: grpc's are noisy about several
            fuzz()
        control.SetPolicy(control_pb2.SetPolicyRequest(policy="continuous"), timeout=PATIENCE_S)
        assert eventually(is_idle), server.load()
        load = server.load()
        assert load.free_blocks + load.cached_blocks == load.total_blocks
        assert load.accepted_requests > num_calls // 20 and statuses[grpc.StatusCode.OK] > num_calls // 10, (load, statuses)
        assert answer() == expected
        assert resident_bytes(server) - before < MEMORY_LIMIT
    assert server.children() == children, server.log()
    assert server.stop() == 0
    for word in ("Traceback", "internal error", "ERROR", "were cut off", "dropped a message"):
        assert word not in server.log(), server.log()


def test_a_server_survives_calls_that_mean_nothing(model_dir: Path) -> None:
    with running("--model", str(model_dir), "--device", "sim", "--num-blocks", "300") as server:
        survives(server, QUICK)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_server_with_a_model_survives_ten_thousand_calls_that_mean_nothing(model_dir: Path) -> None:
    with running("--model", str(model_dir), "--device", "cpu", "--num-blocks", "300") as server:
        survives(server, WHOLE)
