"""Why a request waits and where its time went: each reason, its numbers, its sentence; and that asking changes nothing."""

from __future__ import annotations

import random

import numpy as np
import pytest

from scheduler.core import Core, CoreConfig
from scheduler.core.config import TenantLimits
from scheduler.core.explain import explain
from scheduler.core.observe import MOST_LISTED, block_tables, list_requests
from tests.helpers.churn import MS, POLICIES, Churn
from tests.helpers.core_driver import CoreDriver
from tests.helpers.fake_worker import GREEDY, worker_facts
from wire import AddHeader, AddRequest, Explanation, Hindrance, ListReply, StepPlan, encode

BATCH, NORMAL, INTERACTIVE = 1, 2, 3


def driver(
    *, rows: int = 8, budget: int = 32, num_blocks: int = 64, num_host_blocks: int = 0, tick: int = 10, **config: object
) -> CoreDriver:
    facts = worker_facts(
        num_blocks=num_blocks, block_size=4, max_batch_rows=rows, num_host_blocks=num_host_blocks, swap_block_ns=1
    )
    settings = CoreConfig(max_batch_rows=rows, max_step_tokens=budget, **config)  # type: ignore[arg-type]
    return CoreDriver(settings, facts, tick=tick)


def why(core: CoreDriver, request_id: str) -> Explanation:
    explanation = explain(core.core, request_id, core.now)
    assert explanation is not None and explanation.now_ns == core.now and explanation.request_id == request_id
    return explanation


def numbers(explanation: Explanation) -> tuple[int, int, int, int]:
    """(rank, rows missing, blocks missing, blocks needed)."""
    return explanation.rank, explanation.missing_rows, explanation.missing_blocks, explanation.needed_blocks


def two_ends(core: CoreDriver, gap: int) -> None:
    """Two requests end, `gap` nanoseconds apart: from now on ends have a rate."""
    for _ in range(2):
        request = core.accepted([1], 1)
        core.now += gap - 2 * core.tick
        core.cancel(request.request_id)


# ------------------------------------------------------------------------------------------------- each hindrance


def test_an_unknown_id_is_not_explained() -> None:
    core = driver()
    core.accepted([1], 1, request_id="a")
    assert explain(core.core, "b", 0) is None and explain(core.core, "", 0) is None
    core.finish()


def test_none_it_is_running() -> None:
    core = driver()
    core.accepted([1, 2, 3], 9, request_id="a", tenant="t", priority=INTERACTIVE)
    core.step(), core.step()
    answer = why(core, "a")
    assert (answer.hindrance, answer.state, numbers(answer)) == (Hindrance.NONE, "running", (0, 0, 0, 0))
    assert (answer.tenant, answer.priority, answer.arrival_ns) == ("t", INTERACTIVE, 20)
    assert (answer.num_prompt_tokens, answer.num_output_tokens, answer.num_computed_tokens) == (3, 2, 4)
    assert answer.predicted_start_ns == 30, "when it was admitted"
    assert answer.text == "Running: 4 tokens computed, 2 put out." and answer.end_reason == ""
    core.finish()


def test_order_says_how_many_go_first() -> None:
    core = driver(rows=1)
    for name in "abcd":
        core.accepted([1, 2, 3, 4, 5], 9, request_id=name)
    core.step()
    assert [(why(core, name).hindrance, numbers(why(core, name))) for name in "bcd"] == [
        (Hindrance.ROWS, (0, 1, 0, 2)),
        (Hindrance.ORDER, (1, 0, 0, 2)),
        (Hindrance.ORDER, (2, 0, 0, 2)),
    ]
    assert why(core, "d").text == "Waiting: 2 go first."
    assert (why(core, "d").state, why(core, "d").num_computed_tokens) == ("waiting", 0)
    core.finish()


def test_order_of_a_request_that_has_not_been_tried_yet() -> None:
    core = driver()
    core.accepted([1, 2, 3], 9, request_id="a")
    answer = why(core, "a")
    assert (answer.hindrance, numbers(answer), answer.text) == (Hindrance.ORDER, (0, 0, 0, 1), "Waiting: it is next.")
    core.finish()


