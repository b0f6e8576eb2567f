"""The queue: each rule of its order by exact ids, its bounds and counts, and a cost that the number waiting does not change."""

from __future__ import annotations

import pytest

from scheduler.core.config import CoreConfig, TenantLimits
from scheduler.core.queue import Queue
from scheduler.core.tenants import SCALE, Tenants
from tests.helpers.waiting import Waiting, waiting

NEVER = 1_000_000_000  # oldest_every: rule 1 out of the way


def queue(*weights: int, oldest_every: int = NEVER, max_requests: int = 1000, max_tokens: int = 10**9) -> Queue[Waiting]:
    """Tenants 0, 1, … of these weights; 0 to 9 of weight 1 if none are given."""
    limits = tuple(TenantLimits(f"t{number}", weight=weight) for number, weight in enumerate(weights or [1] * 10))
    config = CoreConfig(max_queue_requests=max_requests, max_queue_tokens=max_tokens, oldest_every=oldest_every, tenants=limits)
    return Queue(config, Tenants(config))


def tenants(of: Queue[Waiting]) -> Tenants:
    return of._tenants


def filled(some: Queue[Waiting], *requests: Waiting) -> Queue[Waiting]:
    for request in requests:
        some.push(request)
    return some


def taken(some: Queue[Waiting], count: int = 1000, charge: bool = False) -> list[int]:
    """Ids in the order of admission; with `charge` each prompt is charged, as the core does."""
    order = []
    while len(order) < count and (head := some.head()) is not None:
        assert some.head() is head, "stable while nothing changes"
        some.take(head)
        if charge:
            tenants(some).charge_input(head.tenant, head.num_queued_tokens)
        order.append(head.sequence_id)
    return order


# ------------------------------------------------------------------------------------------------------- the order


def test_an_empty_queue_has_no_head() -> None:
    some = queue()
    assert some.head() is None and len(some) == 0 and some.num_tokens == 0


def test_first_by_class_then_by_arrival() -> None:
    some = filled(queue(), *(waiting(number, priority) for number, priority in enumerate([1, 2, 3, 2, 1, 3])))
    assert taken(some) == [2, 5, 1, 3, 0, 4]


def test_those_that_were_running_stand_before_the_new_of_their_class_by_arrival_whatever_their_tenant() -> None:
    some = filled(queue(), waiting(13, 2), waiting(14, 3), waiting(15, 1))
    tenants(some).charge_input(1, 1000)
    some.push_back(waiting(7, 2, tenant=0))
    some.push_back(waiting(4, 2, tenant=1))
    some.push_back(waiting(5, 1))
    assert taken(some) == [14, 4, 7, 13, 5, 15]


def test_inside_a_tenant_the_smallest_order_goes_first_then_arrival() -> None:
    some = filled(queue(), waiting(1, order=50), waiting(2, order=30), waiting(3, order=40), waiting(4, order=30))
    assert taken(some) == [2, 4, 3, 1]


def test_between_tenants_the_smallest_counter_goes_first() -> None:
    some = filled(queue(), waiting(1, tenant=0), waiting(2, tenant=1), waiting(3, tenant=2))
    for tenant, tokens in ((0, 30), (1, 20), (2, 10)):
        tenants(some).charge_input(tenant, tokens)
    assert taken(some) == [3, 2, 1]


def test_between_equal_tenants_whose_first_arrived_first() -> None:
    some = filled(queue(), waiting(1, tenant=2, order=90), waiting(2, tenant=1), waiting(3, tenant=2, order=10))
    assert taken(some) == [2, 3, 1]  # tenant 2 would send 3, which came after 2


def test_tenants_take_turns_by_what_their_prompts_cost() -> None:
    some = queue()
    for number in range(6):
        some.push(waiting(number, tenant=0, tokens=100))
    for number in range(6, 12):
        some.push(waiting(number, tenant=1, tokens=50))
    assert taken(some, charge=True) == [0, 6, 7, 1, 8, 9, 2, 10, 11, 3, 4, 5]


