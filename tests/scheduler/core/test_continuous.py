"""The continuous policy, decision by decision."""

from __future__ import annotations

import numpy as np
import pytest

from scheduler.core import CoreConfig
from tests.helpers.core_driver import CoreDriver
from tests.helpers.fake_worker import worker_facts
from wire import EndReason

BATCH, NORMAL, INTERACTIVE = 1, 2, 3


def driver(
    *, rows: int = 8, budget: int = 32, num_blocks: int = 64, block_size: int = 4, max_queue_requests: int = 100
) -> CoreDriver:
    config = CoreConfig(max_batch_rows=rows, max_step_tokens=budget, max_queue_requests=max_queue_requests)
    return CoreDriver(config, worker_facts(num_blocks=num_blocks, block_size=block_size, max_batch_rows=rows))


# ------------------------------------------------------------------------------------------------------------- order


def test_requests_of_one_class_are_admitted_in_order_of_arrival() -> None:
    core = driver()
    for name in "abc":
        core.accepted([1, 2, 3], 4, request_id=name)
    assert core.next_rows() == {"a": 3, "b": 3, "c": 3}


def test_interactive_goes_before_normal_before_batch() -> None:
    core = driver()
    for name, priority in [
        ("b1", BATCH),
        ("n1", NORMAL),
        ("i1", INTERACTIVE),
        ("b2", BATCH),
        ("i2", INTERACTIVE),
        ("n2", NORMAL),
    ]:
        core.accepted([1, 2], 4, request_id=name, priority=priority)
    assert list(core.next_rows()) == ["i1", "i2", "n1", "n2", "b1", "b2"]


def test_the_head_of_the_queue_is_not_overtaken_by_a_smaller_request() -> None:
    core = driver(num_blocks=8)
    core.accepted(range(16), 4, request_id="running")
    core.accepted(range(16), 4, request_id="large")
    core.accepted([1], 4, request_id="small")
    assert core.next_rows() == {"running": 16}, "8 blocks: 4 held, 4 + 1 spare asked"
    assert core.next_rows() == {"running": 1}, "the small one waits behind the large one"


def test_the_lowest_free_slot_is_taken() -> None:
    core = driver()
    for name in "abc":
        core.accepted([1, 2, 3], 9, request_id=name)
    core.step()
    assert [core.requests[i].request_id for i in range(3)] == ["a", "b", "c"]
    core.cancel("b")
    core.accepted([5], 9, request_id="d")
    plan = core.plan()
    assert plan is not None
    assert [(start.slot, start.sequence_id) for start in plan.header.starts] == [(1, 3)]
    assert plan.ended.tolist() == [1] and plan.slots.tolist() == [0, 2, 1], "rows stand by admission, not by slot"


# ------------------------------------------------------------------------------------------------------ token budget


def test_a_prompt_is_chunked_at_the_budget() -> None:
    core = driver(budget=7)
    core.accepted(range(17), 4, request_id="a")
    assert [core.next_rows(), core.next_rows()] == [{"a": 7}, {"a": 7}]
    core.answer()
    assert core.next_rows() == {"a": 3}
    core.answer()
    assert core.next_rows() == {"a": 1}, "its first output token, which is still being sampled"


def test_decodes_go_before_chunks_and_chunks_fill_what_is_left() -> None:
    core = driver(budget=7)
    core.accepted([1, 2], 9, request_id="a")
    core.accepted([3], 9, request_id="b")
    core.accepted(range(20), 9, request_id="long")
    core.accepted([4, 5], 9, request_id="last")
    assert core.next_rows() == {"a": 2, "b": 1, "long": 4}
    assert core.next_rows() == {"a": 1, "b": 1, "long": 5}
    for _ in range(2):
        core.answer()
        assert core.next_rows() == {"a": 1, "b": 1, "long": 5}
    core.answer()
    assert core.next_rows() == {"a": 1, "b": 1, "long": 1, "last": 2}, "the last chunk is of one token"


def test_chunks_are_served_in_order_of_admission() -> None:
    core = driver(budget=5, rows=5)
    core.accepted(range(7), 9, request_id="a")
    core.accepted(range(9), 9, request_id="b")
    assert core.next_rows() == {"a": 5}
    assert core.next_rows() == {"a": 2, "b": 3}
    core.answer()
    assert core.next_rows() == {"a": 1, "b": 4}
    core.answer()
    assert core.next_rows() == {"a": 1, "b": 2}