def test_order_counts_higher_classes_and_those_that_come_back() -> None:
    core = driver(rows=1)
    core.accepted([1], 9, request_id="running")
    core.step()
    for name, priority in [("b", BATCH), ("n", NORMAL), ("i", INTERACTIVE), ("b2", BATCH)]:
        core.accepted([1], 9, request_id=name, priority=priority)
    assert [why(core, name).rank for name in ("i", "n", "b", "b2")] == [0, 1, 2, 3]
    core.lost(), core.joined()
    assert [why(core, name).rank for name in ("i", "running", "n", "b", "b2")] == [0, 1, 2, 3, 4]
    core.finish()


def test_a_tenant_that_begins_to_compete_gets_no_credit_for_the_time_before() -> None:
    core = driver(rows=1)
    core.accepted([1] * 8, 9, request_id="first", tenant="greedy")
    core.step()
    core.accepted([1, 2], 9, request_id="second", tenant="greedy")
    core.accepted([1, 2], 9, request_id="other", tenant="modest")
    assert (why(core, "second").rank, why(core, "other").rank) == (0, 1)
    answer = why(core, "other")
    assert (answer.tenant_tokens, answer.least_tenant_tokens) == (10, 10) and answer.text == "Waiting: 1 go first."
    core.finish()


def test_the_share_is_told_in_weighted_tokens() -> None:
    core = driver(rows=1)
    for tenant in ("greedy", "modest"):  # both compete from the start
        for i in range(2):
            core.accepted([1] * 8, 9, request_id=f"{tenant}{i}", tenant=tenant)
    core.step()
    answer = why(core, "greedy1")
    assert (answer.tenant_tokens, answer.least_tenant_tokens) == (8 + 2, 0), "8 of the prompt, one output that counts twice"
    assert answer.text == ("Waiting: 2 go first; tenant 'greedy' was served 10 weighted tokens, the next one's 0.")
    assert why(core, "modest1").text == "Waiting: 1 go first."
    core.finish()


def test_rows() -> None:
    core = driver(rows=2)
    for name in "abc":
        core.accepted([1, 2], 9, request_id=name)
    core.step()
    answer = why(core, "c")
    assert (answer.hindrance, numbers(answer)) == (Hindrance.ROWS, (0, 1, 0, 1))
    assert answer.text == "Waiting: it is next, and no row of the batch is free."
    core.finish()


def test_blocks() -> None:
    core = driver(num_blocks=8)
    core.accepted(range(16), 4, request_id="running")
    core.accepted(range(20, 40), 4, request_id="large")
    core.accepted([1], 4, request_id="small")
    core.plan()
    answer = why(core, "large")
    assert (answer.hindrance, numbers(answer)) == (Hindrance.BLOCKS, (0, 0, 2, 5)), "5 and 1 spare wanted, 4 are there"
    assert answer.text == "Waiting: it is next, needs 5 blocks, and 2 too few are free."
    assert (why(core, "small").hindrance, why(core, "small").rank) == (Hindrance.ORDER, 1)
    core.finish()


def test_blocks_found_in_the_prefix_cache_are_not_needed() -> None:
    core = driver(num_blocks=8)
    core.accepted(range(16), 4, request_id="running", salt="")
    core.step()
    core.accepted([*range(16), *range(50, 61)], 4, request_id="alike", salt="")
    core.plan()
    answer = why(core, "alike")
    assert (answer.hindrance, numbers(answer)) == (Hindrance.BLOCKS, (0, 0, 1, 3)), "4 of its 7 are shared; 3 and 1 spare"
    core.finish()


def test_quota() -> None:
    limits = (TenantLimits("t", max_blocks=4), TenantLimits("*"))
    core = driver(tenants=limits)
    core.accepted(range(10), 3, request_id="a", tenant="t")
    core.accepted(range(10), 3, request_id="b", tenant="t")
    core.accepted(range(10), 3, request_id="c", tenant="else")
    assert list(core.next_rows()) == ["a", "c"]
    answer = why(core, "b")
    assert (answer.hindrance, answer.missing_blocks, answer.needed_blocks) == (Hindrance.QUOTA, 2, 3), "3 + 3 of 4"
    assert answer.text == "Waiting: tenant 't' is at its quota: 2 blocks of it must come back first."
    core.finish()


def test_reader_of_a_row_that_stands_still() -> None:
    core = driver(max_unread_tokens=2)
    request = core.accepted([1, 2], 9, request_id="a")
    for _ in range(2):
        assert why(core, "a").hindrance in (Hindrance.ORDER, Hindrance.NONE)
        core.step()
    answer = why(core, "a")
    assert (answer.hindrance, answer.state, numbers(answer)) == (Hindrance.READER, "running", (0, 0, 0, 0))
    assert answer.text == "Running: its reader does not take the tokens that there are."
    core.credit((request, 1))
    assert why(core, "a").hindrance is Hindrance.NONE
    core.finish()


