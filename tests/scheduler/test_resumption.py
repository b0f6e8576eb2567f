"""Requests whose reader is gone, over real sockets: they go on, are taken over, are given up, and are kept within bounds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from scheduler.core import CoreConfig, Output
from scheduler.recording import Recording, Verb
from scheduler.replay import Replay
from scheduler.resumption import Resumption
from tests.helpers.engine import Dealer, EngineProcess, HandWorker, request
from tests.helpers.server import eventually
from wire import (
    AbortRequest,
    AddRequest,
    CancelOutcome,
    CancelQuery,
    CancelReply,
    Credit,
    EndReason,
    Facts,
    FrontendHello,
    LoadQuery,
    LoadReply,
    Message,
    OutputEnded,
    Refused,
    RequestStats,
    ResumeQuery,
    ResumeReply,
    TokenBatch,
    TokenBatchHeader,
    TruncateRequest,
)
from worker.sim_executor import SimExecutor, sim_facts

FACTS = sim_facts(vocab_size=1000, max_model_len=512, num_blocks=64, max_batch_rows=8, max_step_tokens=64)
PROMPT = [1, 2, 3]
LONG_MS = 600_000


@pytest.fixture
def engine() -> Iterator[EngineProcess]:
    """A reader may be four tokens behind."""
    process = EngineProcess(CoreConfig(max_batch_rows=8, max_step_tokens=64, max_unread_tokens=4))
    yield process
    process.close()


def joined(engine: EngineProcess) -> Dealer:
    dealer = Dealer(engine, engine.frontends)
    dealer.send(FrontendHello(pid=1))
    assert isinstance(dealer.receive(), Facts)
    return dealer


def with_worker(engine: EngineProcess, *frontends: Dealer) -> HandWorker:
    worker = HandWorker(engine, SimExecutor(FACTS))
    for frontend in frontends:
        frontend.until(lambda message: isinstance(message, Facts) and message.ready)
    return worker


def resumable(handle: int, max_tokens: int, window_ms: int = LONG_MS, num_outputs: int = 1) -> AddRequest:
    add = request(handle, PROMPT, max_tokens)
    header = msgspec.structs.replace(add.header, resume_window_ms=window_ms, resume_state=b"state", num_outputs=num_outputs)
    return AddRequest(header, add.prompt)


def run_out(worker: HandWorker) -> int:
    """All the steps that are due; how many there were."""
    count = 0
    while worker.step(300) is not None:
        count += 1
    return count


def run_steps(worker: HandWorker, count: int) -> None:
    for _ in range(count):
        assert worker.step() is not None


def tokens_of(messages: list[Message], handle: int) -> list[int]:
    return [
        int(token)
        for message in messages
        if isinstance(message, TokenBatch)
        for owner, token in zip(message.handles, message.tokens, strict=True)
        if owner == handle
    ]


def ends_of(messages: list[Message]) -> list[tuple[int, EndReason]]:
    return [(end.handle, end.reason) for message in messages if isinstance(message, TokenBatch) for end in message.header.ended]


def heard(dealer: Dealer) -> list[Message]:
    """What it has been told before the answer to a question that it asks now."""
    dealer.send(LoadQuery(77))
    return dealer.until(lambda message: isinstance(message, LoadReply))


def load(dealer: Dealer) -> LoadReply:
    reply = heard(dealer)[-1]
    assert isinstance(reply, LoadReply)
    return reply


def resume(dealer: Dealer, request_id: str, handle: int, arrival_ns: int = 0) -> ResumeReply:
    dealer.send(ResumeQuery(5, request_id, handle, arrival_ns))
    reply = dealer.until(lambda message: isinstance(message, ResumeReply))[-1]
    assert isinstance(reply, ResumeReply) and (reply.header.query_id, reply.header.handle) == (5, handle)
    return reply


def is_end(message: Message) -> bool:
    return isinstance(message, TokenBatch) and bool(message.header.ended)


def undisturbed(engine: EngineProcess, frontend: Dealer, worker: HandWorker, max_tokens: int) -> list[int]:
    frontend.send(request(900, PROMPT, max_tokens))
    frontend.send(Credit(num_tokens=np.array([1000], np.int32), handles=np.array([900], np.uint32)))
    messages: list[Message] = []
    while not any(map(is_end, messages)):
        worker.step(50)
        while (message := frontend.receive(10)) is not None:
            messages.append(message)
        frontend.send(Credit(num_tokens=np.array([1000], np.int32), handles=np.array([900], np.uint32)))
    return tokens_of(messages, 900)


def test_a_detached_request_is_computed_to_its_end_and_kept_for_whoever_resumes_it(engine: EngineProcess) -> None:
    first, second = joined(engine), joined(engine)
    worker = with_worker(engine, first, second)
    expected = undisturbed(engine, first, worker, 20)
    first.send(resumable(1, 20))
    assert run_out(worker) == 4, "its reader does not read"
    got = heard(first)
    first.send(AbortRequest(1))
    run_out(worker)
    assert load(first).running_requests == 0 and load(first).held_blocks == 0
    for dealer, handle in ((second, 30), (first, 40), (second, 50)):
        reply = resume(dealer, "request-1", handle)
        assert reply.header.resume_state == b"state" and reply.prompt.tolist() == PROMPT
        assert reply.tokens.tolist() == expected and reply.num_tokens.tolist() == [20]
        [end] = reply.header.ended
        assert end is not None and (end.handle, end.reason, end.stats.output_tokens) == (handle, EndReason.LENGTH, 20)
    assert tokens_of(got, 1) == expected[:4] and ends_of(heard(first)) == []


def test_who_resumes_a_live_request_gets_all_that_follows_and_speaks_for_it(engine: EngineProcess) -> None:
    first, second = joined(engine), joined(engine)
    worker = with_worker(engine, first, second)
    expected = undisturbed(engine, first, worker, 30)
    first.send(resumable(1, 30))
    run_out(worker)
    first.send(AbortRequest(1))
    heard(first)
    run_steps(worker, 3)
    assert eventually(lambda: load(first).output_tokens == 30 + 4 + 3)
    reply = resume(second, "request-1", 30)
    known = reply.tokens.tolist()
    assert known == expected[:7] and reply.header.ended == (None,)
    run_out(worker)
    got = heard(second)
    assert [*known, *tokens_of(got, 30)] == expected[:11], "no more than it takes"
    second.send(Credit(num_tokens=np.array([4], np.int32), handles=np.array([30], np.uint32)))
    run_out(worker)
    got += heard(second)
    assert [*known, *tokens_of(got, 30)] == expected[:15]
    second.send(TruncateRequest(30, 12))
    assert ends_of(second.until(is_end)) == [(30, EndReason.STOP)] and ends_of(heard(first)) == []
    again = resume(first, "request-1", 60)
    assert again.tokens.tolist() == expected[:12] and again.header.ended[0] is not None
    assert load(first).held_blocks == 0


def test_the_newest_resume_wins_and_the_older_stream_is_told(engine: EngineProcess) -> None:
    first, second = joined(engine), joined(engine)
    worker = with_worker(engine, first, second)
    first.send(resumable(1, 100))
    run_steps(worker, 2)
    resume(second, "request-1", 30)
    refused = first.until(lambda message: isinstance(message, Refused))[-1]
    assert isinstance(refused, Refused) and (refused.handle, refused.code) == (1, "ABORTED")
    first.send(AbortRequest(1))  # it did not know yet
    first.send(TruncateRequest(1, 1))
    assert load(first).running_requests == 1
    resume(second, "request-1", 50)
    refused = second.until(lambda message: isinstance(message, Refused))[-1]
    assert isinstance(refused, Refused) and refused.handle == 30
    run_steps(worker, 2)
    second.until(lambda message: bool(tokens_of([message], 50)))
    assert not tokens_of(heard(first), 1)
    second.send(AbortRequest(50))  # it is detached again
    assert load(second).running_requests == 1
    run_out(worker)
    assert len(resume(first, "request-1", 60).tokens) == 100


def test_a_resume_that_was_overtaken_does_not_take_the_request_from_the_newer_one(engine: EngineProcess) -> None:
    """As when its front end is killed, its caller resumes over another, and what that one said is read first."""
    first, second = joined(engine), joined(engine)
    worker = with_worker(engine, first, second)
    first.send(resumable(1, 100))
    run_steps(worker, 2)
    resume(second, "request-1", 30, arrival_ns=20)
    late = resume(first, "request-1", 50, arrival_ns=10)
    refused = heard(first)[0]
    assert isinstance(refused, Refused) and (refused.handle, refused.code) == (50, "ABORTED")
    run_steps(worker, 2)
    second.until(lambda message: bool(tokens_of([message], 30)))
    assert not tokens_of(heard(first), 50)
    first.send(AbortRequest(50))
    first.send(TruncateRequest(50, 1))
    assert load(first).running_requests == 1
    second.send(AbortRequest(30))
    assert load(second).running_requests == 1
    again = resume(first, "request-1", 70, arrival_ns=10)
    assert len(again.tokens) > len(late.tokens), "nobody reads it any more"


def test_several_outputs_are_taken_over_together(engine: EngineProcess) -> None:
    first, second = joined(engine), joined(engine)
    worker = with_worker(engine, first, second)
    first.send(resumable(1, 12, num_outputs=3))
    run_steps(worker, 3)
    first.send(TruncateRequest(1, 1))  # the first one ends early: its handle still stands for the request
    heard(first)
    first.send(AbortRequest(1))
    assert load(first).running_requests == 1
    reply = resume(second, "request-1", 30)
    assert [end is not None for end in reply.header.ended] == [True, False, False]
    assert reply.num_tokens.tolist()[0] == 1 and reply.num_tokens.sum() == len(reply.tokens)
    second.send(AbortRequest(30))
    run_out(worker)
    reply = resume(first, "request-1", 40)
    assert reply.num_tokens.tolist() == [1, 12, 12]
    assert [end.handle for end in reply.header.ended if end is not None] == [40, 41, 42]


def test_when_the_window_is_over_it_is_aborted_and_its_blocks_are_free(engine: EngineProcess) -> None:
    first = joined(engine)
    worker = with_worker(engine, first)
    first.send(resumable(1, 400, window_ms=200))
    first.send(resumable(2, 400))
    run_steps(worker, 2)
    first.send(AbortRequest(1))
    first.send(AbortRequest(2))
    assert eventually(lambda: load(first).cancelled_requests == 1), "nothing else happens: the clock alone wakes it"
    run_steps(worker, 3)
    assert load(first).running_requests == 1
    assert not resume(first, "request-1", 30).header.is_known and resume(first, "request-2", 31).header.is_known
    first.send(CancelQuery(1, "request-2"))
    heard(first)
    run_out(worker)
    assert load(first).held_blocks == 0


def test_what_has_ended_is_kept_for_its_window_though_somebody_read_it(engine: EngineProcess) -> None:
    first = joined(engine)
    worker = with_worker(engine, first)
    first.send(resumable(1, 3, window_ms=400))
    first.send(resumable(2, 3))
    run_out(worker)
    got = heard(first)
    assert ends_of(got) == [(1, EndReason.LENGTH), (2, EndReason.LENGTH)]
    assert resume(first, "request-2", 40).tokens.tolist() == tokens_of(got, 2)
    assert eventually(lambda: not resume(first, "request-1", 30).header.is_known or time.sleep(0.5))


def test_a_cancel_ends_a_detached_request_at_once(engine: EngineProcess) -> None:
    first = joined(engine)
    worker = with_worker(engine, first)
    first.send(resumable(1, 400))
    run_steps(worker, 2)
    first.send(AbortRequest(1))
    first.send(CancelQuery(3, "request-1"))
    assert CancelReply(3, CancelOutcome.CANCELLED) in heard(first)
    assert load(first).running_requests == 0
    [end] = resume(first, "request-1", 30).header.ended
    assert end is not None and end.reason is EndReason.CANCELLED


def test_a_front_end_that_dies_takes_only_the_others_along(engine: EngineProcess) -> None:
    first, second = joined(engine), joined(engine)
    worker = with_worker(engine, first, second)
    for add in (resumable(1, 40), request(2, PROMPT, 40), resumable(3, 40)):
        first.send(add)
    run_steps(worker, 2)
    resume(second, "request-3", 30)
    first.close()
    assert eventually(lambda: load(second).cancelled_requests == 1)
    run_out(worker)
    assert len(resume(second, "request-1", 40).tokens) == 40
    assert load(second).running_requests == 1, "the one that the second front end reads, and does not take"
    second.send(AbortRequest(30))
    run_out(worker)
    assert len(resume(second, "request-3", 50).tokens) == 40 and load(second).held_blocks == 0


def test_a_new_request_takes_its_id_from_one_that_has_ended(engine: EngineProcess) -> None:
    first = joined(engine)
    worker = with_worker(engine, first)
    first.send(resumable(1, 3))
    run_out(worker)
    assert resume(first, "request-1", 30).header.is_known
    add = request(2, PROMPT, 3)
    add.header.request_id = "request-1"
    first.send(add)
    assert not resume(first, "request-1", 31).header.is_known, "it has no window"


def test_a_lost_worker_loses_nothing_of_a_detached_request(engine: EngineProcess) -> None:
    first = joined(engine)
    worker = with_worker(engine, first)
    expected = undisturbed(engine, first, worker, 15)
    first.send(resumable(1, 15))
    run_steps(worker, 3)
    first.send(AbortRequest(1))
    heard(first)
    worker.close()
    first.until(lambda message: isinstance(message, Facts) and not message.ready)
    run_out(with_worker(engine, first))
    assert resume(first, "request-1", 30).tokens.tolist() == expected


SABOTAGE = """
from scheduler.core import Core
plan = Core.plan
def sabotaged(core, now):
    assert core.counters.output_tokens < 3 or core.epoch > 1, "sabotage"
    return plan(core, now)