def test_a_running_row_decodes_in_every_step_beside_a_long_prompt() -> None:
    core = driver(budget=3, num_blocks=100)
    core.accepted([1], 40, request_id="a")
    core.accepted(range(60), 4, request_id="long")
    core.next_rows()
    for _ in range(20):
        assert core.next_rows()["a"] == 1
        core.answer()


def test_rows_are_never_more_than_the_budget() -> None:
    core = driver(rows=8, budget=3)
    assert core.core.rows.max_rows == 3
    for _ in range(5):
        core.accepted([1], 5)
    assert len(core.next_rows()) == 3


def test_nobody_is_admitted_into_a_full_batch() -> None:
    core = driver(rows=2)
    for name in "abc":
        core.accepted([1], 3, request_id=name)
    assert list(core.next_rows()) == ["a", "b"]
    core.finish()
    assert core.requests[2].end is not None


def test_the_pipeline_is_two_deep() -> None:
    core = driver()
    core.accepted([1], 9)
    assert core.next_rows() and core.next_rows()
    assert core.next_rows() == {}
    core.answer()
    assert core.next_rows() and core.next_rows() == {}


def test_no_plan_is_made_for_rows_whose_last_token_is_being_sampled() -> None:
    core = driver()
    request = core.accepted([1, 2], 2, request_id="a")
    assert core.next_rows() == {"a": 2}
    assert core.next_rows() == {"a": 1}
    core.answer()
    assert core.next_rows() == {}, "both outputs are known or on their way"
    core.answer()
    assert request.end is not None and request.end.reason is EndReason.LENGTH and len(request.got) == 2


# ---------------------------------------------------------------------------------------------------- blocks


def test_admission_takes_blocks_for_the_whole_prompt() -> None:
    core = driver(budget=5)
    core.accepted(range(9), 9, request_id="a")
    plan = core.plan()
    assert plan is not None
    assert plan.start_blocks.tolist() == [1, 2, 3] and plan.num_tokens.tolist() == [5]


def test_a_row_takes_a_block_when_its_next_token_needs_one_and_not_before() -> None:
    core = driver()
    core.accepted([1, 2, 3], 9)
    grown = []
    for _ in range(7):
        plan = core.plan()
        assert plan is not None
        grown.append(plan.grow_blocks.tolist())
        core.answer()
    assert grown == [[], [], [2], [], [], [], [3]], "3 prompt tokens, then positions 3, 4 (a new block), 5, 6, 7, 8 (a new one)"


@pytest.mark.parametrize(("prompt", "admitted"), [(12, True), (13, False)])
def test_beside_running_rows_one_block_stays_free_at_admission(prompt: int, admitted: bool) -> None:
    core = driver(num_blocks=5)
    core.accepted([1, 2, 3], 9, request_id="a")
    core.accepted(range(prompt), 2, request_id="b")
    assert ("b" in core.next_rows()) == admitted, "of 5 blocks 1 is held and 1 spare: room for 12 tokens"


@pytest.mark.parametrize(
    ("running", "prompt", "admitted"), [(2, 16, True), (2, 17, False), (6, 8, True), (6, 9, False), (7, 8, True)]
)
def test_the_watermark_is_half_a_block_for_each_running_row(running: int, prompt: int, admitted: bool) -> None:
    facts = worker_facts(num_blocks=running + 5, block_size=4, max_batch_rows=16)
    core = CoreDriver(CoreConfig(), facts)
    for row in range(running):
        core.accepted([row + 1], 9, request_id=str(row))
    core.accepted(range(prompt), 1, request_id="late")
    assert ("late" in core.next_rows()) == admitted, f"of 5 blocks {max(1, running // 2)} are spare"


def test_the_first_request_may_take_the_whole_pool() -> None:
    core = driver(num_blocks=4)
    core.accepted(range(16), 1, request_id="a")
    assert core.next_rows() == {"a": 16}


# ------------------------------------------------------------------------------------------------------ preemption


def preempted(core: CoreDriver) -> list[str]:
    return [request.request_id for request in core.core.live_requests() if request.sequences[0].state.value == "preempted"]