def test_reader_of_a_request_that_was_put_aside_and_who_took_its_place() -> None:
    core = driver(num_blocks=5, max_unread_tokens=4)
    slow = core.accepted([1, 2, 3], 12, request_id="slow", priority=INTERACTIVE)
    for _ in range(4):
        core.step()
    readers = [core.accepted([5, 6, 7], 12, request_id="a"), core.accepted([8, 9, 10], 12, request_id="b")]
    for _ in range(3):
        core.step()
        core.credit(*[(reader, 1) for reader in readers])
    answer = why(core, "slow")
    assert (answer.hindrance, answer.state) == (Hindrance.READER, "preempted")
    assert [(each.by_request_id, each.lost_tokens, each.swapped) for each in answer.preemptions] == [("b", 6, False)]
    assert answer.text == (
        "Preempted: its reader does not take the tokens that there are. Preempted for 'b', gave up 6 tokens."
    )
    assert answer.predicted_start_ns == 30, "it had started long ago"
    core.credit((slow, 4))
    assert why(core, "slow").hindrance is Hindrance.ORDER
    core.finish()


def test_sibling() -> None:
    core = driver(budget=4)
    core.accepted(range(10), 3, request_id="a", num_outputs=2)
    core.plan()
    answer = why(core, "a")
    assert (answer.hindrance, answer.state) == (Hindrance.SIBLING, "waiting"), "the output furthest from computing"
    assert answer.text == (
        "Waiting: its first output computes the prompt that they share. (This is output_index 1 of 2 outputs, 2 of them alive.)"
    )
    core.plan()
    assert why(core, "a").hindrance is Hindrance.SIBLING
    core.answer()
    core.plan()
    assert why(core, "a").hindrance is Hindrance.ORDER, "the prompt is planned to its end"
    core.finish()


def test_worker_for_those_that_waited_and_those_that_ran() -> None:
    core = driver(rows=1)
    core.accepted([1, 2], 9, request_id="a")
    core.accepted([1, 2], 9, request_id="b")
    core.step()
    core.lost()
    assert (why(core, "a").hindrance, why(core, "a").state) == (Hindrance.WORKER, "preempted")
    assert (why(core, "b").hindrance, why(core, "b").rank) == (Hindrance.WORKER, 1)
    assert why(core, "b").text == "Waiting: no worker is connected."
    assert why(core, "a").text == "Preempted: no worker is connected. Preempted as the worker was lost, gave up 2 tokens."
    core.joined()
    assert why(core, "a").hindrance is Hindrance.ORDER
    core.finish()


def test_policy_in_the_midst_of_a_static_batch() -> None:
    core = driver(policy="static")
    core.accepted([1, 2], 9, request_id="a")
    core.plan()
    core.accepted([3, 4], 9, request_id="b")
    core.plan()
    answer = why(core, "b")
    assert (answer.hindrance, answer.rank) == (Hindrance.POLICY, 0)
    assert answer.text == "Waiting: the batch takes nobody before all of it has ended."
    assert why(core, "a").hindrance is Hindrance.NONE
    core.finish()


def test_of_several_outputs_the_tokens_are_summed_and_the_slowest_speaks() -> None:
    core = driver(rows=2)
    core.accepted([1, 2, 3], 6, request_id="a", num_outputs=3)
    for _ in range(3):
        core.step()
    answer = why(core, "a")
    assert answer.num_output_tokens == 3 + 2 and answer.hindrance is Hindrance.ROWS and answer.state == "waiting"
    core.finish()


# --------------------------------------------------------------------------------------------- when it should start


def test_the_start_is_not_predicted_before_a_rate_is_known() -> None:
    core = driver(rows=1)
    core.accepted([1], 9)
    core.step()
    core.accepted([1], 9, request_id="a")
    assert why(core, "a").predicted_start_ns == -1 and "start in" not in why(core, "a").text
    core.finish()


