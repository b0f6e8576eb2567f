"""Who loses its row, whether its blocks are swapped, how it comes back, who may never be preempted: decision by decision."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from scheduler.core import CoreConfig, preemption
from scheduler.core.request import State
from scheduler.core.rows import RUNNING, Rows
from tests.helpers.core_driver import CoreDriver, Tracked
from tests.helpers.fake_worker import worker_facts
from wire import EndReason, RequestStats, StepPlan

BATCH, NORMAL, INTERACTIVE = 1, 2, 3


def driver(
    num_blocks: int, *, rows: int = 8, budget: int = 32, block_size: int = 4, host: int = 0, swap_ns: int = 0, **config: object
) -> CoreDriver:
    facts = worker_facts(
        num_blocks=num_blocks,
        block_size=block_size,
        max_batch_rows=rows,
        max_step_tokens=256,
        num_host_blocks=host,
        swap_block_ns=swap_ns,
    )
    return CoreDriver(CoreConfig(max_batch_rows=rows, max_step_tokens=budget, **config), facts)  # type: ignore[arg-type]


def preempted(core: CoreDriver) -> list[str]:
    """Who lost its row, in that order, since the start."""
    return [request_id for request_id, reason in core.core.leaves if reason == "preempted"]


def stats(request: Tracked) -> RequestStats:
    assert request.end is not None
    return request.end.stats


def state(core: CoreDriver, request_id: str, output: int = 0) -> State:
    request = core.core.request(request_id)
    assert request is not None
    return request.sequences[output].state


def preempt(core: CoreDriver, slot: int) -> None:
    """As if another's need had fallen on this row."""
    core.core._preempt(slot, core.now, core.core.rows.sequence(slot))


def turn(core: CoreDriver) -> dict[str, int]:
    """A plan, and then the oldest answer: the pipeline stays as full as it is."""
    rows = core.next_rows()
    if core.core.in_flight:
        core.answer()
    return rows


def until(core: CoreDriver, num_preemptions: int, readers: tuple[Tracked, ...] = ()) -> None:
    """Until so many rows were lost since the start; `readers` take what comes."""
    for _ in range(200):
        if len(preempted(core)) >= num_preemptions:
            return
        core.step()
        core.credit(*((reader, len(reader.got)) for reader in readers if reader.got and not reader.over))
    raise AssertionError(f"preempted were only {preempted(core)}")


# --------------------------------------------------------------------------------------------------------- the victim


@dataclass(frozen=True)
class Row:
    priority: int = NORMAL
    computed: int = 10
    stopped: bool = False  # its reader
    ending: bool = False  # its last token is being sampled
    protected: bool = False
    aged: bool = False
    tenant: int = 0


def rows_of(*wanted: Row) -> Rows:
    """Rows in slots 0, 1, …, admitted in this order."""
    rows = Rows(len(wanted), 10)
    for slot, row in enumerate(wanted):
        rows.state[slot] = RUNNING
        rows.priority[slot], rows.num_computed[slot], rows.tenant[slot] = row.priority, row.computed, row.tenant
        rows.max_tokens[slot], rows.num_tokens[slot] = 100, 100 if row.ending else 50
        rows.limit[slot] = 50 if row.stopped else 100
        rows.is_protected[slot], rows.is_aged[slot] = row.protected, row.aged
        rows._joined.append(slot)
    return rows


@pytest.mark.parametrize(
    ("rows", "victim"),
    [
        ([Row(), Row(), Row()], 2),
        ([Row(computed=9), Row(), Row()], 0),
        ([Row(), Row(computed=9), Row(computed=9)], 2),
        ([Row(computed=90, priority=BATCH), Row(), Row(computed=1)], 0),
        ([Row(computed=1, priority=INTERACTIVE), Row(computed=90), Row(computed=1, priority=INTERACTIVE)], 1),
        ([Row(), Row(computed=90, priority=INTERACTIVE, stopped=True), Row(computed=1, priority=BATCH)], 1),
        ([Row(stopped=True), Row(stopped=True, priority=BATCH), Row(computed=1)], 1),
        ([Row(stopped=True, computed=5), Row(stopped=True, computed=6), Row(computed=1)], 0),
        ([Row(), Row(priority=BATCH, computed=1, ending=True), Row(priority=INTERACTIVE)], 0),
        ([Row(priority=INTERACTIVE, computed=90), Row(priority=BATCH, ending=True)], 0),
        ([Row(ending=True, computed=9), Row(ending=True)], 0),
    ],
)
def test_the_victim_does_not_end_has_stopped_reading_is_of_the_lowest_class_has_least_work_came_last(
    rows: list[Row], victim: int
) -> None:
    columns = rows_of(*rows)
    assert preemption.victim(columns, preemption.candidates(columns)) == victim


