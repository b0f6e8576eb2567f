"""The core process over real sockets: joins, losses, malformed frames, questions, watchers, deadlines, own faults, draining."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from scheduler.core import CoreConfig
from scheduler.core.config import TenantLimits
from scheduler.recording import Recording, RecordingError, Verb
from scheduler.replay import Replay, Report
from tests.helpers.engine import Dealer, EngineProcess, HandWorker, request
from wire import (
    BlockTablesQuery,
    BlockTablesReply,
    CancelOutcome,
    CancelQuery,
    CancelReply,
    Credit,
    DrainQuery,
    DrainReply,
    EndReason,
    ExplainQuery,
    ExplainReply,
    Facts,
    FrontendHello,
    Hindrance,
    ListQuery,
    ListReply,
    LoadQuery,
    LoadReply,
    Message,
    OutputEnded,
    Refused,
    ResultHeader,
    SetPolicyQuery,
    SetPolicyReply,
    StepPlan,
    StepRecord,
    StepResult,
    TokenBatch,
    WatchSteps,
    WorkerHello,
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


def test_quotas_that_bound_nothing_are_said_once_when_the_cache_is_known() -> None:
    tenants = (TenantLimits("a", max_blocks=5), TenantLimits("b", max_blocks=99_999_999), TenantLimits("*"))
    engine = EngineProcess(CoreConfig(tenants=tenants))
    try:
        for _ in range(3):
            HandWorker(engine, SimExecutor(FACTS)).close()
        assert engine.log().count("has no effect") == 1
        assert "--tenant b:blocks=99999999 has no effect: the KV cache has 64 blocks" in engine.log()
    finally:
        engine.close()


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
    assert stats.preemptions == 0 and stats.recomputed_tokens > 0  # nobody took its blocks


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
    for _ in range(2):
        worker.fail("boom")
    end = ended(frontend.until(is_end))[0]
    assert end.reason is EndReason.ERROR and "2 times" in end.message
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


# ---------------------------------------------------------------------------------------------- readers and questions


@pytest.fixture
def narrow() -> Iterator[EngineProcess]:
    """Readers may be four tokens behind."""
    process = EngineProcess(CoreConfig(max_batch_rows=8, max_step_tokens=64, max_unread_tokens=4))
    yield process
    process.close()


def joined(engine: EngineProcess) -> tuple[Dealer, HandWorker]:
    dealer = Dealer(engine, engine.frontends)
    dealer.send(FrontendHello(pid=1))
    worker = HandWorker(engine, SimExecutor(FACTS))
    dealer.until(lambda message: isinstance(message, Facts) and message.ready)
    return dealer, worker


def test_an_output_whose_reader_stops_is_not_computed_until_it_reads_on(narrow: EngineProcess) -> None:
    dealer, worker = joined(narrow)
    dealer.send(request(1, [1, 2, 3], 20))
    got: list[Message] = []
    for taken in (0, 2, 3):
        if taken:
            dealer.send(Credit(num_tokens=np.array([taken], np.int32), handles=np.array([1], np.uint32)))
        while worker.step(300) is not None:
            pass
        while (message := dealer.receive(100)) is not None:
            got.append(message)
    assert len(tokens_of(got, 1)) == 4 + 2 + 3 and not ended(got)
    dealer.send(ExplainQuery(1, "request-1"))
    reply = dealer.until(lambda message: isinstance(message, ExplainReply))[-1]
    assert isinstance(reply, ExplainReply) and reply.explanation is not None
    assert reply.explanation.hindrance is Hindrance.READER
    dealer.send(Credit(num_tokens=np.array([100], np.int32), handles=np.array([1], np.uint32)))
    run_steps(worker, 4)


def test_front_ends_learn_how_far_behind_they_may_be(narrow: EngineProcess) -> None:
    dealer = Dealer(narrow, narrow.frontends)
    dealer.send(FrontendHello(pid=1))
    facts = dealer.receive()
    assert isinstance(facts, Facts) and facts.max_unread_tokens == 4


def test_the_policy_changes_between_steps_and_nothing_is_lost(engine: EngineProcess, frontend: Dealer) -> None:
    worker = HandWorker(engine, SimExecutor(FACTS))
    frontend.until(lambda message: isinstance(message, Facts) and message.ready)
    frontend.send(request(1, [1, 2, 3], 6))
    run_steps(worker, 2)
    frontend.send(SetPolicyQuery(4, "static"))
    got = frontend.until(lambda message: isinstance(message, Facts))
    assert isinstance(got[-1], Facts) and got[-1].policy == "static"
    assert SetPolicyReply(4, "static") in got
    run_steps(worker, 4)
    got += frontend.until(is_end)
    assert len(tokens_of(got, 1)) == 6
    frontend.send(SetPolicyQuery(5, "round_robin"))
    reply = frontend.until(lambda message: isinstance(message, SetPolicyReply))[-1]
    assert isinstance(reply, SetPolicyReply) and reply.policy == "static" and "round_robin" in reply.error


def test_questions_are_answered(engine: EngineProcess, frontend: Dealer) -> None:
    worker = HandWorker(engine, SimExecutor(FACTS))
    frontend.until(lambda message: isinstance(message, Facts) and message.ready)
    for handle in (1, 2, 3):
        frontend.send(request(handle, list(range(20)), 50))
    run_steps(worker, 2)
    frontend.send(ListQuery(1, 0, 2))
    page = frontend.until(lambda message: isinstance(message, ListReply))[-1]
    assert isinstance(page, ListReply) and page.total == 3
    assert [one.request_id for one in page.requests] == ["request-1", "request-2"]
    frontend.send(ListQuery(2, page.next, 2))
    page = frontend.until(lambda message: isinstance(message, ListReply))[-1]
    assert isinstance(page, ListReply) and [one.request_id for one in page.requests] == ["request-3"] and page.next == 0

    frontend.send(BlockTablesQuery(3))
    tables = frontend.until(lambda message: isinstance(message, BlockTablesReply))[-1]
    assert isinstance(tables, BlockTablesReply) and tables.header.query_id == 3
    held = [block for table in tables.header.tables for block in table.blocks]
    assert len(tables.states) == FACTS.num_blocks and (tables.states == 1).sum() == len(set(held))

    for request_id, known in (("request-1", True), ("nobody", False)):
        frontend.send(ExplainQuery(4, request_id))
        reply = frontend.until(lambda message: isinstance(message, ExplainReply))[-1]
        assert isinstance(reply, ExplainReply) and (reply.explanation is not None) is known


def test_a_deadline_passes_though_nothing_else_happens(engine: EngineProcess, frontend: Dealer) -> None:
    """The worker never answers: only the clock can wake the process."""
    worker = HandWorker(engine, SimExecutor(FACTS))
    frontend.until(lambda message: isinstance(message, Facts) and message.ready)
    add = request(1, [1, 2, 3], 50)
    add.header.deadline_ns = time.monotonic_ns() + 400_000_000
    frontend.send(add)
    got = frontend.until(is_end)
    assert [end.reason for end in ended(got)] == [EndReason.DEADLINE]
    assert time.monotonic_ns() >= add.header.deadline_ns and worker.epoch == 1


# ------------------------------------------------------------------------------------------- the recorder, own faults


def replayed(path: Path) -> Report:
    recording = Recording(path)
    return Replay(recording.header).run(recording.events())


def test_a_recording_of_the_whole_life_replays(tmp_path: Path) -> None:
    path = tmp_path / "life.rec"
    engine = EngineProcess(CoreConfig(max_batch_rows=8, max_step_tokens=64), record=path)
    try:
        frontend, worker = joined(engine)
        for handle in (1, 2, 3):
            frontend.send(request(handle, list(range(handle, 30)), 8))
        run_steps(worker, 3)
        worker.fail("out of memory")
        frontend.send(CancelQuery(1, "request-2"))
        frontend.until(lambda message: isinstance(message, CancelReply))
        while worker.step(300) is not None:
            pass
        frontend.send(SetPolicyQuery(2, "static"))
        frontend.until(lambda message: isinstance(message, SetPolicyReply))
        frontend.send(request(4, list(range(40)), 8))
        run_steps(worker, 3)
        worker.close()
        frontend.until(lambda message: isinstance(message, Facts) and not message.ready)
        worker = HandWorker(engine, SimExecutor(FACTS))
        engine.process.terminate()
        while worker.step(300) is not None:
            pass
        assert engine.process.wait(20) == 0
    finally:
        engine.close()
    report = replayed(path)
    assert report.same and report.requests == 4 and report.epochs == 3 and report.steps > 10, report
    done = subprocess.run([sys.executable, "-m", "scheduler", "replay", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr


def test_what_a_killed_process_recorded_is_replayed_up_to_its_last_idle_moment(tmp_path: Path) -> None:
    path = tmp_path / "killed.rec"
    engine = EngineProcess(CoreConfig(max_batch_rows=8, max_step_tokens=64), record=path)
    try:
        frontend, worker = joined(engine)
        frontend.send(request(1, [1, 2, 3], 4))
        run_steps(worker, 4)
        frontend.until(is_end)
        assert load(frontend).steps == 4  # it is idle and has written what it did
        engine.process.kill()
        engine.process.wait()
        with pytest.raises(RecordingError, match="cut off"):
            list(Recording(path).events())
        report = replayed(path)
        assert (report.steps, report.output_tokens, report.difference) == (4, 4, [])
    finally:
        engine.close()


def test_an_answer_that_makes_no_sense_leaves_a_trace_and_the_server_goes_on(engine: EngineProcess, frontend: Dealer) -> None:
    worker = HandWorker(engine, SimExecutor(FACTS))
    frontend.until(lambda message: isinstance(message, Facts) and message.ready)
    frontend.send(request(1, [1, 2, 3], 13))
    for _ in range(2):
        run_steps(worker, 4)
        worker.send(StepResult(ResultHeader(0, worker.epoch, 77, 1)))
        worker.welcome()
    while worker.step(300) is not None:
        pass
    assert len(tokens_of(frontend.until(is_end), 1)) == 13
    [dump] = engine.dumps()  # not one for each
    assert str(dump) in engine.log() and "step 77" in Recording(dump).header.why
    assert replayed(dump).same


SABOTAGED_PLAN = """
from scheduler.core import Core
plan = Core.plan
def sabotaged(core, now):
    assert core.counters.output_tokens < 1 or core.epoch > 1, "sabotage"
    return plan(core, now)