def test_the_start_is_predicted_by_rank_and_by_how_often_requests_end() -> None:
    core = driver(rows=1)
    two_ends(core, 30 * MS)
    core.accepted([1], 9)
    core.step()
    for name in "abc":
        core.accepted([1], 9, request_id=name)
    assert [why(core, name).predicted_start_ns - core.now for name in "abc"] == pytest.approx(
        [30 * MS, 60 * MS, 90 * MS], rel=1e-6
    )
    assert why(core, "c").text == "Waiting: 2 go first. It should start in about 90 ms."
    core.finish()


# ------------------------------------------------------------------------------------------------------ afterwards


def test_after_the_end_the_time_is_told_by_its_parts() -> None:
    core = driver(rows=1, tick=1 * MS)
    core.accepted([1], 1, request_id="before")
    core.accepted([1, 2, 3], 3, request_id="a")
    core.now += 5 * MS
    core.step()
    admitted_at_least = core.now
    core.now += 7 * MS
    core.plan()
    admitted = core.now
    core.now += 3 * MS
    core.answer()
    first = core.now
    core.finish()
    answer = why(core, "a")
    assert (answer.state, answer.hindrance, answer.end_reason, numbers(answer)) == ("ended", Hindrance.NONE, "length", (0,) * 4)
    assert answer.stats.queued_ns == admitted - answer.arrival_ns and admitted > admitted_at_least
    assert answer.stats.prefill_ns == first - admitted == 4 * MS
    assert answer.text == (
        f"Ended (length): queued {answer.stats.queued_ns // MS} ms, prefill 4 ms, "
        f"decode {answer.stats.decode_ns // MS} ms, preempted 0 ms; 0 of 3 prompt tokens came from the prefix cache."
    )
    assert answer.stats.decode_ns > 0 and why(core, "a") == answer
    core.now += 100 * MS
    assert why(core, "a").stats == answer.stats, "the end stops its clocks"


def test_the_parts_of_a_preempted_requests_time_add_up_to_the_whole() -> None:
    core = driver(num_blocks=3, tick=1 * MS)
    core.accepted([1, 2, 3], 9, request_id="a")
    core.accepted([5, 6, 7], 9, request_id="b")
    core.finish()
    for request in core.requests:
        answer = why(core, request.request_id)
        stats = answer.stats
        parts = stats.queued_ns + stats.prefill_ns + stats.decode_ns + stats.preempted_ns
        found = core.core.request(request.request_id)
        assert found is not None
        assert parts == found.sequences[0].ended_ns - answer.arrival_ns
    assert why(core, "b").stats.preempted_ns > 0 and why(core, "a").stats.preempted_ns == 0 and why(core, "a").preemptions == ()


def test_who_was_preempted_is_told_when_and_what_it_lost() -> None:
    core = driver(num_blocks=3)
    core.accepted([5, 6, 7], 9, request_id="low", priority=BATCH)
    core.accepted([1, 2, 3], 9, request_id="high", priority=INTERACTIVE)
    core.next_rows(), core.next_rows()
    core.answer()
    assert core.next_rows() == {"high": 1}
    found = [(each.at_ns, each.lost_tokens, each.swapped) for each in why(core, "low").preemptions]
    assert found == [(core.now, 4, False)] and why(core, "high").preemptions == ()
    core.finish()


def test_a_higher_class_that_takes_the_row_is_named() -> None:
    core = driver(rows=1)
    core.accepted([1, 2, 3], 9, request_id="low", priority=BATCH)
    core.step(), core.step()
    core.accepted([4], 2, request_id="high", priority=INTERACTIVE)
    core.step()
    answer = why(core, "low")
    assert [(each.by_request_id, each.lost_tokens, each.swapped) for each in answer.preemptions] == [("high", 4, False)]
    assert (answer.state, answer.num_output_tokens) == ("preempted", 2)
    core.finish()
    text = why(core, "low").text
    assert text.startswith("Ended (length): ") and text.endswith(" Preempted for 'high', gave up 4 tokens.")


def test_a_swapped_one_says_so() -> None:
    core = driver(rows=1, num_host_blocks=8)
    core.accepted([1, 2], 2)
    core.finish()  # what a step costs is known now
    core.accepted([1, 2, 3], 9, request_id="low", priority=BATCH)
    core.step(), core.step()
    core.accepted([4], 2, request_id="high", priority=INTERACTIVE)
    core.step()
    answer = why(core, "low")
    assert [(each.by_request_id, each.lost_tokens, each.swapped) for each in answer.preemptions] == [("high", 4, True)]
    assert answer.text.endswith(" Preempted for 'high', swapped out 4 tokens.")
    core.finish()


