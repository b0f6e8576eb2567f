"""Tenants with a quota of blocks, decision by decision: who is passed over, who is preempted for it, who is refused."""

from __future__ import annotations

import pytest

from scheduler.core import CoreConfig
from scheduler.core.config import TenantLimits
from scheduler.core.request import State
from tests.helpers.core_driver import CoreDriver, Tracked
from tests.helpers.fake_worker import worker_facts
from wire import EndReason, Refused

BATCH, NORMAL, INTERACTIVE = 1, 2, 3


def driver(*quotas: tuple[str, int], rows: int = 8, num_blocks: int = 40, **config: object) -> CoreDriver:
    """Blocks of 4 tokens. quotas: (tenant, blocks); "*" without a quota is there in any case."""
    tenants = tuple(TenantLimits(name, max_blocks=blocks) for name, blocks in quotas)
    if "*" not in dict(quotas):
        tenants += (TenantLimits("*"),)
    facts = worker_facts(num_blocks=num_blocks, max_batch_rows=rows, max_step_tokens=64)
    return CoreDriver(CoreConfig(max_batch_rows=rows, max_step_tokens=64, tenants=tenants, **config), facts)  # type: ignore[arg-type]


def held(core: CoreDriver, tenant: str) -> int:
    index = core.core.tenants.index_of(tenant)
    assert index is not None
    return int(core.core.tenants.held_blocks[index])


def preempted(core: CoreDriver) -> list[str]:
    return [request_id for request_id, reason in core.core.leaves if reason == "preempted"]


def order_of_admission(core: CoreDriver) -> list[str]:
    """Runs until nothing is left."""
    seen: list[str] = []
    while core.core.num_requests:
        seen += [name for name in core.next_rows() if name not in seen]
        core.answer()
    return seen


# --------------------------------------------------------------------------------------------------------- admission


def test_a_tenant_at_its_quota_is_passed_over_while_another_goes_on() -> None:
    core = driver(("a", 4))
    core.accepted(range(9), 3, request_id="a1", tenant="a")
    core.accepted(range(9), 3, request_id="a2", tenant="a")
    core.accepted(range(9), 3, request_id="b1", tenant="b")
    core.accepted(range(9), 3, request_id="b2", tenant="b")
    assert core.next_rows() == {"a1": 9, "b1": 9, "b2": 9}
    assert (held(core, "a"), held(core, "b")) == (3, 6)
    core.finish()


@pytest.mark.parametrize(("second", "joins"), [(8, True), (9, False)])
def test_a_quota_may_be_filled_to_its_last_block(second: int, joins: bool) -> None:
    core = driver(("a", 5))
    core.accepted(range(9), 2, request_id="a1", tenant="a")
    core.accepted(range(second), 2, request_id="a2", tenant="a")
    assert ("a2" in core.next_rows()) == joins and held(core, "a") == (5 if joins else 3)
    core.finish()


def test_in_a_tenant_at_its_quota_a_smaller_request_does_not_overtake() -> None:
    core = driver(("a", 4))
    core.accepted(range(9), 3, request_id="a1", tenant="a")
    core.accepted(range(9), 3, request_id="large", tenant="a")
    core.accepted([1], 3, request_id="small", tenant="a")
    assert order_of_admission(core) == ["a1", "large", "small"]


def test_a_higher_class_does_not_pass_the_quota_and_does_not_preempt_others_for_it() -> None:
    core = driver(("a", 3), rows=3)
    core.accepted(range(9), 4, request_id="a1", tenant="a")
    core.accepted([1], 5, request_id="b1", tenant="b", priority=BATCH)
    core.step()
    core.accepted(range(9), 2, request_id="a2", tenant="a", priority=INTERACTIVE)
    core.accepted([2], 5, request_id="b2", tenant="b", priority=BATCH)
    assert core.next_rows() == {"a1": 1, "b1": 1, "b2": 1}
    core.finish()
    assert preempted(core) == []


def test_whoever_waits_longest_does_not_pass_the_quota() -> None:
    core = driver(("a", 3), oldest_every=1)
    core.accepted(range(9), 4, request_id="a1", tenant="a")
    core.accepted(range(9), 4, request_id="a2", tenant="a")
    core.accepted([1], 2, request_id="b1", tenant="b")
    assert order_of_admission(core) == ["a1", "b1", "a2"]


def test_each_tenant_that_is_not_listed_has_a_quota_of_its_own() -> None:
    core = driver(("*", 3))
    for name in ("x1", "x2", "y1", "y2"):
        core.accepted(range(9), 2, request_id=name, tenant=name[0])
    assert core.next_rows() == {"x1": 9, "y1": 9}
    core.finish()