Core.plan = sabotaged
"""


def test_a_core_that_fails_ends_them_and_the_next_one_keeps_its_own() -> None:
    engine = EngineProcess(CoreConfig(max_batch_rows=8, max_step_tokens=64), sabotage=SABOTAGE)
    try:
        first, second = joined(engine), joined(engine)
        worker = with_worker(engine, first, second)
        for handle in (1, 2):
            first.send(resumable(handle, 20))
        first.send(AbortRequest(2))
        assert load(first).accepted_requests == 2
        resume(second, "request-1", 30)
        run_steps(worker, 2)
        assert ends_of(second.until(is_end)) == [(30, EndReason.ERROR)]
        assert not any(resume(first, f"request-{handle}", 40 + handle).header.is_known for handle in (1, 2))
        first.send(resumable(3, 4))
        run_out(worker)
        assert len(resume(second, "request-3", 50).tokens) == 4
        assert load(first).held_blocks == 0
    finally:
        engine.close()


def test_a_recording_with_detached_requests_replays_and_holds_no_state_of_front_ends(tmp_path: Path) -> None:
    path = tmp_path / "detached.rec"
    engine = EngineProcess(CoreConfig(max_batch_rows=8, max_step_tokens=64, max_unread_tokens=4), record=path)
    try:
        first, second = joined(engine), joined(engine)
        worker = with_worker(engine, first, second)
        first.send(resumable(1, 30))
        first.send(resumable(2, 30, window_ms=1))
        run_steps(worker, 2)
        first.send(AbortRequest(1))
        first.send(AbortRequest(2))
        assert eventually(lambda: load(first).cancelled_requests == 1)
        run_steps(worker, 9)
        resume(second, "request-1", 30)
        second.send(AbortRequest(30))
        run_out(worker)
        assert len(resume(second, "request-1", 40).tokens) == 30
        engine.process.terminate()
        assert engine.process.wait(20) == 0
    finally:
        engine.close()
    recording = Recording(path)
    events = list(recording.events())
    assert sum(event.verb is Verb.CREDIT for event in events) > 5
    assert not any(event.message.header.resume_state for event in events if isinstance(event.message, AddRequest))
    report = Replay(recording.header).run(iter(events))
    assert report.same and report.requests == 2, report


# ------------------------------------------------------------------------------------------------------------- bounds


def ended(resumption: Resumption, handle: int, num_tokens: int, now: int) -> None:
    resumption.added(resumable(handle, num_tokens), 0)
    batch = TokenBatch(TokenBatchHeader(1, (OutputEnded(handle, EndReason.LENGTH, RequestStats()),)))
    [output] = resumption.route(Output(0, batch, ((handle, np.zeros(num_tokens, np.int32)),)), now)
    assert output.batch is batch


def known(resumption: Resumption, handles: range) -> list[int]:
    def is_known(handle: int) -> bool:
        query = ResumeQuery(1, f"request-{handle}", 100)
        return resumption.resume(query, 0, lambda key: np.empty(0, np.int32), 0)[0].header.is_known

    return [handle for handle in handles if is_known(handle)]


def test_those_that_ended_first_are_forgotten_first_when_there_are_too_many() -> None:
    resumption = Resumption(1024, most=3)
    for handle in range(1, 6):
        ended(resumption, handle, 1, handle)
    assert known(resumption, range(1, 6)) == [3, 4, 5]


def test_those_that_ended_first_are_forgotten_first_when_they_are_too_long() -> None:
    weight = len(PROMPT) + len(b"state") // 4
    resumption = Resumption(1024, most_tokens=3 * weight + 100)
    for handle, num_tokens in enumerate((50, 20, 80), 1):
        ended(resumption, handle, num_tokens, handle)
    assert known(resumption, range(1, 4)) == [2, 3]
    ended(resumption, 4, 500, 4)
    assert known(resumption, range(1, 5)) == []


def test_nothing_is_left_of_what_was_given_up() -> None:
    """However often each was resumed: neither requests, nor routes, nor entries of the clock."""
    resumption, window_ns = Resumption(1024), LONG_MS * 1_000_000
    for handle in range(1, 50):
        resumption.added(resumable(handle, 10), 0)
        for now in range(20):
            resumption.resume(ResumeQuery(1, f"request-{handle}", 1000 + now), 1, lambda key: np.empty(0, np.int32), now)
            assert resumption.core_key(1, 1000 + now) == (0, handle) and resumption.core_key(0, handle) is None
            assert resumption.detach((0, handle), now)
    assert len(resumption._due) < 200
    assert resumption.expired(window_ns) == []
    assert sorted(resumption.expired(window_ns + 19)) == [(0, handle) for handle in range(1, 50)]
    assert not resumption.expired(1 << 62) and not resumption.next_due_ns()
    left = (resumption._by_id, resumption._live, resumption._routes, resumption._came_from, resumption._untaken)
    assert not any(left) and resumption.core_key(0, 1) == (0, 1)


def test_requests_without_a_window_are_left_alone() -> None:
    resumption = Resumption(1024)
    resumption.added(request(1, PROMPT, 3), 0)
    batch = TokenBatch(TokenBatchHeader(1, (OutputEnded(1, EndReason.LENGTH, RequestStats()),)))
    assert not resumption.concerns(Output(0, batch)) and not resumption.detach((0, 1), 5)
    handles, num_tokens = np.array([1], np.uint32), np.array([2], np.int32)
    assert resumption.core_credits(0, handles, num_tokens) == {0: (handles, num_tokens)}