def test_of_equals_the_one_admitted_last_is_preempted() -> None:
    core = driver(num_blocks=3)
    core.accepted([1, 2, 3], 9, request_id="a")
    core.accepted([5, 6, 7], 9, request_id="b")
    assert core.next_rows() == {"a": 3, "b": 3}
    assert core.next_rows() == {"a": 1, "b": 1}
    core.answer()
    assert core.next_rows() == {"a": 1}, "both need a second block, one is free: b gives way"
    assert preempted(core) == ["b"]
    core.answer()
    core.finish()
    stats = [request.end.stats for request in core.requests if request.end is not None]
    assert [stat.preemptions for stat in stats] == [0, 1]
    assert [stat.recomputed_tokens for stat in stats] == [0, 4]


def test_who_loses_least_work_is_preempted_also_in_the_middle_of_its_prompt() -> None:
    core = driver(num_blocks=5, budget=7, rows=3)
    core.accepted([1, 2, 3], 9, request_id="a")
    core.accepted([4, 5, 6], 9, request_id="b")
    core.accepted(range(8), 9, request_id="long")
    assert core.next_rows() == {"a": 3, "b": 3, "long": 1}
    core.core.token_budget = 3
    assert core.next_rows() == {"a": 1, "b": 1, "long": 1}
    core.answer()
    assert core.next_rows() == {"a": 1}, "a takes the free block; b waits for those that step 1 still names"
    assert preempted(core) == ["long"], "2 tokens are less than 4"
    core.answer()
    assert core.next_rows() == {"a": 1, "b": 1}
    core.finish()
    assert core.requests[2].end is not None and core.requests[2].end.stats.recomputed_tokens >= 2


def test_the_victim_is_of_the_lowest_class_even_if_it_was_the_first_to_arrive() -> None:
    core = driver(num_blocks=3)
    core.accepted([1, 2, 3], 9, request_id="early", priority=BATCH)
    core.accepted([5, 6, 7], 9, request_id="late", priority=INTERACTIVE)
    assert list(core.next_rows()) == ["late", "early"]
    core.next_rows()
    core.answer()
    assert core.next_rows() == {"late": 1}
    assert preempted(core) == ["early"]


def test_several_are_preempted_if_one_does_not_suffice_and_return_in_the_old_order() -> None:
    core = driver(num_blocks=5, block_size=2, rows=4)
    for name in "abcd":
        core.accepted([ord(name)], 4, request_id=name)
    core.accepted([1], 4, request_id="new")
    assert core.next_rows() == core.next_rows() == {"a": 1, "b": 1, "c": 1, "d": 1}
    core.answer()
    assert core.next_rows() == {"a": 1}, "4 want a block, 1 is free: those of c and d will do for b, once step 1 has returned"
    assert preempted(core) == ["c", "d"]
    joined: list[str] = []
    while core.core.num_requests:
        core.answer()
        joined += [name for name in core.next_rows() if name in ("c", "d", "new") and name not in joined]
    assert joined == ["c", "d", "new"]


def test_the_preempted_is_the_next_to_return_and_computes_all_its_tokens_again() -> None:
    core = driver(num_blocks=3)
    core.accepted([1, 2, 3], 5, request_id="a")
    core.accepted([5, 6, 7], 5, request_id="b")
    core.accepted([9], 5, request_id="waits")
    core.next_rows(), core.next_rows()
    core.answer()
    assert core.next_rows() == {"a": 1}
    rows: dict[str, int] = {}
    while "b" not in rows:
        core.answer()
        rows = core.next_rows()
        assert "waits" not in rows
    assert rows["b"] == 5, "3 prompt tokens and the 2 outputs that had been sampled"
    core.finish()


def test_a_preempted_request_goes_behind_a_more_urgent_class_only() -> None:
    core = driver(num_blocks=3, rows=2)
    core.accepted([1, 2, 3], 6, request_id="a")
    core.accepted([5, 6, 7], 6, request_id="b")
    core.next_rows(), core.next_rows()
    core.accepted([9], 2, request_id="normal")
    core.accepted([9], 2, request_id="urgent", priority=INTERACTIVE)
    core.answer()
    assert "b" not in core.next_rows()
    joined: list[str] = []
    while core.core.num_requests:
        core.answer()
        joined += [name for name in core.next_rows() if name != "a" and name not in joined]
    assert joined == ["urgent", "b", "normal"]


def test_tokens_still_in_flight_when_it_is_preempted_are_kept() -> None:
    core = driver(num_blocks=3)
    core.accepted([1, 2, 3], 9, request_id="a")
    victim = core.accepted([5, 6, 7], 9, request_id="b")
    core.next_rows(), core.next_rows()
    core.answer()
    assert core.next_rows() == {"a": 1} and len(victim.got) == 1
    core.answer()
    assert len(victim.got) == 2, "its second token was being sampled"
    core.finish()


