"""Placement: by prefix affinity, then load; each choice by exact group."""

from __future__ import annotations

from dataclasses import replace

from scheduler.core import CoreConfig
from scheduler.core.placement import GroupLoad, load_of, place
from tests.helpers.core_driver import CoreDriver
from tests.helpers.fake_worker import worker_facts

IDLE = GroupLoad(
    group=0,
    connected=True,
    hit_tokens=0,
    waiting_tokens=0,
    running_rows=0,
    max_rows=64,
    available_blocks=100,
    num_blocks=100,
)


def group(number: int, **of: int | bool) -> GroupLoad:
    return replace(IDLE, group=number, **of)  # type: ignore[arg-type]


def test_nobody_is_there() -> None:
    assert place(100, []) is None
    assert place(100, [group(0, connected=False), group(1, connected=False)]) is None


def test_only_groups_with_a_worker_are_chosen() -> None:
    assert place(100, [group(0, connected=False, hit_tokens=99), group(1, waiting_tokens=10**6)]) == 1


def test_equals_go_to_the_lowest_group_in_whatever_order_they_come() -> None:
    assert place(100, [group(2), group(1), group(3)]) == 1


def test_the_shorter_queue_without_hits() -> None:
    assert place(100, [group(0, waiting_tokens=51), group(1, waiting_tokens=50)]) == 1


def test_a_hit_outweighs_a_queue_longer_by_less_than_it_saves() -> None:
    prompt = 1000
    assert place(prompt, [group(0), group(1, hit_tokens=800, waiting_tokens=799)]) == 1
    assert place(prompt, [group(0), group(1, hit_tokens=800, waiting_tokens=801)]) == 0


def test_a_very_long_queue_outweighs_a_small_hit() -> None:
    assert place(1000, [group(0), group(1, hit_tokens=64, waiting_tokens=50_000)]) == 0


def test_the_larger_of_two_hits() -> None:
    assert place(1000, [group(0, hit_tokens=320), group(1, hit_tokens=640)]) == 1


def test_a_hit_counts_up_to_the_prompt_but_for_its_last_token() -> None:
    assert place(100, [group(0, hit_tokens=100, waiting_tokens=1), group(1, hit_tokens=99)]) == 1
    assert place(100, [group(0, hit_tokens=100), group(1, hit_tokens=99)]) == 0


def test_between_equals_the_smaller_share_of_rows_then_of_blocks_in_use() -> None:
    assert place(100, [group(0, running_rows=32, max_rows=64), group(1, running_rows=40, max_rows=128)]) == 1
    assert place(100, [group(0, available_blocks=40), group(1, available_blocks=100, num_blocks=200)]) == 1


def test_a_queue_weighs_more_than_rows_in_use() -> None:
    assert place(100, [group(0, waiting_tokens=1), group(1, running_rows=63)]) == 1


def test_a_group_without_a_free_row_must_save_half_the_prompt() -> None:
    assert place(1000, [group(0, running_rows=64, hit_tokens=499), group(1)]) == 1
    assert place(1000, [group(0, running_rows=64, hit_tokens=501), group(1)]) == 0
    assert place(1000, [group(0, running_rows=64), group(1, waiting_tokens=499)]) == 1


def test_when_all_are_full_the_same_rules_hold() -> None:
    loads = [group(number, running_rows=64, hit_tokens=100 * number, waiting_tokens=50 * number) for number in range(4)]
    assert place(1000, loads) == 3


def test_a_group_that_it_does_not_fit_is_none_for_it() -> None:
    assert place(1000, [group(0, fits=False), group(1, waiting_tokens=10**6)]) == 1
    assert place(1000, [group(0, fits=False), group(1, connected=False)]) is None


def test_a_group_that_looks_for_a_poisoned_request_comes_last() -> None:
    assert place(100, [group(0, is_tried=True), group(1, waiting_tokens=10**6)]) == 1
    assert place(100, [group(0, is_tried=True), group(1, connected=False)]) == 0


def test_a_core_says_what_it_has_to_do_and_what_it_has_of_a_prompt() -> None:
    facts = worker_facts(num_blocks=40, block_size=4, max_batch_rows=2)
    driver = CoreDriver(CoreConfig(max_batch_rows=2, max_step_tokens=8), facts)
    prompt = list(range(20))
    first = driver.accepted(prompt, 40, salt="")
    for _ in range(4):
        driver.turn()
    driver.accepted([*prompt, 7], 4, salt="")
    driver.accepted([5] * 9, 4)
    driver.plan()
    digests = driver.core.request(first.request_id).digests
    load = load_of(driver.core, 20, digests)
    assert (load.group, load.connected, load.hit_tokens, load.max_rows) == (0, True, 16, 2)
    assert (load.running_rows, load.waiting_tokens, load.num_blocks) == (2, 9, 40)
    assert load_of(driver.core, 21, digests).hit_tokens == 20 and load_of(driver.core, 21, b"").hit_tokens == 0
    driver.lost()
    after, again = load_of(driver.core, 20, digests), sum(len(each.prompt) + len(each.got) for each in driver.requests[:2])
    assert not after.connected and after.waiting_tokens == 9 + again and after.running_rows == 0
    driver.joined()
    driver.finish()
