"""Control over real gRPC: another policy, the list of requests in pages, why a request waits, the load watched, the end."""

from __future__ import annotations

import time
from collections.abc import Callable

import grpc
import pytest
from grpc_health.v1 import health_pb2

from carousel.v1 import control_pb2 as pb
from carousel.v1 import generation_pb2
from tests.helpers.fake_core import PATIENCE_S, FakeCore
from tests.helpers.frontend import Frontend
from tests.helpers.server import eventually
from tests.helpers.streams import bad_field, collect, details, make
from wire import (
    AddRequest,
    DrainQuery,
    Explanation,
    Hindrance,
    ListQuery,
    LoadQuery,
    LoadReply,
    Preemption,
    ReplaceQuery,
    RequestStats,
    RequestSummary,
    SetPolicyQuery,
)

MS = 1_000_000


def refused(call: Callable[[], object]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


# -------------------------------------------------------------------------------------------------------------- policy


def test_a_policy_is_set_and_told(core: FakeCore, frontend: Frontend) -> None:
    assert frontend.control.SetPolicy(pb.SetPolicyRequest(policy="static")).policy == "static"
    assert core.wait_for(SetPolicyQuery).policy == "static"
    assert frontend.control.GetServerInfo(pb.GetServerInfoRequest()).policy == "static"


@pytest.mark.parametrize("policy", ["", "fifo", "STATIC"])
def test_an_unknown_policy_is_refused_with_those_there_are(policy: str, core: FakeCore, frontend: Frontend) -> None:
    error = refused(lambda: frontend.control.SetPolicy(pb.SetPolicyRequest(policy=policy)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and bad_field(error) == "policy"
    assert "continuous, prefill_first, static" in error.details()


# ---------------------------------------------------------------------------------------------------------------- list


def summaries(core: FakeCore, count: int) -> list[RequestSummary]:
    states, started = ("running", "waiting", "preempted"), core.facts.started_ns
    return [
        RequestSummary(f"r-{i}", states[i % 3], f"tenant-{i % 2}", i % 3 + 1, started + i * MS, 10 + i, 20 + i, 1 + i % 4, 5)
        for i in range(count)
    ]


def test_requests_are_listed_with_what_is_known_of_them(core: FakeCore, frontend: Frontend) -> None:
    core.listed = summaries(core, 3)
    answer = frontend.control.ListRequests(pb.ListRequestsRequest())
    assert (answer.total_requests, answer.next_page_token, len(answer.requests)) == (3, "", 3)
    assert answer.now_ns >= 5_000_000_000
    second = answer.requests[1]
    assert (second.request_id, second.state, second.tenant) == ("r-1", pb.REQUEST_STATE_WAITING, "tenant-1")
    assert (second.priority, second.arrival_ns) == (generation_pb2.PRIORITY_CLASS_NORMAL, MS)
    assert (second.prompt_tokens, second.output_tokens, second.num_outputs, second.held_blocks) == (11, 21, 2, 5)
    states = [pb.REQUEST_STATE_RUNNING, pb.REQUEST_STATE_WAITING, pb.REQUEST_STATE_PREEMPTED]
    assert [request.state for request in answer.requests] == states


def test_pages_put_together_are_the_list(core: FakeCore, frontend: Frontend) -> None:
    core.listed = summaries(core, 25)
    got, token, sizes = [], "", []
    while True:
        page = frontend.control.ListRequests(pb.ListRequestsRequest(page_size=10, page_token=token))
        got += [request.request_id for request in page.requests]
        sizes.append(len(page.requests))
        token = page.next_page_token
        if not token:
            break
        assert not token.isdigit(), "nobody should reckon with it"
    assert got == [f"r-{i}" for i in range(25)] and sizes == [10, 10, 5]


@pytest.mark.parametrize(("asked", "limit"), [(None, 100), (1, 1), (1000, 1000)])
def test_the_page_size_reaches_the_core(asked: int | None, limit: int, core: FakeCore, frontend: Frontend) -> None:
    frontend.control.ListRequests(pb.ListRequestsRequest(page_size=asked))
    assert core.wait_for(ListQuery).limit == limit


@pytest.mark.parametrize("size", [0, 1001])
def test_a_page_size_out_of_range_is_refused(size: int, core: FakeCore, frontend: Frontend) -> None:
    error = refused(lambda: frontend.control.ListRequests(pb.ListRequestsRequest(page_size=size)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and bad_field(error) == "page_size"


@pytest.mark.parametrize("token", ["x", "10", "====", "é", "AAAAAAAAAA==", "_________-8="])
def test_a_page_token_of_ones_own_is_refused(token: str, core: FakeCore, frontend: Frontend) -> None:
    error = refused(lambda: frontend.control.ListRequests(pb.ListRequestsRequest(page_token=token)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and bad_field(error) == "page_token"


# ------------------------------------------------------------------------------------------------------------- explain


def explanation(core: FakeCore, **changes: object) -> Explanation:
    started = core.facts.started_ns
    fields: dict[str, object] = dict(
        request_id="why",
        state="waiting",
        tenant="team-a",
        priority=3,
        arrival_ns=started + 10 * MS,
        now_ns=started + 50 * MS,
        hindrance=Hindrance.BLOCKS,
        rank=2,
        missing_rows=3,
        missing_blocks=4,
        needed_blocks=5,
        tenant_tokens=600,
        least_tenant_tokens=500,
        predicted_start_ns=started + 90 * MS,
        num_prompt_tokens=11,
        num_output_tokens=12,
        num_computed_tokens=13,
        preemptions=(Preemption(started + 20 * MS, "other", 64, True), Preemption(started + 30 * MS, "", 7, False)),
        stats=RequestStats(11, 8, 12, 9, 2, 21, 22, 23, 24, 25, 26 * 10**9),
        text="Waiting: 2 go first.",
    )
    return Explanation(**fields | changes)  # type: ignore[arg-type]


def explain(frontend: Frontend, request_id: str = "why", tenant: str | None = None) -> pb.ExplainRequestResponse:
    return frontend.control.ExplainRequest(pb.ExplainRequestRequest(request_id=request_id, tenant=tenant), timeout=PATIENCE_S)


def test_a_request_of_a_tenant_is_explained_as_no_other_tenants(core: FakeCore, frontend: Frontend) -> None:
    core.explanations["why"] = explanation(core)
    assert explain(frontend, tenant="team-a").tenant == "team-a"
    with pytest.raises(grpc.RpcError) as raised:
        explain(frontend, tenant="team-b")
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.RpcError) as raised:
        explain(frontend, tenant="")
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_all_of_an_explanation_is_told(core: FakeCore, frontend: Frontend) -> None:
    core.explanations["why"] = explanation(core)
    told = explain(frontend)
    assert (told.request_id, told.state, told.tenant) == ("why", pb.REQUEST_STATE_WAITING, "team-a")
    assert told.priority == generation_pb2.PRIORITY_CLASS_INTERACTIVE
    assert (told.arrival_ns, told.now_ns, told.predicted_start_ns) == (10 * MS, 50 * MS, 90 * MS)
    assert (told.hindrance, told.rank) == (pb.HINDRANCE_BLOCKS, 2)
    assert (told.missing_rows, told.missing_blocks, told.needed_blocks) == (3, 4, 5)
    assert (told.tenant_tokens, told.least_tenant_tokens, told.computed_tokens) == (600, 500, 13)
    first, second = told.preemptions
    assert (first.at_ns, first.by_request_id, first.lost_tokens, first.swapped) == (20 * MS, "other", 64, True)
    assert (second.at_ns, second.by_request_id, second.lost_tokens, second.swapped) == (30 * MS, "", 7, False)
    usage, timing = told.usage, told.timing
    assert (usage.prompt_tokens, usage.cached_tokens, usage.output_tokens, usage.recomputed_tokens) == (11, 8, 12, 9)
    assert (timing.queued_ns, timing.prefill_ns, timing.decode_ns, timing.preempted_ns) == (21, 22, 23, 24)
    assert (timing.time_to_first_token_ns, timing.preemptions, timing.block_seconds) == (25, 2, 26.0)
    assert told.text == "Waiting: 2 go first." and not told.HasField("finish_reason")


def test_what_is_not_known_is_absent(core: FakeCore, frontend: Frontend) -> None:
    core.explanations["why"] = explanation(core, predicted_start_ns=-1)
    assert not explain(frontend).HasField("predicted_start_ns")


@pytest.mark.parametrize("hindrance", Hindrance)
def test_every_hindrance_has_its_name(hindrance: Hindrance, core: FakeCore, frontend: Frontend) -> None:
    core.explanations["why"] = explanation(core, hindrance=hindrance)
    assert explain(frontend).hindrance == pb.Hindrance.Value(f"HINDRANCE_{hindrance.name}")


@pytest.mark.parametrize("state", ["waiting", "running", "preempted", "ended"])
def test_every_state_has_its_name(state: str, core: FakeCore, frontend: Frontend) -> None:
    core.explanations["why"] = explanation(core, state=state, end_reason="deadline" if state == "ended" else "")
    told = explain(frontend)
    assert told.state == pb.RequestState.Value(f"REQUEST_STATE_{state.upper()}")
    assert told.finish_reason == (generation_pb2.FINISH_REASON_DEADLINE if state == "ended" else 0)


def test_an_unknown_request_is_not_found(core: FakeCore, frontend: Frontend) -> None:
    error = refused(lambda: explain(frontend, "nobody"))
    assert error.code() is grpc.StatusCode.NOT_FOUND and "'nobody'" in error.details()


@pytest.mark.parametrize("request_id", ["", "x" * 129])
def test_an_id_that_can_not_be_one_is_refused(request_id: str, core: FakeCore, frontend: Frontend) -> None:
    error = refused(lambda: explain(frontend, request_id))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and bad_field(error) == "request_id"


@pytest.mark.parametrize(
    "ask",
    [
        lambda frontend: frontend.control.ListRequests.future(pb.ListRequestsRequest()),
        lambda frontend: frontend.control.SetPolicy.future(pb.SetPolicyRequest(policy="static")),
    ],
)
def test_questions_overtake_each_other_unharmed(
    ask: Callable[[Frontend], grpc.Future], core: FakeCore, frontend: Frontend
) -> None:
    core.explanations["why"] = explanation(core)
    others = [ask(frontend) for _ in range(20)]
    assert explain(frontend).text
    assert all(other.result(PATIENCE_S) is not None for other in others)


# ------------------------------------------------------------------------------------------------------ load, and the end


def test_the_load_is_watched_from_at_once_on(core: FakeCore, frontend: Frontend) -> None:
    stream = frontend.control.WatchLoad(pb.WatchLoadRequest(interval_ms=100), timeout=PATIENCE_S)
    now = frontend.control.GetLoad(pb.GetLoadRequest())
    first = next(stream)
    assert first.load == now
    core.load = LoadReply(0, *range(101, 122))
    assert any(told.load.running_requests == 101 for told in stream)
    stream.cancel()


def test_a_watch_without_an_interval_gives_a_load_at_once_and_no_other_soon(core: FakeCore, frontend: Frontend) -> None:
    stream = frontend.control.WatchLoad(pb.WatchLoadRequest(), timeout=PATIENCE_S)
    next(stream)
    frontend.hear_core()
    assert sum(isinstance(message, LoadQuery) for message in core.all_heard()) == 2, "one for the watch, one for GetLoad"
    next(stream)
    stream.cancel()


def test_a_watch_that_is_left_asks_the_core_no_more(core: FakeCore, frontend: Frontend) -> None:
    stream = frontend.control.WatchLoad(pb.WatchLoadRequest(interval_ms=100), timeout=PATIENCE_S)
    next(stream)
    stream.cancel()
    assert eventually(lambda: (core.forget(), time.sleep(0.3), not core.all_heard())[-1])


@pytest.mark.parametrize("interval_ms", [0, 99, 60_001, 2**32 - 1])
def test_an_interval_out_of_range_is_refused(interval_ms: int, core: FakeCore, frontend: Frontend) -> None:
    error = refused(lambda: list(frontend.control.WatchLoad(pb.WatchLoadRequest(interval_ms=interval_ms))))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and bad_field(error) == "interval_ms"


def test_drain_tells_who_is_alive_and_nobody_new_comes_in(core: FakeCore, frontend: Frontend) -> None:
    core.hold()
    stream = frontend.generation.Generate(make(max_tokens=3), timeout=PATIENCE_S)
    core.wait_for(AddRequest)
    told = frontend.control.Drain(pb.DrainRequest())
    assert (told.live_requests, told.left_ms) == (1, 9_000)
    assert core.wait_for(DrainQuery).timeout_ms < 0, "as configured"
    frontend.wait_health(health_pb2.HealthCheckResponse.NOT_SERVING)
    error = refused(lambda: list(frontend.generation.Generate(make())))
    assert error.code() is grpc.StatusCode.UNAVAILABLE and "RetryInfo" in details(error)
    core.hold(False)
    assert len(collect(stream).tokens) == 3


@pytest.mark.parametrize("timeout_ms", [0, 1, 2**32 - 1])
def test_drain_hands_its_time_to_the_core(timeout_ms: int, core: FakeCore, frontend: Frontend) -> None:
    frontend.control.Drain(pb.DrainRequest(timeout_ms=timeout_ms))
    assert core.wait_for(DrainQuery).timeout_ms == timeout_ms


def test_replace_worker_is_answered_with_the_one_that_computes_then(core: FakeCore, frontend: Frontend) -> None:
    told = frontend.control.ReplaceWorker(pb.ReplaceWorkerRequest())
    assert (told.pid, told.epoch) == (4711, 4) and core.wait_for(ReplaceQuery).device == ""
    frontend.control.ReplaceWorker(pb.ReplaceWorkerRequest(device="cpu"))
    assert core.wait_for(ReplaceQuery).device == "cpu"


def test_a_worker_that_is_not_replaced_is_said_with_the_reason(core: FakeCore, frontend: Frontend) -> None:
    error = refused(lambda: frontend.control.ReplaceWorker(pb.ReplaceWorkerRequest(device="cuda")))
    assert (error.code(), error.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "it did not start")
    error = refused(lambda: frontend.control.ReplaceWorker(pb.ReplaceWorkerRequest(device="toaster")))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and bad_field(error) == "device"