def test_a_protected_row_is_nobodys_victim() -> None:
    rows = rows_of(Row(), Row(protected=True, priority=BATCH, computed=1), Row(computed=20))
    assert preemption.candidates(rows).tolist() == [0, 2]
    assert preemption.victim(rows, preemption.candidates(rows)) == 0


def test_candidates_of_one_tenant_are_its_own_rows_only() -> None:
    rows = rows_of(Row(tenant=1), Row(tenant=2), Row(tenant=1, protected=True), Row(tenant=1))
    assert preemption.candidates(rows, tenant=1).tolist() == [0, 3]


def test_only_lower_classes_that_were_not_admitted_by_age_make_room() -> None:
    rows = rows_of(Row(), Row(priority=BATCH), Row(priority=BATCH, aged=True), Row(priority=INTERACTIVE))
    assert preemption.candidates(rows, below=INTERACTIVE).tolist() == [0, 1]
    assert preemption.candidates(rows, below=NORMAL).tolist() == [1]
    assert preemption.candidates(rows, below=BATCH).tolist() == []
    assert preemption.candidates(rows).tolist() == [0, 1, 2, 3], "for blocks to go on with, age is no protection"


def test_a_reader_that_stopped_loses_its_row_first_whatever_its_class_and_work() -> None:
    core = driver(5, max_unread_tokens=3)
    stopped = core.accepted(range(9), 12, request_id="stopped", priority=INTERACTIVE)
    reads = core.accepted([50], 20, request_id="reads", priority=BATCH)
    until(core, 1, (reads,))
    assert preempted(core) == ["stopped"] and len(stopped.got) == 3
    assert state(core, "stopped") is State.PARKED, "it waits for its reader, not for blocks"
    before = len(reads.got)
    for _ in range(6):
        core.step()
        core.credit((reads, 9))
    assert len(reads.got) == before + 6 and state(core, "stopped") is State.PARKED
    core.credit((stopped, 1))
    assert state(core, "stopped") is State.PREEMPTED
    core.finish()
    assert stats(stopped).preemptions == 1 and len(stopped.got) == 12


def test_a_parked_one_that_was_swapped_goes_on_where_it_was() -> None:
    core = driver(5, host=9, swap_ns=1, max_unread_tokens=3)
    learn(core)
    stopped = core.accepted(range(9), 12, request_id="stopped")
    reads = core.accepted([50], 16, request_id="reads")
    until(core, 1, (reads,))
    assert core.core.load(0).held_host_blocks == 3
    while not reads.over:
        core.step()
        core.credit((reads, 9))
    assert state(core, "stopped") is State.PARKED and core.core.load(0).held_host_blocks == 3
    core.credit((stopped, 3))
    core.finish()
    assert stats(stopped).recomputed_tokens == 0 and stats(stopped).preemptions == 1


def test_one_about_to_end_keeps_its_row_though_it_is_of_the_lowest_class_and_has_least_work() -> None:
    core = driver(4)
    core.accepted([1, 2, 3], 9, request_id="a")
    core.accepted([5, 6, 7], 9, request_id="b")
    ending = core.accepted([4], 2, request_id="ending", priority=BATCH)
    assert core.next_rows() == {"a": 3, "b": 3, "ending": 1} and len(core.next_rows()) == 3
    core.answer()
    assert core.next_rows() == {"a": 1} and preempted(core) == ["b"], "both want a second block, one is free"
    core.answer()
    assert ending.end is not None and ending.end.reason is EndReason.LENGTH and stats(ending).preemptions == 0
    core.finish()


