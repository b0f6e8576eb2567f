"""Blocks that several sequences share: prefixes found again, outputs of one request, copies on the first write."""

from __future__ import annotations

import numpy as np

from scheduler.core import CoreConfig
from tests.helpers.core_driver import CoreDriver
from tests.helpers.fake_worker import worker_facts

PROMPT = list(range(100, 110))  # 10 tokens: two full blocks of 4, and 2 tokens


def driver(*, num_blocks: int = 64, rows: int = 8, budget: int = 64, block_size: int = 4, **config: object) -> CoreDriver:
    facts = worker_facts(
        num_blocks=num_blocks, block_size=block_size, max_batch_rows=rows, max_step_tokens=2048, max_model_len=4096
    )
    return CoreDriver(CoreConfig(max_batch_rows=rows, max_step_tokens=budget, **config), facts)  # type: ignore[arg-type]


def held(core: CoreDriver) -> int:
    return core.core.load(0).held_blocks


def starts(core: CoreDriver) -> list[tuple[int, int]]:
    """(tokens known, of these found computed) of every sequence started so far."""
    return [(start.num_tokens, start.num_computed_tokens) for plan in core.plans for start in plan.header.starts]


# ---------------------------------------------------------------------------------------------------- prefix cache


def test_the_same_prompt_again_computes_only_its_last_block() -> None:
    core = driver()
    core.accepted(PROMPT, 3, salt="")
    core.finish()
    again = core.accepted(PROMPT, 3, salt="")
    core.finish()
    assert starts(core) == [(10, 0), (10, 8)]
    assert again.end is not None and again.end.stats.cached_tokens == 8


def test_a_hit_leaves_at_least_one_token_to_compute() -> None:
    core = driver()
    core.accepted(PROMPT[:8], 3, salt="")
    core.finish()
    core.accepted(PROMPT[:8], 3, salt="")
    core.finish()
    assert starts(core)[1] == (8, 4), "both blocks are known, and the logits of the last token are not"


def test_outputs_are_found_again_as_part_of_a_longer_prompt() -> None:
    core = driver()
    first = core.accepted(PROMPT, 7, salt="")
    core.finish()
    core.accepted([*PROMPT, *first.got, 5], 3, salt="")
    core.finish()
    assert starts(core)[1] == (18, 16), "the last output token was never computed, all before it were"


def test_a_prefix_is_shared_while_its_owner_still_runs() -> None:
    core = driver()
    core.accepted(PROMPT, 30, salt="")
    core.step()
    before = held(core)
    core.accepted([*PROMPT[:8], 1, 2], 30, salt="")
    core.plan()
    assert starts(core)[1] == (10, 8) and held(core) == before + 1
    core.finish()


def test_another_salt_and_no_salt_find_nothing() -> None:
    core = driver()
    for salt in ("a", "b", None, None):
        core.accepted(PROMPT, 2, salt=salt)
        core.finish()
    assert [computed for _, computed in starts(core)] == [0, 0, 0, 0]


def test_without_prefix_caching_nothing_is_kept() -> None:
    core = driver(prefix_caching=False)
    for _ in range(2):
        core.accepted(PROMPT, 2, salt="")
        core.finish()
    assert [computed for _, computed in starts(core)] == [0, 0] and core.core.load(0).cached_blocks == 0


def test_a_block_that_was_evicted_is_computed_again() -> None:
    core = driver(num_blocks=6)
    core.accepted(PROMPT, 2, salt="")
    core.finish()
    core.accepted(list(range(20)), 2, salt="")
    core.finish()
    core.accepted(PROMPT, 2, salt="")
    core.finish()
    assert starts(core)[-1] == (10, 0)


