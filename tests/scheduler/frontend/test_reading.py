"""Messages that are none of their type: every method of every service says that to its caller, and logs no stack trace."""

from __future__ import annotations

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from carousel.inference import grpc_service_pb2
from carousel.v1 import control_pb2, generation_pb2, inspect_pb2, tokenization_pb2
from tests.helpers.calls import methods
from tests.helpers.fake_core import PATIENCE_S, FakeCore
from tests.helpers.frontend import Frontend
from tests.helpers.streams import failure

FILES = (generation_pb2, tokenization_pb2, control_pb2, inspect_pb2, grpc_service_pb2, health_pb2, reflection_pb2)
METHODS = methods([service for file in FILES for service in file.DESCRIPTOR.services_by_name.values()])

NOT_THERE = "grpc.health.v1.Health.List"


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
def test_a_message_that_can_not_be_read_is_invalid(method, core: FakeCore, frontend: Frontend) -> None:
    path = f"/{method.containing_service.full_name}/{method.name}"
    call = frontend.channel.stream_stream(path)(iter([b"\xff\xff\xff"]), timeout=PATIENCE_S)
    error = failure(call)
    if method.full_name == NOT_THERE:
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    else:
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and "can't be read" in error.details()
    assert "Traceback" not in frontend.log() and not core.all_heard()
