"""Standard health checks, as grpc_health_probe and Kubernetes make them: Check and Watch, of the server and of each service."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.helpers.server import Server, running

BUNDLED_MODEL = Path(__file__).parents[2] / "demo" / "model"
SERVICES = ["", *(f"carousel.v1.{name}" for name in ("Generation", "Tokenization", "Control", "Inspect"))]
SERVICES += ["inference.GRPCInferenceService"]
Status = health_pb2.HealthCheckResponse
TIMEOUT_S = 20


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running("--model", str(BUNDLED_MODEL), "--device", "sim") as server:
        yield server


@pytest.fixture
def health(server: Server) -> Iterator[health_pb2_grpc.HealthStub]:
    with grpc.insecure_channel(server.target) as channel:
        yield health_pb2_grpc.HealthStub(channel)


@pytest.mark.parametrize("service", SERVICES)
def test_check_and_watch_say_serving(service: str, health: health_pb2_grpc.HealthStub) -> None:
    request = health_pb2.HealthCheckRequest(service=service)
    assert health.Check(request, timeout=TIMEOUT_S).status == Status.SERVING
    watch = health.Watch(request, timeout=TIMEOUT_S)
    assert next(watch).status == Status.SERVING
    watch.cancel()


def test_an_unknown_service_is_not_found_by_check_and_unknown_to_watch(health: health_pb2_grpc.HealthStub) -> None:
    request = health_pb2.HealthCheckRequest(service="carousel.v1.NoSuchService")
    with pytest.raises(grpc.RpcError) as caught:
        health.Check(request, timeout=TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    watch = health.Watch(request, timeout=TIMEOUT_S)
    assert next(watch).status == Status.SERVICE_UNKNOWN, "the protocol wants it so: the stream stays open"
    watch.cancel()


def test_probes_hear_that_the_server_stops() -> None:
    with (
        running("--model", str(BUNDLED_MODEL), "--device", "sim") as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        watches = [
            health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S)
            for service in ("", "carousel.v1.Generation")
        ]
        assert [next(watch).status for watch in watches] == [Status.SERVING] * 2
        server.process.send_signal(signal.SIGTERM)
        assert [next(watch).status for watch in watches] == [Status.NOT_SERVING] * 2
        assert server.stop() == 0
