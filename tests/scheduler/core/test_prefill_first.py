"""The policy prefill_first, decision by decision: a baseline that must be a fair and a true one."""

from __future__ import annotations

import random

import pytest

from scheduler.core import CoreConfig
from scheduler.core.config import TenantLimits
from tests.helpers.core_driver import CoreDriver
from tests.helpers.fake_worker import undisturbed, worker_facts
from wire import EndReason, Refused

BATCH, NORMAL, INTERACTIVE = 1, 2, 3


def driver(*, rows: int = 8, budget: int = 32, num_blocks: int = 64, **config: object) -> CoreDriver:
    settings = CoreConfig(policy="prefill_first", max_batch_rows=rows, max_step_tokens=budget, **config)  # type: ignore[arg-type]
    return CoreDriver(settings, worker_facts(num_blocks=num_blocks, block_size=4, max_batch_rows=rows))


def reserved(core: CoreDriver) -> list[int]:
    """Blocks of every start so far."""
    return [start.num_blocks for plan in core.plans for start in plan.header.starts]


# ------------------------------------------------------------------------------------------------------- who computes


def test_new_prompts_stand_before_everybody_elses_next_token() -> None:
    core = driver()
    core.accepted([1, 2], 9, request_id="a")
    core.accepted([3], 9, request_id="b")
    assert list(core.next_rows().items()) == [("a", 2), ("b", 1)]
    core.answer()
    core.accepted([4, 5, 6], 9, request_id="c")
    assert list(core.next_rows().items()) == [("c", 3), ("a", 1), ("b", 1)]
    core.finish()


def test_requests_join_and_leave_at_every_step() -> None:
    core = driver(rows=2)
    for name, max_tokens in [("a", 2), ("b", 4), ("c", 3), ("d", 1)]:
        core.accepted([1, 2], max_tokens, request_id=name)
    batches: list[str] = []
    while core.core.num_requests:
        batches.append("".join(core.next_rows()))
        core.answer()
    assert batches == ["ab", "ab", "cb", "bc", "dc"]


def test_prompts_that_fill_the_step_hold_up_the_decodes() -> None:
    """What chunking and decode-first avoid: running requests stand still while prompts are computed."""
    core = driver(budget=8)
    core.accepted([1], 9, request_id="a")
    core.step()
    core.accepted(range(8), 9, request_id="b")
    core.accepted(range(10, 18), 9, request_id="c")
    made = []
    for _ in range(3):
        made.append(core.next_rows())
        while core.core.in_flight:
            core.answer()
    assert made == [{"b": 8}, {"c": 8}, {"a": 1, "b": 1, "c": 1}]
    core.finish()


def test_decodes_take_what_the_prompts_leave_by_admission() -> None:
    core = driver(budget=6)
    for name in "abc":
        core.accepted([1], 9, request_id=name)
    core.step()
    core.accepted([2, 3, 4, 5], 9, request_id="d")
    assert list(core.next_rows().items()) == [("d", 4), ("a", 1), ("b", 1)]
    core.answer()
    assert list(core.next_rows().items()) == [("a", 1), ("b", 1), ("c", 1), ("d", 1)]
    core.finish()


def test_a_prompt_of_exactly_the_budget_is_computed_at_once() -> None:
    core = driver(budget=12)
    core.accepted(range(12), 3, request_id="a")
    assert core.next_rows() == {"a": 12}
    core.finish()


def test_prompts_that_fit_together_are_never_cut() -> None:
    """Whole prompts, whatever the order of arrival; each step's prompts fit its budget here."""
    rng, core = random.Random(3), driver(rows=8, budget=64, num_blocks=200)
    lengths = {}
    for i in range(40):
        length = rng.randrange(1, 9)  # 8 rows of at most 8 tokens
        core.accepted([rng.randrange(1000) for _ in range(length)], rng.randrange(1, 12), request_id=f"r{i}")
        lengths[f"r{i}"] = length
        if rng.random() < 0.5:
            core.turn()
    core.finish()
    first = {start.sequence_id: (plan, start.slot) for plan in core.plans for start in plan.header.starts}
    assert len(first) == 40
    for sequence_id, (plan, slot) in first.items():
        takes = dict(zip(plan.slots.tolist(), plan.num_tokens.tolist(), strict=True))
        assert takes[slot] == lengths[core.requests[sequence_id].request_id]


