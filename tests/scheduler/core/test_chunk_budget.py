"""How much of long prompts goes beside running requests: as much as keeps the step to the inter-token time, and never less
than a least chunk. The worker in memory says that a step of n tokens took 1000 + 100 n ns; the core has to find that out.
"""

from __future__ import annotations

import random

import pytest

from scheduler.core import CoreConfig
from tests.helpers.core_driver import CoreDriver
from tests.helpers.fake_worker import worker_facts

LEAST_CHUNK = 16


def duration(num_tokens: int) -> int:
    return 1000 + 100 * num_tokens


def within(num_tokens: int) -> int:
    """A target that so many tokens keep to, and one more does not."""
    return duration(num_tokens) + 50


def driver(target: int, *, rows: int = 8, budget: int = 128, **config: object) -> CoreDriver:
    facts = worker_facts(num_blocks=200, block_size=16, max_model_len=1024, max_batch_rows=rows, max_step_tokens=budget)
    settings = CoreConfig(max_batch_rows=rows, max_step_tokens=budget, target_itl_ns=target, **config)  # type: ignore[arg-type]
    return CoreDriver(settings, facts)


def learnt(target: int, *, largest: int = 100, **options: object) -> CoreDriver:
    """A core that has seen steps of one token and of `largest` tokens: the rest is on the line between."""
    core = driver(target, **options)  # type: ignore[arg-type]
    core.accepted(range(largest), 2)
    core.finish()
    assert core.core.step_cost.is_known
    return core


def decoding(core: CoreDriver, names: str) -> None:
    """So many requests that decode from now on, one token long each."""
    for name in names:
        core.accepted([ord(name)], 60, request_id=name)
    core.step()


def next_step(core: CoreDriver) -> dict[str, int]:
    rows = core.next_rows()
    while core.core.in_flight:
        core.answer()
    return rows


# --------------------------------------------------------------------------------------------------------- the target


@pytest.mark.parametrize(("target", "chunk"), [(within(60), 58), (within(61), 59), (within(40), 38), (within(19), 17)])
def test_a_chunk_fills_the_step_up_to_the_target_and_not_a_token_further(target: int, chunk: int) -> None:
    core = learnt(target)
    decoding(core, "ab")
    core.accepted(range(300), 5, request_id="long")
    for _ in range(3):
        assert next_step(core) == {"a": 1, "b": 1, "long": chunk}
    core.finish()


def test_decodes_leave_less_for_the_prompt() -> None:
    core = learnt(within(60))
    decoding(core, "abcde")
    core.accepted(range(300), 5, request_id="long")
    assert next_step(core)["long"] == 55
    core.finish()


def test_several_prompts_share_one_chunk_in_order_of_admission() -> None:
    core = learnt(within(60))
    decoding(core, "a")
    for name in ("p", "q", "r"):
        core.accepted([ord(name)] * 40, 9, request_id=name)
    assert next_step(core) == {"a": 1, "p": 40, "q": 19}
    assert next_step(core) == {"a": 1, "p": 1, "q": 21, "r": 37}
    core.finish()


def test_nobody_is_admitted_whose_prompt_would_get_nothing() -> None:
    core = learnt(within(60))
    decoding(core, "a")
    core.accepted(range(200), 9, request_id="long")
    core.accepted([1], 9, request_id="short")
    assert next_step(core) == {"a": 1, "long": 59} and len(core.core.queue) == 1
    core.finish()


def test_what_the_prefix_cache_has_takes_none_of_the_chunk() -> None:
    core = driver(within(60))
    core.accepted(range(100), 2, salt="")
    core.finish()
    decoding(core, "a")
    core.accepted([*range(100), *range(500, 600)], 9, request_id="alike", salt="")
    assert next_step(core) == {"a": 1, "alike": 59}
    plan = core.plans[-1]
    assert plan.header.starts[0].num_computed_tokens == 96
    core.finish()


def test_the_token_budget_is_the_other_bound() -> None:
    core = learnt(within(60), budget=32, largest=30)
    decoding(core, "ab")
    core.accepted(range(300), 5, request_id="long")
    assert next_step(core) == {"a": 1, "b": 1, "long": 30}
    core.finish()


# ---------------------------------------------------------------------------------------------------- the least chunk


@pytest.mark.parametrize("target", [1, 1000, within(1), within(16)])
def test_under_a_target_that_cannot_be_kept_prompts_get_on_by_the_least_chunk(target: int) -> None:
    core = learnt(target)
    decoding(core, "ab")
    core.accepted(range(70), 5, request_id="long")
    assert [next_step(core)["long"] for _ in range(5)] == [LEAST_CHUNK] * 4 + [70 - 4 * LEAST_CHUNK]
    core.finish()


def test_the_least_chunk_is_shared_and_so_are_its_leftovers() -> None:
    core = learnt(1)
    decoding(core, "a")
    for name in ("p", "q", "r"):
        core.accepted([ord(name)] * 10, 9, request_id=name)
    assert next_step(core) == {"a": 1, "p": 10, "q": 6}
    assert next_step(core) == {"a": 1, "p": 1, "q": 4, "r": 10}
    core.finish()


