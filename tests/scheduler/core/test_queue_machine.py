"""The queue under everything that may happen to it: equal to its slow twin, nobody starves, tenants get equal shares."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scheduler.core.config import CoreConfig, TenantLimits
from scheduler.core.queue import Queue
from scheduler.core.tenants import SCALE, Tenants
from tests.helpers.waiting import SlowQueue, Waiting, waiting

NUM_TENANTS = 4
PRIORITIES = st.integers(1, 3)
TENANTS = st.integers(0, NUM_TENANTS - 1)
COMEBACKS = 2  # of one request


class QueueMachine(RuleBasedStateMachine):
    """The queue and its twin hear the same; and each request's turns are counted against the bound."""

    @initialize(
        oldest_every=st.sampled_from([1, 2, 3, 7, 10**9]),
        weights=st.lists(st.integers(1, 3), min_size=4, max_size=4),
        repairs=st.sampled_from([0, 8]),
    )
    def begin(self, oldest_every: int, weights: list[int], repairs: int) -> None:
        limits = tuple(TenantLimits(f"t{number}", weight=weight) for number, weight in enumerate(weights))
        config = CoreConfig(oldest_every=oldest_every, tenants=limits, max_queue_requests=10**6)
        self.tenants, self.twins_tenants = Tenants(config), Tenants(config)
        self.queue: Queue[Waiting] = Queue(config, self.tenants)
        for lines in self.queue._all_lines():
            lines.repairs = repairs  # with 0 the tenants are scanned as soon as an entry is stale
        self.twin = SlowQueue(self.twins_tenants, oldest_every)
        self.oldest_every = oldest_every
        self.next_number = 0
        self.waiting: dict[int, Waiting] = {}
        self.running: dict[int, Waiting] = {}
        self.comebacks: Counter[int] = Counter()
        self.admissions = 0
        self.latest: dict[int, int] = {}  # sequence_id -> admissions by which it is the head
        self.excused: set[int] = set()  # passed over at some time: the bound is not theirs

    @rule(priority=PRIORITIES, tenant=TENANTS, order=st.integers(-3, 3), num_tokens=st.integers(1, 50), many=st.integers(1, 3))
    def arrive(self, priority: int, tenant: int, order: int, num_tokens: int, many: int) -> None:
        for _ in range(many):
            request = waiting(self.next_number, priority, tenant, order, num_tokens)
            self.next_number += 1
            older = sum(1 + COMEBACKS - self.comebacks[number] for number in (*self.waiting, *self.running))
            self.latest[request.sequence_id] = self.admissions + self.oldest_every * (1 + older)
            self.waiting[request.sequence_id] = request
            self.queue.push(request)
            self.twin.push(request)
            if tenant in self.queue._passed:
                self.excused.add(request.sequence_id)

    @precondition(lambda self: self.queue.head() is not None)
    @rule(charge=st.booleans())
    def admit(self, charge: bool) -> None:
        head = self.queue.head()
        assert head is not None and head is self.twin.head()
        assert not self.queue.is_aged_turn or head.sequence_id == min(
            number for number, request in self.waiting.items() if request.tenant not in self.queue._passed
        )
        for of in (self.queue, self.twin):
            of.take(head)
        if charge:
            for tenants in (self.tenants, self.twins_tenants):
                tenants.charge_input(head.tenant, head.num_queued_tokens)
        self.admissions += 1
        self.running[head.sequence_id] = self.waiting.pop(head.sequence_id)

    @precondition(lambda self: bool(self.running))
    @rule(data=st.data())
    def come_back(self, data: st.DataObject) -> None:
        request = self.running[data.draw(st.sampled_from(sorted(self.running)))]
        number = request.sequence_id
        if self.comebacks[number] == COMEBACKS:
            return
        del self.running[number]
        self.comebacks[number] += 1
        self.waiting[number] = request
        self.queue.push_back(request)
        self.twin.push_back(request)
        self.excused.add(number)  # it had its turn

    @precondition(lambda self: bool(self.waiting))
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        request = self.waiting.pop(data.draw(st.sampled_from(sorted(self.waiting))))
        self.queue.remove(request)
        self.twin.remove(request)

    @precondition(lambda self: bool(self.running))
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        del self.running[data.draw(st.sampled_from(sorted(self.running)))]

    @rule(rows=st.lists(TENANTS, max_size=20))
    def outputs(self, rows: list[int]) -> None:
        for tenants in (self.tenants, self.twins_tenants):
            tenants.charge_outputs(np.array(rows, np.int32))

    @rule(tenant=TENANTS)
    def pass_over(self, tenant: int) -> None:
        self.queue.pass_over(tenant)
        self.twin.pass_over(tenant)
        self.excused |= {number for number, request in self.waiting.items() if request.tenant == tenant}

    @rule(tenant=TENANTS)
    def resume(self, tenant: int) -> None:
        self.queue.resume(tenant)
        self.twin.resume(tenant)

    @precondition(lambda self: 0 < len(self.waiting) <= 12)
    @rule(data=st.data())
    def look_ahead(self, data: st.DataObject) -> None:
        request = self.waiting[data.draw(st.sampled_from(sorted(self.waiting)))]
        assert 0 <= self.queue.rank(request) < len(self.waiting)
        assert self.queue.tokens_ahead(request.header.priority, request.tenant, request.order_ns) >= 0

    @invariant()
    def the_twin_agrees(self) -> None:
        if not hasattr(self, "queue"):
            return
        assert self.queue.head() is self.twin.head()
        assert self.tenants.served.tolist() == self.twins_tenants.served.tolist()
        assert len(self.queue) == len(self.waiting) and all(request in self.queue for request in self.waiting.values())
        assert self.queue.num_tokens == sum(request.num_queued_tokens for request in self.twin.new)
        assert set(self.queue._passed) == self.twin.passed

    @invariant()
    def nobody_waits_longer_than_the_bound(self) -> None:
        if not hasattr(self, "queue"):
            return
        head = self.queue.head()
        for number, latest in self.latest.items():
            if number in self.waiting and number not in self.excused and (head is None or head.sequence_id != number):
                assert self.admissions < latest - 1, f"{number} should have been the head"

    @invariant()
    def token_counts_are_those_of_who_waits(self) -> None:
        if not hasattr(self, "queue"):
            return
        for priority, cls in self.queue._classes.items():
            mine = [request for request in self.twin.new if request.header.priority == priority]
            back = [request for request in self.twin.returning if request.header.priority == priority]
            assert cls.num_returning_tokens == sum(request.num_queued_tokens for request in back)
            assert cls.num_tokens - cls.num_returning_tokens == sum(request.num_queued_tokens for request in mine)
            for tenant in range(NUM_TENANTS):
                tokens = sum(request.num_queued_tokens for request in mine if request.tenant == tenant)
                assert cls.tenant_tokens[tenant] == tokens == cls.own_before(tenant, None)


QueueMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None, derandomize=True, database=None
)
TestQueueMachine = QueueMachine.TestCase


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    oldest_every=st.integers(1, 8),
    num_older=st.integers(0, 6),
    comebacks=st.integers(0, 3),
    priority=PRIORITIES,
    seed=st.integers(0, 1000),
)
def test_no_flood_of_whatever_comes_later_keeps_anybody_from_its_turn(
    oldest_every: int, num_older: int, comebacks: int, priority: int, seed: int
) -> None:
    """The adversary sends, before every admission, two requests of the highest class, of fresh tenants, with an earlier
    deadline; and what was admitted comes back as often as it may."""
    config = CoreConfig(oldest_every=oldest_every, max_queue_requests=10**6)
    tenants = Tenants(config)
    queue: Queue[Waiting] = Queue(config, tenants)
    tenants.charge_input(tenants.index_of("victim") or 0, 10**6)
    for number in range(num_older):
        queue.push(waiting(number, 1 + (seed + number) % 3, tenants.index_of(f"older{number % 2}") or 0))
    victim = waiting(num_older, priority, 0, order=10**18)
    queue.push(victim)
    bound = oldest_every * (1 + num_older * (1 + comebacks))
    came_back: Counter[int] = Counter()
    number = num_older
    for admissions in range(bound + 1):
        for _ in range(2):
            number += 1
            queue.push(waiting(number, 3, tenants.index_of(f"fresh{number}") or 0, order=-number))
        head = queue.head()
        assert head is not None
        if head is victim:
            assert admissions < bound
            return
        queue.take(head)
        tenants.charge_input(head.tenant, 1)
        if came_back[head.sequence_id] < (comebacks if head.sequence_id < num_older else 10**9):
            came_back[head.sequence_id] += 1
            queue.push_back(head)
    raise AssertionError("the victim never came to its turn")


