"""Another policy while requests run, wait, are swapped out or pad: nobody is lost, every token is the same."""

from __future__ import annotations

import itertools
import random

import pytest

from scheduler.core import CoreConfig
from scheduler.core.explain import explain
from scheduler.core.request import State
from tests.helpers.core_driver import CoreDriver
from tests.helpers.fake_worker import worker_facts
from wire import EndReason, Hindrance

POLICIES = ("continuous", "prefill_first", "static")
PAIRS = list(itertools.permutations(POLICIES, 2))
BATCH, NORMAL, INTERACTIVE = 1, 2, 3


def driver(
    policy: str = "continuous",
    *,
    rows: int = 4,
    budget: int = 16,
    num_blocks: int = 64,
    num_host_blocks: int = 0,
    **config: object,
) -> CoreDriver:
    facts = worker_facts(
        num_blocks=num_blocks, block_size=4, max_batch_rows=rows, num_host_blocks=num_host_blocks, swap_block_ns=1
    )
    settings = CoreConfig(policy=policy, max_batch_rows=rows, max_step_tokens=budget, **config)  # type: ignore[arg-type]
    return CoreDriver(settings, facts)


def states(core: CoreDriver) -> dict[str, str]:
    return {request.request_id: request.sequences[0].state.value for request in core.core.live_requests()}


def answer_all(core: CoreDriver) -> None:
    while core.core.in_flight:
        core.answer()


def all_whole(core: CoreDriver) -> bool:
    return all(request.end is not None and request.end.reason is EndReason.LENGTH for request in core.requests)


# ------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["", "none", "Continuous", "prefill-first", "continuous "])
def test_an_unknown_name_is_answered_with_the_choice_and_changes_nothing(name: str) -> None:
    core = driver("static")
    core.accepted([1, 2], 5, request_id="a")
    core.plan()
    policy = core.core.policy
    error = core.set_policy(name)
    assert error == f"unknown policy {name!r}: choose one of continuous, prefill_first, static"
    assert core.core.policy is policy
    core.finish()


@pytest.mark.parametrize("name", POLICIES)
def test_a_known_name_is_answered_with_nothing_and_is_in_force(name: str) -> None:
    core = driver()
    assert core.set_policy(name) == "" and core.core.policy.name == name


def test_a_core_is_not_made_with_an_unknown_policy() -> None:
    with pytest.raises(ValueError, match="unknown policy 'fifo': choose one of continuous, prefill_first, static"):
        driver("fifo")


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_policy_again_changes_no_plan(policy: str) -> None:
    def rows(again: bool) -> list[dict[str, int]]:
        core, made = driver(policy, rows=3), []
        for i in range(8):
            core.accepted([1 + i] * (1 + i % 3), 2 + i % 4, request_id=f"r{i}")
        while core.core.num_requests:
            if again:
                assert core.set_policy(policy) == ""
            made.append(core.next_rows())
            answer_all(core)
        return made

    assert rows(True) == rows(False)


# --------------------------------------------------------------------------------------------- every pair, all states


@pytest.mark.parametrize("turns", [0, 1, 2, 4, 7])
@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_whoever_runs_waits_or_pads_gets_all_its_tokens_under_the_next_policy(before: str, after: str, turns: int) -> None:
    core = driver(before, num_blocks=12)
    for i in range(9):
        core.accepted([7 * i + j for j in range(1 + 3 * (i % 4))], 2 + 3 * (i % 3), priority=1 + i % 3, salt="")
    for _ in range(turns):
        core.turn()
    core.plan()  # plans are in flight when it changes
    assert core.set_policy(after) == ""
    core.finish()
    assert all_whole(core)


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_a_prompt_that_is_half_computed_is_computed_to_its_end(before: str, after: str) -> None:
    core = driver(before, budget=8)
    core.accepted(range(20), 3, request_id="a")
    assert core.next_rows() == {"a": 8}
    core.set_policy(after)
    assert core.next_rows() == {"a": 8}
    answer_all(core)
    assert core.next_rows() == {"a": 4}
    core.finish()
    assert core.requests[0].end is not None and core.requests[0].end.stats.recomputed_tokens == 0


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_rows_keep_their_slots_and_nothing_is_computed_twice(before: str, after: str) -> None:
    core = driver(before)
    for name in "abc":
        core.accepted([ord(name)] * 3, 9, request_id=name)
    core.step(), core.step()
    slots = core.core.rows.in_order().tolist()
    core.set_policy(after)
    assert core.core.rows.in_order().tolist() == slots and core.core.load(0).held_blocks > 0
    assert core.next_rows() == {"a": 1, "b": 1, "c": 1}
    core.finish()
    counters = core.core.counters
    assert (counters.preemptions, counters.recomputed_tokens) == (0, 0) and all_whole(core)


