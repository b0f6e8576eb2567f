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
from client.streams import GenerateStream
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.server import CAROUSEL, eventually, running
from tests.helpers.streams import collect

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
    "too long a resume window": (
        request(lambda r: setattr(r.scheduling, "resume_window_ms", 600_001)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "scheduling.resume_window_ms",
    ),
    "no outputs": (
        request(lambda r: setattr(r.sampling, "num_outputs", 0)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "sampling.num_outputs",
    ),
    "too many outputs": (
        request(lambda r: setattr(r.sampling, "num_outputs", 65)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "sampling.num_outputs",
    ),
    "min_tokens beyond max_tokens": (
        request(lambda r: setattr(r.stopping, "min_tokens", 5)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "stopping.min_tokens",
    ),
    "a tenant that can't be printed": (
        request(lambda r: setattr(r.scheduling, "tenant", "a\x1b[2J")),
        grpc.StatusCode.INVALID_ARGUMENT,
        "scheduling.tenant",
    ),
    "no time at all": (
        request(lambda r: setattr(r.scheduling, "max_time_ms", 0)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "scheduling.max_time_ms",
    ),
    "unknown on_timeout": (
        request(lambda r: setattr(r.scheduling, "on_timeout", 77)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "scheduling.on_timeout",
    ),
    "a salt of 300 characters": (
        request(lambda r: setattr(r.scheduling, "cache_salt", "x" * 300)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "scheduling.cache_salt",
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


@pytest.mark.parametrize("num_outputs", [1, 2])
def test_the_same_id_alive_is_refused_and_free_again_afterwards(client: CarouselClient, num_outputs: int) -> None:
    with client.generate("a", max_tokens=200, ignore_eos=True, request_id="twin", num_outputs=num_outputs) as first:
        next(first)
        with pytest.raises(CarouselError) as caught:
            list(client.generate("a", max_tokens=2, request_id="twin"))
        assert caught.value.code is grpc.StatusCode.ALREADY_EXISTS
    assert eventually(lambda: client.load().running_requests == 0)
    assert list(client.generate("a", max_tokens=2, request_id="twin", ignore_eos=True))


def test_a_full_queue_says_when_to_come_back(client: CarouselClient) -> None:
    refused = []
    with CarouselClient(client.target, retries=0) as once:
        streams = [once.generate("a", max_tokens=300, ignore_eos=True) for _ in range(40)]  # 2 rows, 3 places in the queue
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


def test_a_deadline_that_has_passed_or_is_too_near_is_refused(client: CarouselClient) -> None:
    for options in (dict(timeout_s=1e-6), dict(max_time_ms=1, on_timeout="fail")):
        with pytest.raises(CarouselError) as caught:
            list(client.generate("a" * 400, max_tokens=100, ignore_eos=True, **options))
        assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert eventually(lambda: client.load().held_blocks == 0)


@pytest.fixture(scope="module")
def divided(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CarouselClient]:
    """A server of two tenants, one of them with a quota, and a pool smaller than the model's length."""
    model_dir = make_checkpoint(tmp_path_factory.mktemp("divided"), "llama", tokenizer=True, max_position_embeddings=MODEL_LEN)
    options = ("--num-blocks", "20", "--tenant", "large:weight=2", "--tenant", "small:blocks=5")
    with running("--model", str(model_dir), "--device", "sim", *options) as server, CarouselClient(server.target) as client:
        yield client


def refused(stream: GenerateStream) -> CarouselError:
    with pytest.raises(CarouselError) as caught:
        list(stream)
    return caught.value


@pytest.mark.parametrize("tenant", [None, "stranger"])
def test_a_tenant_without_a_share_is_refused_by_name(divided: CarouselClient, tenant: str | None) -> None:
    error = refused(divided.generate("a", max_tokens=2, tenant=tenant))
    assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, "UNKNOWN_TENANT")
    assert "scheduling.tenant" in error.fields and repr(tenant or "") in error.message
    assert collect(divided.generate("a", max_tokens=2, tenant="large", ignore_eos=True)).summary is not None


def test_a_request_larger_than_its_tenants_quota_is_refused_with_the_numbers(divided: CarouselClient) -> None:
    error = refused(divided.generate([5] * 100, max_tokens=60, tenant="small"))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "TOO_LARGE")
    assert "needs 10 blocks for 160 tokens" in error.message and "may hold 5 of 16 tokens" in error.message
    assert collect(divided.generate([5] * 100, max_tokens=60, tenant="large", ignore_eos=True)).summary is not None


def test_a_request_larger_than_the_pool_is_refused_with_the_numbers(divided: CarouselClient) -> None:
    """The worker has lowered the model's length to what its 20 blocks hold."""
    error = refused(divided.generate([5] * 300, max_tokens=100, tenant="large"))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT and "stopping.max_tokens" in error.fields
    assert "320" in error.message and "300" in error.message


def test_a_worker_without_memory_says_what_would_fit(tmp_path: Path) -> None:
    model_dir = make_checkpoint(tmp_path, "llama", tokenizer=True)
    command = [CAROUSEL, "serve", "--model", str(model_dir), "--port", "0", "--device", "cpu", "--num-blocks", "2000000000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if line.startswith("worker: ")]
    assert "GiB" in line or "TiB" in line