def test_more_work_in_a_lower_class_goes_before_less_work_in_a_higher_one() -> None:
    core = driver(5)
    core.accepted(range(10), 9, request_id="much", priority=BATCH)
    core.accepted([1, 2, 3], 9, request_id="little", priority=INTERACTIVE)
    until(core, 1)
    assert preempted(core) == ["much"]
    core.finish()


def test_the_last_admitted_is_meant_not_the_last_arrived() -> None:
    core = driver(6, rows=3)
    for name in "ab":
        core.accepted([ord(name)] * 3, 18, request_id=name)
    core.step()
    preempt(core, 0)
    assert core.next_rows() == {"b": 1, "a": 4}, "a has come back behind b"
    core.answer()
    core.step()
    assert core.core.rows.num_computed[:2].tolist() == [5, 5]
    until(core, 2)
    assert preempted(core) == ["a", "a"]
    core.finish()


# ------------------------------------------------------------------------------------------------- swap or recompute


def learn(core: CoreDriver) -> None:
    """Steps of 8 tokens and of 1, in other words that a step of n tokens takes 1000 + 100 n nanoseconds: to compute n tokens
    again adds 100 (n - 1) to a step that is made anyway."""
    core.accepted(range(500, 508), 2, request_id="teacher")
    core.finish()
    assert abs(core.core.step_cost.recompute_ns(4) - 300) <= 1 and abs(core.core.step_cost.recompute_ns(9) - 800) <= 1
    core.core.leaves.clear()


def one_victim(core: CoreDriver) -> StepPlan:
    """b loses its row, with 4 tokens computed in 1 block. The plan that was made then."""
    core.accepted([1, 2, 3], 9, request_id="a")
    core.accepted([5, 6, 7], 9, request_id="b")
    core.next_rows(), core.next_rows()
    core.answer()
    plan = core.plan()
    assert plan is not None and preempted(core) == ["b"]
    return plan


@pytest.mark.parametrize(
    ("num_blocks", "swap_ns", "recompute_ns", "pays"),
    [(3, 50, 301, True), (3, 50, 300, False), (3, 0, 300, False), (3, 50, 0, False), (0, 50, 300, False), (1, 1, 3, True)],
)
def test_swapping_pays_when_out_and_in_cost_less_than_to_compute_again(
    num_blocks: int, swap_ns: int, recompute_ns: int, pays: bool
) -> None:
    assert preemption.swap_pays(num_blocks, swap_ns, recompute_ns) == pays


@pytest.mark.parametrize(("swap_ns", "swaps"), [(1, True), (149, True), (151, False), (5000, False), (0, False)])
def test_the_cheaper_one_is_chosen_and_flips_where_they_cost_the_same(swap_ns: int, swaps: bool) -> None:
    """1 block out and in against 300 ns of computing 4 tokens again."""
    core = driver(3, host=5, swap_ns=swap_ns)
    learn(core)
    plan = one_victim(core)
    assert len(plan.swap_out_blocks) == swaps
    core.finish()
    victim = core.requests[-1]
    assert stats(victim).recomputed_tokens == (0 if swaps else 4) and stats(victim).preemptions == 1


def test_more_tokens_in_the_block_make_the_same_swap_pay() -> None:
    """A block costs 2 * 100; 2 tokens again cost 100, 4 cost 300."""
    for length, swaps in [(2, False), (4, True)]:
        core = driver(9, host=5, swap_ns=100)
        learn(core)
        core.accepted(range(length), 9, request_id="a")
        core.step()
        preempt(core, 0)
        plan = core.plan()
        assert plan is not None and bool(len(plan.swap_out_blocks)) == swaps
        core.finish()


def test_while_no_step_was_measured_nothing_is_swapped() -> None:
    core = driver(3, host=5, swap_ns=1)
    core.accepted([1, 2, 3], 9, request_id="a")
    core.next_rows()
    preempt(core, 0)
    assert core.core.counters.swapped_blocks == 0
    core.finish()


def displace(core: CoreDriver, name: str = "i", num_outputs: int = 1) -> StepPlan:
    """A request of a higher class comes when no row is free, and takes one for so many steps. The plan in which it does."""
    core.accepted([900], num_outputs, request_id=name, priority=INTERACTIVE)
    plan = core.plan()
    assert plan is not None
    return plan


