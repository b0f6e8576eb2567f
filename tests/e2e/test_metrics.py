"""What a real server of several processes exports, and what it logs of requests."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import grpc
import pytest

from tests.helpers.scrape import DEMO, Measured, generate, load, measured, refused, request
from tests.helpers.server import eventually, kill

OPTIONS = ("--frontends", "2", "--num-blocks", "24", "--max-model-len", "256", "--log-format", "json")


@pytest.fixture(scope="module")
def busy() -> Iterator[Measured]:
    """Twelve requests over two front ends, in a pool where they have to preempt one another, and one that was refused."""
    with measured(*OPTIONS) as seen:
        requests = [request(100, tenant) for tenant in ("alice", "bob", "") for _ in range(4)]
        assert load(seen.server.target, requests) == 1200
        assert refused(seen.server.target) is grpc.StatusCode.INVALID_ARGUMENT
        assert seen.settles("carousel_requests_ended_total", 13)
        yield seen


def test_what_front_ends_and_core_count_adds_up(busy: Measured) -> None:
    assert busy.value("carousel_requests_ended_total", status="OK") == 12
    assert busy.value("carousel_requests_finished_total", reason="length") == 12
    assert busy.value("carousel_requests_refused_total", reason="INVALID_ARGUMENT") == 1
    assert busy.value("carousel_requests_accepted_total") == 12
    assert busy.value("carousel_output_tokens_total") == 1200
    assert busy.value("carousel_prompt_tokens_total") == 240
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert busy.value(f"carousel_{name}_seconds_count") == 12, name
    assert busy.value("carousel_request_output_tokens_sum") == 1200
    assert busy.value("carousel_step_duration_seconds_count") == busy.value("carousel_step_tokens_count") > 0
    assert busy.value("carousel_preemptions_total") > 0
    assert busy.value("carousel_request_preempted_time_seconds_count") > 0


def test_every_token_but_the_first_of_each_output_waited_for_the_one_before(busy: Measured) -> None:
    samples = busy.scrape()
    [(_, count)] = samples["carousel_inter_token_latency_seconds_count"]
    assert count >= 1200 - 12  # more by those that were sampled when their request had ended
    assert count <= 1200 + 12


def test_the_blocks_of_all_states_are_the_pool(busy: Measured) -> None:
    assert busy.value("carousel_kv_blocks") == 24
    assert eventually(lambda: busy.value("carousel_kv_blocks", state="held") == 0)
    assert busy.value("carousel_kv_usage_ratio") == 0 and busy.value("carousel_kv_waste_ratio") == 0


def test_tenants_are_told_apart(busy: Measured) -> None:
    for tenant in ("alice", "bob", ""):
        assert busy.value("carousel_tenant_tokens_total", tenant=tenant, kind="output") == 400
        assert busy.value("carousel_tenant_tokens_total", tenant=tenant, kind="prompt") == 80


def test_dashboards_for_vllm_find_the_same_numbers(busy: Measured) -> None:
    model = {"model_name": "model", "engine": "0"}
    assert busy.value("vllm:request_success_total", finished_reason="length", **model) == 12
    assert busy.value("vllm:generation_tokens_total", **model) == 1200
    assert busy.value("vllm:time_to_first_token_seconds_count", **model) == 12
    assert busy.value("vllm:time_to_first_token_seconds_bucket", le="+Inf", **model) == 12
    assert "vllm:kv_cache_usage_perc" in busy.scrape()


def test_each_request_has_one_line_with_its_parts_by_name(busy: Measured) -> None:
    lines = [json.loads(line) for line in busy.server.log().splitlines() if line.startswith("{")]
    told = [line for line in lines if line["message"] == "request"]
    assert len(told) == 13 and all(line["role"] == "frontend" and line["level"] == "info" for line in told)
    assert len({line["request_id"] for line in told if line["status"] == "OK"}) == 12
    [not_taken] = [line for line in told if line["status"] != "OK"]
    assert not_taken["refused"] == "INVALID_ARGUMENT" and "prompt" in not_taken["said"]
    one = next(line for line in told if line["tenant"] == "alice")
    assert (one["prompt_tokens"], one["output_tokens"], one["finish"]) == (20, 100, "length")
    assert one["whole_ms"] >= one["first_token_ms"] >= 0
    assert any(line.get("preemptions", 0) > 0 and line["recomputed_tokens"] >= 0 for line in told)


def test_the_start_says_what_was_chosen_and_why(busy: Measured) -> None:
    said = " ".join(json.loads(line)["message"] for line in busy.server.log().splitlines() if line.startswith("{"))
    assert "num_blocks=24 (--num-blocks)" in said and "frontends=2 (--frontends)" in said
    assert "KV cache: 24 blocks of 16 tokens, 384 tokens" in said
    assert "sequences (as the worker says)" in said


def test_a_worker_that_dies_is_counted_and_begins_a_new_epoch() -> None:
    with measured() as seen:
        assert seen.value("carousel_epoch") == 1
        assert seen.value("carousel_process_restarts_total", role="worker") == 0
        kill(seen.server.children()["worker"][0])
        assert seen.settles("carousel_process_restarts_total", 1, role="worker")
        assert seen.settles("carousel_epoch", 2) and seen.settles("carousel_ready", 1)
        assert generate(seen.server.target, request(5)) == 5
        kill(seen.server.children()["frontend"][0])  # what it had counted stays
        assert seen.settles("carousel_process_restarts_total", 1, role="frontend")
        assert seen.value("carousel_requests_ended_total", status="OK") == 1


def test_more_tenants_than_are_told_apart_are_counted_together() -> None:
    with measured("--no-request-log") as seen:
        load(seen.server.target, [request(1, f"tenant-{number}") for number in range(80)])
        assert seen.settles("carousel_requests_ended_total", 80, status="OK")
        tenants = {labels["tenant"] for labels, _ in seen.scrape()["carousel_tenant_tokens_total"]}
        assert len(tenants) == 65 and "other" in tenants
        assert seen.value("carousel_tenant_tokens_total", tenant="other", kind="output") == 16
        assert "request_id" not in seen.server.log()


def test_a_metrics_port_that_is_taken_is_one_line() -> None:
    with measured() as seen:
        port = seen.url.rpartition(":")[2].partition("/")[0]
        command = [sys.executable, "-m", "scheduler", "--model", str(DEMO), "--device", "sim", "--port", "0"]
        done = subprocess.run([*command, "--metrics-port", port], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip() == f"carousel: --metrics-port {port} of 127.0.0.1: Address already in use"
