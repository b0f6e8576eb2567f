"""The core process over real sockets: joins, losses, malformed frames, watchers, draining."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from scheduler.core import CoreConfig
from tests.helpers.engine import Dealer, EngineProcess, HandWorker, request
from wire import (
    CancelOutcome,
    CancelQuery,
    CancelReply,
    EndReason,
    Facts,
    FrontendHello,
    LoadQuery,
    LoadReply,
    Message,
    OutputEnded,
    Refused,
    StepPlan,
    StepRecord,
    TokenBatch,
    WatchSteps,
)
from worker.sim_executor import SimExecutor, sim_facts

FACTS = sim_facts(vocab_size=1000, max_model_len=512, num_blocks=64, max_batch_rows=8, max_step_tokens=64)


@pytest.fixture
def engine() -> Iterator[EngineProcess]:
    process = EngineProcess(CoreConfig(max_batch_rows=8, max_step_tokens=64))
    yield process
    process.close()


@pytest.fixture
def frontend(engine: EngineProcess) -> Dealer:
    dealer = Dealer(engine, engine.frontends)
    dealer.send(FrontendHello(pid=1))
    assert isinstance(dealer.receive(), Facts)
    return dealer


def is_end(message: Message) -> bool:
    return isinstance(message, TokenBatch) and bool(message.header.ended)


def tokens_of(messages: list[Message], handle: int) -> list[int]:
    return [
        int(token)
        for message in messages
        if isinstance(message, TokenBatch)
        for owner, token in zip(message.handles, message.tokens, strict=True)
        if owner == handle
    ]


def ended(messages: list[Message]) -> list[OutputEnded]:
    return [end for message in messages if isinstance(message, TokenBatch) for end in message.header.ended]


def load(frontend: Dealer) -> LoadReply:
    frontend.send(LoadQuery(7))
    reply = frontend.until(lambda message: isinstance(message, LoadReply))[-1]
    assert isinstance(reply, LoadReply)
    return reply


def run_steps(worker: HandWorker, count: int) -> None:
    for _ in range(count):
        assert worker.step() is not None


def test_not_ready_until_a_worker_has_joined(engine: EngineProcess, frontend: Dealer) -> None:
    frontend.send(request(1, [1, 2, 3], 4))
    refused = frontend.receive()
    assert isinstance(refused, Refused) and refused.code == "UNAVAILABLE" and refused.retry_after_ns > 0
    HandWorker(engine, SimExecutor(FACTS))
    facts = frontend.receive()
    assert isinstance(facts, Facts) and facts.ready and facts.workers[0][2] == FACTS


def test_tokens_come_back_to_the_front_end_that_asked(engine: EngineProcess, frontend: Dealer) -> None:
    other = Dealer(engine, engine.frontends)
    other.send(FrontendHello(pid=2))
    worker = HandWorker(engine, SimExecutor(FACTS))
    frontend.until(lambda message: isinstance(message, Facts) and message.ready)
    other.until(lambda message: isinstance(message, Facts) and message.ready)
    frontend.send(request(5, list(range(20)), 4))
    run_steps(worker, 4)
    got = frontend.until(is_end)
    assert len(tokens_of(got, 5)) == 4
    assert [end.reason for end in ended(got)] == [EndReason.LENGTH]
    assert other.receive(50) is None
    assert load(frontend).held_blocks == 0


def test_a_lost_worker_costs_a_recompute_and_nothing_else(engine: EngineProcess, frontend: Dealer) -> None:
    worker = HandWorker(engine, SimExecutor(FACTS))
    frontend.until(lambda message: isinstance(message, Facts) and message.ready)
    frontend.send(request(1, list(range(100, 130)), 8))
    run_steps(worker, 8)
    undisturbed = tokens_of(frontend.until(is_end), 1)

    frontend.send(request(2, list(range(100, 130)), 8))
    run_steps(worker, 3)
    worker.close()
    lost = frontend.until(lambda message: isinstance(message, Facts) and not message.ready)
    again = HandWorker(engine, SimExecutor(FACTS))
    assert again.epoch == worker.epoch + 1
    while (step := again.step(200)) is not None:
        assert step.header.epoch == again.epoch
    got = lost + frontend.until(is_end)
    assert tokens_of(got, 2) == undisturbed
    stats = ended(got)[0].stats
    assert stats.preemptions == 1 and stats.recomputed_tokens > 0


def test_a_failed_step_begins_a_new_epoch_with_the_same_worker(engine: EngineProcess, frontend: Dealer) -> None:
    worker = HandWorker(engine, SimExecutor(FACTS))
    frontend.until(lambda message: isinstance(message, Facts) and message.ready)
    frontend.send(request(1, list(range(10)), 3))
    worker.fail("out of memory")
    while worker.step(300) is not None:
        pass
    got = frontend.until(is_end)
    assert len(tokens_of(got, 1)) == 3
    assert "out of memory" in engine.log()


def test_a_request_that_always_fails_ends_and_the_server_goes_on(engine: EngineProcess, frontend: Dealer) -> None:
    worker = HandWorker(engine, SimExecutor(FACTS))
    frontend.until(lambda message: isinstance(message, Facts) and message.ready)
    frontend.send(request(1, list(range(10)), 3))
    for _ in range(3):
        worker.fail("boom")
    end = ended(frontend.until(is_end))[0]
    assert end.reason is EndReason.ERROR and "3 times" in end.message
    frontend.send(request(2, list(range(10)), 2))
    run_steps(worker, 2)
    assert len(tokens_of(frontend.until(is_end), 2)) == 2


def test_malformed_frames_are_dropped_with_a_line(engine: EngineProcess, frontend: Dealer) -> None:
    worker = HandWorker(engine, SimExecutor(FACTS))
    frontend.until(lambda message: isinstance(message, Facts) and message.ready)
    for socket in (frontend.socket, worker.socket):
        socket.send_multipart([b"", b"\x01\xff", b"x" * 100])
        socket.send_multipart([b"\x09abc"])
        socket.send_multipart([b"\x01" + b"\x92" * 50])
    frontend.send(request(1, [1, 2, 3], 2))
    run_steps(worker, 2)
    assert len(tokens_of(frontend.until(is_end), 1)) == 2
    assert engine.log().count("dropped a message") == 6


def test_a_malformed_result_begins_a_new_epoch_instead_of_a_wait_without_end(engine: EngineProcess, frontend: Dealer) -> None:
    worker = HandWorker(engine, SimExecutor(FACTS))
    frontend.until(lambda message: isinstance(message, Facts) and message.ready)
    frontend.send(request(1, [1, 2, 3], 3))
    worker.until(lambda message: isinstance(message, StepPlan))
    worker.socket.send_multipart([b"\x01not a result"])
    worker.welcome()
    while worker.step(300) is not None:
        pass
    assert len(tokens_of(frontend.until(is_end), 1)) == 3


def test_a_lost_front_end_frees_what_its_requests_held(engine: EngineProcess, frontend: Dealer) -> None:
    other = Dealer(engine, engine.frontends)
    other.send(FrontendHello(pid=2))
    worker = HandWorker(engine, SimExecutor(FACTS))
    other.until(lambda message: isinstance(message, Facts) and message.ready)
    other.send(request(1, list(range(40)), 100))
    run_steps(worker, 3)
    assert load(frontend).held_blocks > 0
    other.close()
    while worker.step(300) is not None:
        pass
    after = load(frontend)
    assert (after.running_requests, after.held_blocks, after.retiring_blocks) == (0, 0, 0)
    assert after.cancelled_requests == 1


def test_cancel_by_id_reaches_the_stream(engine: EngineProcess, frontend: Dealer) -> None:
    worker = HandWorker(engine, SimExecutor(FACTS))
    frontend.until(lambda message: isinstance(message, Facts) and message.ready)
    frontend.send(request(1, [1, 2, 3], 100))
    run_steps(worker, 2)
    outcomes = []
    for request_id in ("request-1", "request-1", "nobody"):
        frontend.send(CancelQuery(3, request_id))
        reply = frontend.until(lambda message: isinstance(message, CancelReply))
        outcomes.append(reply[-1].outcome)  # type: ignore[union-attr]
    assert outcomes == [CancelOutcome.CANCELLED, CancelOutcome.ALREADY_FINISHED, CancelOutcome.NOT_FOUND]


def test_watchers_see_every_step(engine: EngineProcess, frontend: Dealer) -> None:
    worker = HandWorker(engine, SimExecutor(FACTS))
    frontend.until(lambda message: isinstance(message, Facts) and message.ready)
    frontend.send(WatchSteps(True))
    frontend.send(request(1, list(range(70)), 3))
    run_steps(worker, 4)
    records = [message for message in frontend.until(is_leave) if isinstance(message, StepRecord)]
    assert [record.step_id for record in records] == [0, 1, 2, 3]
    assert [record.rows[0].num_tokens for record in records] == [64, 6, 1, 1]
    assert [record.rows[0].joined for record in records] == [True, False, False, False]
    assert [record.rows[0].sampled for record in records] == [False, True, True, True]
    assert records[-1].leaves == (("request-1", "length"),)
    assert [record.kv_tokens for record in records] == [64, 70, 71, 72]


def is_leave(message: Message) -> bool:
    return isinstance(message, StepRecord) and bool(message.leaves)


def test_draining_finishes_what_was_accepted_and_exits(engine: EngineProcess, frontend: Dealer) -> None:
    worker = HandWorker(engine, SimExecutor(FACTS))
    frontend.until(lambda message: isinstance(message, Facts) and message.ready)
    frontend.send(request(1, [1, 2, 3], 3))
    run_steps(worker, 1)
    engine.process.terminate()
    frontend.until(lambda message: isinstance(message, Facts) and message.draining)
    frontend.send(request(2, [1, 2, 3], 3))
    refused = frontend.until(lambda message: isinstance(message, Refused))[-1]
    assert isinstance(refused, Refused) and refused.code == "UNAVAILABLE"
    run_steps(worker, 2)
    assert [end.reason for end in ended(frontend.until(is_end))] == [EndReason.LENGTH]
    assert engine.process.wait(20) == 0


def test_the_drain_timeout_hands_back_what_is_left() -> None:
    engine = EngineProcess(CoreConfig(max_batch_rows=8, max_step_tokens=64), drain_timeout_s=0.2)
    try:
        dealer = Dealer(engine, engine.frontends)
        dealer.send(FrontendHello(pid=1))
        worker = HandWorker(engine, SimExecutor(FACTS))
        dealer.until(lambda message: isinstance(message, Facts) and message.ready)
        dealer.send(request(1, [1, 2, 3], 400))
        run_steps(worker, 2)
        assert engine.terminate() == 0
        assert [end.reason for end in ended(dealer.until(is_end))] == [EndReason.UNAVAILABLE]
    finally:
        engine.close()