Core.plan = sabotaged
"""
SABOTAGED_CHECK = """
from scheduler.core import Core
def sabotaged(core):
    assert core.epoch > 1, "sabotage"
Core.check_invariants = sabotaged
"""


def test_a_core_that_fails_is_replaced_and_leaves_a_trace() -> None:
    engine = EngineProcess(CoreConfig(max_batch_rows=8, max_step_tokens=64), sabotage=SABOTAGED_PLAN)
    try:
        frontend, worker = joined(engine)
        frontend.send(request(1, [1, 2, 3], 20))
        frontend.send(request(2, [1, 2, 3], 20))
        assert load(frontend).accepted_requests == 2
        run_steps(worker, 1)
        got = frontend.until(is_end)
        assert [end.reason for end in ended(got)] == [EndReason.ERROR] * 2
        frontend.send(request(3, [1, 2, 3], 4))
        while worker.step(300) is not None:
            pass
        assert worker.epoch == 2 and len(tokens_of(frontend.until(is_end), 3)) == 4
        assert load(frontend).held_blocks == 0
        assert "AssertionError: sabotage" in engine.log() and "in sabotaged" in engine.log()
        [dump] = engine.dumps()
        events = list(Recording(dump).events())
        assert events[-1].verb is Verb.FAILED and "sabotage" in events[-1].text
        report = replayed(dump)  # here nobody sabotages
        assert not report.same and "now it does not" in report.difference[1]
    finally:
        engine.close()


def test_a_violated_invariant_is_said_with_its_trace_and_does_not_end_the_service() -> None:
    engine = EngineProcess(CoreConfig(max_batch_rows=8, max_step_tokens=64), sabotage=SABOTAGED_CHECK)
    try:
        frontend, worker = joined(engine)
        for handle in (1, 2):
            frontend.send(request(handle, [1, 2, 3], 4))
            while worker.step(300) is not None:
                pass
            got = frontend.until(is_end)
            assert len(tokens_of(got, handle)) == 4 and [end.reason for end in ended(got)] == [EndReason.LENGTH]
        assert worker.epoch == 2 and "invariants are violated" in engine.log() and "in sabotaged" in engine.log()
        [dump] = engine.dumps()
        assert replayed(dump).same
    finally:
        engine.close()


def test_a_question_that_fails_stays_open_and_the_next_is_answered() -> None:
    sabotage = "from scheduler.core import explain\nexplain.explain = lambda *_: 1 // 0"
    engine = EngineProcess(CoreConfig(max_batch_rows=8, max_step_tokens=64), sabotage=sabotage)
    try:
        frontend, _worker = joined(engine)
        frontend.send(ExplainQuery(4, "nobody"))
        assert load(frontend).query_id == 7
        assert "ExplainQuery could not be answered" in engine.log()
    finally:
        engine.close()


SABOTAGED_JOIN = """
from scheduler.core import Core
joined = Core.worker_joined
def sabotaged(core, facts, now):
    assert facts.max_batch_rows != 7, "sabotage"
    return joined(core, facts, now)