@pytest.mark.parametrize(("host", "swaps"), [(0, False), (2, False), (3, True)])
def test_what_does_not_fit_host_memory_whole_is_computed_again(host: int, swaps: bool) -> None:
    core = driver(9, rows=1, host=host, swap_ns=1)
    learn(core)
    victim = core.accepted(range(9), 9, request_id="a")
    core.step()
    displace(core)
    assert preempted(core) == ["a"] and core.core.load(0).held_host_blocks == (3 if swaps else 0)
    core.finish()
    assert stats(victim).recomputed_tokens == (0 if swaps else 9)


def test_when_host_memory_is_full_the_next_victim_computes_again_and_when_it_is_not_any_more_swaps() -> None:
    core = driver(20, rows=3, host=3, swap_ns=1)
    learn(core)
    victims = [core.accepted([ord(name)] * 8, 20, request_id=name) for name in "abc"]
    core.step()
    first = displace(core, "i1", 4)
    assert preempted(core) == ["c"] and len(first.swap_out_blocks) == 2
    second = displace(core, "i2", 4)
    assert preempted(core) == ["c", "b"] and len(second.swap_out_blocks) == 0, "1 host block is left, and 2 are wanted"
    while core.core.in_flight:
        core.answer()
    for _ in range(8):
        core.step()
    assert core.core.load(0).held_host_blocks == 0 and core.core.load(0).running_requests == 3
    third = displace(core, "i3")
    assert preempted(core)[:2] == ["c", "b"] and len(preempted(core)) == 3 and 0 < len(third.swap_out_blocks) <= 3
    core.finish()
    assert [stats(victim).recomputed_tokens for victim in victims] == [0, 9, 0]


# ----------------------------------------------------------------------------------------------------- how it returns


def test_swapped_blocks_go_and_come_back_by_plan_entries() -> None:
    core = driver(20, rows=1, host=9, swap_ns=1)
    learn(core)
    core.accepted(range(9), 9, request_id="a")
    first = core.step()
    assert first is not None and core.core.load(0).held_blocks == len(first.start_blocks) == 3
    out = displace(core)
    assert out.ended.tolist() == [0] and [start.slot for start in out.header.starts] == [0]
    assert out.swap_out_blocks.tolist() == first.start_blocks.tolist() and out.swap_out_host_blocks.tolist() == [1, 2, 3]
    load = core.core.load(0)
    assert (load.held_blocks, load.retiring_blocks, load.free_blocks, load.held_host_blocks) == (1, 3, 16, 3)
    assert core.plan() is None, "the row is named by a plan in flight"
    core.answer()
    assert core.core.load(0).free_blocks == 20
    back = core.plan()
    assert back is not None
    start = back.header.starts[0]
    assert (start.num_tokens, start.num_computed_tokens, start.num_blocks) == (10, 9, 3)
    assert back.swap_in_host_blocks.tolist() == [1, 2, 3] and back.swap_in_blocks.tolist() == back.start_blocks.tolist()
    assert back.num_tokens.tolist() == [1], "it decodes as if nothing had been"
    load = core.core.load(0)
    assert (load.held_blocks, load.free_blocks, load.held_host_blocks, load.swapped_blocks) == (3, 17, 0, 6)
    assert core.core.kv.host.num_retiring == 3, "the plan in flight reads them"
    core.answer()
    assert core.core.kv.host.num_available == 9
    core.finish()


def test_only_blocks_that_were_written_are_swapped() -> None:
    core = driver(20, rows=1, budget=6, host=9, swap_ns=1)
    learn(core)
    core.accepted(range(15), 9, request_id="a")
    first = core.step()
    assert first is not None and len(first.start_blocks) == 4
    out = displace(core)
    assert out.swap_out_blocks.tolist() == first.start_blocks[:2].tolist(), "6 of 15 tokens"
    core.answer()
    back = core.plan()
    assert back is not None and back.num_tokens.tolist() == [6]
    assert back.swap_in_blocks.tolist() == back.start_blocks[:2].tolist() and len(back.start_blocks) == 4
    core.finish()


