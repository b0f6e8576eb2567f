"""Bad input to a live server: the status and the field that API clients rely on, and the others are served on."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from carousel.v1 import generation_pb2 as pb
from client.api import CarouselClient
from client.errors import CarouselError
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.server import CAROUSEL, eventually, running

MODEL_LEN = 512
NUM_BLOCKS = 40  # 640 tokens


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CarouselClient]:
    folder = tmp_path_factory.mktemp("model")
    model_dir = make_checkpoint(folder, "llama", tokenizer=True, max_position_embeddings=MODEL_LEN)
    options = ("--device", "cpu", "--num-blocks", str(NUM_BLOCKS), "--max-queue-requests", "3", "--max-batch-rows", "2")
    with running("--model", str(model_dir), *options) as server, CarouselClient(server.target) as client:
        yield client
        load = client.load()
        assert (load.held_blocks, load.running_requests, load.waiting_requests) == (0, 0, 0)


def request(change: Callable[[pb.GenerateRequest], object] = lambda request: None, text: str = "x = 1") -> pb.GenerateRequest:
    made = pb.GenerateRequest(text=text)
    made.stopping.max_tokens = 4
    change(made)
    return made


BAD: dict[str, tuple[pb.GenerateRequest, grpc.StatusCode, str]] = {
    "empty text": (request(text=""), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
    "no prompt": (request(lambda r: r.ClearField("text")), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
    "empty ids": (request(lambda r: r.token_ids.SetInParent()), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
    "token beyond the vocabulary": (
        request(lambda r: r.token_ids.ids.append(1 << 31)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "prompt.token_ids",
    ),
    "max_tokens beyond the length": (
        request(lambda r: setattr(r.stopping, "max_tokens", 10_000)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "stopping.max_tokens",
    ),
    "max_tokens 0": (
        request(lambda r: setattr(r.stopping, "max_tokens", 0)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "stopping.max_tokens",
    ),
    "unknown priority": (
        request(lambda r: setattr(r.scheduling, "priority", 77)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "scheduling.priority",
    ),
    "top_p over 1": (
        request(lambda r: setattr(r.sampling, "top_p", 1.5)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "sampling.top_p",
    ),
    "temperature not a number": (
        request(lambda r: setattr(r.sampling, "temperature", float("nan"))),
        grpc.StatusCode.INVALID_ARGUMENT,
        "sampling.temperature",
    ),
    "not supported yet": (
        request(lambda r: setattr(r.sampling, "num_outputs", 2)),
        grpc.StatusCode.UNIMPLEMENTED,
        "sampling.num_outputs",
    ),
    "10 MB of text": (request(text="word " * 2_000_000), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
}


@pytest.mark.parametrize("name", BAD)
def test_is_refused_by_status_and_field_while_a_stream_goes_on(client: CarouselClient, name: str) -> None:
    bad, status, field = BAD[name]
    with client.generate("y = 2", max_tokens=150, ignore_eos=True) as stream:
        next(stream)
        with pytest.raises(CarouselError) as caught:
            list(client.stream(bad))
        assert caught.value.code is status, caught.value
        assert field in str(caught.value) or field in str(caught.value.__dict__)
        assert "Traceback" not in str(caught.value)
        assert sum(len(event.delta.token_ids) for event in stream) > 100


def test_the_same_id_alive_is_refused_and_free_again_afterwards(client: CarouselClient) -> None:
    with client.generate("a", max_tokens=200, ignore_eos=True, request_id="twin") as first:
        next(first)
        with pytest.raises(CarouselError) as caught:
            list(client.generate("a", max_tokens=2, request_id="twin"))
        assert caught.value.code is grpc.StatusCode.ALREADY_EXISTS
    assert eventually(lambda: client.load().running_requests == 0)
    assert list(client.generate("a", max_tokens=2, request_id="twin", ignore_eos=True))


def test_a_full_queue_says_when_to_come_back(client: CarouselClient) -> None:
    streams = [client.generate("a", max_tokens=300, ignore_eos=True) for _ in range(40)]  # 2 rows, 3 places in the queue
    refused = []
    for stream in streams:
        try:
            assert sum(len(event.delta.token_ids) for event in stream) == 300
        except CarouselError as error:
            refused.append(error)
    assert 0 < len(refused) < 40
    assert {error.code for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert all(error.retry_after_s for error in refused)
    assert eventually(lambda: client.load().held_blocks == 0)


def test_a_deadline_frees_the_row(client: CarouselClient) -> None:
    with pytest.raises(CarouselError) as caught:
        list(client.generate("a", max_tokens=480, ignore_eos=True, timeout_s=0.05))
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert eventually(lambda: client.load().held_blocks == 0)


def test_a_worker_without_memory_says_what_would_fit(tmp_path: Path) -> None:
    model_dir = make_checkpoint(tmp_path, "llama", tokenizer=True)
    command = [CAROUSEL, "serve", "--model", str(model_dir), "--port", "0", "--device", "cpu", "--num-blocks", "2000000000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if line.startswith("worker: ")]
    assert "GiB" in line or "TiB" in line