@pytest.mark.parametrize(("how", "reason"), [("cancel", "cancelled"), ("truncate", "stop"), ("deadline", "deadline")])
def test_the_reason_of_the_end_is_told(how: str, reason: str) -> None:
    core = driver()
    request = core.accepted([1, 2], 9, request_id="a", deadline_ns=5 * MS if how == "deadline" else 0)
    core.step()
    match how:
        case "cancel":
            core.cancel("a")
        case "truncate":
            core.truncate(request, 1)
        case "deadline":
            core.now = 5 * MS
            core.plan()
    answer = why(core, "a")
    assert (answer.state, answer.end_reason) == ("ended", reason) and answer.text.startswith(f"Ended ({reason}): ")


def test_a_hit_in_the_prefix_cache_is_told_at_the_end() -> None:
    core = driver()
    for name in "ab":
        core.accepted(range(10), 2, request_id=name, salt="")
        core.finish()
    assert why(core, "b").text.endswith("; 8 of 10 prompt tokens came from the prefix cache.")


def test_the_oldest_of_the_ended_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scheduler.core.core._REMEMBERED_IDS", 2)
    core = driver()
    for name in "abc":
        core.accepted([1], 1, request_id=name)
        core.finish()
    assert explain(core.core, "a", core.now) is None
    assert why(core, "b").state == why(core, "c").state == "ended"


# ---------------------------------------------------------------------------------------------- asking changes nothing


class Planned(Churn):
    """Keeps the bytes of all plans."""

    def __init__(self, core: Core, seed: int) -> None:
        self.plans: list[bytes] = []
        plan = core.plan

        def kept(now: int) -> StepPlan | None:
            made = plan(now)
            self.plans.append(b"".join(map(bytes, encode(made))) if made is not None else b"")
            return made

        core.plan = kept  # type: ignore[method-assign]
        super().__init__(core, seed)  # type: ignore[arg-type]


class Curious(Planned):
    """Asks everything about everybody, before each input."""

    num_asked = 0

    def ask(self) -> None:
        core = self.core
        assert isinstance(core, Core)
        for number in range(max(0, self.num_added - 12), self.num_added + 1):
            first, second = (explain(core, f"r{number}", self.now) for _ in range(2))
            assert first == second, "the same question has the same answer"
            self.num_asked += first is not None
        list_requests(core, 0, 0, 5)
        block_tables(core, 0)


def config(seed: int) -> CoreConfig:
    limits = (TenantLimits("a", weight=2, max_blocks=12), TenantLimits("*"))
    return CoreConfig(
        policy=POLICIES[seed % len(POLICIES)], max_batch_rows=6, max_step_tokens=24, max_unread_tokens=8, tenants=limits
    )


@pytest.mark.parametrize("seed", range(6))
def test_plans_are_the_same_bytes_whether_anybody_asks_or_not(seed: int) -> None:
    silent, curious = Planned(Core(config(seed)), seed), Curious(Core(config(seed)), seed)
    for churn in (silent, curious):
        churn.run(400)
        churn.finish()
    assert silent.plans == curious.plans and sum(map(bool, silent.plans)) > 50
    assert curious.num_asked > 300


# ------------------------------------------------------------------------------------------------------------- pages


def ids(reply: ListReply) -> list[str]:
    return [request.request_id for request in reply.requests]


def pages(core: Core, limit: int) -> list[list[str]]:
    found, after = [], 0
    while True:
        reply = list_requests(core, 7, after, limit)
        assert reply.query_id == 7
        found.append(ids(reply))
        if not reply.next:
            return found
        assert reply.next > after
        after = reply.next


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(2, ["ab", "cd", "e"]), (5, ["abcde"]), (4, ["abcd", "e"]), (100, ["abcde"]), (1, [*"abcde"]), (0, [*"abcde"])],
)
def test_pages_go_by_arrival_and_the_last_one_says_so(limit: int, expected: list[str]) -> None:
    core = driver(rows=2)
    for name, priority in zip("abcde", (BATCH, INTERACTIVE, NORMAL, BATCH, INTERACTIVE), strict=True):
        core.accepted([1, 2], 9, request_id=name, priority=priority)
    core.step()
    assert ["".join(page) for page in pages(core.core, limit)] == expected
    core.finish()
    assert pages(core.core, limit) == [[]]