def test_a_preempted_request_may_end_by_its_last_token_in_flight() -> None:
    core = driver(num_blocks=3)
    core.accepted([1, 2, 3], 9, request_id="a")
    victim = core.accepted([5, 6, 7], 2, request_id="b")
    core.accepted([8], 4, request_id="c")
    core.next_rows(), core.next_rows()
    core.answer()
    assert "b" not in core.next_rows()
    core.answer()
    assert victim.end is not None and victim.end.reason is EndReason.LENGTH
    core.finish()


def test_a_preempted_request_that_is_cancelled_shows_no_token_any_more() -> None:
    core = driver(num_blocks=3)
    core.accepted([1, 2, 3], 9, request_id="a")
    victim = core.accepted([5, 6, 7], 9, request_id="b")
    core.next_rows(), core.next_rows()
    core.answer()
    assert core.next_rows() == {"a": 1} and preempted(core) == ["b"]
    core.cancel("b")
    core.answer()
    assert len(victim.got) == 1
    core.finish()


def test_a_preempted_request_does_not_return_before_the_last_plan_that_names_it() -> None:
    core = driver()
    core.accepted([1, 2, 3], 9, request_id="a")
    core.next_rows()
    core.core._preempt(0, core.now, core.core.rows.sequence(0))
    assert core.next_rows() == {}, "there is room, but one of its tokens is still to come"
    core.answer()
    assert core.next_rows() == {"a": 4}
    core.finish()


@pytest.mark.parametrize(("prompt", "max_tokens"), [(1, 16), (5, 12), (16, 1), (13, 4)])
def test_a_request_exactly_as_large_as_the_pool_runs_to_its_end(prompt: int, max_tokens: int) -> None:
    core = driver(num_blocks=4, budget=3)
    first = core.accepted(range(prompt), max_tokens)
    second = core.accepted(range(prompt, 2 * prompt), max_tokens)
    core.finish()
    for request in (first, second):
        assert request.end is not None and request.end.reason is EndReason.LENGTH
    assert first.end is not None and first.end.stats.preemptions == 0, "the oldest one always gets on"


def test_the_oldest_request_is_never_preempted_however_small_the_pool() -> None:
    core = driver(num_blocks=8, rows=8)
    requests = [core.accepted([i], 30) for i in range(6)]
    core.finish()
    ends = [request.end for request in requests]
    assert all(end is not None and end.reason is EndReason.LENGTH for end in ends)
    assert ends[0] is not None and ends[0].stats.preemptions == 0
    assert core.core.counters.preemptions > 0


def test_recomputed_tokens_are_what_was_computed_more_than_once() -> None:
    core = driver(num_blocks=8, rows=8)
    requests = [core.accepted([i], 30) for i in range(6)]
    worker = core.worker
    core.finish()
    assert worker is not None
    recomputed = sum(request.end.stats.recomputed_tokens for request in requests if request.end is not None)
    assert worker.num_computed_tokens == recomputed + sum(1 + 30 - 1 for _ in requests)


def test_rows_waiting_for_retiring_blocks_sit_out_a_step() -> None:
    core = driver(num_blocks=4)
    core.accepted([1, 2, 3], 9, request_id="a")
    core.accepted([5, 6, 7], 9, request_id="b")
    core.accepted([8], 9, request_id="c")
    assert core.next_rows() == {"a": 3, "b": 3, "c": 1}
    core.next_rows()
    core.cancel("c")
    core.answer()
    assert core.core.load(0).retiring_blocks == 1
    assert core.next_rows() == {"a": 1}, "the one free block is a's; b waits for c's, which step 1 still names"
    core.answer()
    assert core.next_rows() == {"a": 1, "b": 1}
    assert core.core.counters.preemptions == 0


def test_steady_decoding_is_a_plan_of_slots_and_counts_only() -> None:
    core = driver(num_blocks=64, block_size=64)
    for i in range(8):
        core.accepted([i], 30)
    core.step()
    plan = core.plan()
    assert plan is not None
    assert np.array_equal(plan.slots, np.arange(8)) and plan.num_tokens.tolist() == [1] * 8
    rest = (plan.header.starts, *map(len, (plan.grow_blocks, plan.start_tokens, plan.start_blocks, plan.padding, plan.ended)))
    assert rest == ((), 0, 0, 0, 0, 0)