def test_one_swapped_twice_in_the_middle_of_its_prompt_computes_each_token_once() -> None:
    core = driver(20, rows=1, budget=6, host=9, swap_ns=1)
    learn(core)
    victim = core.accepted(range(15), 2, request_id="a")
    for name in ("i1", "i2"):
        core.step()
        displace(core, name)
        core.answer()
    core.finish()
    assert [start.num_computed_tokens for plan in core.plans for start in plan.header.starts if start.num_tokens == 15] == [
        0,
        6,
        12,
    ]
    assert stats(victim).recomputed_tokens == 0 and stats(victim).preemptions == 2


def test_what_the_prefix_cache_still_has_is_not_swapped_in() -> None:
    core = driver(20, rows=1, host=9, swap_ns=1)
    learn(core)
    core.accepted(range(9), 9, request_id="a", salt="")
    first = core.step()
    displace(core)
    core.answer()
    assert first is not None and core.core.load(0).cached_blocks == 2 and core.core.load(0).held_host_blocks == 3
    back = core.plan()
    assert back is not None
    assert back.swap_in_host_blocks.tolist() == [3], "the third block of 1 token; the first two are cached"
    assert back.start_blocks[:2].tolist() == first.start_blocks[:2].tolist()
    assert back.swap_in_blocks.tolist() == back.start_blocks[2:].tolist() and back.num_tokens.tolist() == [1]
    assert core.core.load(0).held_host_blocks == 0 and core.core.load(0).cached_blocks == 0
    assert core.core.counters.swapped_blocks == 3 + 1
    core.finish()
    assert stats(core.requests[1]).recomputed_tokens == 0


def test_when_the_cache_has_all_its_blocks_nothing_is_swapped_in_and_the_host_blocks_come_back() -> None:
    core = driver(20, rows=1, host=9, swap_ns=1)
    learn(core)
    core.accepted(range(8), 9, request_id="a", salt="")
    core.step()
    displace(core)
    core.answer()
    back = core.plan()
    assert back is not None and len(back.swap_in_blocks) == 0 and back.header.starts[0].num_computed_tokens == 8
    assert core.core.load(0).held_host_blocks == 0
    core.finish()


def test_of_cached_blocks_of_which_some_were_evicted_the_rest_is_swapped_in() -> None:
    core = driver(5, rows=1, host=9, swap_ns=1)
    learn(core)
    core.accepted(range(13), 2, request_id="a", salt="")
    core.step()
    displace(core)
    core.answer()
    assert core.core.load(0).cached_blocks == 3
    core.accepted(range(100, 112), 1, request_id="wide", priority=INTERACTIVE)  # 3 blocks: 2 are free, the cached tail goes
    assert core.step() is not None
    back = core.plan()
    assert back is not None and back.swap_in_host_blocks.tolist() == [3, 4] and back.num_tokens.tolist() == [1]
    core.finish()


def test_a_computed_prefix_that_is_cached_is_not_computed_again_after_preemption() -> None:
    core = driver(20)
    core.accepted(range(9), 9, request_id="a", salt="")
    core.step()
    preempt(core, 0)
    back = core.plan()
    assert back is not None and back.header.starts[0].num_computed_tokens == 8 and back.num_tokens.tolist() == [2]
    core.finish()
    assert stats(core.requests[0]).recomputed_tokens == 1, "9 were computed, 8 are found"


def test_a_preempted_sibling_copies_the_prompt_again_and_computes_only_its_own_outputs() -> None:
    core = driver(20)
    outputs = core.accepted(range(6), 9, request_id="a", num_outputs=2).siblings
    for _ in range(3):
        core.step()
    assert core.core.load(0).held_blocks == 3, "one is shared, and each has one of its own"
    source = core.core.kv.tables.row(0).tolist()
    assert [len(output.got) for output in outputs] == [3, 2]
    preempt(core, 1)
    assert core.core.load(0).held_blocks == 2
    back = core.plan()
    assert back is not None
    start = next(iter(back.header.starts))
    assert (start.output_index, start.num_tokens, start.num_computed_tokens) == (1, 8, 6)
    assert back.copy_from.tolist() == [source[1]] and back.copy_to.tolist() == [back.start_blocks[1]]
    assert back.start_blocks[0] == source[0] and core.core.kv.pool.ref_counts[source[0]] == 2
    assert back.num_tokens.tolist() == [1, 2]
    core.finish()
    assert stats(outputs[1]).recomputed_tokens == 1 and stats(outputs[0]).preemptions == 0


