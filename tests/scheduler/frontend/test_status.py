"""Exceptions of handlers to statuses: ours get an id and nothing else leaves the process."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2

from scheduler.errors import InvalidFieldError, RefusedError
from scheduler.frontend.server.status import answers_with_status, is_worth_a_line, to_status


class Context:
    """As much of a call as the wrapper touches."""

    def __init__(self, done: bool = False) -> None:
        self.status: grpc.Status | None = None
        self._done = done

    def done(self) -> bool:
        return self._done

    async def abort_with_status(self, status: grpc.Status) -> None:
        self.status = status
        raise grpc.aio.AbortError


def call(error: BaseException | None, context: Context) -> Any:
    @answers_with_status
    async def handler(servicer: None, request: str, context: Context) -> str:
        if error is not None:
            raise error
        return request

    return asyncio.run(handler(None, "answer", context))


def test_an_answer_passes() -> None:
    assert call(None, Context()) == "answer"


def test_an_unforeseen_exception_is_internal_and_its_text_stays_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    context = Context()
    with pytest.raises(grpc.aio.AbortError):
        call(ValueError("the secret path"), context)
    assert context.status is not None and context.status.code is grpc.StatusCode.INTERNAL
    assert "secret" not in context.status.details
    error_id = context.status.details.removeprefix("internal error ").partition(";")[0]
    assert error_id in caplog.text and "the secret path" in caplog.text


def test_a_request_error_becomes_its_status() -> None:
    context = Context()
    with pytest.raises(grpc.aio.AbortError):
        call(InvalidFieldError("sampling.top_p", "is wrong"), context)
    assert context.status == to_status(InvalidFieldError("sampling.top_p", "is wrong"))
    assert context.status.code is grpc.StatusCode.INVALID_ARGUMENT and context.status.details == "sampling.top_p is wrong"


def test_the_reason_carries_its_numbers() -> None:
    status = to_status(RefusedError("DEADLINE_EXCEEDED", "too late", metadata={"estimate_ms": "350"}))
    [(_, packed)] = status.trailing_metadata
    told = status_pb2.Status.FromString(packed)
    info = error_details_pb2.ErrorInfo()
    assert len(told.details) == 1 and told.details[0].Unpack(info)
    assert (info.reason, info.domain, dict(info.metadata)) == ("DEADLINE", "carousel.v1", {"estimate_ms": "350"})


def test_the_core_may_say_the_reason_itself() -> None:
    error = RefusedError("RESOURCE_EXHAUSTED", "too many", metadata={"reason": "TENANT_RATE", "max_requests_per_s": "5"})
    assert (error.reason, error.metadata) == ("TENANT_RATE", {"max_requests_per_s": "5"})
    assert RefusedError("RESOURCE_EXHAUSTED", "full", metadata={}).reason == "QUEUE_FULL"


def test_a_write_to_a_reader_who_has_just_gone_is_a_cancelled_call(caplog: pytest.LogCaptureFixture) -> None:
    """The call does not know yet that it is over."""
    context = Context(done=False)
    with pytest.raises(asyncio.CancelledError):
        call(grpc.aio.InternalError("Failed execute_batch"), context)
    assert context.status is None and not caplog.records


@pytest.mark.parametrize(("error", "is_logged"), [(grpc.aio.InternalError("no batch"), False), (ValueError("ours"), True)])
def test_of_grpcs_own_log_a_caller_who_has_gone_is_left_out(
    error: Exception, is_logged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("tests.grpc")
    logger.addFilter(is_worth_a_line)
    try:
        raise error
    except Exception:
        logger.exception("raised in core")
    assert bool(caplog.records) == is_logged
    logger.error("without an exception")
    assert caplog.records


@pytest.mark.parametrize("error", [ValueError("the stream is closed"), asyncio.CancelledError()])
def test_an_exception_after_the_reader_has_gone_is_a_cancelled_call(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    context = Context(done=True)
    with pytest.raises(asyncio.CancelledError):
        call(error, context)
    assert context.status is None and not caplog.records
