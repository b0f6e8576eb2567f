from __future__ import annotations

import grpc
import grpc.aio
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from client.errors import CarouselError, ServerUnreachableError, error_of

TARGET = "127.0.0.1:1"


def failed(code: grpc.StatusCode, message: str, *details: object) -> grpc.aio.AioRpcError:
    trailers = grpc.aio.Metadata()
    if details:
        packed = [any_pb2.Any() for _ in details]
        for one, detail in zip(packed, details, strict=True):
            one.Pack(detail)
        status = status_pb2.Status(code=code.value[0], message=message, details=packed)
        trailers.add("grpc-status-details-bin", status.SerializeToString())
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailers, details=message)


@pytest.mark.parametrize("message", ["Socket closed", "Internal error from Core"])
def test_a_connection_that_broke_is_one_whatever_grpc_calls_it(message: str) -> None:
    """grpc.aio says INTERNAL where a message could not be sent any more."""
    code = grpc.StatusCode.UNAVAILABLE if message == "Socket closed" else grpc.StatusCode.INTERNAL
    error = error_of(failed(code, message), TARGET, answered=True)
    assert type(error) is CarouselError and error.code is grpc.StatusCode.UNAVAILABLE
    assert error.message == f"the connection to {TARGET} broke: {message}"
    assert type(error_of(failed(code, message), TARGET, answered=False)) is ServerUnreachableError


def test_a_server_s_own_fault_stays_one() -> None:
    error = error_of(failed(grpc.StatusCode.INTERNAL, "see the log at 1a2b"), TARGET, answered=True)
    assert (error.code, error.message) == (grpc.StatusCode.INTERNAL, "see the log at 1a2b")


def test_what_a_server_refuses_keeps_its_details() -> None:
    info = error_details_pb2.ErrorInfo(reason="CORE_LOST", metadata={"a": "1"})
    error = error_of(failed(grpc.StatusCode.UNAVAILABLE, "no core", info), TARGET, answered=True)
    assert (error.message, error.reason, error.metadata) == ("no core", "CORE_LOST", {"a": "1"})
