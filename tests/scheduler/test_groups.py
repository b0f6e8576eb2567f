"""The core process with several worker groups over real sockets: where requests go, and what the loss of a worker costs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from kvcache.prefix_index import hash_blocks, root
from scheduler.core import CoreConfig
from scheduler.recording import Recording
from scheduler.replay import Replay
from tests.helpers.engine import GREEDY, Dealer, EngineProcess, HandWorker, request
from tests.helpers.server import eventually
from tests.scheduler.test_engine import FACTS, ended, is_end, tokens_of
from tests.scheduler.test_engine_workers import words
from wire import (
    AbortRequest,
    AddHeader,
    AddRequest,
    BlockTablesQuery,
    BlockTablesReply,
    CancelOutcome,
    CancelQuery,
    CancelReply,
    Credit,
    EndReason,
    ExplainQuery,
    ExplainReply,
    Facts,
    FrontendHello,
    ListQuery,
    ListReply,
    LoadQuery,
    LoadReply,
    Message,
    MetricsQuery,
    MetricsReply,
    Refused,
    ReplaceQuery,
    ReplaceReply,
    ResultHeader,
    ResumeQuery,
    ResumeReply,
    Retired,
    SetPolicyQuery,
    SetPolicyReply,
    StepPlan,
    StepRecord,
    StepResult,
    TokenBatch,
    WatchSteps,
    Welcome,
    WorkerFacts,
    WorkerHello,
)
from worker.sim_executor import SimExecutor

POISON = 999
KEY = root("model", "", "")


class Crew:
    """A core process, a front end, and workers that are told one by one when to compute."""

    def __init__(self, num_workers: int = 2, **options: Any) -> None:
        core = options.pop("core", CoreConfig(max_batch_rows=8, max_step_tokens=64))
        self.engine = EngineProcess(core, **{"max_groups": 2} | options)
        self.frontend = Dealer(self.engine, self.engine.frontends)
        self.frontend.send(FrontendHello(pid=1))
        assert isinstance(self.frontend.receive(), Facts)
        self.workers = [self.start() for _ in range(num_workers)]
        self.heard: list[Message] = []
        self.poisoned: dict[int, set[int]] = {}  # by id of a worker: slots

    def start(self, facts: WorkerFacts = FACTS, **options: Any) -> HandWorker:
        return HandWorker(self.engine, SimExecutor(facts), **options)

    def finish(self) -> None:
        """Until nothing is alive."""
        for _ in range(5_000):
            for worker in self.workers:
                worker.step(5)
            alive = self.load()
            if not alive.running_requests + alive.waiting_requests:
                return
        raise AssertionError(f"requests stand still: {alive}")

    def load(self) -> LoadReply:
        self.frontend.send(LoadQuery(7))
        reply = self.hear(LoadReply)
        assert isinstance(reply, LoadReply)
        return reply

    def groups(self, page: int = 100) -> dict[str, int]:
        """Of all that are alive."""
        found, after = {}, 0
        while True:
            self.frontend.send(ListQuery(3, after, page))
            reply = self.hear(ListReply)
            found |= {summary.request_id: summary.group for summary in reply.requests}
            assert len(reply.requests) <= page
            if not (after := reply.next):
                assert len(found) == reply.total
                return found

    def run_until(self, count: int, *handles: int) -> None:
        """Until each of these has so many tokens."""
        while min(len(tokens_of(self.heard, handle)) for handle in handles) < count:
            for worker in self.workers:
                worker.step(20)
            self.groups()

    def hear(self, kind: type[Any]) -> Any:
        """The next message of this kind; what comes before it is kept in `heard`."""
        *before, found = self.frontend.until(lambda message: isinstance(message, kind))
        self.heard += before
        return found

    def ends(self, count: int) -> dict[int, EndReason]:
        """How so many requests ended; their tokens are in `heard`."""
        while len(ended(self.heard)) < count:
            self.heard += self.frontend.until(is_end)
        return {end.handle: end.reason for end in ended(self.heard)}

    def undisturbed(self, prompt: list[int], max_tokens: int) -> list[int]:
        kept, self.heard = self.heard, []
        self.frontend.send(request(900, prompt, max_tokens))
        self.finish()
        self.ends(1)
        got, self.heard = tokens_of(self.heard, 900), kept
        return got


@pytest.fixture
def crews() -> Iterator[Any]:
    started: list[Crew] = []

    def start(*args: Any, **options: Any) -> Crew:
        started.append(Crew(*args, **options))
        return started[-1]

    yield start
    for crew in started:
        crew.engine.close()


def prompt(number: int, length: int = 40) -> list[int]:
    return [(number * 101 + i * 7) % 900 for i in range(length)]


def hashed(handle: int, tokens: list[int], max_tokens: int) -> AddRequest:
    """As a front end sends it."""
    add = request(handle, tokens, max_tokens)
    add.header.prefix_key, add.header.hash_block_size = KEY, FACTS.block_size
    add.prefix_hashes = np.frombuffer(hash_blocks(KEY, add.prompt, FACTS.block_size), np.uint8)
    return add


# ---------------------------------------------------------------------------------------------------------- placement


def test_requests_go_where_their_beginning_is_known_and_else_where_least_is_done(crews: Any) -> None:
    crew = crews()
    assert [(worker.group, worker.epoch) for worker in crew.workers] == [(0, 1), (1, 1)]
    for handle, tokens in ((1, prompt(1)), (2, prompt(2))):
        crew.frontend.send(hashed(handle, tokens, 300))
        for worker in crew.workers:
            worker.step(100)
    assert crew.groups() == {"request-1": 0, "request-2": 1}
    crew.frontend.send(hashed(3, [*prompt(2), 5], 300))
    while crew.load().waiting_requests:
        crew.workers[1].step(20)
    crew.frontend.send(hashed(4, [*prompt(2), 6], 300))
    assert crew.groups() == {"request-1": 0, "request-2": 1, "request-3": 1, "request-4": 1}
    crew.frontend.send(hashed(5, prompt(3), 300))
    assert crew.groups()["request-5"] == 0
    assert [len(crew.groups(page)) for page in (1, 2, 3, 5)] == [5, 5, 5, 5], "page by page"


def test_more_workers_than_groups_stand_by_for_whichever_loses_its_own(crews: Any) -> None:
    crew = crews()
    third = crew.start(waits=False)
    assert eventually(lambda: "stands by" in crew.engine.log())
    crew.workers[1].close()
    third.welcome()
    assert (third.group, third.epoch) == (1, 2)


def test_what_one_has_too_few_blocks_for_goes_to_another_and_waits_for_it(crews: Any) -> None:
    crew = crews(0)
    small, large = (msgspec.structs.replace(FACTS, num_blocks=number) for number in (8, 64))
    crew.workers = [crew.start(small), crew.start(large)]
    crew.frontend.send(request(1, prompt(1, 100), 200))
    crew.frontend.send(request(2, prompt(2, 20), 300))
    assert crew.groups() == {"request-1": 1, "request-2": 1}
    crew.frontend.send(request(3, prompt(3, 20), 20))
    crew.frontend.send(request(4, prompt(4, 400), 1000))
    refused = crew.hear(Refused)
    assert (refused.handle, refused.code) == (4, "INVALID_ARGUMENT")
    crew.workers[1].step()
    crew.frontend.send(CancelQuery(5, "request-2"))
    crew.frontend.send(request(5, prompt(5, 20), 20))
    crew.workers.pop(1).close()
    assert eventually(lambda: "its requests go to other groups" in crew.engine.log())
    assert crew.groups() == {"request-1": 1, "request-3": 0, "request-5": 0}
    while len(ended(crew.heard)) < 3:
        crew.workers[0].step(5)
        crew.load()
    assert set(crew.ends(3)) == {2, 3, 5}
    crew.workers.append(crew.start(large))
    crew.finish()
    assert crew.ends(4)[1] is EndReason.LENGTH and len(tokens_of(crew.heard, 1)) == 200


def test_the_limit_on_who_waits_is_the_servers(crews: Any) -> None:
    crew = crews(core=CoreConfig(max_batch_rows=1, max_step_tokens=64, max_queue_requests=3))
    for handle in range(1, 6):
        crew.frontend.send(request(handle, prompt(handle), 10))
        if handle < 3:
            for worker in crew.workers:
                worker.step(100)
    assert crew.load().waiting_requests == 3
    crew.frontend.send(request(6, prompt(6), 10))
    refused = crew.hear(Refused)
    assert (refused.code, refused.details["waiting_requests"]) == ("RESOURCE_EXHAUSTED", "3")
    crew.frontend.send(request(4, prompt(4), 10))
    assert crew.hear(Refused).code == "ALREADY_EXISTS"
    crew.finish()
    assert set(crew.ends(5).values()) == {EndReason.LENGTH}
    assert crew.load().refused_requests == 2


# --------------------------------------------------------------------------------------------------------------- loss


def test_what_a_lost_worker_computed_goes_on_with_another_and_nothing_is_lost(crews: Any) -> None:
    crew = crews()
    wanted = {handle: crew.undisturbed(prompt(handle), 12) for handle in range(1, 5)}
    for handle in range(1, 5):
        crew.frontend.send(request(handle, prompt(handle), 12))
    assert sorted(crew.groups().values()) == [0, 0, 1, 1]
    crew.run_until(3, 1, 2, 3, 4)
    crew.workers.pop(1).close()
    assert eventually(lambda: set(crew.groups().values()) == {0})
    crew.finish()
    assert set(crew.ends(4).values()) == {EndReason.LENGTH}
    assert {handle: tokens_of(crew.heard, handle) for handle in wanted} == wanted
    assert not any(isinstance(message, Facts) and not message.ready for message in crew.heard)
    after = crew.load()
    assert (after.total_blocks, after.held_blocks) == (FACTS.num_blocks, 0)
    assert (after.accepted_requests, after.finished_requests, after.preemptions) == (8, 8, 0)
    again = crew.start()
    assert (again.group, again.epoch) == (1, 2)
    assert crew.load().total_blocks == 2 * FACTS.num_blocks


def test_when_all_workers_are_lost_requests_wait_for_whichever_comes_first(crews: Any) -> None:
    crew = crews()
    wanted = {handle: crew.undisturbed(prompt(handle), 12) for handle in range(1, 5)}
    for handle in range(1, 5):
        crew.frontend.send(request(handle, prompt(handle), 12))
    crew.run_until(3, 1, 2, 3, 4)
    for worker in crew.workers:
        worker.close()
    facts = crew.hear(Facts)
    while facts.ready:
        facts = crew.hear(Facts)
    assert facts.reason == "waiting for a worker with its model" and len(crew.groups()) == 4
    crew.frontend.send(request(5, prompt(5), 12))
    crew.workers = [crew.start()]
    assert set(crew.groups().values()) == {crew.workers[0].group}
    crew.finish()
    assert set(crew.ends(5).values()) == {EndReason.LENGTH}
    assert {handle: tokens_of(crew.heard, handle) for handle in wanted} == wanted


def test_who_waits_goes_to_a_worker_that_comes(crews: Any) -> None:
    crew = crews(1, core=CoreConfig(max_batch_rows=2, max_step_tokens=64))
    for handle in range(1, 9):
        crew.frontend.send(request(handle, prompt(handle), 10))
    crew.workers[0].step()
    assert set(crew.groups().values()) == {0}
    crew.workers.append(crew.start())
    assert sorted(crew.groups().values()) in ([0] * 4 + [1] * 4, [0] * 5 + [1] * 3)
    crew.finish()
    assert set(crew.ends(8).values()) == {EndReason.LENGTH}


def crashes(crew: Crew, worker: HandWorker, plan: StepPlan) -> bool:
    """Whether the plan computes the poisoned request."""
    slots, at = crew.poisoned.setdefault(id(worker), set()), 0
    for start in plan.header.starts:
        slots.discard(start.slot)
        if POISON in plan.start_tokens[at : at + start.num_prompt_tokens]:
            slots.add(start.slot)
        at += start.num_tokens
    return bool(slots & set(plan.slots.tolist()))


def test_one_that_crashes_every_worker_is_found_and_fails_alone(crews: Any) -> None:
    crew = crews()
    wanted = {handle: crew.undisturbed(prompt(handle, 8), 10) for handle in range(1, 7)}
    for handle in range(1, 7):
        crew.frontend.send(request(handle, prompt(handle, 8), 10))
    crew.frontend.send(request(7, [POISON, 1, 2], 10))
    num_crashes = 0
    while len(ended(crew.heard)) < 7:
        crew.load()
        for place, worker in enumerate(crew.workers):
            message = worker.receive(10)
            if isinstance(message, Welcome):
                worker._welcome(message)
                crew.poisoned.pop(id(worker), None)
            if isinstance(message, StepPlan):
                if crashes(crew, worker, message):
                    num_crashes += 1
                    assert num_crashes < 20, "it hops for ever"
                    worker.close()
                    crew.workers[place] = crew.start()
                else:
                    worker.executor.submit(message, worker._deliver)
    assert crew.ends(7) == {handle: EndReason.ERROR if handle == 7 else EndReason.LENGTH for handle in range(1, 8)}
    assert {handle: tokens_of(crew.heard, handle) for handle in wanted} == wanted
    assert 3 <= num_crashes <= 2 + math.ceil(math.log2(7)) + 2


def test_suspects_that_wait_in_vain_for_a_worker_get_another_groups_to_themselves(crews: Any) -> None:
    crew = crews(core=CoreConfig(max_batch_rows=8, max_step_tokens=64, max_crashes=1), trial_patience_s=0.5)
    wanted = {handle: crew.undisturbed(prompt(handle), 20) for handle in range(1, 5)}
    for handle in range(1, 5):
        crew.frontend.send(request(handle, prompt(handle), 20))
    crew.run_until(2, 1, 2, 3, 4)
    crew.workers.pop(1).close()
    assert eventually(lambda: "run by themselves now" in crew.engine.log()), crew.engine.log()
    assert sorted(crew.groups().values()) == [0, 0, 1, 1], "suspects do not run beside others"
    crew.finish()
    assert "group 0 makes way" in crew.engine.log()
    assert set(crew.ends(4).values()) == {EndReason.LENGTH}
    assert {handle: tokens_of(crew.heard, handle) for handle in wanted} == wanted


def test_a_result_for_another_group_counts_for_nothing(crews: Any) -> None:
    crew = crews(worker_timeout_s=1.0)
    crew.frontend.send(request(1, prompt(1), 4))
    crew.frontend.send(request(2, prompt(2), 4))
    plan = crew.workers[1].receive()
    assert isinstance(plan, StepPlan) and plan.header.group == 1
    forged = StepResult(ResultHeader(0, 1, 0, 1), np.array([7], np.int32), np.array([0], np.uint16))
    crew.workers[1].send(forged)
    crew.workers[1].executor.submit(plan, crew.workers[1]._deliver)
    crew.finish()
    assert crew.ends(2) == {1: EndReason.LENGTH, 2: EndReason.LENGTH}
    assert "dropped a result of group 0" in crew.engine.log() and [worker.epoch for worker in crew.workers] == [1, 1]


def test_another_model_gets_no_group(crews: Any) -> None:
    crew = crews(1)
    other = Dealer(crew.engine, crew.engine.workers)
    other.send(WorkerHello(0, msgspec.structs.replace(FACTS, vocab_size=999)))
    assert other.receive() == Retired("its vocab_size is 999, and 1000 is served")


def test_a_request_that_no_core_can_take_ends_and_keeps_nobody_waiting(crews: Any) -> None:
    crew = crews(sabotage="from scheduler.core import Core\nCore.take = lambda *_: 1 // 0")
    for handle in (1, 2):
        crew.frontend.send(windowed(handle, 12))
    assert crew.groups() == {"request-1": 0, "request-2": 1}
    crew.workers.pop(1).close()
    assert crew.ends(2) == {1: EndReason.ERROR, 2: EndReason.ERROR}
    crew.frontend.send(request(3, prompt(3), 4))
    crew.finish()
    assert crew.ends(3)[3] is EndReason.LENGTH and "Traceback" in crew.engine.log()


SABOTAGED = """
from scheduler.core import Core
plan = Core.plan
def sabotaged(core, now):
    assert core.config.group != 1 or core.counters.output_tokens < 1 or core.epoch > 1, "sabotage"
    return plan(core, now)
