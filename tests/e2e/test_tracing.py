"""Traces of a real server, as a real collector gets them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from carousel.v1 import generation_pb2 as pb
from carousel.v1 import generation_pb2_grpc
from tests.helpers.server import Server, running

pytest.importorskip("opentelemetry.sdk", reason="the extra `tracing` is not installed")

from tests.helpers.otlp import Collector, attributes

DEMO = Path(__file__).parents[2] / "demo" / "model"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = (("traceparent", f"00-{TRACE}-{PARENT}-01"),)
UNSAMPLED = (("traceparent", f"00-{TRACE}-{PARENT}-00"),)


@pytest.fixture(scope="module")
def traced() -> Iterator[tuple[Server, Collector]]:
    """A pool so small that two long outputs can't both stay."""
    with Collector() as collector:
        options = ("--device", "sim", "--num-blocks", "16", "--max-model-len", "200", "--otlp-endpoint", collector.endpoint)
        with running("--model", str(DEMO), *options, environment={"OTEL_BSP_SCHEDULE_DELAY": "100"}) as server:
            yield server, collector


def generate(server: Server, *requests: pb.GenerateRequest, metadata: tuple[tuple[str, str], ...] = SAMPLED) -> None:
    """All of them at once."""
    with grpc.insecure_channel(server.target) as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        calls = [stub.Generate(request, metadata=metadata, timeout=60) for request in requests]
        for call in calls:
            for _ in call:
                pass


def request(request_id: str, max_tokens: int) -> pb.GenerateRequest:
    made = pb.GenerateRequest(request_id=request_id, token_ids=pb.TokenIds(ids=range(10, 30)))
    made.stopping.max_tokens, made.stopping.ignore_eos = max_tokens, True
    return made


def span_of(collector: Collector, request_id: str) -> object:
    [span] = [span for span in collector.named("generate") if attributes(span)["gen_ai.response.id"] == request_id]
    return span


def test_a_request_is_a_span_of_its_callers_trace_with_queue_prefill_and_decode_in_it(traced) -> None:
    server, collector = traced
    generate(server, request("alone", 8))
    collector.wait_for("generate", 1)
    span = span_of(collector, "alone")
    assert span.trace_id.hex() == TRACE and span.parent_span_id.hex() == PARENT
    told = attributes(span)
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (20, 8)
    assert told["rpc.grpc.status"] == "OK"
    inside = collector.children(span)
    assert [child.name for child in inside] == ["queue", "prefill", "decode"]
    assert all(child.trace_id == span.trace_id for child in inside)
    assert inside[0].end_time_unix_nano <= inside[1].start_time_unix_nano + 1_000_000
    assert inside[1].end_time_unix_nano <= inside[2].start_time_unix_nano + 1_000_000
    steps = {event.name: attributes(event).get("carousel.step_id") for event in span.events}
    assert steps["last step"] - steps["admitted"] == 7  # its first step samples its first token
    assert "first token" in steps
    assert {"service.name": "carousel"}.items() <= collector.resources[0].items()


def test_a_preempted_request_says_when_and_for_whom(traced) -> None:
    server, collector = traced
    generate(server, *(request(f"long-{i}", 150) for i in range(3)))
    collector.wait_for("generate", 4)
    preempted = collector.wait_for("preempted", 1)
    assert preempted, "three outputs of 170 tokens can't stay in 256 slots"
    for span in preempted:
        told = attributes(span)
        assert told["carousel.preempted_by"].startswith("long-") and told["carousel.step_id"] > 0
        assert told["carousel.lost_tokens"] > 0 and span.end_time_unix_nano > span.start_time_unix_nano
    parents = {bytes(span.parent_span_id) for span in preempted}
    owners = [span for span in collector.named("generate") if bytes(span.span_id) in parents]
    assert owners and all(attributes(span)["carousel.preemptions"] > 0 for span in owners)
    assert all({"preempted", "resumed"} <= {event.name for event in span.events} for span in owners)


def test_a_refused_request_is_a_span_too_and_what_its_caller_does_not_sample_is_none(traced) -> None:
    server, collector = traced
    before = len(collector.named("generate"))
    generate(server, request("unsampled", 2), metadata=UNSAMPLED)
    with pytest.raises(grpc.RpcError):
        generate(server, request("too-long", 1000))
    collector.wait_for("generate", before + 1)
    told = attributes(span_of(collector, "too-long"))
    assert told["carousel.refusal"] == told["rpc.grpc.status"] == "INVALID_ARGUMENT"
    assert "unsampled" not in {attributes(span)["gen_ai.response.id"] for span in collector.named("generate")}


def test_without_the_option_no_process_imports_it() -> None:
    code = "import scheduler.frontend.main, scheduler.supervisor, scheduler.engine, sys; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "scheduler.engine" in done.stdout
    assert "opentelemetry" not in done.stdout and "prometheus_client" not in done.stdout
