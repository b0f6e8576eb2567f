"""What became of each request, told once its call is over: to the log, the metrics, the traces; whoever wants to know.

Knows requests and errors; no gRPC but the metadata that a context shows, and nothing of those it tells.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from scheduler.errors import RefusedError, RequestError
from scheduler.frontend.callers import core_id
from scheduler.frontend.validation import MAX_ID_CHARACTERS, Options
from scheduler.process import Fields
from wire import RequestStats

log = logging.getLogger(__name__)

_TRACE_KEYS = ("traceparent", "tracestate")


class RunningRequest(Protocol):
    """Of server/running.py."""

    options: Options
    first_ns: int

    def account(self) -> tuple[RequestStats, tuple[str, ...], bool]: ...


@dataclass(frozen=True, slots=True)
class Ended:
    """A request whose call is over. Times are CLOCK_MONOTONIC nanoseconds."""

    request_id: str
    core_id: str  # as the core knows it
    tenant: str
    status: str  # name of a gRPC status
    message: str  # what the status says; empty: nothing
    refusal: str  # why it was not accepted, in a word; empty: it was
    stats: RequestStats  # as far as they are known
    is_whole: bool  # all its outputs ended: all of stats is known
    finish_reasons: tuple[str, ...]  # of the outputs that ended
    is_resumed: bool  # this call took it over from another one
    is_detached: bool  # it goes on without a reader
    arrival_ns: int  # of this call
    first_ns: int  # when its first token was ready for the reader; 0: never
    ended_ns: int
    trace: Mapping[str, str]  # W3C trace context of the caller

    @property
    def first_token_ns(self) -> int:
        """From arrival to the first token; 0: there was none."""
        if self.is_resumed:
            return self.stats.first_token_ns
        return self.first_ns - self.arrival_ns if self.first_ns else 0

    @property
    def whole_ns(self) -> int:
        """From arrival to the end."""
        stats = self.stats
        if self.is_resumed:
            return stats.queued_ns + stats.prefill_ns + stats.decode_ns + stats.preempted_ns
        return self.ended_ns - self.arrival_ns


Listener = Callable[[Ended], None]


class Entry:
    """A call for a request. Entered as a context, it takes the call's end, and the exception that it ends with."""

    def __init__(self, ledger: Ledger, request: Any, context: Any, caller: Any, is_resumed: bool) -> None:
        self._ledger, self._context, self._caller, self._is_resumed = ledger, context, caller, is_resumed
        self._request_id = request.request_id
        self._tenant = caller.tenant if caller is not None else "" if is_resumed else request.scheduling.tenant
        self._arrival_ns = time.monotonic_ns()
        self.running: RunningRequest | None = None  # once it is accepted by this front end

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end(error)

    def end(self, error: BaseException | None) -> None:
        if self._ledger.listeners:
            try:
                ended = self._ended(error)
                for listener in self._ledger.listeners:
                    listener(ended)
            except Exception:  # our mistake, which must not be the call's
                log.exception("the end of a request could not be told")

    def _ended(self, error: BaseException | None) -> Ended:
        running = self.running
        stats, reasons, is_whole = running.account() if running is not None else (RequestStats(), (), False)
        status = _status(error, self._context)
        request_id = (running.options.request_id if running is not None else self._request_id)[:MAX_ID_CHARACTERS]
        refused = isinstance(error, RequestError) and (running is None or isinstance(error, RefusedError))
        return Ended(
            request_id=request_id,
            core_id=core_id(self._caller, request_id),
            tenant=(running.options.tenant if running is not None else self._tenant)[:MAX_ID_CHARACTERS],
            status=status,
            message=error.message if isinstance(error, RequestError) else "",
            refusal=(error.reason or status) if refused and isinstance(error, RequestError) else "",
            stats=stats,
            is_whole=is_whole,
            finish_reasons=reasons,
            is_resumed=self._is_resumed,
            is_detached=running is not None and running.options.resume_window_ms > 0 and not is_whole and status == "CANCELLED",
            arrival_ns=self._arrival_ns,
            first_ns=running.first_ns if running is not None else 0,
            ended_ns=time.monotonic_ns(),
            trace=_trace(self._context),
        )


class Ledger:
    """listeners: called on the event loop, one after the other, so they return at once."""

    def __init__(self, listeners: Sequence[Listener] = ()) -> None:
        self.listeners = tuple(listeners)

    def open(self, request: Any, context: Any, caller: Any, *, is_resumed: bool = False) -> Entry:
        """request: a GenerateRequest, or a ResumeRequest that is_resumed."""
        return Entry(self, request, context, caller, is_resumed)


def _status(error: BaseException | None, context: Any) -> str:
    if error is None:
        return "OK"
    if isinstance(error, RequestError):
        return error.status
    return "CANCELLED" if isinstance(error, asyncio.CancelledError) or context.done() else "INTERNAL"


def _trace(context: Any) -> Mapping[str, str]:
    metadata = context.invocation_metadata() or ()
    return {key: str(value) for key, value in metadata if key in _TRACE_KEYS}


# ---------------------------------------------------------------------------------------------------------------- the log


def log_request(ended: Ended) -> None:
    """One line."""
    if log.isEnabledFor(logging.INFO):
        log.info("request %s", request_fields(ended))


def request_fields(ended: Ended) -> Fields:
    """Times in milliseconds. The trace's id stands in its caller's traceparent."""
    stats = ended.stats
    told = Fields(request_id=ended.request_id, tenant=ended.tenant, status=ended.status)
    if (parent := ended.trace.get("traceparent", "").split("-")) and len(parent) == 4:
        told["trace_id"] = parent[1]
    if ended.message:
        told["said"] = ended.message
    if ended.refusal:
        told["refused"] = ended.refusal
        return told
    told["finish"] = ",".join(ended.finish_reasons) or ("detached" if ended.is_detached else "")
    told |= {"prompt_tokens": stats.prompt_tokens, "cached_tokens": stats.cached_tokens, "output_tokens": stats.output_tokens}
    times = {"first_token_ms": ended.first_token_ns, "whole_ms": ended.whole_ns}
    if ended.is_whole:
        times |= {"queued_ms": stats.queued_ns, "prefill_ms": stats.prefill_ns, "decode_ms": stats.decode_ns}
        times |= {"preempted_ms": stats.preempted_ns}
    told |= {key: round(ns / 1e6, 1) for key, ns in times.items()}
    if stats.preemptions:
        told |= {"preemptions": stats.preemptions, "recomputed_tokens": stats.recomputed_tokens}
    return told