def test_a_page_is_never_longer_than_a_thousand() -> None:
    core = driver().core
    assert list_requests(core, 0, 0, 10**6).requests == ()
    for number in range(MOST_LISTED + 1):
        header = AddHeader(number, f"r{number}", 0, NORMAL, 1, GREEDY)
        assert core.add(AddRequest(header, np.array([1], np.int32)), 0, 0) is None
    reply = list_requests(core, 0, 0, 10**6)
    assert (len(reply.requests), reply.next, reply.total) == (MOST_LISTED, MOST_LISTED, MOST_LISTED + 1)
    assert ids(list_requests(core, 0, reply.next, 10**6)) == [f"r{MOST_LISTED}"]


@pytest.mark.parametrize("seed", range(5))
def test_pages_cover_all_that_stay_exactly_once_while_others_come_and_go(seed: int) -> None:
    rng, core = random.Random(seed), driver(rows=4, num_blocks=200)
    for i in range(40):
        core.accepted([1 + i], 60, request_id=f"s{i}" if rng.random() < 0.5 else f"t{i}")
    stay = [request.request_id for request in core.requests if request.request_id.startswith("s")]
    seen: list[str] = []
    after, num_new = 0, 0
    while True:
        reply = list_requests(core.core, 0, after, 5)
        assert reply.total == core.core.num_requests
        seen += ids(reply)
        if not reply.next:
            break
        after = reply.next
        for _ in range(3):  # some go, before and after where the page ended; some come
            going = [each.request_id for each in core._alive() if not each.request_id.startswith("s")]
            if going and rng.random() < 0.7:
                core.cancel(rng.choice(going))
            if num_new < 12:
                core.accepted([1], 60, request_id=f"n{num_new}")
                num_new += 1
        core.turn()
    assert len(set(seen)) == len(seen), "nobody twice"
    assert [name for name in seen if name.startswith("s")] == stay, "all that stayed, by arrival"
    assert set(seen) >= {each.request_id for each in core._alive()}, "who came meanwhile comes at the end"
    core.finish()


def test_a_line_of_the_list_tells_state_tokens_and_blocks() -> None:
    core = driver(rows=2)
    core.accepted(range(10), 9, request_id="a", tenant="t", priority=INTERACTIVE, num_outputs=2)
    core.step(), core.step()
    core.accepted([1, 2], 9, request_id="b")
    first, second = list_requests(core.core, 0, 0, 10).requests
    assert (first.state, first.tenant, first.priority, first.arrival_ns) == ("running", "t", INTERACTIVE, 20)
    assert (first.num_prompt_tokens, first.num_output_tokens, first.num_outputs, first.held_blocks) == (10, 3, 2, 6)
    assert (second.state, second.num_output_tokens, second.num_outputs, second.held_blocks) == ("waiting", 0, 1, 0)
    core.lost()
    assert [each.state for each in list_requests(core.core, 0, 0, 10).requests] == ["preempted", "waiting"]
    core.finish()


# ------------------------------------------------------------------------------------------------------ block tables


def test_tables_tell_owner_slot_tokens_and_blocks_of_every_row() -> None:
    core = driver(num_blocks=10)
    core.accepted(range(9), 9, request_id="a")
    core.accepted([1, 2], 9, request_id="b")
    core.step()
    reply = block_tables(core.core, 3)
    found = [(each.request_id, each.output_index, each.slot, each.num_tokens, each.blocks) for each in reply.header.tables]
    assert found == [("a", 0, 0, 9, (1, 2, 3)), ("b", 0, 1, 2, (4,))]
    header = reply.header
    assert (header.query_id, header.group, header.block_size, header.num_blocks) == (3, 0, 4, 10)
    assert reply.ref_counts.tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0] and reply.states.tolist() == [1] * 4 + [0] * 6
    core.finish()


def test_a_shared_prefix_is_counted_once_for_each_that_holds_it() -> None:
    core = driver(num_blocks=20)
    for i, name in enumerate("abc"):
        core.accepted([*range(100, 108), i], 9, request_id=name, salt="")
        core.step()
    reply = block_tables(core.core, 0)
    tables = [each.blocks for each in reply.header.tables]
    assert len({table[:2] for table in tables}) == 1 and len({table[2] for table in tables}) == 3
    assert [reply.ref_counts[block - 1] for block in tables[0]] == [3, 3, 1]
    counted = np.bincount([block - 1 for table in tables for block in table], minlength=20)
    assert (counted == reply.ref_counts).all() and int((reply.states == 1).sum()) == core.core.load(0).held_blocks == 5
    core.finish()