def test_a_preempted_sibling_whose_source_is_gone_computes_the_prompt_itself() -> None:
    core = driver(20)
    outputs = core.accepted(range(6), 9, num_outputs=2).siblings
    for _ in range(3):
        core.step()
    preempt(core, 1)
    core.truncate(outputs[0], 1)
    back = core.plan()
    assert back is not None and back.header.starts[0].num_computed_tokens == 0 and len(back.copy_from) == 0
    core.finish()
    assert stats(outputs[1]).recomputed_tokens == 7


def test_siblings_preempted_together_compute_the_prompt_once() -> None:
    core = driver(20)
    outputs = core.accepted(range(6), 9, num_outputs=3).siblings
    for _ in range(3):
        core.step()
    for slot in (2, 1, 0):
        preempt(core, slot)
    assert core.core.load(0).held_blocks == 0
    worker = core.worker
    assert worker is not None
    before = worker.num_computed_tokens
    core.finish()
    again = worker.num_computed_tokens - before - sum(9 - len_before for len_before in (3, 2, 2))
    recomputed = sum(stats(output).recomputed_tokens for output in outputs)
    assert recomputed == again
    assert recomputed >= 6 + 2 + 1 + 1, "the prompt, and what each had computed of its outputs"


# ----------------------------------------------------------------------------------------------------- how often