@pytest.mark.parametrize("after", ["prefill_first", "static"])
@pytest.mark.parametrize("num_host_blocks", [0, 8])
def test_a_preempted_or_swapped_request_comes_back_with_all_its_blocks_reserved(after: str, num_host_blocks: int) -> None:
    core = driver(num_blocks=3, num_host_blocks=num_host_blocks)
    core.accepted([1, 2], 2)
    core.finish()  # what a step costs is known now
    core.accepted([1, 2, 3], 6, request_id="a")
    core.accepted([5, 6, 7], 6, request_id="b")
    while "preempted" not in states(core).values():
        core.turn()
    assert (core.core.load(0).held_host_blocks > 0) == (num_host_blocks > 0)
    core.set_policy(after)
    core.finish()
    assert all_whole(core) and core.core.counters.preemptions == 1
    back = [start for plan in core.plans for start in plan.header.starts][-1]
    assert back.num_blocks == 2 and (back.num_computed_tokens > 0) == (num_host_blocks > 0)
    recomputed = sum(request.end.stats.recomputed_tokens for request in core.requests if request.end is not None)
    assert (recomputed == 0) == (num_host_blocks > 0)


@pytest.mark.parametrize("after", ["prefill_first", "static"])
def test_a_parked_request_stays_aside_and_comes_back_after_credit(after: str) -> None:
    core = driver(num_blocks=5, max_unread_tokens=4)
    slow = core.accepted([1, 2, 3], 12, request_id="slow")
    for _ in range(4):
        core.step()
    others = [core.accepted([5, 6, 7], 9, request_id="a"), core.accepted([8, 9, 10], 9, request_id="b")]
    for _ in range(3):
        core.step()
        core.credit(*[(other, 1) for other in others])
    assert states(core)["slow"] == State.PARKED.value
    core.set_policy(after)
    while not all(other.over for other in others):
        assert core.step() is not None and states(core)["slow"] == State.PARKED.value
        core.credit(*[(other, 1) for other in others if not other.over])
    assert states(core) == {"slow": State.PARKED.value} and core.next_rows() == {}
    core.credit((slow, 4))
    assert core.next_rows() == {"slow": 7}
    core.finish()


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_siblings_that_wait_for_the_prompt_start_under_the_next_policy(before: str, after: str) -> None:
    core = driver(before, budget=4)
    outputs = core.accepted(range(10), 4, num_outputs=3, salt="").siblings
    core.plan()
    core.set_policy(after)
    core.finish()
    assert [output.got for output in outputs] == [output.expected for output in outputs]


@pytest.mark.parametrize("seed", range(6))
def test_a_change_at_every_turn_loses_nobody(seed: int) -> None:
    rng = random.Random(seed)
    core = driver(rng.choice(POLICIES), num_blocks=14, num_host_blocks=6, rows=5)
    for _ in range(30):
        core.accepted(
            [rng.randrange(20) for _ in range(rng.randrange(1, 14))],
            rng.randrange(1, 14),
            priority=rng.randint(1, 3),
            num_outputs=rng.choice([1, 1, 2]),
            salt=rng.choice(["", None]),
        )
        core.set_policy(rng.choice(POLICIES))
        for _ in range(rng.randrange(3)):
            core.turn()
    for _ in range(2000):
        if core.core.is_idle:
            break
        core.set_policy(rng.choice(POLICIES))
        core.turn()
    core.finish()
    assert all_whole(core)


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_it_may_change_while_the_worker_is_away(before: str, after: str) -> None:
    core = driver(before, rows=2)
    for name in "abc":
        core.accepted([1, 2], 4, request_id=name)
    core.step(), core.step()
    core.lost()
    assert core.set_policy(after) == ""
    core.joined()
    assert core.next_rows() == {"a": 4, "b": 4}
    core.finish()
    assert all_whole(core)


# ------------------------------------------------------------------------------------------------- decisions, by id


@pytest.mark.parametrize("after", ["continuous", "prefill_first"])
def test_padding_is_let_go_and_the_waiting_join_at_once(after: str) -> None:
    core = driver("static", rows=2)
    core.accepted([1], 1, request_id="a")
    core.accepted([2], 9, request_id="b")
    core.accepted([3, 4], 9, request_id="c")
    core.step()
    assert core.next_padding() == ["a"]
    held = core.core.load(0).held_blocks
    core.set_policy(after)
    load = core.core.load(0)
    assert (load.held_blocks, load.retiring_blocks) == (held - 1, 1), "step 1 pads with a still"
    plan = core.plan()
    assert plan is not None and (plan.slots.tolist(), plan.padding.tolist(), plan.ended.tolist()) == ([1], [], [0])
    answer_all(core)
    assert set(core.next_rows()) == {"b", "c"}
    core.finish()