def test_the_policies_that_reserve_reserve_against_the_quota() -> None:
    for policy in ("static", "prefill_first"):
        core = driver(("a", 5), policy=policy)
        core.accepted([1], 12, request_id="a1", tenant="a")
        core.accepted([2], 12, request_id="a2", tenant="a")
        core.accepted([3], 5, request_id="a3", tenant="a")
        assert core.next_rows() == {"a1": 1}, "3 blocks each for 12 tokens"
        assert held(core, "a") == 3
        core.finish()


# ----------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("end", ["length", "cancel", "truncate", "frontend"])
def test_after_an_end_the_tenant_is_tried_again(end: str) -> None:
    core = driver(("a", 3))
    first = core.accepted(range(9), 1 if end == "length" else 4, request_id="a1", tenant="a", frontend=1)
    core.accepted(range(9), 2, request_id="a2", tenant="a")
    assert core.next_rows() == {"a1": 9}
    if end == "cancel":
        core.cancel("a1")
    elif end == "truncate":
        core.truncate(first, 0)
    elif end == "frontend":
        core.frontend_lost(1)
    core.answer()
    assert held(core, "a") == 0 and core.next_rows() == {"a2": 9}
    core.finish()


def test_a_lost_worker_frees_the_quota() -> None:
    core = driver(("a", 3))
    core.accepted(range(9), 4, request_id="a1", tenant="a")
    core.accepted(range(9), 2, request_id="a2", tenant="a")
    core.step()
    core.lost()
    assert held(core, "a") == 0
    core.joined()
    assert "a1" in core.next_rows() and held(core, "a") == 3
    core.finish()


def test_while_it_is_passed_over_it_saves_no_turns_up() -> None:
    core = driver(("a", 3), rows=2)
    core.accepted(range(9), 4, request_id="a1", tenant="a")
    for index in range(2, 5):
        core.accepted(range(9), 1, request_id=f"a{index}", tenant="a")
    for index in range(1, 8):
        core.accepted(range(9), 4, request_id=f"b{index}", tenant="b")
    order = order_of_admission(core)
    after = order[order.index("a2") :]
    assert [name[0] for name in after[:4]].count("b") >= 1, "b gets its turns between"


# ------------------------------------------------------------------------------------------------------------ growing


def test_growing_past_the_quota_costs_a_row_of_the_same_tenant_only() -> None:
    core = driver(("a", 3))
    core.accepted([1], 9, request_id="other", tenant="b", priority=BATCH)
    core.accepted([1, 2, 3], 9, request_id="a1", tenant="a")
    core.accepted([4, 5, 6], 9, request_id="a2", tenant="a")
    core.step()
    core.step()
    assert core.next_rows() == {"a1": 1, "other": 1} and preempted(core) == ["a2"], "4 blocks are wanted, 3 allowed"
    assert held(core, "a") == 2 and core.core.load(0).free_blocks > 30, "there were blocks enough"
    core.finish()
    assert all(request.end is not None and request.end.reason is EndReason.LENGTH for request in core.requests)


def test_of_the_tenants_own_rows_it_is_the_usual_victim() -> None:
    core = driver(("a", 5))
    core.accepted([1, 2, 3], 9, request_id="low", tenant="a", priority=BATCH)
    core.accepted(range(7), 9, request_id="a1", tenant="a", priority=INTERACTIVE)
    core.accepted([4, 5, 6], 9, request_id="a2", tenant="a", priority=INTERACTIVE)
    core.step()
    core.step()
    core.step()
    assert preempted(core) == ["low"] and held(core, "a") == 5
    core.finish()


def test_one_alone_in_its_tenant_grows_to_the_quota_and_is_never_preempted() -> None:
    core = driver(("a", 3))
    request = core.accepted([1, 2], 11, tenant="a")
    core.accepted([1], 30, tenant="b")
    while not request.over:
        core.step()
        assert held(core, "a") <= 3
    assert preempted(core) == [] and len(request.got) == 11
    core.finish()


def test_held_blocks_never_pass_the_quota_however_many_want_them() -> None:
    core = driver(("a", 7), ("b", 5), num_blocks=30)
    for index in range(8):
        core.accepted([index] * (1 + index % 5), 12, tenant="ab"[index % 2], priority=1 + index % 3)
    while core.core.num_requests:
        core.step()
        assert held(core, "a") <= 7 and held(core, "b") <= 5
    core.finish()
    assert preempted(core)


# ------------------------------------------------------------------------------------------------------------ refusal


def refused(answer: Tracked | Refused) -> Refused:
    assert isinstance(answer, Refused)
    return answer


