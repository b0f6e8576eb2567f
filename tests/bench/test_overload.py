from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from bench.generator import Heard
from bench.jobs import Job, Part
from bench.overload import Report, Size, as_json, measure, show, targets
from bench.overload_figures import Span, goodput, growth, is_refused, phase, recovery, retry_after_ns
from bench.overload_load import Load, asking, jobs
from bench.sim_server import parted
from bench.tables import console

MODEL = Path(__file__).parents[2] / "demo" / "model"
TINY = Size(
    rows=4,
    queue=6,
    words=(4, 8),
    tokens=(4, 12),
    closed_s=2.0,
    others_s=1.0,
    most_s=3.0,
    window_s=0.5,
    singles=4,
    crowd=40,
    hold_s=1.0,
)
S, MS = 1_000_000_000, 1_000_000
JOB = Job(0, (Part(1, 8),), 4)


def status(*details: Message) -> bytes:
    found = status_pb2.Status(code=8)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        found.details.append(packed)
    return bytes(found.SerializeToString())


def retry(ns: int) -> Message:
    info = error_details_pb2.RetryInfo()
    info.retry_delay.FromNanoseconds(ns)
    return info


def served(due_ns: int, *tokens_ns: int) -> Heard:
    """A token at each of these times."""
    return Heard(JOB, due_ns, due_ns, tokens_ns[-1], "OK", [(at, 1) for at in tokens_ns], prompt_tokens=8)


def refused(sent_ns: int, after_ns: int, *details: Message, code: str = "RESOURCE_EXHAUSTED") -> Heard:
    return Heard(JOB, sent_ns, sent_ns, sent_ns + after_ns, code, details=status(*details))


def test_only_tokens_of_requests_that_ended_in_time_are_goodput() -> None:
    heard = [
        served(0, 1 * S, 2 * S, 3 * S),
        served(0, 1 * S, 2 * S, 6 * S),  # late
        served(2 * S, 3 * S, 4 * S),
        refused(0, 5 * MS, retry(1 * S)),
    ]
    found = phase(heard, 5 * S, Span(0, 5 * S, S))
    assert found.windows == [0, 1, 1, 2, 1] and found.goodput == 1.0
    assert (found.requests, found.served, found.good, found.refused, found.told_when) == (4, 3, 2, 1, 1)
    assert found.statuses == {"OK": 3, "RESOURCE_EXHAUSTED": 1} and found.rate == pytest.approx(2 / 5)
    assert found.ttft.p50 == 1.0 and found.refusal.p99 == pytest.approx(0.005) and found.prompt_tokens == 8
    assert phase(heard, 0, Span(0, 5 * S, S)).windows == [0, 2, 2, 2, 1], "without a deadline any time is good"


def test_windows_are_whole_and_lie_within_the_span() -> None:
    good = [served(0, 0, 1 * S, 2 * S, int(2.5 * S), 3 * S)]
    assert goodput(good, Span(1 * S, int(3.9 * S), S)) == [1, 2]
    assert goodput(good, Span(1 * S, int(1.9 * S), S)) == []
    assert goodput([], Span(0, 2 * S, S)) == [0, 0]


def test_who_is_refused_at_arrival_is_told_from_who_is_ended_by_the_clock() -> None:
    estimate = error_details_pb2.ErrorInfo(reason="DEADLINE", metadata={"estimate_ms": "900", "left_ms": "800"})
    ended = error_details_pb2.ErrorInfo(metadata={"allowed_ms": "800", "output_tokens": "0"})
    assert is_refused(refused(0, MS, retry(1))) and is_refused(refused(0, MS))
    assert is_refused(refused(0, MS, estimate, code="DEADLINE_EXCEEDED"))
    assert not is_refused(refused(0, MS, ended, code="DEADLINE_EXCEEDED"))
    assert not is_refused(served(0, 1 * S))


def test_retry_info_is_found_among_the_details() -> None:
    info = error_details_pb2.ErrorInfo(reason="QUEUE_FULL")
    assert retry_after_ns(status(info, retry(250 * MS))) == 250 * MS
    assert retry_after_ns(status(info)) == 0 and retry_after_ns(b"") == 0


def test_growth_is_the_line_through_the_samples_between_two_times() -> None:
    samples = [(second * S, {"core": 1000 + 10 * second, "worker": 500}) for second in range(100)]
    found = growth(samples, 20 * S, 80 * S)
    assert found["core"].bytes_per_minute == pytest.approx(600) and found["core"].most == 1800
    assert found["core"].share == pytest.approx(np.median(range(1690, 1801, 10)) / np.median(range(1200, 1311, 10)) - 1)
    assert found["worker"].share == 0 and found["worker"].bytes_per_minute == pytest.approx(0, abs=1e-6)
    assert growth(samples, 20 * S, 20 * S) == {}, "one sample is no line"


def test_recovery_counts_from_the_last_request() -> None:
    loads = [(9 * S, 0, 0), (10 * S, 4, 4), (12 * S, 0, 4), (13 * S, 0, 0)]
    found = recovery(10 * S, loads, [(11 * S, 0.5), (14 * S, 0.01), (15 * S, 0.01)], usual_s=0.02)
    assert (found.empty_s, found.idle_s, found.fresh_s) == (2, 3, 4)
    never = recovery(10 * S, loads[:2], [], 0.02)
    assert math.isnan(never.empty_s) and math.isnan(never.fresh_s)


def test_an_open_loop_has_its_rate_and_prompts_that_differ() -> None:
    made = jobs(Load(port=0, seconds=50, rate=20, deadline_s=2.5))
    assert len(made) == 1000 and made[-1].arrival_ns == pytest.approx(50 * S, rel=0.15)
    assert {job.deadline_ns for job in made} == {2500 * MS}
    first, second = (asking().request(job) for job in made[:2])
    assert len(first.text.split()) == made[0].prompt_tokens and first.text[:20] != second.text[:20]
    assert first.scheduling.max_time_ms == 2500 and first.stopping.max_tokens == made[0].output_tokens


def test_the_simulated_workers_options_are_told_from_the_servers() -> None:
    assert parted(["--model", "m", "--sim-base-ns", "5", "--port", "1", "--sim-end-chance", "0.5"]) == (
        ["--model", "m", "--port", "1"],
        ["--sim-base-ns", "5", "--sim-end-chance", "0.5"],
    )


@pytest.mark.slow
def test_a_small_overload_is_measured_from_its_beginning_to_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(TINY, "sim", 1, seed=1)
    measure(report, MODEL, lambda text: None)
    assert [each.times for each in report.measured] == [0, 0.5, 1, 1.5, 3]
    for each in report.measured:
        phase = each.phase
        assert set(phase.statuses) <= {"OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
        assert phase.told_when == phase.statuses.get("RESOURCE_EXHAUSTED", 0)
        assert set(each.busy) == {"core", "frontend", "worker", "load"}
    assert report.most.phase.refused and not report.closed.phase.refused and report.closed.phase.goodput > 0
    assert set(report.memory) == {"supervisor", "core", "frontend", "worker"} and report.recovery is not None
    idle = report.idle
    assert idle is not None and (idle.crowd.served, idle.crowd.statuses, idle.alive) == (40, {"0": 40}, 40)
    told = json.loads(json.dumps(as_json(report, quick=True)))
    assert told["step_ns"]["base"] == 3_500_000 and len(told["targets"]) == len(list(targets(report)))
    show(report, console())
    assert "idle streams: not served whole" in capsys.readouterr().out