def test_a_prompt_larger_than_any_step_is_computed_in_steps_of_the_whole_budget() -> None:
    core = driver(budget=8)
    core.accepted([1], 9, request_id="a")
    core.step()
    core.accepted(range(20), 9, request_id="long")
    made = []
    for _ in range(4):
        made.append(core.next_rows())
        while core.core.in_flight:
            core.answer()
    assert made == [{"long": 8}, {"long": 8}, {"long": 4, "a": 1}, {"a": 1, "long": 1}]
    core.finish()


def test_the_inter_token_time_is_not_this_policys_business() -> None:
    core = driver(budget=32, target_itl_ns=1)
    core.accepted([1], 20, request_id="a")
    core.step(), core.step()
    core.accepted(range(30), 9, request_id="long")
    assert core.next_rows() == {"long": 30, "a": 1}
    core.finish()


# ------------------------------------------------------------------------------------------------------------ classes


def test_higher_classes_are_admitted_first_and_then_all_are_served_alike() -> None:
    core = driver(rows=3)
    for name, priority in [("b", BATCH), ("n", NORMAL), ("i", INTERACTIVE), ("i2", INTERACTIVE)]:
        core.accepted([1, 2], 9, request_id=name, priority=priority)
    assert list(core.next_rows()) == ["i", "i2", "n"]
    assert list(core.next_rows()) == ["i", "i2", "n"]
    core.cancel("i2")
    core.answer(), core.answer()
    assert list(core.next_rows()) == ["b", "i", "n"]
    core.finish()


def test_a_higher_class_takes_nobodys_row_and_nobodys_blocks() -> None:
    core = driver(rows=1)
    core.accepted([1, 2], 5, request_id="low", priority=BATCH)
    core.step()
    core.accepted([3], 2, request_id="high", priority=INTERACTIVE)
    order: list[str] = []
    while core.core.num_requests:
        order += core.next_rows()
        core.answer()
    assert order == ["low"] * 4 + ["high"] * 2 and core.core.counters.preemptions == 0


# ------------------------------------------------------------------------------------------------------- reservations


@pytest.mark.parametrize(("max_tokens", "blocks"), [(1, 1), (2, 1), (3, 2), (6, 2), (7, 3)])
def test_blocks_for_prompt_and_all_outputs_but_the_last_are_reserved(max_tokens: int, blocks: int) -> None:
    core = driver()
    core.accepted([1, 2, 3], max_tokens)
    core.finish()
    assert reserved(core) == [blocks] and all(len(plan.grow_blocks) == 0 for plan in core.plans)


@pytest.mark.parametrize(("num_blocks", "admitted"), [(5, 2), (6, 3), (7, 3), (8, 4)])
def test_reservations_use_the_pool_to_the_last_block(num_blocks: int, admitted: int) -> None:
    core = driver(num_blocks=num_blocks)
    for _ in range(5):
        core.accepted([1, 2, 3], 6)  # two blocks each
    assert len(core.next_rows()) == admitted
    core.finish()


def test_reserved_blocks_come_back_when_the_request_ends_and_the_next_one_takes_them() -> None:
    core = driver(num_blocks=4)
    core.accepted([1, 2, 3], 2, request_id="a")
    core.accepted([1, 2, 3], 9, request_id="b")
    core.accepted([1, 2, 3], 3, request_id="c")
    assert list(core.next_rows()) == ["a", "b"]
    core.next_rows()
    core.answer()
    assert list(core.next_rows()) == ["b"], "a's block is named by step 1 still, and c wants two"
    core.answer(), core.answer()
    assert core.requests[0].end is not None
    core.finish()
    assert reserved(core) == [1, 3, 2]