@pytest.mark.parametrize("most", [1, 2, 3])
def test_after_so_many_preemptions_it_comes_back_with_all_its_blocks_and_is_nobodys_victim(most: int) -> None:
    core = driver(20, max_preemptions=most)
    core.accepted(range(3), 18, request_id="a")
    core.accepted(range(9), 9, request_id="b", priority=INTERACTIVE)
    core.step()
    slot = core.core.request("a").sequences[0].slot
    for count in range(most):
        assert not core.core.rows.is_protected[slot] and core.core.kv.tables.num_blocks[slot] == -(-(3 + count) // 4)
        preempt(core, slot)
        core.step()
        slot = core.core.request("a").sequences[0].slot
    assert core.core.rows.is_protected[slot] and core.core.kv.tables.num_blocks[slot] == 5, "for 3 + 18 - 1 tokens"
    assert slot not in preemption.candidates(core.core.rows)
    core.finish()


def test_who_is_protected_waits_until_all_its_blocks_are_there() -> None:
    core = driver(5, max_preemptions=1)
    core.accepted(range(3), 14, request_id="a")
    core.accepted(range(4, 7), 5, request_id="b", priority=INTERACTIVE)
    core.step()
    slot = core.core.request("a").sequences[0].slot
    preempt(core, slot)
    while state(core, "b") is not State.ENDED:
        assert "a" not in turn(core), "4 blocks are free of which 1 is spare, and it wants 4"
    assert turn(core) == {"a": 4}
    core.finish()


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("swap_ns", [0, 1])
def test_nobody_is_preempted_more_often_than_that(most: int, swap_ns: int) -> None:
    core = driver(9, max_preemptions=most, host=6, swap_ns=swap_ns)
    learn(core)
    requests = [core.accepted([i], 30, priority=1 + i % 3) for i in range(7)]
    core.finish()
    counts = [stats(request).preemptions for request in requests]
    assert max(counts) == most and sum(counts) == core.core.counters.preemptions
    assert all(request.end is not None and request.end.reason is EndReason.LENGTH for request in requests)


def test_who_stands_alone_between_protected_ones_gives_way_itself_and_returns_when_they_end() -> None:
    core = driver(7, max_preemptions=1)
    core.accepted(range(3), 18, request_id="protected")
    core.step()
    preempt(core, 0)
    assert core.next_rows() == {"protected": 4}
    core.answer()
    last = core.accepted([8], 9, request_id="last", priority=INTERACTIVE)
    until(core, 2)
    assert preempted(core) == ["protected", "last"], "of 7 blocks 5 are reserved; the third of its own is not there"
    core.finish()
    assert stats(core.requests[0]).preemptions == 1 and stats(last).preemptions == 1


def test_the_last_running_one_gets_on_to_the_last_block_of_the_pool() -> None:
    core = driver(4)
    core.accepted([1], 16, request_id="a")
    for i in range(5):
        core.accepted([i], 16, request_id=f"b{i}")
    seen: list[str] = []
    while not core.requests[0].over:
        rows = turn(core)
        seen += [next(iter(rows))] if rows else []
    assert set(seen) == {"a"} and stats(core.requests[0]).preemptions == 0
    core.finish()


# ------------------------------------------------------------------------------------------- room for a higher class


def test_a_higher_class_takes_the_row_of_a_lower_one() -> None:
    core = driver(20, rows=2)
    core.accepted([1], 9, request_id="b1", priority=BATCH)
    core.accepted([2], 9, request_id="b2", priority=BATCH)
    core.step()
    core.accepted([3, 4], 9, request_id="i", priority=INTERACTIVE)
    assert core.next_rows() == {"b1": 1, "i": 2} and preempted(core) == ["b2"]
    explained = core.core.request("b2").sequences[0].preempted_by
    assert [(note.by_request_id, note.lost_tokens, note.swapped) for note in explained] == [("i", 1, False)]
    core.finish()


def test_it_takes_no_more_rows_than_it_needs_of_the_lowest_class_and_least_work() -> None:
    core = driver(8, rows=4)
    for name, length, priority in [("n", 6, NORMAL), ("b1", 6, BATCH), ("b2", 2, BATCH), ("b3", 2, BATCH)]:
        core.accepted(range(length), 9, request_id=name, priority=priority)
    core.step()
    core.accepted(range(10), 9, request_id="i", priority=INTERACTIVE)
    core.step()
    assert preempted(core) == ["b3", "b2"], "of 8 blocks 2 are free; 3 and a spare one are wanted"
    core.finish()


@pytest.mark.parametrize(
    ("running", "waiting"), [(INTERACTIVE, INTERACTIVE), (NORMAL, NORMAL), (BATCH, BATCH), (NORMAL, BATCH)]
)
def test_nobody_gives_way_to_an_equal_or_a_lower_one(running: int, waiting: int) -> None:
    core = driver(20, rows=1)
    core.accepted([1], 9, request_id="runs", priority=running)
    core.step()
    core.accepted([2], 9, request_id="waits", priority=waiting)
    while not core.requests[0].over:
        turn(core)
    assert preempted(core) == []
    core.finish()


@pytest.mark.parametrize(("oldest_every", "order"), [(2, ["first", "old", "urgent"]), (16, ["first", "urgent", "old"])])
def test_who_was_admitted_by_age_gives_way_to_nobody(oldest_every: int, order: list[str]) -> None:
    core = driver(20, rows=1, oldest_every=oldest_every)
    core.accepted([1], 2, request_id="first", priority=INTERACTIVE)
    core.step()
    core.accepted([2], 5, request_id="old", priority=BATCH)
    core.accepted([3], 5, request_id="urgent", priority=INTERACTIVE)
    seen: list[str] = []
    for _ in range(40):
        seen += [name for name in turn(core) if name not in seen]
    assert seen == order
    assert preempted(core) == []
    core.finish()


def test_nobody_is_preempted_when_it_would_not_suffice() -> None:
    core = driver(8)
    core.accepted(range(18), 4, request_id="equal", priority=INTERACTIVE)
    core.accepted([1, 2], 9, request_id="low", priority=BATCH)
    core.step()
    core.accepted(range(16), 2, request_id="wide", priority=INTERACTIVE)
    while not core.requests[0].over:
        assert "wide" not in turn(core), "2 blocks are free and 1 is of the lower class; 4 and a spare one are wanted"
    assert preempted(core) == []
    core.finish()


def test_for_room_the_policies_that_reserve_preempt_nobody() -> None:
    for policy in ("static", "prefill_first"):
        core = driver(20, rows=1, policy=policy)
        core.accepted([1], 5, request_id="b", priority=BATCH)
        core.step()
        core.accepted([2], 5, request_id="i", priority=INTERACTIVE)
        core.finish()
        assert preempted(core) == []
