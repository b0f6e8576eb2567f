"""Errors to gRPC statuses with google.rpc details, in one place for all services."""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status  # type: ignore[import-untyped]

from scheduler.errors import RequestError, UnreadableMessageError

log = logging.getLogger(__name__)

DOMAIN = "carousel.v1"  # of ErrorInfo

Context: TypeAlias = Any  # the generated stubs say: a sync and an async ServicerContext at once; it is the async one
ServicerT = TypeVar("ServicerT")
RequestT = TypeVar("RequestT")
AnswerT = TypeVar("AnswerT")


def is_worth_a_line(record: logging.LogRecord) -> bool:
    """Of what grpc logs: not the stack trace of a status or message for a caller who has just gone."""
    return record.exc_info is None or not isinstance(record.exc_info[1], grpc.aio.InternalError)


def to_status(error: RequestError) -> grpc.Status:
    made: grpc.Status = rpc_status.to_status(status_message(error))
    return made


def status_message(error: RequestError) -> status_pb2.Status:
    """The status of a RequestError: BadRequest names its field, RetryInfo when to come again, ErrorInfo why, with numbers."""
    details: list[Message] = []
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.description)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_ns:
        delay = Duration()
        delay.FromNanoseconds(error.retry_after_ns)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if error.reason:
        details.append(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata))
    status = status_pb2.Status(code=grpc.StatusCode[error.status].value[0], message=error.message)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def internal_error(what: str, *, exc_info: bool = False) -> RequestError:
    """Our own fault: the caller gets an id, the log gets the same id and the rest."""
    error_id = secrets.token_hex(6)
    log.error("internal error %s: %s", error_id, what, exc_info=exc_info)
    return RequestError(f"internal error {error_id}; the server's log says more")


def answers_with_status(
    handler: Callable[[ServicerT, RequestT, Context], Awaitable[AnswerT]],
) -> Callable[[ServicerT, RequestT, Context], Awaitable[AnswerT]]:
    """For the handlers of all services: a RequestError becomes its status, any other exception INTERNAL.

    Handlers of streams write instead of yielding, which is why their types need an `ignore`: when its call is cancelled, a
    coroutine ends at once, a generator when somebody collects it.
    """

    @functools.wraps(handler)
    async def answer(servicer: ServicerT, request: RequestT, context: Context) -> AnswerT:
        try:
            return await handler(servicer, request, context)
        except RequestError as error:
            failure: RequestError = error
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except grpc.aio.InternalError:  # a write, and the reader has just gone: the call may not know yet that it is over
            raise asyncio.CancelledError from None
        except DecodeError:
            failure = UnreadableMessageError()
        except Exception:
            if context.done():  # written to a reader that has just gone
                raise asyncio.CancelledError from None
            failure = internal_error(handler.__qualname__, exc_info=True)
        await refuse(context, failure)

    return answer


async def refuse(context: Context, error: RequestError) -> NoReturn:
    """Ends the call with the error's status, unless its caller has just gone. Raises AbortError or CancelledError."""
    try:
        await context.abort_with_status(to_status(error))
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None
    raise AssertionError("abort_with_status raises")