def test_under_static_nobody_joins_before_all_that_ran_have_ended() -> None:
    core = driver("continuous", rows=4)
    for name, max_tokens in [("a", 2), ("b", 4)]:
        core.accepted([1, 2], max_tokens, request_id=name)
    core.step()
    core.accepted([3], 3, request_id="c")
    core.accepted([4], 1, request_id="d")
    core.set_policy("static")
    made = []
    while core.core.num_requests:
        made.append(core.next_rows())
        if made[-1] == {"b": 1}:
            assert core.core.in_flight[-1].plan.padding.tolist() == [0], "a pads"
        answer_all(core)
    assert made == [{"a": 1, "b": 1}, {"b": 1}, {"b": 1}, {"c": 1, "d": 1}, {"c": 1}, {"c": 1}]


def test_what_was_admitted_with_few_blocks_grows_on_under_prefill_first_and_new_ones_reserve() -> None:
    core = driver("continuous", num_blocks=6)
    core.accepted([1, 2, 3], 9, request_id="a")
    core.plan()
    core.set_policy("prefill_first")
    core.accepted([4, 5, 6], 9, request_id="b")
    core.finish()
    starts = [(start.sequence_id, start.num_blocks) for plan in core.plans for start in plan.header.starts]
    assert starts == [(0, 1), (1, 3)]
    grown = [slot for plan in core.plans for slot in plan.grow_slots.tolist()]
    assert grown == [0, 0], "a takes its second and its third block when it needs them, b has all"


def test_what_has_reserved_is_preempted_for_nobody_under_continuous() -> None:
    core = driver("prefill_first", num_blocks=5)
    core.accepted([1, 2, 3], 9, request_id="a", priority=BATCH)  # 3 blocks
    core.step()
    core.set_policy("continuous")
    core.accepted([4, 5, 6], 9, request_id="b", priority=INTERACTIVE)
    core.finish()
    ends = [request.end.stats.preemptions for request in core.requests if request.end is not None]
    assert ends[0] == 0 and all_whole(core)


@pytest.mark.parametrize("before", ["prefill_first", "static"])
def test_who_did_not_fit_with_a_reservation_joins_without_one(before: str) -> None:
    core = driver(before, num_blocks=6)
    core.accepted([1, 2, 3], 12, request_id="a")  # 4 blocks
    core.accepted([4, 5, 6], 12, request_id="b")
    assert core.next_rows() == {"a": 3} and core.next_rows() == {"a": 1}
    core.set_policy("continuous")
    core.answer()
    assert core.next_rows() == {"a": 1, "b": 3}
    core.finish()


def test_who_fitted_without_a_reservation_waits_for_one() -> None:
    core = driver("continuous", num_blocks=6)
    core.accepted([1, 2, 3], 12, request_id="a")
    core.step()
    core.set_policy("prefill_first")
    core.accepted([4, 5, 6], 20, request_id="b")  # 6 blocks
    assert core.next_rows() == {"a": 1} and core.next_rows() == {"a": 1}
    core.finish()
    assert all_whole(core)


def test_prefixes_are_shared_under_continuous_only() -> None:
    core, found = driver("continuous"), []
    for policy in ("continuous", "prefill_first", "continuous", "static", "continuous"):
        core.set_policy(policy)
        core.accepted(range(10), 2, salt="")
        core.finish()
        found.append(core.plans[-2].header.starts[0].num_computed_tokens)
    assert found == [0, 0, 8, 0, 8]


def test_it_is_told_why_a_request_waits_by_the_policy_in_force() -> None:
    core = driver("continuous", rows=4)
    core.accepted([1, 2], 9, request_id="a")
    core.plan()
    core.set_policy("static")
    core.accepted([1, 2], 9, request_id="b")
    core.plan()
    answer = explain(core.core, "b", core.now)
    assert answer is not None and answer.hindrance is Hindrance.POLICY
    core.set_policy("continuous")
    answer = explain(core.core, "b", core.now)
    assert answer is not None and answer.hindrance is Hindrance.ORDER
    core.answer()
    assert core.next_rows() == {"a": 1, "b": 2}
    core.finish()
