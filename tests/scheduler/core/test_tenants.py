"""Tenants: who is served, what they are charged, who is forgotten."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.core.config import CoreConfig, TenantLimits
from scheduler.core.tenants import SCALE, Tenants


def tenants(*limits: TenantLimits, max_idle: int = 100, **config: int) -> Tenants:
    return Tenants(CoreConfig(tenants=limits, **config), max_idle)  # type: ignore[arg-type]


def index(of: Tenants, name: str) -> int:
    found = of.index_of(name)
    assert found is not None
    return found


def test_without_a_list_every_tenant_has_weight_1_and_no_quota() -> None:
    some = tenants()
    assert [some.index_of(name) for name in ("a", "", "b", "a")] == [0, 1, 2, 0]
    assert some.weight[:3].tolist() == [1, 1, 1] and some.max_blocks[:3].tolist() == [0, 0, 0]
    assert [some.name(number) for number in range(3)] == ["a", "", "b"]


def test_a_list_without_a_star_serves_nobody_else() -> None:
    some = tenants(TenantLimits("a", weight=3, max_blocks=7), TenantLimits("b"))
    assert [some.index_of(name) for name in ("b", "a", "c", "", "*")] == [1, 0, None, None, None]
    assert (some.weight[0], some.max_blocks[0]) == (3, 7)


def test_the_star_is_what_each_of_the_others_gets() -> None:
    some = tenants(TenantLimits("a", weight=3), TenantLimits("*", weight=2, max_blocks=5))
    assert [some.index_of(name) for name in ("x", "y", "a")] == [1, 2, 0]
    assert some.weight[:3].tolist() == [3, 2, 2] and some.max_blocks[:3].tolist() == [0, 5, 5]


def test_charges_are_tokens_times_their_weight_by_the_tenants_weight() -> None:
    some = tenants(TenantLimits("a", weight=3), TenantLimits("b"), input_token_weight=5, output_token_weight=7)
    some.charge_input(0, 100)
    some.charge_input(1, 100)
    assert some.served[:2].tolist() == [500 * SCALE // 3, 500 * SCALE]
    some.charge_outputs(np.array([1, 0, 1]))
    assert some.served[:2].tolist() == [500 * SCALE // 3 + 7 * SCALE // 3, 514 * SCALE]
    assert [some.tokens_of(number) for number in (0, 1)] == [168, 514]


@given(rows=st.lists(st.integers(0, 40)), weights=st.lists(st.integers(1, 1000), min_size=41, max_size=41))
def test_charging_rows_at_once_is_charging_one_after_another(rows: list[int], weights: list[int]) -> None:
    some = tenants(*(TenantLimits(f"t{number}", weight=weight) for number, weight in enumerate(weights)))
    some.charge_outputs(np.array(rows, np.int32))
    expected = [rows.count(number) * 2 * SCALE // weights[number] for number in range(41)]
    assert some.served[:41].tolist() == expected


def test_lifting_never_lowers() -> None:
    some = tenants(TenantLimits("a"))
    some.lift(0, 5)
    some.lift(0, 3)
    assert some.served[0] == 5


def test_columns_grow_and_keep_what_they_hold() -> None:
    some = tenants(max_idle=1000)
    for number in range(100):
        assert some.index_of(f"t{number}") == number
        some.held_blocks[number] = some.served[number] = number
    assert some.held_blocks[:100].tolist() == some.served[:100].tolist() == list(range(100))
    assert all(len(column) >= 100 for column in (some.weight, some.max_blocks, some.num_requests))


def test_half_of_the_idle_is_forgotten_when_too_many_are_those_served_least_first() -> None:
    some = tenants(max_idle=4)
    for name, num_tokens in (("a", 40), ("b", 10), ("c", 30), ("d", 20)):
        some.charge_input(index(some, name), num_tokens)
    assert index(some, "e") == 1  # in the place of b, the least served; d was forgotten too
    assert some.served[1] == 0 and some.name(1) == "e" and len(some) == 3
    assert index(some, "b") == 3 and some.served[3] == 0
    assert some.tokens_of(index(some, "a")) == 40 and some.tokens_of(index(some, "c")) == 30


def test_who_has_a_request_is_never_forgotten_nor_who_is_listed() -> None:
    some = tenants(TenantLimits("listed"), TenantLimits("*"), max_idle=2)
    some.enter(index(some, "listed"))
    some.leave(index(some, "listed"))
    busy = index(some, "busy")
    some.enter(busy)
    some.enter(busy)
    some.leave(busy)
    some.charge_input(busy, 5)
    for number in range(50):
        assert index(some, f"passing{number}") not in (0, busy)
    assert (index(some, "busy"), some.tokens_of(busy)) == (busy, 5)
    assert len(some) <= 2 + 2
    some.leave(busy)
    for number in range(50):
        index(some, f"passing{number}")
    assert index(some, "busy") is not None and len(some) <= 1 + 2


def test_ending_more_than_had_begun_is_our_mistake() -> None:
    some = tenants(TenantLimits("a"))
    with pytest.raises(AssertionError, match="'a'"):
        some.leave(0)


def test_thinking_ahead_on_a_copy_charges_nobody() -> None:
    some = tenants(TenantLimits("a"))
    twin = some.copy()
    twin.charge_input(0, 5)
    twin.lift(0, 10 * SCALE)
    assert some.served[0] == 0 and twin.tokens_of(0) == 10