def test_of_a_cached_prefix_the_tail_is_evicted_first() -> None:
    core = driver(num_blocks=6)
    core.accepted(list(range(16)), 1, salt="")
    core.finish()
    assert core.core.load(0).cached_blocks == 4
    core.accepted([7, 7, 7, 7, 7, 7, 7, 7, 7], 1)  # 3 blocks: 2 are free, 1 is evicted
    core.finish()
    core.accepted(list(range(17)), 1, salt="")
    core.finish()
    assert starts(core)[-1] == (17, 12)


def test_a_lost_worker_takes_the_cache_along() -> None:
    core = driver()
    core.accepted(PROMPT, 2, salt="")
    core.finish()
    core.lost()
    core.joined()
    core.accepted(PROMPT, 2, salt="")
    core.finish()
    assert starts(core)[-1] == (10, 0)


def test_a_prefix_hit_is_not_charged_to_the_token_budget() -> None:
    core = driver(budget=8)
    core.accepted(PROMPT, 1, salt="")
    core.finish()
    core.accepted(PROMPT, 1, salt="")
    core.accepted([1, 2, 3, 4], 1)
    assert list(core.next_rows().values()) == [2, 4]
    core.finish()


# -------------------------------------------------------------------------------------------- outputs of one request


def test_eight_outputs_of_a_thousand_tokens_hold_the_prompt_once() -> None:
    core = driver(num_blocks=200, budget=1024, block_size=16)
    core.accepted([i % 997 for i in range(1000)], 5, num_outputs=8)
    core.step()
    assert held(core) == 63, "the first output computes the prompt: 62 full blocks and 8 tokens"
    core.plan()
    assert held(core) == 63 + 7, "each of the others has a copy of the last block, and nothing else of its own"
    plan = core.plans[-1]
    assert plan.copy_from.tolist() == [63] * 7 and len(set(plan.copy_to.tolist()) | {63}) == 8
    assert starts(core)[1:] == [(1000, 999)] * 7
    core.finish()


def test_a_prompt_that_fills_its_blocks_is_copied_by_its_last_block() -> None:
    core = driver()
    core.accepted(PROMPT[:8], 3, num_outputs=3)
    core.step()
    core.plan()
    assert held(core) == 3 + 2, "two of the prompt and one to write to; the others need their own second block"
    core.finish()


def test_a_prompt_of_one_token_shares_nothing() -> None:
    core = driver()
    core.accepted([5], 3, num_outputs=3)
    core.step()
    core.plan()
    assert len(core.plans[-1].copy_from) == 0 and held(core) == 3
    core.finish()


def test_outputs_wait_for_the_first_ones_prompt() -> None:
    core = driver(budget=4)
    outputs = core.accepted(PROMPT, 3, num_outputs=2).siblings
    for _ in range(3):
        core.step()
    assert [len(output.got) for output in outputs] == [1, 0]
    core.step()
    assert [len(output.got) for output in outputs] == [2, 1]
    core.finish()


def test_outputs_come_as_rows_become_free() -> None:
    core = driver(rows=2)
    core.accepted(PROMPT, 3, num_outputs=5)
    core.finish()
    assert all(len(output.got) == 3 for output in core.requests)


def test_when_the_first_output_is_cut_short_the_next_one_computes_the_prompt() -> None:
    core = driver(budget=4)
    outputs = core.accepted(PROMPT, 3, num_outputs=3).siblings
    core.step()
    core.truncate(outputs[0], 0)
    core.finish()
    assert [len(output.got) for output in outputs] == [0, 3, 3]


def test_a_request_ends_when_its_last_output_does() -> None:
    core = driver()
    outputs = core.accepted(PROMPT, 3, num_outputs=2).siblings
    core.step(), core.step()
    core.truncate(outputs[0], 1)
    assert core.core.num_requests == 1
    core.cancel(outputs[0].request_id)
    assert core.core.num_requests == 0 and all(output.over for output in outputs)
    core.finish()


def test_outputs_that_come_late_find_the_prompt_in_the_cache() -> None:
    core = driver(rows=1)
    core.accepted(PROMPT, 3, num_outputs=2, salt="")
    core.finish()
    assert starts(core) == [(10, 0), (10, 8)]


