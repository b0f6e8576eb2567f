"""The static policy, decision by decision: the baseline must be a fair and a true one."""

from __future__ import annotations

import pytest

from scheduler.core import CoreConfig
from tests.helpers.core_driver import CoreDriver
from tests.helpers.fake_worker import undisturbed, worker_facts
from wire import EndReason


def driver(*, rows: int = 8, budget: int = 32, num_blocks: int = 64, batch_size: int = 0, vocab_size: int = 1000) -> CoreDriver:
    config = CoreConfig(policy="static", max_batch_rows=rows, max_step_tokens=budget, static_batch_size=batch_size)
    return CoreDriver(config, worker_facts(num_blocks=num_blocks, block_size=4, max_batch_rows=rows, vocab_size=vocab_size))


def test_a_batch_is_admitted_at_once_and_nobody_joins_before_all_have_ended() -> None:
    core = driver(rows=2)
    for name, max_tokens in [("a", 2), ("b", 5), ("c", 3), ("d", 1)]:
        core.accepted([1, 2], max_tokens, request_id=name)
    batches: list[str] = []
    while core.core.num_requests:
        batches.append("".join(core.next_rows()))
        core.answer()
    assert batches == ["ab", "ab", "b", "b", "b", "cd", "c", "c"]


def test_a_request_that_comes_later_waits_for_the_next_batch_though_rows_are_free() -> None:
    core = driver(rows=4)
    core.accepted([1], 3, request_id="a")
    assert core.next_rows() == {"a": 1}
    core.accepted([2], 3, request_id="b")
    assert core.next_rows() == {"a": 1}
    core.answer()
    assert core.next_rows() == {"a": 1}
    core.answer()
    assert core.next_rows() == {}, "a's last token is on its way"
    core.answer()
    assert core.next_rows() == {"b": 1}


@pytest.mark.parametrize(("batch_size", "rows", "admitted"), [(0, 3, 3), (2, 3, 2), (9, 3, 3), (1, 3, 1)])
def test_the_batch_size_is_what_was_asked_for_or_all_rows(batch_size: int, rows: int, admitted: int) -> None:
    core = driver(rows=rows, batch_size=batch_size)
    for _ in range(5):
        core.accepted([1, 2], 3)
    assert len(core.next_rows()) == admitted


def test_prompts_are_computed_before_anybody_decodes() -> None:
    core = driver(rows=2, budget=5)
    core.accepted([1, 2], 3, request_id="a")
    core.accepted(range(9), 3, request_id="b")
    assert core.next_rows() == {"a": 2, "b": 3}
    assert core.next_rows() == {"b": 5}
    core.answer()
    assert core.next_rows() == {"a": 1, "b": 1}, "b's last prompt token, beside a's first output"


def test_blocks_for_prompt_and_all_outputs_but_the_last_are_reserved_at_admission() -> None:
    core = driver()
    core.accepted([1, 2, 3], 6)
    core.accepted([1, 2, 3], 7)
    plan = core.plan()
    assert plan is not None
    assert [start.num_blocks for start in plan.header.starts] == [2, 3], "3 + 6 - 1 tokens fill two blocks of 4 exactly"
    core.finish()
    assert all(len(plan.grow_blocks) == 0 for plan in core.plans) and core.core.counters.preemptions == 0


@pytest.mark.parametrize(("num_blocks", "admitted"), [(5, 2), (6, 3), (7, 3), (8, 4)])
def test_reserved_batches_use_the_pool_to_the_last_block(num_blocks: int, admitted: int) -> None:
    core = driver(num_blocks=num_blocks)
    for _ in range(5):
        core.accepted([1, 2, 3], 6)  # two blocks each
    assert len(core.next_rows()) == admitted


def test_a_request_exactly_as_large_as_the_pool_runs_alone() -> None:
    core = driver(num_blocks=4)
    core.accepted(range(10), 7, request_id="a")
    core.accepted([1], 1, request_id="b")
    assert core.next_rows() == {"a": 10}
    core.finish()
    assert all(request.end is not None and request.end.reason is EndReason.LENGTH for request in core.requests)


