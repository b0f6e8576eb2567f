"""A trace of each request by OpenTelemetry: one span for the call, in it its time in the queue, in prefill, in decode, and each
time that it was preempted; the steps of its life are events.

Made once the request is over, out of what is known then, so a running request costs nothing. Imported only where
`--otlp-endpoint` was given; needs the extra `tracing`. Knows no gRPC; the exporter of the library does.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Span, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from scheduler.errors import RequestError
from scheduler.frontend.ledger import Ended
from wire import ExplainReply, Explanation

log = logging.getLogger(__name__)

_MOST_PENDING = 1000  # requests whose explanation is awaited; the spans of further ones say less
_FLUSH_MS = 2000
_OUR_FAULT = ("INTERNAL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNKNOWN", "DATA_LOSS", "UNIMPLEMENTED")


class Tracing:
    """explain: asks the core about a request by the core's id. Which requests are sampled says their caller's traceparent, else
    OTEL_TRACES_SAMPLER; the library's other OTEL_… variables hold too."""

    def __init__(self, endpoint: str, model: str, explain: Callable[[str], Awaitable[ExplainReply]]) -> None:
        self._model, self._explain = model, explain
        self._provider = TracerProvider(resource=Resource.create({"service.name": "carousel"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("carousel")
        self._propagator = TraceContextTextMapPropagator()
        self._pending: set[asyncio.Task[None]] = set()

    def ended(self, ended: Ended) -> None:
        parent = self._propagator.extract(dict(ended.trace), Context())
        span = self._tracer.start_span("generate", parent, SpanKind.SERVER, start_time=_unix(ended.arrival_ns))
        if not isinstance(span, Span) or not span.is_recording():
            return
        _describe(span, ended, self._model)
        if ended.refusal or len(self._pending) >= _MOST_PENDING:
            self._finish(span, ended, None)
            return
        task = asyncio.create_task(self._ask_and_finish(span, ended))
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)

    async def close(self) -> None:
        """What is pending is finished, and sent as far as the collector takes it in time."""
        if self._pending:
            await asyncio.wait(set(self._pending), timeout=_FLUSH_MS / 1000)
        await asyncio.to_thread(self._provider.force_flush, _FLUSH_MS)
        await asyncio.to_thread(self._provider.shutdown)

    async def _ask_and_finish(self, span: Span, ended: Ended) -> None:
        explanation: Explanation | None = None
        try:
            explanation = (await self._explain(ended.core_id)).explanation
        except RequestError:
            log.debug("the core did not explain %r", ended.request_id)
        self._finish(span, ended, explanation)

    def _finish(self, span: Span, ended: Ended, explanation: Explanation | None) -> None:
        inside, stats = set_span_in_context(span, Context()), ended.stats
        started = ended.arrival_ns if explanation is None else explanation.arrival_ns
        if ended.is_whole:
            admitted, first = started + stats.queued_ns, started + stats.first_token_ns
            self._child(inside, "queue", started, admitted)
            if stats.first_token_ns:
                self._child(inside, "prefill", admitted, first)
                self._child(inside, "decode", first, ended.ended_ns)
                span.add_event("first token", {"carousel.output_tokens": 1}, _unix(first))
        if explanation is not None:
            self._tell_steps(span, inside, ended, explanation)
        span.end(_unix(ended.ended_ns))

    def _tell_steps(self, span: Span, inside: Context, ended: Ended, explanation: Explanation) -> None:
        """Which steps they were: their ids are those of WatchSteps, and of a recording."""
        if explanation.first_step >= 0:
            at_ns = explanation.arrival_ns + explanation.stats.queued_ns
            span.add_event("admitted", {"carousel.step_id": explanation.first_step}, _unix(at_ns))
        for preemption in explanation.preemptions:
            until_ns = preemption.until_ns if preemption.until_ns >= 0 else ended.ended_ns
            about: dict[str, AttributeValue] = {
                "carousel.step_id": preemption.step_id,
                "carousel.preempted_by": preemption.by_request_id or "the worker was lost",
                "carousel.lost_tokens": preemption.lost_tokens,
                "carousel.swapped": preemption.swapped,
            }
            span.add_event("preempted", about, _unix(preemption.at_ns))
            if preemption.until_ns >= 0:
                span.add_event("resumed", {"carousel.step_id": preemption.until_step}, _unix(until_ns))
            self._child(inside, "preempted", preemption.at_ns, until_ns, about)
        if explanation.last_step >= 0:
            span.add_event("last step", {"carousel.step_id": explanation.last_step}, _unix(ended.ended_ns))

    def _child(
        self, inside: Context, name: str, start_ns: int, end_ns: int, about: dict[str, AttributeValue] | None = None
    ) -> None:
        self._tracer.start_span(name, inside, attributes=about, start_time=_unix(start_ns)).end(_unix(end_ns))


def _describe(span: Span, ended: Ended, model: str) -> None:
    """By OpenTelemetry's names where it has some."""
    stats = ended.stats
    span.set_attributes(
        {
            "rpc.system": "grpc",
            "rpc.grpc.status": ended.status,
            "gen_ai.operation.name": "text_completion",
            "gen_ai.request.model": model,
            "gen_ai.response.id": ended.request_id,
            "gen_ai.response.finish_reasons": ended.finish_reasons,
            "gen_ai.usage.input_tokens": stats.prompt_tokens,
            "gen_ai.usage.output_tokens": stats.output_tokens,
            "carousel.tenant": ended.tenant,
            "carousel.cached_tokens": stats.cached_tokens,
            "carousel.recomputed_tokens": stats.recomputed_tokens,
            "carousel.preemptions": stats.preemptions,
            "carousel.resumed": ended.is_resumed,
            "carousel.detached": ended.is_detached,
        }
    )
    if ended.refusal:
        span.set_attribute("carousel.refusal", ended.refusal)
    if ended.status in _OUR_FAULT:
        span.set_status(Status(StatusCode.ERROR, ended.message))


def _unix(monotonic_ns: int) -> int:
    return monotonic_ns + time.time_ns() - time.monotonic_ns()