def test_a_token_budget_smaller_than_the_least_chunk_stands() -> None:
    core = learnt(1, budget=12, largest=10)
    decoding(core, "abc")
    core.accepted(range(50), 5, request_id="long")
    assert next_step(core) == {"a": 1, "b": 1, "c": 1, "long": 9}
    core.finish()


def test_where_decodes_fill_the_token_budget_the_prompt_waits() -> None:
    core = learnt(1, budget=4, rows=4, largest=4)
    decoding(core, "abcd")
    core.accepted(range(50), 5, request_id="long")
    assert next_step(core) == dict.fromkeys("abcd", 1)
    core.finish()


# ------------------------------------------------------------------------------------------------- when it is no matter


def test_with_no_decodes_running_the_whole_budget_goes_to_prompts() -> None:
    core = learnt(1)
    core.accepted(range(300), 5, request_id="long")
    core.accepted(range(100), 5, request_id="next")
    assert [next_step(core) for _ in range(4)] == [
        {"long": 128},
        {"long": 128},
        {"long": 44, "next": 84},
        {"long": 1, "next": 16},
    ]
    core.finish()


def test_a_target_of_0_is_none() -> None:
    core = learnt(0)
    decoding(core, "ab")
    core.accepted(range(300), 5, request_id="long")
    assert next_step(core) == {"a": 1, "b": 1, "long": 126}
    core.finish()


def test_a_running_row_whose_reader_has_stopped_asks_for_no_inter_token_time() -> None:
    core = learnt(1, max_unread_tokens=2)
    decoding(core, "ab")
    next_step(core)
    core.accepted(range(300), 2, request_id="long")
    assert next_step(core) == {"long": 128}
    core.credit((core.requests[-2], 1))
    assert next_step(core) == {"b": 1, "long": LEAST_CHUNK}
    core.finish()


def test_while_no_step_has_been_measured_the_whole_budget_goes() -> None:
    core = driver(1)
    core.accepted([1], 60, request_id="a")
    core.accepted(range(300), 5, request_id="long")
    assert not core.core.step_cost.is_known
    assert core.next_rows() == {"a": 1, "long": 127}
    assert core.next_rows() == {"a": 1, "long": 127}, "no result has arrived"
    core.answer()
    assert core.next_rows() == {"a": 1, "long": LEAST_CHUNK}
    core.finish()


def test_what_was_learnt_outlives_the_worker() -> None:
    core = learnt(within(60))
    core.lost(), core.joined()
    decoding(core, "ab")
    core.accepted(range(300), 5, request_id="long")
    assert next_step(core)["long"] == 58
    core.finish()


# ------------------------------------------------------------------------------------------------- sizes never tried


def test_no_step_is_more_than_twice_as_large_as_the_largest_seen() -> None:
    core = learnt(1_000_000_000, largest=10)
    decoding(core, "a")
    core.accepted(range(500), 5, request_id="long")
    assert [next_step(core)["long"] for _ in range(5)] == [20, 42, 86, 127, 127]
    core.finish()


def test_steps_past_the_largest_seen_keep_to_the_target_too() -> None:
    core = learnt(within(60), largest=25)
    decoding(core, "ab")
    core.accepted(range(500), 5, request_id="long")
    made = [next_step(core)["long"] for _ in range(4)]
    assert made == [49, 58, 58, 58], "51 tokens are twice the largest and one; then the target holds"
    core.finish()


# -------------------------------------------------------------------------------------------------------- at random


def decodes_and_tokens(core: CoreDriver) -> list[tuple[int, int]]:
    """Of every plan: rows that had one token to compute, and tokens in all."""
    missing: dict[int, int] = {}
    found = []
    for plan in core.plans:
        for slot in plan.ended.tolist():
            del missing[slot]
        num_decodes = sum(missing.get(slot) == 1 for slot in plan.slots.tolist())
        missing.update({start.slot: start.num_tokens - start.num_computed_tokens for start in plan.header.starts})
        for slot, count in zip(plan.slots.tolist(), plan.num_tokens.tolist(), strict=True):
            missing[slot] = missing[slot] - count or 1  # what it has sampled is the next to be computed
        found.append((num_decodes, int(plan.num_tokens.sum())))
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("target", [within(20), within(40), within(60), within(80)])
def test_steps_with_decodes_keep_to_the_target_whenever_the_least_chunk_allows(target: int, seed: int) -> None:
    rng = random.Random(seed)
    core = driver(target, rows=6)
    for _ in range(40):
        prompt = [rng.randrange(1000) for _ in range(rng.choice([3, 20, 100, 300]))]
        core.accepted(prompt, rng.randrange(5, 60))
        for _ in range(rng.randrange(8)):
            core.turn()
    core.finish()
    assert core.core.counters.preemptions == 0
    mixed = full = 0
    for step, (num_decodes, num_tokens) in enumerate(decodes_and_tokens(core)):
        if step >= 2 and 0 < num_decodes < num_tokens:  # two are made before the first has been measured
            mixed += 1
            full += duration(num_tokens) > 0.9 * target
            assert duration(num_tokens) <= target or num_tokens - num_decodes <= LEAST_CHUNK
    assert mixed > 60 and 2 * full > mixed, "and most steps use the time that they have"