def test_the_head_that_finds_no_blocks_is_not_overtaken() -> None:
    core = driver(num_blocks=8)
    core.accepted(range(16), 9, request_id="running")  # 6 blocks
    core.accepted([1, 2, 3], 9, request_id="large")  # 3 blocks
    core.accepted([1], 2, request_id="small")  # 1 block
    assert list(core.next_rows()) == ["running"] and list(core.next_rows()) == ["running"]
    core.finish()
    assert [start.sequence_id for plan in core.plans for start in plan.header.starts] == [0, 1, 2]


def test_nobody_is_ever_preempted_however_small_the_pool() -> None:
    core = driver(num_blocks=8)
    requests = [core.accepted([i], 30, priority=1 + i % 3) for i in range(6)]
    core.finish()
    assert all(request.end is not None and request.end.reason is EndReason.LENGTH for request in requests)
    counters = core.core.counters
    assert (counters.preemptions, counters.recomputed_tokens, counters.swapped_blocks) == (0, 0, 0)


def test_most_of_what_is_reserved_may_stay_unused() -> None:
    expected = undisturbed([1], 9, 1000)
    core = driver()
    request = core.accepted([1], 60, stop=[expected[1]])
    core.plan()
    assert core.core.load(0).held_blocks == 15
    core.finish()
    assert request.got == expected[:2]


def test_a_request_exactly_as_large_as_the_pool_runs_alone() -> None:
    core = driver(num_blocks=4)
    core.accepted(range(10), 7, request_id="a")
    core.accepted([1], 1, request_id="b")
    assert core.next_rows() == {"a": 10}
    core.finish()


def test_a_request_larger_than_the_pool_is_refused_at_arrival() -> None:
    answer = driver(num_blocks=4).add(range(10), 8)
    assert isinstance(answer, Refused) and answer.code == "FAILED_PRECONDITION"


def test_a_quota_counts_what_is_reserved() -> None:
    core = driver(tenants=(TenantLimits("t", max_blocks=4), TenantLimits("*")))
    core.accepted([1, 2], 8, request_id="a", tenant="t")  # 3 blocks
    core.accepted([3, 4], 8, request_id="b", tenant="t")
    core.accepted([5, 6], 8, request_id="c", tenant="else")
    assert list(core.next_rows()) == ["a", "c"]
    core.finish()
    assert [start.sequence_id for plan in core.plans for start in plan.header.starts] == [0, 2, 1]


# ------------------------------------------------------------------------------------------------- outputs, cache, loss


def test_no_block_is_shared_and_every_output_computes_the_prompt() -> None:
    core = driver()
    core.accepted(range(10), 3, num_outputs=3, salt="", request_id="a")
    core.finish()
    core.accepted(range(10), 3, salt="")
    core.finish()
    starts = [(start.num_tokens, start.num_computed_tokens, start.num_blocks) for p in core.plans for start in p.header.starts]
    assert starts == [(10, 0, 3)] * 4 and all(len(plan.copy_from) == 0 for plan in core.plans)
    assert all(request.end is not None and request.end.stats.cached_tokens == 0 for request in core.requests)


def test_ended_rows_leave_at_once() -> None:
    core = driver()
    core.accepted([1], 1, request_id="a")
    core.accepted([2], 5, request_id="b")
    core.step()
    plan = core.plan()
    assert plan is not None and (plan.ended.tolist(), plan.padding.tolist()) == ([0], [])
    core.finish()


def test_after_a_lost_worker_those_that_ran_come_back_whole_and_first() -> None:
    core = driver(rows=2)
    for name in "abc":
        core.accepted([1, 2], 5, request_id=name)
    core.step(), core.step()
    core.lost(), core.joined()
    assert core.next_rows() == {"a": 4, "b": 4}, "2 prompt tokens and 2 outputs"
    core.finish()


def test_a_prompt_that_does_not_fit_behind_another_waits_for_a_step_of_its_own() -> None:
    core = driver(budget=10)
    core.accepted(range(6), 9, request_id="a")
    core.accepted(range(6), 9, request_id="b")
    assert [core.next_rows(), core.next_rows()] == [{"a": 6}, {"b": 6, "a": 1}]
    core.finish()