def test_a_weight_of_two_gets_twice_the_tokens() -> None:
    some = queue(1, 2)
    for number in range(20):
        some.push(waiting(number, tenant=number % 2, tokens=10))
    assert taken(some, 9, charge=True) == [0, 1, 3, 2, 5, 7, 4, 9, 11]


def test_counters_that_grow_change_the_head() -> None:
    some = filled(queue(), waiting(1, tenant=0), waiting(2, tenant=1))
    head = some.head()
    assert head is not None and head.sequence_id == 1
    tenants(some).charge_input(0, 1)
    head = some.head()
    assert head is not None and head.sequence_id == 2


def test_a_tenants_later_request_with_an_earlier_deadline_becomes_what_it_sends() -> None:
    some = filled(queue(), waiting(1, tenant=0, order=100), waiting(2, tenant=1, order=100))
    some.push(waiting(3, tenant=0, order=5))
    assert taken(some) == [2, 3, 1]  # … and waits behind whoever came before it, at equal counters


# ------------------------------------------------------------------------------------------- who begins to compete


def test_who_was_away_is_lifted_to_the_least_of_those_who_compete() -> None:
    some = filled(queue(), waiting(1, tenant=0), waiting(2, tenant=1))
    tenants(some).charge_input(0, 70)
    tenants(some).charge_input(1, 50)
    some.push(waiting(3, tenant=2))
    assert tenants(some).tokens_of(2) == 50
    assert taken(some) == [2, 3, 1]


def test_who_competes_already_is_not_lifted() -> None:
    some = filled(queue(), waiting(1, tenant=0), waiting(2, tenant=1))
    tenants(some).charge_input(0, 70)
    some.push(waiting(3, tenant=1))
    assert tenants(some).tokens_of(1) == 0


def test_who_comes_alone_is_lifted_to_what_the_last_that_left_has_by_now() -> None:
    some = queue()
    first = waiting(1, tenant=0)
    some.push(first)
    some.take(first)
    tenants(some).charge_input(0, 40)  # it runs
    some.push(waiting(2, tenant=1))
    assert tenants(some).tokens_of(1) == 40


def test_a_class_lifts_to_its_own_tenants_only() -> None:
    some = filled(queue(), waiting(1, 3, tenant=0), waiting(2, 1, tenant=1))
    tenants(some).charge_input(0, 70)
    some.push(waiting(3, 3, tenant=2))
    some.push(waiting(4, 1, tenant=3))
    assert [tenants(some).tokens_of(tenant) for tenant in range(4)] == [70, 0, 70, 0]


def test_who_comes_back_from_running_does_not_compete_by_it() -> None:
    some = filled(queue(), waiting(1, tenant=0))
    tenants(some).charge_input(0, 70)
    some.push_back(waiting(0, tenant=1))
    assert tenants(some).tokens_of(1) == 0
    some.push(waiting(2, tenant=1))
    assert tenants(some).tokens_of(1) == 70


# ---------------------------------------------------------------------------------------------------- passing over


def test_a_tenant_passed_over_is_skipped_by_every_rule_until_it_is_resumed() -> None:
    some = filled(queue(oldest_every=2), waiting(1, tenant=0), waiting(2, tenant=1), waiting(3, 3, tenant=0))
    some.push_back(waiting(0, tenant=0))
    some.pass_over(0)
    assert taken(some) == [2]
    some.push(waiting(4, tenant=0))
    assert some.head() is None and len(some) == 4
    some.resume(0)
    assert taken(some) == [0, 3, 1, 4]  # the oldest, the class, the oldest, what is left


def test_all_that_were_passed_over_can_be_resumed_at_once() -> None:
    some = filled(queue(), waiting(1, tenant=2), waiting(2, tenant=1), waiting(3, tenant=0))
    for tenant in range(3):
        some.pass_over(tenant)
    assert some.head() is None
    some.resume_all()
    assert taken(some) == [1, 2, 3]