def test_a_request_larger_than_its_tenants_quota_is_refused_with_the_numbers() -> None:
    core = driver(("a", 4))
    answer = refused(core.add(range(10), 8, tenant="a"))
    assert answer.code == "FAILED_PRECONDITION"
    assert answer.message.startswith("the request needs 5 blocks for 18 tokens, tenant 'a' may hold 4 of 4 tokens")
    assert isinstance(core.add(range(10), 7, tenant="a"), Tracked), "the last token needs no block"
    assert isinstance(core.add(range(10), 8, tenant="b"), Tracked)
    core.finish()


def test_a_quota_larger_than_the_pool_is_not_blamed() -> None:
    core = driver(("a", 100), num_blocks=4)
    answer = refused(core.add(range(10), 8, tenant="a"))
    assert answer.message.startswith("the request needs 5 blocks for 18 tokens, the whole KV cache has 4 of 4 tokens")


def test_without_a_length_of_its_own_it_may_fill_the_quota() -> None:
    core = driver(("a", 4))
    request = core.accepted(range(10), 0, tenant="a")
    core.finish()
    assert len(request.got) == 4 * 4 + 1 - 10
    assert request.end is not None and request.end.reason is EndReason.LENGTH


def test_an_unknown_tenant_is_refused_by_name_unless_all_others_are_served() -> None:
    facts = worker_facts()
    core = CoreDriver(CoreConfig(tenants=(TenantLimits("a"),)), facts)
    for name in ("b", ""):
        answer = refused(core.add([1], 2, tenant=name))
        assert (answer.code, answer.field) == ("PERMISSION_DENIED", "scheduling.tenant")
        assert f"tenant {name!r}" in answer.message
    assert isinstance(core.add([1], 2, tenant="a"), Tracked)
    core.finish()
    for config in (CoreConfig(), CoreConfig(tenants=(TenantLimits("a"), TenantLimits("*")))):
        core = CoreDriver(config, facts)
        assert isinstance(core.add([1], 2, tenant="b"), Tracked)
        core.finish()


@pytest.mark.parametrize("max_tokens", [0, 11])
def test_a_new_worker_with_smaller_blocks_makes_the_quota_smaller(max_tokens: int) -> None:
    core = driver(("a", 3))
    request = core.accepted([1, 2], max_tokens, tenant="a")
    assert request.max_outputs == 11
    core.joined(worker_facts(num_blocks=40, block_size=2, max_step_tokens=64))
    core.finish()
    assert request.end is not None
    assert request.end.reason is (EndReason.ERROR if max_tokens else EndReason.LENGTH), "3 blocks of 2 tokens, for 2 + 5 - 1"
    assert len(request.got) == (0 if max_tokens else 5)


# ------------------------------------------------------------------------------------------------------------ padding


def test_rows_that_pad_do_not_count() -> None:
    core = driver(("a", 6), policy="static")
    core.accepted([1, 2, 3], 2, request_id="short", tenant="a")
    core.accepted([4, 5, 6], 9, request_id="long", tenant="a")
    assert core.step() is not None and held(core, "a") == 1 + 3, "for 3 + 2 - 1 and 3 + 9 - 1 tokens"
    core.step()
    assert core.next_padding() and held(core, "a") == 3 and core.core.load(0).held_blocks == 4
    core.answer()
    core.finish()


def test_a_row_that_goes_on_beside_padding_may_grow_into_the_whole_quota() -> None:
    """Admitted by one policy, without reservation; the other keeps the ended row, with its blocks."""
    core = driver(("a", 3))
    core.accepted([1, 2, 3], 2, request_id="short", tenant="a")
    core.accepted([4, 5, 6], 10, request_id="long", tenant="a")
    core.step()
    assert core.set_policy("static") == ""
    core.step()
    long = core.requests[1]
    while not long.over:
        core.step()
    assert preempted(core) == [] and len(long.got) == 10
    core.finish()


def test_a_tenant_waits_for_the_batch_not_for_the_padding() -> None:
    core = driver(("a", 3), policy="static")
    core.accepted(range(9), 1, request_id="a1", tenant="a")
    core.accepted(range(9), 1, request_id="a2", tenant="a")
    core.accepted([1, 2], 3, request_id="b1", tenant="b")
    batches = []
    while core.core.num_requests:
        batches.append("/".join(core.next_rows()))
        core.answer()
    assert batches == ["a1/b1", "b1", "b1", "a2"]
    core.finish()


def test_blocks_of_several_outputs_count_for_each() -> None:
    core = driver(("a", 8))
    outputs = core.accepted(range(6), 4, tenant="a", num_outputs=4).siblings
    core.step()
    core.step()
    assert core.core.load(0).held_blocks <= held(core, "a") <= 8
    core.finish()
    assert all(len(output.got) == 4 for output in outputs)
    assert core.core.request(outputs[0].request_id).sequences[0].state is State.ENDED