Core.worker_joined = sabotaged
"""


def test_a_worker_that_no_core_can_take_ends_nothing() -> None:
    engine = EngineProcess(CoreConfig(max_batch_rows=8, max_step_tokens=64), sabotage=SABOTAGED_JOIN)
    try:
        frontend, worker = joined(engine)
        nonsense = Dealer(engine, engine.workers)
        nonsense.send(WorkerHello(0, msgspec.structs.replace(FACTS, max_batch_rows=7)))
        assert load(frontend).query_id == 7
        worker.close()
        frontend.until(lambda message: isinstance(message, Facts) and not message.ready)
        again = HandWorker(engine, SimExecutor(FACTS))
        assert again.epoch > worker.epoch
        frontend.send(request(1, [1, 2, 3], 2))
        run_steps(again, 2)
        assert len(tokens_of(frontend.until(is_end), 1)) == 2
        assert "no core can take this worker" in engine.log()
    finally:
        engine.close()


# ----------------------------------------------------------------------------------------------------------- the end


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


def test_drain_is_answered_with_those_alive_and_ends_as_sigterm_does(engine: EngineProcess, frontend: Dealer) -> None:
    worker = HandWorker(engine, SimExecutor(FACTS))
    frontend.until(lambda message: isinstance(message, Facts) and message.ready)
    frontend.send(request(1, [1, 2, 3], 3))
    run_steps(worker, 1)
    frontend.send(DrainQuery(5, -1))
    before = frontend.until(lambda message: isinstance(message, DrainReply))
    assert any(isinstance(message, Facts) and message.draining for message in before), "whoever asked knows that it drains"
    reply = before[-1]
    assert isinstance(reply, DrainReply) and (reply.query_id, reply.num_requests) == (5, 1)
    assert 0 < reply.left_ns <= 10 * 1_000_000_000, "the engine's own drain timeout"
    assert os.read(engine.status, 64) == b"ready\ndraining\n", "the supervisor hears of it"
    frontend.send(request(2, [1, 2, 3], 3))
    refused = frontend.until(lambda message: isinstance(message, Refused))[-1]
    assert isinstance(refused, Refused) and refused.code == "UNAVAILABLE" and refused.retry_after_ns > 0
    run_steps(worker, 2)
    assert [end.reason for end in ended(frontend.until(is_end))] == [EndReason.LENGTH]
    assert engine.process.wait(20) == 0


def test_an_idle_core_answers_drain_before_it_goes(engine: EngineProcess, frontend: Dealer) -> None:
    frontend.send(DrainQuery(6, 0))
    reply = frontend.until(lambda message: isinstance(message, DrainReply))[-1]
    assert reply == DrainReply(6, 0, 0)
    assert engine.process.wait(20) == 0


def test_drain_again_can_only_leave_less_time(engine: EngineProcess, frontend: Dealer) -> None:
    worker = HandWorker(engine, SimExecutor(FACTS))
    frontend.until(lambda message: isinstance(message, Facts) and message.ready)
    frontend.send(request(1, [1, 2, 3], 400))
    run_steps(worker, 1)
    left = []
    for timeout_ms in (2**31, 5_000, 8_000, -1):
        frontend.send(DrainQuery(7, timeout_ms))
        reply = frontend.until(lambda message: isinstance(message, DrainReply))[-1]
        assert isinstance(reply, DrainReply) and reply.num_requests == 1
        left.append(reply.left_ns / 1e9)
    assert 5 < left[0] <= 10 and all(0 < each <= 5 for each in left[1:])
    frontend.send(DrainQuery(8, 0))
    assert [end.reason for end in ended(frontend.until(is_end))] == [EndReason.UNAVAILABLE]
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