def test_states_are_free_held_retiring_and_cached() -> None:
    core = driver(num_blocks=10)
    core.accepted(range(9), 2, request_id="cached", salt="")
    core.finish()
    core.accepted([1, 2], 9, request_id="held")
    core.accepted([3, 4], 9, request_id="gone")
    core.plan()
    core.cancel("gone")
    load, states = core.core.load(0), block_tables(core.core, 0).states
    counts = np.bincount(states, minlength=4).tolist()
    assert counts == [load.free_blocks, load.held_blocks, load.retiring_blocks, load.cached_blocks] == [6, 1, 1, 2]
    assert [each.request_id for each in block_tables(core.core, 0).header.tables] == ["held"]
    core.finish()


def test_host_blocks_of_swapped_requests_are_counted() -> None:
    core = driver(rows=1, num_host_blocks=8)
    core.accepted([1, 2], 2)
    core.finish()
    core.accepted(range(6), 9, request_id="low", priority=BATCH)
    core.step()
    core.accepted([4], 2, request_id="high", priority=INTERACTIVE)
    core.step()
    header = block_tables(core.core, 0).header
    assert (header.num_host_blocks, header.held_host_blocks) == (8, 2)
    assert [each.request_id for each in header.tables] == ["high"]
    core.finish()


def test_what_was_told_does_not_change_with_the_core() -> None:
    core = driver(num_blocks=10)
    core.accepted(range(9), 9, request_id="a")
    core.plan()
    reply = block_tables(core.core, 0)
    before = (reply.ref_counts.tolist(), reply.states.tolist())
    core.cancel("a")
    core.answer()
    assert (reply.ref_counts.tolist(), reply.states.tolist()) == before
    core.finish()


def test_after_the_end_the_tokens_are_still_told() -> None:
    core = driver()
    request = core.accepted([1, 2, 3], 5, request_id="a")
    core.finish()
    answer = why(core, "a")
    assert answer.num_output_tokens == 5 and request.end is not None and answer.stats == request.end.stats


def test_tokens_of_an_output_that_has_ended_still_count() -> None:
    core = driver()
    outputs = core.accepted([1, 2, 3], 9, request_id="a", num_outputs=2).siblings
    for _ in range(4):
        core.step()
    core.truncate(outputs[0], 3)
    core.step()
    assert list_requests(core.core, 0, 0, 9).requests[0].num_output_tokens == 3 + 4 == why(core, "a").num_output_tokens


def test_the_victim_is_told_for_whom_it_went() -> None:
    core = driver(num_blocks=3)
    core.accepted([5, 6, 7], 9, request_id="low", priority=1)
    core.accepted([1, 2, 3], 9, request_id="high", priority=3)
    core.next_rows(), core.next_rows()
    core.answer()
    assert core.next_rows() == {"high": 1}
    assert [each.by_request_id for each in why(core, "low").preemptions] == ["high"]
    core.finish()


@pytest.mark.parametrize("policy", ["prefill_first", "static"])
def test_what_is_needed_counts_the_reservation(policy: str) -> None:
    core = driver(policy=policy, rows=1)
    for name in "abc":
        core.accepted([1, 2], 8, request_id=name)
    core.plan()
    assert [numbers(why(core, name))[3] for name in "bc"] == [3, 3]
    core.finish()


@pytest.mark.parametrize("policy", ["prefill_first", "static"])
def test_a_quota_counts_the_reservation(policy: str) -> None:
    core = driver(policy=policy, tenants=(TenantLimits("t", max_blocks=4), TenantLimits("*")))
    for name in "ab":
        core.accepted([1, 2], 8, request_id=name, tenant="t")
    core.plan()
    answer = why(core, "b")
    assert (answer.hindrance, answer.missing_blocks, answer.needed_blocks) == (Hindrance.QUOTA, 2, 3)
    core.finish()


def test_the_share_of_a_higher_classs_tenant_is_no_reason() -> None:
    core = driver(rows=1)
    core.accepted([1] * 8, 9, request_id="first", tenant="greedy")
    core.accepted([1], 9, request_id="second", tenant="greedy")
    core.step()
    core.accepted([1], 9, request_id="high", tenant="other", priority=3)
    assert why(core, "second").text == "Waiting: 1 go first."
    core.finish()
