"""Resume over gRPC: two front ends over one core process, and streams that drop in all the ways there are."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
import pytest

from carousel.v1 import control_pb2
from carousel.v1 import generation_pb2 as pb
from scheduler.core import CoreConfig
from tests.helpers.engine import EngineProcess, HandWorker
from tests.helpers.frontend import Frontend, running
from tests.helpers.resuming import Had, whole
from tests.helpers.server import eventually
from tests.helpers.streams import Got, bad_field, collect, details, failure, make
from worker.sim_executor import SimExecutor, sim_facts

FACTS = sim_facts(vocab_size=400, max_model_len=512, num_blocks=64, max_batch_rows=8, max_step_tokens=64)
WINDOW_MS = 60_000


class Stepping(threading.Thread):
    """A worker that computes whenever it may."""

    def __init__(self, engine: EngineProcess) -> None:
        super().__init__(daemon=True)
        self._worker = HandWorker(engine, SimExecutor(FACTS))
        self.may = threading.Event()
        self.may.set()
        self.is_over = False

    def run(self) -> None:
        while not self.is_over:
            if self.may.wait(0.05):
                self._worker.step(20)
        self._worker.close()


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcess]:
    process = EngineProcess(CoreConfig(max_batch_rows=8, max_step_tokens=64))
    yield process
    process.close()


@pytest.fixture(scope="module")
def stepping(engine: EngineProcess) -> Iterator[Stepping]:
    worker = Stepping(engine)
    worker.start()
    yield worker
    worker.is_over = True
    worker.join()


@pytest.fixture(scope="module")
def both(engine: EngineProcess, stepping: Stepping, model_dir: Path) -> Iterator[tuple[Frontend, Frontend]]:
    with running(model_dir, engine.frontends) as one, running(model_dir, engine.frontends) as other:
        one.wait_serving()
        other.wait_serving()
        yield one, other
        assert "Traceback" not in one.log() + other.log() + engine.log(), one.log() + other.log() + engine.log()


@pytest.fixture
def worker(stepping: Stepping) -> Iterator[Stepping]:
    yield stepping
    stepping.may.set()


def asked(with_text: bool = True, **options: Any) -> pb.GenerateRequest:
    request = make(**{"max_tokens": 60, "ignore_eos": True, "seed": 5, "temperature": 1.0} | options)
    request.output.text = with_text
    return request


def resumable(request_id: str, **options: Any) -> pb.GenerateRequest:
    return asked(request_id=request_id, resume_window_ms=WINDOW_MS, **options)


def undisturbed(frontend: Frontend, **options: Any) -> Got:
    return collect(frontend.generation.Generate(asked(**options)))


def num_alive(frontend: Frontend) -> int:
    load = frontend.control.GetLoad(control_pb2.GetLoadRequest())
    return load.running_requests + load.waiting_requests


def nothing_is_held(frontend: Frontend) -> bool:
    return num_alive(frontend) == frontend.control.GetLoad(control_pb2.GetLoadRequest()).held_blocks == 0


@pytest.mark.parametrize(
    "options",
    [{}, {"num_outputs": 3, "echo": True}, {"with_text": False}, {"stop": True}, {"stop": True, "include_stop": True}],
    ids=["plain", "three outputs, echoed", "no text", "stop string", "stop string, included"],
)
def test_a_stream_cut_again_and_again_is_the_undisturbed_one(
    options: dict[str, Any], both: tuple[Frontend, Frontend], worker: Stepping
) -> None:
    if "stop" in options:
        text = undisturbed(both[0]).text
        options = options | {"stop": [text[len(text) // 2 :][:3], "never"]}
    expected = undisturbed(both[0], **options)
    had = Had(f"cut {options}")
    worker.may.clear()
    stream = both[0].generation.Generate(resumable(had.request_id, **options))
    for cut in range(30):
        worker.may.set()
        had.take(islice(stream, 1))
        if had.got.summary is not None:
            break
        worker.may.clear()
        stream.cancel()
        stream = both[cut % 2].generation.Resume(had.rest())
    worker.may.set()
    had.take(stream)
    assert whole(had.got) == whole(expected)
    assert had.got.summary is not None and expected.summary is not None
    assert had.got.summary.usage.output_tokens == expected.summary.usage.output_tokens
    assert had.got.summary.request_id == had.request_id
    assert had.got.summary.timing.seed == 5
    assert eventually(lambda: nothing_is_held(both[0]))
    again = collect(both[1].generation.Resume(pb.ResumeRequest(request_id=had.request_id)))
    assert whole(again) == whole(expected), "it is kept for its window"


def test_a_killed_front_end_loses_no_token(
    engine: EngineProcess, both: tuple[Frontend, Frontend], worker: Stepping, model_dir: Path
) -> None:
    expected, had = undisturbed(both[0], max_tokens=200), Had("killed")
    with running(model_dir, engine.frontends) as third:
        third.wait_serving()
        stream = third.generation.Generate(resumable("killed", max_tokens=200))
        had.take(islice(stream, 1))
        worker.may.clear()
        third.process.kill()
        with pytest.raises(grpc.RpcError):
            had.take(stream)
    stream = both[1].generation.Resume(had.rest())
    worker.may.set()
    had.take(stream)
    assert whole(had.got) == whole(expected)


def test_the_older_of_two_streams_is_told_that_it_was_resumed_elsewhere(
    both: tuple[Frontend, Frontend], worker: Stepping
) -> None:
    expected = undisturbed(both[0])
    worker.may.clear()
    older = both[0].generation.Generate(resumable("two"))
    assert eventually(lambda: num_alive(both[0]) == 1)
    newer = both[1].generation.Resume(pb.ResumeRequest(request_id="two"))
    error = failure(older)
    assert error.code() is grpc.StatusCode.ABORTED
    assert details(error)["ErrorInfo"].reason == "RESUMED_ELSEWHERE"  # type: ignore[attr-defined]
    worker.may.set()
    assert whole(collect(newer)) == whole(expected)


def test_a_request_of_generate_many_is_resumed_as_any_other(both: tuple[Frontend, Frontend], worker: Stepping) -> None:
    expected = undisturbed(both[0])
    worker.may.clear()
    commands = iter([pb.GenerateManyRequest(submit=pb.Submit(request=resumable("many"), window_tokens=8))])
    over = threading.Event()

    def held_open() -> Iterator[pb.GenerateManyRequest]:
        yield from commands
        over.wait(20)

    call = both[0].generation.GenerateMany(held_open())
    worker.may.set()
    next(call)
    call.cancel()
    over.set()
    got = collect(both[1].generation.Resume(pb.ResumeRequest(request_id="many")))
    assert whole(got) == whole(expected)


def test_generate_many_is_told_of_a_request_that_was_resumed_elsewhere_and_goes_on(
    both: tuple[Frontend, Frontend], worker: Stepping
) -> None:
    expected = undisturbed(both[0])
    worker.may.clear()
    requests = [resumable("taken"), asked(request_id="stays")]
    commands = [pb.GenerateManyRequest(submit=pb.Submit(request=request)) for request in requests]
    call = both[0].generation.GenerateMany(iter(commands))
    assert eventually(lambda: num_alive(both[0]) == 2)
    newer = both[1].generation.Resume(pb.ResumeRequest(request_id="taken"))
    events = [event for message in call for event in _stepping_after(worker, message, "failed")]
    ends = {event.request_id: event for event in events if event.WhichOneof("event") in ("failed", "summary")}
    assert ends["taken"].failed.code == grpc.StatusCode.ABORTED.value[0]
    assert ends["stays"].summary.usage.output_tokens == 60
    assert whole(collect(newer)) == whole(expected)


def _stepping_after(worker: Stepping, message: pb.GenerateManyResponse, kind: str) -> list[pb.RequestEvent]:
    """The worker goes on once an event of this kind has come."""
    if any(event.WhichOneof("event") == kind for event in message.events):
        worker.may.set()
    return list(message.events)


def test_a_cancel_ends_it_at_once_detached_or_not(both: tuple[Frontend, Frontend], worker: Stepping) -> None:
    worker.may.clear()
    streams = [both[0].generation.Generate(resumable(name, max_tokens=300)) for name in ("detached", "attached")]
    assert eventually(lambda: num_alive(both[0]) == 2)
    streams[0].cancel()
    for name in ("detached", "attached"):
        answer = both[1].generation.Cancel(pb.CancelRequest(request_id=name))
        assert answer.outcome == pb.CANCEL_OUTCOME_CANCELLED
    assert num_alive(both[0]) == 0
    assert failure(streams[1]).code() is grpc.StatusCode.CANCELLED
    worker.may.set()
    assert eventually(lambda: nothing_is_held(both[0]))
    for name in ("detached", "attached"):
        error = failure(both[1].generation.Resume(pb.ResumeRequest(request_id=name)))
        assert error.code() is grpc.StatusCode.CANCELLED and "cancelled by its id" in error.details()


def test_what_is_not_kept_is_not_found(both: tuple[Frontend, Frontend], worker: Stepping) -> None:
    collect(both[0].generation.Generate(asked(request_id="no window", max_tokens=2)))
    for request_id in ("no window", "nobody"):
        error = failure(both[0].generation.Resume(pb.ResumeRequest(request_id=request_id)))
        assert error.code() is grpc.StatusCode.NOT_FOUND and repr(request_id) in error.details()


def test_an_offset_that_was_never_sent_is_named_and_the_request_goes_on(
    both: tuple[Frontend, Frontend], worker: Stepping
) -> None:
    expected = collect(both[0].generation.Generate(resumable("range", max_tokens=5)))
    for name, value in (("token_offset", 6), ("text_offset", len(expected.text.encode()) + 1)):
        offset = pb.OutputOffset(**{name: value})
        error = failure(both[0].generation.Resume(pb.ResumeRequest(request_id="range", outputs=[offset])))
        assert error.code() is grpc.StatusCode.OUT_OF_RANGE and bad_field(error) == f"outputs[0].{name}"
    error = failure(both[0].generation.Resume(pb.ResumeRequest(request_id="")))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and bad_field(error) == "request_id"
    assert whole(collect(both[0].generation.Resume(pb.ResumeRequest(request_id="range")))) == whole(expected)


def test_another_tenants_request_is_not_found(
    engine: EngineProcess, stepping: Stepping, model_dir: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    entries = [dict(sha256=hashlib.sha256(name.encode()).hexdigest(), tenant=name) for name in ("mine", "other")]
    keys.write_text("\n".join(map(json.dumps, entries)))
    with running(model_dir, engine.frontends, key_file=str(keys)) as frontend:
        frontend.wait_serving()

        def as_(name: str) -> list[tuple[str, str]]:
            return [("authorization", f"Bearer {name}")]

        expected = collect(frontend.generation.Generate(resumable("a", max_tokens=5), metadata=as_("mine")))
        error = failure(frontend.generation.Resume(pb.ResumeRequest(request_id="a"), metadata=as_("other")))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        got = collect(frontend.generation.Resume(pb.ResumeRequest(request_id="a"), metadata=as_("mine")))
        assert whole(got) == whole(expected) and got.summary.request_id == "a"