def test_who_was_passed_over_does_not_save_up() -> None:
    some = filled(queue(), waiting(1, tenant=0), waiting(2, tenant=1))
    some.pass_over(0)
    tenants(some).charge_input(1, 500)
    some.push(waiting(3, tenant=2))
    assert tenants(some).tokens_of(2) == 500, "who is passed over is not one of those who compete"
    some.resume(0)
    assert tenants(some).tokens_of(0) == 500


def test_passing_over_ends_with_the_last_that_waits() -> None:
    some = filled(queue(), waiting(1, tenant=0))
    some.pass_over(0)
    some.remove(Waiting(1))
    some.push(waiting(2, tenant=0))
    assert taken(some) == [2]


def test_passing_over_who_does_not_wait_changes_nothing() -> None:
    some = queue()
    some.pass_over(0)
    some.resume(0)
    some.push(waiting(1, tenant=0))
    some.pass_over(0)
    some.pass_over(0)
    some.resume(0)
    assert taken(some) == [1]


# -------------------------------------------------------------------------------------------------- who waits longest


def test_every_so_many_admissions_whoever_waits_longest_goes_first() -> None:
    some = filled(
        queue(oldest_every=3), waiting(0, 1), waiting(1, 1, order=-5), *(waiting(number, 3) for number in range(2, 9))
    )
    turns = []
    order = []
    while (head := some.head()) is not None:
        turns.append(some.is_aged_turn)
        order.append(head.sequence_id)
        some.take(head)
    assert order == [2, 3, 0, 4, 5, 1, 6, 7, 8]
    assert turns == [False, False, True] * 3


def test_only_admissions_count_not_who_leaves_otherwise() -> None:
    some = filled(queue(oldest_every=2), waiting(0, 1), *(waiting(number, 3) for number in range(1, 5)))
    some.remove(Waiting(1, waiting(1, 3).header))
    assert not some.is_aged_turn and taken(some) == [2, 0, 3, 4]


def test_those_that_came_back_count_by_their_first_arrival() -> None:
    some = filled(queue(oldest_every=1), waiting(5, 3), waiting(4, 1))
    some.push_back(waiting(2, 1))
    some.push_back(waiting(9, 3))
    assert taken(some) == [2, 4, 5, 9]


def test_what_is_taken_by_rule_1_from_the_middle_of_a_line_is_not_taken_again() -> None:
    some = filled(queue(oldest_every=2), waiting(0, order=99), waiting(1, order=1), waiting(2, order=2), waiting(3, order=3))
    assert taken(some) == [1, 0, 2, 3]


def test_one_taken_by_rule_1_that_comes_back_stands_before_the_new() -> None:
    some = filled(queue(oldest_every=1), waiting(0, order=99), waiting(1, order=1))
    oldest = some.head()
    assert oldest is not None
    some.take(oldest)
    some.push_back(oldest)
    some.remove(oldest)
    some.push_back(oldest)
    assert taken(some) == [0, 1]


# ------------------------------------------------------------------------------------------------- counts and bounds


def test_anybody_can_be_removed_from_the_middle() -> None:
    some = queue()
    requests = [waiting(number, tokens=number) for number in range(5)]
    filled(some, *requests)
    some.remove(requests[2])
    assert requests[2] not in some and requests[3] in some
    assert (len(some), some.num_tokens) == (4, 8)
    assert taken(some) == [0, 1, 3, 4] and some.num_tokens == 0


def test_those_that_came_back_count_as_waiting_but_not_their_prompts() -> None:
    some = filled(queue(), waiting(1, tokens=10))
    back = waiting(0, tokens=7)
    some.push_back(back)
    assert (len(some), some.num_tokens, back in some) == (2, 10, True)
    some.remove(back)
    assert (len(some), some.num_tokens, back in some) == (1, 10, False)