def test_ended_rows_stay_as_padding_and_hold_their_blocks_until_the_batch_has_ended() -> None:
    core = driver()
    core.accepted([1], 2, request_id="a")
    core.accepted([2], 5, request_id="b")
    core.step()
    held = core.core.load(0).held_blocks
    assert core.next_padding() == []
    core.answer()
    assert core.requests[0].end is not None and core.requests[0].end.reason is EndReason.LENGTH
    assert core.next_padding() == ["a"] and core.next_padding() == ["a"]
    core.answer()
    assert core.next_padding() == ["a"]
    assert core.core.load(0).held_blocks == held, "nothing comes back while the batch turns"
    core.answer(), core.answer()
    assert core.plan() is None
    assert core.core.load(0).held_blocks == 0


def test_padding_rows_are_told_to_the_worker_as_ended_with_the_next_batch() -> None:
    core = driver()
    core.accepted([1], 1)
    core.accepted([2], 2)
    core.finish()
    core.accepted([3], 1)
    plan = core.plan()
    assert plan is not None
    assert sorted(plan.ended.tolist()) == [0, 1] and [start.slot for start in plan.header.starts] == [0]


def test_an_end_token_ends_a_row_and_it_stays_as_padding() -> None:
    expected = undisturbed([1], 9, 1000)
    core = driver()
    core.accepted([1], 9, stop=[expected[1]], request_id="a")
    core.accepted([2], 9, request_id="b")
    core.step(), core.step()
    end = core.requests[0].end
    assert end is not None and end.reason is EndReason.STOP and core.requests[0].got == expected[:2]
    assert core.next_padding() == ["a"]


def test_a_truncated_row_stays_as_padding() -> None:
    core = driver()
    core.accepted([1], 9, request_id="a")
    core.accepted([2], 9, request_id="b")
    core.step(), core.step()
    core.truncate(core.requests[0], 1)
    assert core.next_padding() == ["a"]


def test_a_cancelled_row_leaves_at_once() -> None:
    core = driver()
    core.accepted([1], 9, request_id="a")
    core.accepted([2], 9, request_id="b")
    core.step()
    core.cancel("a")
    plan = core.plan()
    assert plan is not None
    assert (plan.slots.tolist(), plan.padding.tolist(), plan.ended.tolist()) == ([1], [], [0])


def test_a_row_cancelled_before_its_prompt_had_a_turn_is_told_to_the_worker() -> None:
    core = driver(budget=4, rows=2)
    core.accepted(range(6), 9, request_id="a")
    core.accepted([2], 9, request_id="b")
    assert core.next_rows() == {"a": 4}, "b is started in this plan, but has to wait for the budget"
    core.cancel("b")
    assert core.core.load(0).retiring_blocks == 3, "a plan in flight names its blocks"
    plan = core.plan()
    assert plan is not None and plan.ended.tolist() == [1]
    core.finish()


def test_blocks_of_padding_rows_are_not_free_before_the_last_plan_that_names_them() -> None:
    core = driver()
    core.accepted([1], 1, request_id="a")
    core.accepted([2], 9, request_id="b")
    core.step()
    assert core.next_padding() == core.next_padding() == ["a"]
    core.cancel("b")
    core.answer()
    assert core.plan() is None
    assert (core.core.load(0).held_blocks, core.core.load(0).retiring_blocks) == (0, 4), "step 2 pads with a"
    core.answer()
    core.finish()


def test_when_all_are_cancelled_the_next_batch_starts_once_the_plans_have_returned() -> None:
    core = driver(rows=2)
    for name in "abc":
        core.accepted([1], 9, request_id=name)
    core.next_rows(), core.next_rows()
    core.cancel("a"), core.cancel("b")
    assert core.next_rows() == {}
    core.answer()
    assert core.next_rows() == {}
    core.answer()
    assert core.next_rows() == {"c": 1}


def test_the_lost_workers_batch_comes_back_before_new_requests() -> None:
    core = driver(rows=2)
    for name, max_tokens in [("a", 2), ("b", 5), ("c", 3)]:
        core.accepted([1, 2], max_tokens, request_id=name)
    for _ in range(3):
        core.step()
    core.lost()
    assert core.core.load(0).held_blocks == 0
    core.joined()
    assert core.next_rows() == {"b": 5, "c": 2}, "a had ended; b computes its prompt and three outputs again"
    core.finish()
