"""An OpenTelemetry collector in this process: the real service of opentelemetry-proto, which keeps the spans that it gets."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Entered, it listens on a free port of loopback."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resources: list[dict[str, str]] = []
        self._changed = threading.Condition()
        self._server = grpc.server(ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def Export(self, request: Any, context: Any) -> Any:
        with self._changed:
            for group in request.resource_spans:
                self.resources.append({each.key: each.value.string_value for each in group.resource.attributes})
                self.spans += [span for scope in group.scope_spans for span in scope.spans]
            self._changed.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def wait_for(self, name: str, count: int, timeout_s: float = 20.0) -> list[Any]:
        """The spans of this name, once there are so many."""
        with self._changed:
            self._changed.wait_for(lambda: len(self.named(name)) >= count, timeout_s)
            return self.named(name)

    def named(self, name: str) -> list[Any]:
        return [span for span in self.spans if span.name == name]

    def children(self, parent: Any) -> list[Any]:
        return sorted(
            (span for span in self.spans if span.parent_span_id == parent.span_id), key=lambda s: s.start_time_unix_nano
        )

    def __enter__(self) -> Collector:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(0)


def attributes(of: Any) -> dict[str, Any]:
    """Of a span or an event."""
    return {each.key: getattr(each.value, each.value.WhichOneof("value") or "string_value") for each in of.attributes}
