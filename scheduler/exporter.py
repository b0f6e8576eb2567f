"""The process that serves /metrics: asks the core, reads the front ends' files, answers Prometheus.

A process of its own, so that a scrape holds up no step and no stream. Knows one socket to the core and prometheus_client's HTTP
server; decides nothing.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator

import zmq
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector

from scheduler.config import ExporterConfig
from scheduler.metrics import core_families, vllm_alias
from scheduler.process import log_to_stderr, obey_the_supervisor
from wire import MetricsQuery, MetricsReply, WireError, decode, encode

log = logging.getLogger(__name__)

_ANSWER_S = 2.0  # the core answers between two steps; Prometheus gives up after 10 s


class CoreQuestions:
    """Asks the core for its counts, one question at a time."""

    def __init__(self, endpoint: str) -> None:
        self._lock = threading.Lock()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # what was asked of a lost core is not kept for the next
        self._socket.connect(endpoint)
        self._last_query = 0

    def ask(self) -> MetricsReply | None:
        """None: it does not answer."""
        with self._lock:
            self._last_query += 1
            until = time.monotonic() + _ANSWER_S
            if not self._socket.poll(round(_ANSWER_S * 1000), zmq.POLLOUT):
                return None
            self._socket.send_multipart(encode(MetricsQuery(self._last_query)))
            while (left_s := until - time.monotonic()) > 0 and self._socket.poll(round(left_s * 1000)):
                try:
                    message = decode(self._socket.recv_multipart())
                except WireError as error:
                    log.warning("dropped a message from the core: %s", error)
                    continue
                if isinstance(message, MetricsReply) and message.query_id == self._last_query:
                    return message
            return None

    def close(self) -> None:
        with self._lock:
            self._socket.close()
            self._context.term()


class Everything:
    """Collector of a scrape: the core's, the front ends' and the supervisor's, then the same by vLLM's names."""

    def __init__(self, questions: CoreQuestions, files: MultiProcessCollector, model: str) -> None:
        self._questions, self._files, self._model = questions, files, model

    def collect(self) -> Iterator[Metric]:
        reply = self._questions.ask()
        families: list[Metric] = [
            GaugeMetricFamily("carousel_core_up", "1 while the core process answers.", value=reply is not None)
        ]
        if reply is not None:
            families += core_families(reply, self._model)
        families += self._files.collect()  # type: ignore[no-untyped-call]
        yield from families
        for family in families:
            if (alias := vllm_alias(family, self._model)) is not None:
                yield alias


def run(config: ExporterConfig) -> int:
    """The process `python -m scheduler exporter`; returns the exit code."""
    obey_the_supervisor()
    log_to_stderr("exporter", config.log_level, config.log_format)
    stopped, questions = threading.Event(), CoreQuestions(config.core_endpoint)
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    files = MultiProcessCollector(None, config.folder)  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    registry.register(Everything(questions, files, config.served_model_name))
    try:
        server, thread = start_http_server(config.port, config.host, registry)
    except OSError as error:
        print(f"exporter: can't listen on {config.host}:{config.port}: {error.strerror}", file=sys.stderr)
        return 1
    log.info("metrics are served on http://%s:%d/metrics", config.host, server.server_port)
    stopped.wait()
    questions.close()  # first: the core waits for those it talks to
    server.shutdown()
    thread.join()
    return 0