Core.plan = sabotaged
"""


def test_the_failure_of_one_core_is_nothing_to_the_others(crews: Any) -> None:
    crew = crews(sabotage=SABOTAGED)
    for handle in (1, 2, 3):
        crew.frontend.send(windowed(handle, 12))
    assert crew.groups() == {"request-1": 0, "request-2": 1, "request-3": 0}
    crew.finish()
    assert crew.ends(3) == {1: EndReason.LENGTH, 2: EndReason.ERROR, 3: EndReason.LENGTH}
    for handle, is_known in ((1, True), (2, False), (3, True)):
        crew.frontend.send(ResumeQuery(4, f"request-{handle}", 50))
        assert crew.hear(ResumeReply).header.is_known is is_known
    assert [worker.epoch for worker in crew.workers] == [1, 2]


# ------------------------------------------------------------------------------------------- what concerns one or all


def windowed(handle: int, max_tokens: int) -> AddRequest:
    header = AddHeader(handle, f"request-{handle}", 0, 2, max_tokens, GREEDY, resume_window_ms=60_000)
    return AddRequest(header, np.array(prompt(handle), np.int32))


def test_credit_cancel_and_resume_find_the_group(crews: Any) -> None:
    crew = crews(core=CoreConfig(max_batch_rows=8, max_step_tokens=64, max_unread_tokens=4))
    for handle in (1, 2, 3, 4):
        crew.frontend.send(windowed(handle, 8))
    assert sorted(crew.groups().values()) == [0, 0, 1, 1]
    crew.run_until(4, 1, 2, 3, 4)
    assert all(worker.step(50) is None for worker in crew.workers), "nobody reads"
    crew.frontend.send(Credit(num_tokens=np.array([4, 4], np.int32), handles=np.array([1, 2], np.uint32)))
    crew.run_until(8, 1, 2)
    assert crew.ends(2) == {1: EndReason.LENGTH, 2: EndReason.LENGTH}
    assert [len(tokens_of(crew.heard, handle)) for handle in (3, 4)] == [4, 4]
    other = Dealer(crew.engine, crew.engine.frontends)
    for handle in (3, 4):
        crew.frontend.send(AbortRequest(handle))
        crew.groups()
        other.send(ResumeQuery(9, f"request-{handle}", 100 * handle))
        reply = other.until(lambda message: isinstance(message, ResumeReply))[-1]
        assert isinstance(reply, ResumeReply) and reply.tokens.tolist() == tokens_of(crew.heard, handle)
    crew.workers.pop(1).close()
    crew.finish()
    got: list[Message] = []
    while len(ended(got)) < 2:
        got += other.until(is_end)
    assert all(len(tokens_of(got, handle)) == 4 for handle in (300, 400))
    outcomes = []
    for request_id in ("request-1", "request-3", "nobody"):
        crew.frontend.send(CancelQuery(3, request_id))
        outcomes.append(crew.hear(CancelReply).outcome)
    crew.frontend.send(windowed(5, 100))
    crew.frontend.send(CancelQuery(3, "request-5"))
    outcomes.append(crew.hear(CancelReply).outcome)
    assert outcomes == [*[CancelOutcome.ALREADY_FINISHED] * 2, CancelOutcome.NOT_FOUND, CancelOutcome.CANCELLED]


def test_questions_are_answered_for_all_groups_or_the_one_that_knows(crews: Any) -> None:
    crew = crews(metrics=True)
    crew.frontend.send(WatchSteps(True))
    crew.frontend.send(request(1, prompt(1), 5))
    crew.frontend.send(request(2, prompt(2), 5))
    crew.frontend.send(ExplainQuery(4, "request-2"))
    explained = crew.hear(ExplainReply).explanation
    assert explained is not None and explained.group == 1
    for worker in crew.workers:
        worker.step()
    for group in (0, 1):
        crew.frontend.send(BlockTablesQuery(5, group))
        header = crew.hear(BlockTablesReply).header
        assert header.group == group and [table.request_id for table in header.tables] == [f"request-{group + 1}"]
    crew.finish()
    crew.ends(2)
    crew.frontend.send(MetricsQuery(6))
    metrics = crew.hear(MetricsReply)
    steps = [group.load.steps for group in metrics.groups]
    assert min(steps) >= 5 and metrics.load.steps == sum(steps) == sum(metrics.step_tokens.counts)
    assert [(group.group, group.has_worker) for group in metrics.groups] == [(0, True), (1, True)]
    records = [message for message in crew.heard if isinstance(message, StepRecord)]
    assert {record.group for record in records} == {0, 1}
    facts = [message for message in crew.heard if isinstance(message, Facts)]
    assert not facts or [group for group, _, _ in facts[-1].workers] == [0, 1]


def test_policy_and_draining_are_for_all(crews: Any) -> None:
    crew = crews(1, drain_timeout_s=60.0)
    crew.frontend.send(SetPolicyQuery(5, "prefill_first"))
    assert crew.hear(SetPolicyReply).policy == "prefill_first"
    crew.workers.append(crew.start())
    crew.frontend.send(WatchSteps(True))
    for handle in (1, 2):
        crew.frontend.send(request(handle, prompt(handle), 6))
    for worker in crew.workers:
        worker.step()
    crew.engine.process.terminate()
    while not crew.hear(Facts).draining:
        pass
    crew.frontend.send(request(3, prompt(3), 6))
    assert crew.hear(Refused).code == "UNAVAILABLE"
    third = Dealer(crew.engine, crew.engine.workers)
    third.send(WorkerHello(0, FACTS))
    while crew.engine.process.poll() is None:
        for worker in crew.workers:
            worker.step(20)
    assert crew.ends(2) == {1: EndReason.LENGTH, 2: EndReason.LENGTH}
    records = [message for message in crew.heard if isinstance(message, StepRecord)]
    assert {(record.group, record.policy) for record in records} == {(0, "prefill_first"), (1, "prefill_first")}
    assert crew.engine.process.wait(20) == 0


def test_the_worker_of_the_group_that_was_named_is_replaced(crews: Any) -> None:
    crew = crews(control=True)
    crew.frontend.send(ReplaceQuery(9, "sim", 7))
    assert crew.hear(ReplaceReply).error == "there is no worker to replace"
    crew.frontend.send(ReplaceQuery(9, "sim", 1))
    words(crew.engine, "replace sim")
    new = crew.start(msgspec.structs.replace(FACTS, pid=4712), replaces=True, waits=False)
    assert crew.hear(ReplaceReply) == ReplaceReply(9, 2, 4712)
    new.welcome()
    assert (new.group, new.epoch) == (1, 2) and isinstance(crew.workers[1].receive(), Retired)


def test_what_a_journal_holds_is_spread_over_the_workers_that_come(crews: Any, tmp_path: Path) -> None:
    options = {"journal": str(tmp_path / "journal"), "journal_model": "m", "core": CoreConfig(max_batch_rows=2)}
    (tmp_path / "journal").mkdir()
    crew = crews(**options)
    for handle in range(1, 9):
        crew.frontend.send(windowed(handle, 12))
    crew.run_until(1, 1, 2, 3, 4)
    crew.engine.process.kill()
    had = {handle: tokens_of(crew.heard, handle) for handle in range(1, 9)}
    again = crews(**options)
    assert "restored 8 requests" in again.engine.log()
    assert sorted(again.groups().values()).count(1) >= 2
    again.finish()
    for handle in range(1, 9):
        again.frontend.send(ResumeQuery(handle, f"request-{handle}", 100 * handle))
        reply = again.hear(ResumeReply)
        assert reply.header.is_known and len(reply.tokens) == 12
        assert reply.tokens[: len(had[handle])].tolist() == had[handle]


def test_each_group_has_a_recording_that_replays(crews: Any, tmp_path: Path) -> None:
    path = tmp_path / "file.rec"
    crew = crews(record=path)
    for handle in range(1, 7):
        crew.frontend.send(hashed(handle, prompt(handle), 12))
    crew.run_until(3, 1, 2, 3, 4, 5, 6)
    crew.workers.pop(0).close()
    crew.finish()
    assert set(crew.ends(6).values()) == {EndReason.LENGTH}
    assert crew.engine.terminate() == 0
    for file, group in ((path, 0), (tmp_path / "file.rec.group1", 1)):
        recording = Recording(file)
        report = Replay(recording.header).run(recording.events())
        assert report.same and report.steps > 0 and recording.header.core.group == group, report


def test_tokens_of_one_step_are_one_message_for_each_group(crews: Any) -> None:
    crew = crews()
    for handle in (1, 2):
        crew.frontend.send(request(handle, prompt(handle), 3))
    crew.finish()
    crew.ends(2)
    batches = [message for message in crew.heard if isinstance(message, TokenBatch)]
    assert sorted(len(tokens_of(crew.heard, handle)) for handle in (1, 2)) == [3, 3] and len(batches) <= 6