def test_a_handle_of_any_output_is_taken() -> None:
    core = driver()
    core.accepted(PROMPT, 3, num_outputs=3, handle=10)
    refused = core.add(PROMPT, 3, handle=12)
    assert getattr(refused, "code", "") == "ALREADY_EXISTS"
    core.finish()


# ---------------------------------------------------------------------------------------------------------- swapping


def swapping(num_host_blocks: int = 20, **config: object) -> CoreDriver:
    facts = worker_facts(num_blocks=3, num_host_blocks=num_host_blocks, swap_block_ns=1)
    return CoreDriver(CoreConfig(max_batch_rows=2, max_step_tokens=16, **config), facts)  # type: ignore[arg-type]


def test_a_victim_whose_recomputation_costs_more_is_swapped_and_computes_nothing_twice() -> None:
    core = swapping()
    for _ in range(2):  # the costs of steps are learnt first
        core.accepted([1, 2], 2)
        core.finish()
    worker = core.worker
    assert worker is not None
    before = worker.num_computed_tokens
    requests = [core.accepted([1, 2, 3], 6), core.accepted([5, 6, 7], 6)]
    core.finish()
    assert worker.num_computed_tokens - before == 2 * (3 + 6 - 1)
    assert core.core.counters.preemptions > 0 and core.core.counters.swapped_blocks > 0
    assert sum(request.end.stats.recomputed_tokens for request in requests if request.end is not None) == 0
    moved = [plan for plan in core.plans if len(plan.swap_out_blocks) or len(plan.swap_in_blocks)]
    assert sum(len(plan.swap_out_blocks) for plan in moved) == sum(len(plan.swap_in_blocks) for plan in moved)


def test_without_room_in_host_memory_the_victim_computes_again() -> None:
    core = swapping(num_host_blocks=0)
    core.accepted([1, 2], 2)
    core.finish()
    core.accepted([1, 2, 3], 6), core.accepted([5, 6, 7], 6)
    core.finish()
    assert core.core.counters.recomputed_tokens > 0 and core.core.counters.swapped_blocks == 0


def test_a_swapped_request_that_is_cancelled_gives_its_host_blocks_back() -> None:
    core = swapping()
    core.accepted([1, 2], 2)
    core.finish()
    core.accepted([1, 2, 3], 9), core.accepted([5, 6, 7], 9)
    for _ in range(4):
        core.turn()
    assert core.core.load(0).held_host_blocks > 0
    core.cancel(core.requests[-1].request_id)
    core.finish()
    assert core.core.load(0).held_host_blocks == 0


def test_after_so_many_preemptions_a_request_comes_back_to_stay() -> None:
    facts = worker_facts(num_blocks=8)
    core = CoreDriver(CoreConfig(max_batch_rows=8, max_step_tokens=32, max_preemptions=1), facts)
    requests = [core.accepted([i], 30) for i in range(6)]
    core.finish()
    preemptions = [request.end.stats.preemptions for request in requests if request.end is not None]
    assert max(preemptions) == 1 and core.core.counters.preemptions == sum(preemptions)


# -------------------------------------------------------------------------------------------------- what others see


def test_block_tables_name_owners_counts_and_sharing() -> None:
    from scheduler.core.observe import block_tables

    core = driver()
    core.accepted(PROMPT, 9, num_outputs=2, request_id="a")
    core.step(), core.plan()
    reply = block_tables(core.core, 5)
    assert [(table.request_id, table.output_index, table.num_tokens) for table in reply.header.tables] == [
        ("a", 0, 11),
        ("a", 1, 10),
    ]
    first, second = (table.blocks for table in reply.header.tables)
    assert first[:2] == second[:2] and first[2] != second[2]
    assert reply.ref_counts[np.array(first) - 1].tolist() == [2, 2, 1]
    assert np.count_nonzero(reply.states == 1) == 4 and reply.header.query_id == 5
    core.finish()