def test_room_is_bounded_by_new_requests_and_their_tokens_but_one_may_always_wait() -> None:
    some = queue(max_requests=2, max_tokens=10)
    assert some.has_room_for(10_000)
    for number in range(5):
        some.push_back(waiting(number, tokens=100))
    assert some.has_room_for(10_000), "what was accepted once takes nobody's place"
    some.push(waiting(10, tokens=4))
    assert some.has_room_for(6) and not some.has_room_for(7)
    some.push(waiting(11, priority=3))
    assert not some.has_room_for(1)


def test_only_the_three_classes_are_known() -> None:
    assert [priority for priority in range(-1, 6) if queue().knows(priority)] == [1, 2, 3]


def test_waiting_twice_is_our_mistake() -> None:
    some = filled(queue(), waiting(1))
    with pytest.raises(AssertionError, match="1 waits already"):
        some.push(waiting(1))
    with pytest.raises(AssertionError, match="1 waits already"):
        some.push_back(waiting(1))


# ----------------------------------------------------------------------------------------------------------- outlook


def test_rank_is_exact_for_the_first_hundred_and_changes_nothing() -> None:
    some = queue(1, 2, 3, oldest_every=7)
    requests = [
        waiting(number, 1 + number % 3, number * 7 % 3, order=number * 37 % 50, tokens=1 + number * 11 % 40)
        for number in range(90)
    ]
    filled(some, *requests[10:])
    for request in requests[:10]:
        some.push_back(request)
    ranks = [some.rank(request) for request in requests]
    assert [requests[number].sequence_id for number in taken(some, charge=True)] == sorted(range(90), key=ranks.__getitem__)


def test_rank_of_one_passed_over_is_as_if_it_were_not() -> None:
    some = filled(queue(), waiting(0, tenant=0), waiting(1, tenant=1), waiting(2, tenant=1))
    some.pass_over(1)
    assert [some.rank(waiting(number, tenant=tenant)) for number, tenant in ((0, 0), (1, 1), (2, 1))] == [0, 1, 2]
    assert taken(some) == [0]


def test_rank_of_one_far_back_is_estimated() -> None:
    some = filled(queue(), *(waiting(number, tenant=number % 4) for number in range(400)))
    for number in (100, 250, 399):
        assert abs(some.rank(waiting(number, tenant=number % 4)) - number) <= 4
    some.push(waiting(1000, 1))
    assert some.rank(waiting(1000, 1)) == 400
    some.push_back(waiting(1001, 1))
    assert some.rank(waiting(1001, 1)) == 400 and some.rank(waiting(1000, 1)) == 401


def test_tokens_ahead_are_the_higher_classes_the_returning_and_its_tenants_own() -> None:
    some = filled(queue(), waiting(0, 3, tokens=1000), waiting(1, 2, tokens=200), waiting(2, 1, tokens=30))
    some.push_back(waiting(3, 2, tenant=5, tokens=4))
    assert [some.tokens_ahead(priority, 0) for priority in (3, 2, 1)] == [1000, 1204, 1234]


def test_tokens_ahead_of_its_own_tenant_are_those_with_an_earlier_order() -> None:
    second = 1_000_000_000
    some = filled(queue(), *(waiting(number, order=number * second, tokens=10) for number in range(10)))
    assert [some.tokens_ahead(2, 0, order * second) for order in (-1, 0, 4, 9, 99)] == [0, 10, 50, 100, 100]
    assert some.tokens_ahead(2, 0) == 100


def test_tokens_ahead_of_other_tenants_are_their_share_meanwhile() -> None:
    some = queue(1, 2, 1)
    for number in range(10):
        some.push(waiting(number, tenant=0, tokens=10))
        some.push(waiting(100 + number, tenant=1, tokens=100))
    some.push(waiting(200, tenant=2, tokens=15))
    assert some.tokens_ahead(2, 0) == 100 + 200 + 15  # twice the weight; all that there is
    some.pass_over(1)
    assert some.tokens_ahead(2, 0) == 100 + 15


