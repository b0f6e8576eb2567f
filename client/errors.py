"""What a failed call becomes: one exception with the status, the message and the google.rpc details that came along."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status  # type: ignore[import-untyped]

from carousel.v1 import generation_pb2

_CODES = {code.value[0]: code for code in grpc.StatusCode}
# What grpc.aio says, and no server, when a message can't be sent any more because its connection broke.
_NOT_SENT = (grpc.StatusCode.INTERNAL, "Internal error from Core")


class CarouselError(Exception):
    """A call that the server refused, or that broke.

    code: the gRPC status. message: the server's words. fields: what is wrong with which field of the request (BadRequest).
    retry_after_s: when to try again (RetryInfo), seconds. reason: a word for programs (ErrorInfo), metadata: numbers that go
    with it, such as estimate_ms.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        fields: dict[str, str] | None = None,
        retry_after_s: float | None = None,
        reason: str = "",
        metadata: dict[str, str] | None = None,
    ) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message
        self.fields = fields or {}
        self.retry_after_s = retry_after_s
        self.reason = reason
        self.metadata = metadata or {}


class ServerUnreachableError(CarouselError):
    """Nobody answers at the target."""


def explained(error: CarouselError, more: str) -> CarouselError:
    """The same error with more to its message."""
    return type(error)(
        error.code,
        f"{error.message}; {more}",
        fields=error.fields,
        retry_after_s=error.retry_after_s,
        reason=error.reason,
        metadata=error.metadata,
    )


@dataclass
class _Details:
    """The google.rpc details of a status; `any` is false when the status carries none."""

    fields: dict[str, str]
    metadata: dict[str, str]
    retry_after_s: float | None = None
    reason: str = ""
    any: bool = False


def error_of(error: grpc.RpcError, target: str, answered: bool) -> CarouselError:
    """The exception for a failed call to `target`; answered: messages of this call had come before."""
    call = cast(grpc.Call, error)  # every RpcError that a stub raises is one
    code, message = call.code(), call.details() or ""
    details = _details_of(call)
    if (code, message) == _NOT_SENT:
        code = grpc.StatusCode.UNAVAILABLE
    if code is grpc.StatusCode.UNAVAILABLE and not details.any:  # a Carousel server that refuses says when to come again
        if answered:
            return CarouselError(code, f"the connection to {target} broke: {message}")
        return ServerUnreachableError(code, f"no server answers at {target}: {message}")
    return CarouselError(
        code,
        message,
        fields=details.fields,
        retry_after_s=details.retry_after_s,
        reason=details.reason,
        metadata=details.metadata,
    )


def error_of_failed(failed: generation_pb2.Failed) -> CarouselError:
    """The exception for one request of a GenerateMany."""
    details = _read(failed.details)
    return CarouselError(
        _CODES.get(failed.code, grpc.StatusCode.UNKNOWN),
        failed.message,
        fields=details.fields,
        retry_after_s=details.retry_after_s,
        reason=details.reason,
        metadata=details.metadata,
    )


def _details_of(call: grpc.Call) -> _Details:
    try:
        status = rpc_status.from_call(call)
    except (ValueError, DecodeError):  # something on the way made them up
        return _Details({}, {})
    return _read(status.details if status is not None else ())


def _read(packed_details: Iterable[Any]) -> _Details:
    details = _Details({}, {})
    for packed in packed_details:
        details.any = True
        bad_request, retry_info, info = (
            error_details_pb2.BadRequest(),
            error_details_pb2.RetryInfo(),
            error_details_pb2.ErrorInfo(),
        )
        if packed.Unpack(bad_request):
            details.fields |= {violation.field: violation.description for violation in bad_request.field_violations}
        elif packed.Unpack(retry_info):
            details.retry_after_s = retry_info.retry_delay.seconds + retry_info.retry_delay.nanos / 1e9
        elif packed.Unpack(info):
            details.reason, details.metadata = info.reason, dict(info.metadata)
    return details