class Server:
    """A batch of rows that all decode at every step; admits while a row is free. What VTC's proof assumes."""

    def __init__(self, config: CoreConfig, num_rows: int) -> None:
        self.tenants = Tenants(config)
        self.queue: Queue[Waiting] = Queue(config, self.tenants)
        self.num_rows = num_rows
        self.rows: list[list[int]] = []  # [tenant, outputs left]
        self.number = 0
        self.outputs: dict[int, int] = {}
        self.service: Counter[int] = Counter()  # virtual tokens * SCALE

    def send(self, tenant: int, num_tokens: int, num_outputs: int, priority: int = 2) -> None:
        self.queue.push(waiting(self.number, priority, tenant, tokens=num_tokens))
        self.outputs[self.number] = num_outputs
        self.number += 1

    def step(self) -> None:
        before = self.tenants.served.copy()
        while len(self.rows) < self.num_rows and (head := self.queue.head()) is not None:
            self.queue.take(head)
            self.tenants.charge_input(head.tenant, head.num_queued_tokens)
            self.rows.append([head.tenant, self.outputs.pop(head.sequence_id)])
        self.tenants.charge_outputs(np.array([tenant for tenant, _ in self.rows], np.int32))
        for tenant, served in enumerate((self.tenants.served - before).tolist()):
            self.service[tenant] += served
        for row in self.rows:
            row[1] -= 1
        self.rows = [row for row in self.rows if row[1]]


LENGTHS = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    kinds=st.lists(LENGTHS, min_size=3, max_size=3),
    weights=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    num_rows=st.integers(1, 8),
    late=st.integers(0, 60),
)
def test_two_tenants_that_always_wait_are_served_alike_up_to_the_bound_of_vtc(
    kinds: list[list[tuple[int, int]]], weights: list[int], num_rows: int, late: int
) -> None:
    """Theorem 4.4 of the paper: between any two times their services differ by at most 2 U, U = max(w_p L_input, w_q M), here
    divided by the smallest weight; M: tokens that the batch can hold. Without rule 1, which breaks it by the admissions that it
    gives away."""
    limits = tuple(TenantLimits(f"t{number}", weight=weight) for number, weight in enumerate(weights))
    config = CoreConfig(tenants=limits, oldest_every=10**9, max_queue_requests=10**6)
    server = Server(config, num_rows)
    sizes = [length for kind in kinds for length in kind]
    most_input = config.input_token_weight * max(num_tokens for num_tokens, _ in sizes)
    most_held = config.output_token_weight * num_rows * max(num_tokens + num_outputs for num_tokens, num_outputs in sizes)
    bound = 2 * max(most_input, most_held) * SCALE / min(weights)
    differences = []
    for step in range(100):
        for tenant, kind in enumerate(kinds):
            if tenant < 2 or late <= step < late + 40:  # the third comes and goes
                for turn in range(num_rows + 1):
                    server.send(tenant, *kind[(step + turn) % len(kind)])
        server.step()
        differences.append(server.service[0] - server.service[1])
    assert max(differences) - min(differences) <= bound


def test_rule_1_is_paid_for_out_of_its_tenants_own_share() -> None:
    """One tenant has sent a thousand before the other sends his first: every fourth admission is the first one's, and what is
    given so is made good by the three between."""
    config = CoreConfig(oldest_every=4, max_queue_requests=10**6)
    server = Server(config, 4)
    for name in ("hoarder", "other"):
        server.tenants.index_of(name)
    for _ in range(1000):
        server.send(0, 50, 10)
    for _ in range(300):
        for _ in range(5):
            server.send(1, 50, 10)
        server.step()
    assert abs(server.service[0] - server.service[1]) <= 2 * 2 * 4 * (50 + 10) * SCALE


def test_a_tenant_with_many_requests_takes_nothing_from_one_with_few() -> None:
    """One sends ten times what the server can do, the other less than half: the latter waits for a free row only."""
    server = Server(CoreConfig(max_queue_requests=10**6), 4)
    for name in ("greedy", "modest"):
        server.tenants.index_of(name)
    sent = 0
    for step in range(400):
        for _ in range(10):
            server.send(0, 10, 10)
        if step % 8 == 0:
            server.send(1, 10, 10)
            sent += 1
        server.step()
    modest = server.service[1] / SCALE / (10 + 2 * 10)
    assert modest >= sent - 2