def test_tokens_ahead_count_what_others_have_to_catch_up() -> None:
    some = filled(queue(), waiting(0, tenant=1, tokens=100))
    tenants(some).charge_input(0, 70)
    assert some.tokens_ahead(2, 0) == 70
    assert some.tokens_ahead(2, 2) == 0  # lifted to the least, it is next


def test_tokens_ahead_of_tenants_that_were_never_seen_waiting() -> None:
    config = CoreConfig()
    everybody = Tenants(config)
    some: Queue[Waiting] = Queue(config, everybody)
    indices = [everybody.index_of(f"t{number}") for number in range(200)]
    some.push(waiting(0, tenant=3, tokens=5))
    assert indices[199] is not None and some.tokens_ahead(2, indices[199]) == 0
    some.push(waiting(1, tenant=199, tokens=7))
    assert some.tokens_ahead(1, 0) == 12


# -------------------------------------------------------------------------------------------------------------- cost


def entries_looked_at(num_waiting: int, num_tenants: int) -> float:
    """Heap entries touched for each turn of: one arrives, the head is admitted, rows of 8 tenants get an output, one leaves."""
    config = CoreConfig(max_queue_requests=10**6)
    everybody = Tenants(config, max_idle=10**6)
    some: Queue[Waiting] = Queue(config, everybody)
    for tenant in range(num_tenants):
        everybody.index_of(f"t{tenant}")
    requests = [
        waiting(number, 1 + number % 3, number * 7919 % num_tenants, order=number * 31 % 1000) for number in range(num_waiting)
    ]
    filled(some, *requests)
    some.head()
    before = sum(lines.num_looked_at for lines in some._all_lines())
    turns = 500
    for turn in range(turns):
        number = num_waiting + turn
        some.push(waiting(number, 1 + number % 3, number * 7919 % num_tenants, order=number * 31 % 1000))
        head = some.head()
        assert head is not None
        some.take(head)
        everybody.charge_input(head.tenant, 5)
        for tenant in range(turn, turn + 8):
            everybody.served[tenant % num_tenants] += SCALE
        gone = next(iter(some._new.values()))
        some.remove(gone)
    return (sum(lines.num_looked_at for lines in some._all_lines()) - before) / turns


def test_the_cost_of_a_turn_does_not_grow_with_the_number_waiting() -> None:
    for num_tenants in (1, 50):
        few, many = entries_looked_at(600, num_tenants), entries_looked_at(30_000, num_tenants)
        assert many <= few + 1
        assert many <= 12  # 9 charges, an arrival, an admission, a departure


def test_the_cost_of_a_turn_does_not_grow_with_the_number_of_tenants_waiting() -> None:
    assert entries_looked_at(20_000, 10_000) <= 12


def test_tenants_that_all_run_and_wait_are_not_put_right_one_by_one() -> None:
    config = CoreConfig(max_queue_requests=10**6)
    everybody = Tenants(config)
    some: Queue[Waiting] = Queue(config, everybody)
    for number in range(1000):
        some.push(waiting(number, tenant=everybody.index_of(f"t{number}") or 0))
    for step in range(50):
        everybody.served[:1000] += SCALE
        everybody.served[step] += 5 * SCALE
        before = some._classes[2].new.num_looked_at
        head = some.head()
        assert head is not None and head.sequence_id == step + 1
        assert some._classes[2].new.num_looked_at - before <= 8 + 1000 // 128 + 1


def test_what_is_remembered_of_those_gone_is_bounded_by_those_waiting() -> None:
    some = filled(queue(), waiting(0, order=10**9), waiting(1, tenant=1, order=10**9))
    for number in range(2, 3000):
        one = waiting(number, 2, number % 2, order=-number)
        some.push(one)
        some.head()
        if number % 3:
            some.pass_over(number % 2)
            some.resume(number % 2)
        some.remove(one)
    for lines in some._all_lines():
        assert len(lines.heap) <= 2 * len(lines.entered) + 17
        for line in lines.lines.values():
            assert len(line._heap) <= 2 * len(line) + 17
    assert sum(len(cls.bucket_tokens) for cls in some._classes.values()) == 2
