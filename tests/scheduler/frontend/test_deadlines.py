"""A request's time: how long it may take by its own word and by its call's, and what becomes of it when that is over."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from carousel.v1 import generation_pb2 as pb
from scheduler.errors import DeadlineError
from scheduler.frontend.defaults import ModelDefaults
from scheduler.frontend.server.generation import deadline
from scheduler.frontend.validation import check_options
from tests.helpers.fake_core import FakeCore, worker_facts
from tests.helpers.frontend import Frontend
from tests.helpers.streams import Got, collect, details, failure, make
from wire import AddRequest, EndReason

PARTIAL, FAIL = pb.ON_TIMEOUT_RETURN_PARTIAL, pb.ON_TIMEOUT_FAIL
SECOND = 1_000_000_000
LONG_S = 600.0  # a call's deadline that never comes


@pytest.mark.parametrize(
    ("max_time_ms", "remaining_s", "expected"),
    [
        (0, None, 0),
        (2500, None, 100 + 2_500_000_000),
        (0, 1.5, 100 + 1_500_000_000),
        (2500, 1.5, 100 + 1_500_000_000),
        (1000, 1.5, 100 + 1_000_000_000),
        (2**32 - 1, 1e8, 100 + (2**32 - 1) * 1_000_000),
    ],
)
def test_the_sooner_of_both_deadlines_counts(max_time_ms: int, remaining_s: float | None, expected: int) -> None:
    request = make(**(dict(max_time_ms=max_time_ms) if max_time_ms else {}))
    options = check_options(request, worker_facts(), ModelDefaults(0.0, 0, 1.0, 0.0, ()))
    assert deadline(options, remaining_s, arrival_ns=100) == expected


def test_a_deadline_that_has_passed_is_refused_at_once() -> None:
    options = check_options(make(max_time_ms=1000), worker_facts(), ModelDefaults(0.0, 0, 1.0, 0.0, ()))
    with pytest.raises(DeadlineError) as caught:
        deadline(options, 0.0, arrival_ns=100)
    assert (caught.value.status, caught.value.reason) == ("DEADLINE_EXCEEDED", "DEADLINE")


def heard(core: FakeCore, frontend: Frontend, timeout: float | None = None, **options: Any) -> AddRequest:
    """What the core hears of such a request."""
    request = make(request_id=f"heard-{sorted(options.items())}-{timeout}", **options)
    collect(frontend.generation.Generate(request, timeout=timeout))
    return core.wait_for(AddRequest, lambda add: add.header.request_id == request.request_id)


def test_the_core_hears_of_the_deadline(core: FakeCore, frontend: Frontend) -> None:
    assert heard(core, frontend).header.deadline_ns == 0
    header = heard(core, frontend, max_time_ms=60_000).header
    assert header.deadline_ns == header.arrival_ns + 60 * SECOND
    header = heard(core, frontend, timeout=LONG_S).header
    assert 0 < header.deadline_ns - header.arrival_ns <= (LONG_S + 1) * SECOND
    header = heard(core, frontend, timeout=LONG_S, max_time_ms=60_000).header
    assert header.deadline_ns == header.arrival_ns + 60 * SECOND


@pytest.mark.parametrize(
    ("options", "partial", "whole"),
    [
        (dict(), False, False),
        (dict(on_timeout=PARTIAL), True, False),
        (dict(on_timeout=FAIL), False, False),
        (dict(ignore_eos=True), False, True),
        (dict(ignore_eos=True, on_timeout=PARTIAL), True, False),
        (dict(ignore_eos=True, stop=["x"]), False, False),
        (dict(ignore_eos=True, stop_token_ids=[9]), False, False),
        (dict(ignore_eos=True, whole_by_deadline=False), False, False),
        (dict(whole_by_deadline=True), False, True),
        (dict(whole_by_deadline=True, on_timeout=PARTIAL), True, True),
    ],
)
def test_the_core_hears_what_the_deadline_is_for(
    options: dict[str, Any], partial: bool, whole: bool, core: FakeCore, frontend: Frontend
) -> None:
    header = heard(core, frontend, max_time_ms=60_000, **options).header
    assert (header.partial_at_deadline, header.whole_by_deadline) == (partial, whole)


def test_without_max_tokens_the_length_is_not_known() -> None:
    request = make(ignore_eos=True)
    request.stopping.ClearField("max_tokens")
    assert not check_options(request, worker_facts(), ModelDefaults(0.0, 0, 1.0, 0.0, ())).whole_by_deadline


def out_of_time(core: FakeCore, frontend: Frontend, request_id: str, timeout: float | None = None, **options: Any) -> Any:
    """A stream that gets two tokens of each output, and then its time is over."""
    core.hold()
    stream = frontend.generation.Generate(make(request_id=request_id, max_tokens=100, **options), timeout=timeout)
    core.wait_for(AddRequest, lambda add: add.header.request_id == request_id)
    core.step(2)
    core.end_all(EndReason.DEADLINE)
    return stream


@pytest.mark.parametrize("num_outputs", [1, 3])
@pytest.mark.parametrize("on_timeout", [pb.ON_TIMEOUT_UNSPECIFIED, FAIL])
def test_fail_ends_with_the_status_after_the_deltas(
    on_timeout: int, num_outputs: int, core: FakeCore, frontend: Frontend
) -> None:
    options = dict(max_time_ms=60_000, on_timeout=on_timeout, num_outputs=num_outputs)
    got = Got()
    error = failure(out_of_time(core, frontend, f"late-{on_timeout}-{num_outputs}", **options), got)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    for output in got.outputs.values():
        assert len(output.tokens) == 2 and output.finished.reason == pb.FINISH_REASON_DEADLINE
    info = details(error)["ErrorInfo"]
    assert (info.reason, info.domain) == ("DEADLINE", "carousel.v1")
    assert dict(info.metadata) == {"allowed_ms": "60000", "output_tokens": str(2 * num_outputs)}
    assert "60000 ms" in error.details()


def test_a_calls_deadline_alone_counts_as_fail(core: FakeCore, frontend: Frontend) -> None:
    error = failure(out_of_time(core, frontend, "call", timeout=LONG_S))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and details(error)["ErrorInfo"].reason == "DEADLINE"


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_return_partial_ends_in_order_with_what_there_is(num_outputs: int, core: FakeCore, frontend: Frontend) -> None:
    options = dict(max_time_ms=60_000, on_timeout=PARTIAL, num_outputs=num_outputs)
    got = collect(out_of_time(core, frontend, f"partial-{num_outputs}", **options))
    assert len(got.outputs) == num_outputs
    for output in got.outputs.values():
        assert len(output.tokens) == 2 and output.finished.reason == pb.FINISH_REASON_DEADLINE
    assert got.summary.usage.output_tokens == 2 * num_outputs


def test_what_ended_by_itself_before_the_deadline_is_no_failure(core: FakeCore, frontend: Frontend) -> None:
    got = collect(frontend.generation.Generate(make(max_time_ms=60_000, on_timeout=FAIL)))
    assert got.reason == pb.FINISH_REASON_LENGTH and got.summary is not None
