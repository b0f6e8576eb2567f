"""The waiting requests: bounded, and who of them is next.

Knows no rows, blocks or clock. The order, from the first rule to the last:
  1. every `oldest_every`-th admission: who waits longest, whatever its class or tenant (nobody starves);
  2. the higher class;
  3. in a class those that were running already, by arrival;
  4. then the tenant with the smallest virtual token counter (VTC), ties by arrival of what it would send;
  5. inside a tenant the smallest order_ns (latest start for a deadline, arrival + patience otherwise), ties by arrival.
A tenant that is passed over (it holds all the blocks that it may) is skipped by all of them until it is resumed.

Who is next, adding and removing cost O(log n) amortised: heaps whose stale entries are found when they come to the front.

The bound on waiting (rule 1): when k requests that arrived before it are alive, and each of them comes back at most m times,
a request of a tenant that is not passed over is the head after at most oldest_every * (1 + k * (1 + m)) admissions.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, Protocol, TypeAlias, TypeVar

import numpy as np

from scheduler.core.config import CoreConfig
from scheduler.core.tenants import I64, Tenants

PRIORITIES = (3, 2, 1)  # INTERACTIVE, NORMAL, BATCH
_EXACT_RANK = 100  # up to so many admissions ahead are played through, more are estimated …
_EXACT_WAITING = 1_000  # … and all where more wait
_BUCKET_NS = 1 << 29  # about half a second: grain in which tokens ahead by order_ns are counted
_REPAIRS = 8  # entries put right at a time, and one for each 128 tenants, before the tenants are scanned
_GARBAGE = 16  # stale entries a heap may hold besides as many as it has live ones


class _Header(Protocol):
    @property
    def priority(self) -> int: ...


class Waiting(Protocol):
    """What the queue reads of a request. None of it changes while the request waits."""

    @property
    def header(self) -> _Header: ...
    @property
    def sequence_id(self) -> int: ...  # order of arrival
    @property
    def tenant(self) -> int: ...
    @property
    def order_ns(self) -> int: ...
    @property
    def num_queued_tokens(self) -> int: ...  # prompt tokens to compute


R = TypeVar("R", bound=Waiting)


_Entry: TypeAlias = tuple[int, int, int]  # counter, sequence_id, tenant


class _Line:
    """One tenant's requests, by (order, sequence_id). What leaves from the middle is forgotten when it comes to the front."""

    __slots__ = ("_heap", "_order")

    def __init__(self) -> None:
        self._heap: list[tuple[int, int]] = []
        self._order: dict[int, int] = {}  # sequence_id -> order of those in line

    def __len__(self) -> int:
        return len(self._order)

    def push(self, order: int, sequence_id: int) -> None:
        self._order[sequence_id] = order
        heapq.heappush(self._heap, (order, sequence_id))

    def discard(self, sequence_id: int) -> None:
        del self._order[sequence_id]
        if len(self._heap) > 2 * len(self._order) + _GARBAGE:
            self._heap = [(order, sequence_id) for sequence_id, order in self._order.items()]
            heapq.heapify(self._heap)

    def first(self) -> int:
        """Its sequence_id. The line is not empty."""
        heap, order = self._heap, self._order
        while order.get(heap[0][1]) != heap[0][0]:
            heapq.heappop(heap)
        return heap[0][1]

    def __iter__(self) -> Iterator[int]:
        return iter(self._order)

    def num_before(self, sequence_id: int) -> int:
        """O(n)."""
        mine = (self._order[sequence_id], sequence_id)
        return sum(1 for other, order in self._order.items() if (order, other) < mine)

    def copy(self) -> _Line:
        twin = _Line()
        twin._heap, twin._order = self._heap.copy(), self._order.copy()
        return twin


class _Lines:
    """The tenants' lines, and which tenant's first goes first: the least (counter, sequence_id of its first).

    An entry of the heap may be smaller than what holds now, since counters only grow; then it is put right when it comes to
    the front, which pays for a charge, or a change of a line, since the last time. Where many tenants both run and wait, all
    their counters grow at every step: after a few entries put right the least is found by a vector operation over the
    tenants instead."""

    def __init__(self, counters: Callable[[], I64] | None, passed: dict[int, None]) -> None:
        self.counters = counters  # None: by sequence_id alone
        self.passed = passed
        self.lines: dict[int, _Line] = {}
        self.entered: dict[int, _Entry] = {}  # tenant -> its entry in the heap; what is not here is stale
        self.heap: list[_Entry] = []
        self.places: dict[int, int] = {}  # tenant -> where it stands in the columns
        self.tenants: I64 = np.zeros(16, np.int64)  # [:len(places)] of those not passed over
        self.firsts: I64 = np.zeros(16, np.int64)  # sequence_id of its first
        self.repairs = _REPAIRS
        self.num_looked_at = 0  # entries of the heap, since the start; for tests of the cost

    def push(self, tenant: int, order: int, sequence_id: int) -> None:
        line = self.lines.get(tenant)
        if line is None:
            line = self.lines[tenant] = _Line()
        line.push(order, sequence_id)
        self._enter(tenant, line)

    def discard(self, tenant: int, sequence_id: int) -> None:
        line = self.lines[tenant]
        line.discard(sequence_id)
        if len(line):
            self._enter(tenant, line)
        else:
            del self.lines[tenant]
            self.pass_over(tenant)

    def first(self) -> _Entry | None:
        """Who is next; None when nobody is in line but those passed over."""
        heap, entered, repairs = self.heap, self.entered, 0
        while heap:
            self.num_looked_at += 1
            entry = heap[0]
            tenant = entry[2]
            if entered.get(tenant) != entry:
                heapq.heappop(heap)
                continue
            now = self._key(tenant, self.lines[tenant])
            if now == entry:
                return entry
            if repairs >= self.repairs + len(entered) // 128:
                return self._scan()
            heapq.heapreplace(heap, now)
            entered[tenant] = now
            repairs += 1
        return None

    def pass_over(self, tenant: int) -> None:
        if self.entered.pop(tenant, None) is not None:
            place, last = self.places.pop(tenant), len(self.places)
            if place < last:
                moved = int(self.tenants[last])
                self.tenants[place], self.firsts[place] = moved, self.firsts[last]
                self.places[moved] = place

    def resume(self, tenant: int) -> None:
        if tenant in self.lines:
            self._enter(tenant, self.lines[tenant])

    def copy(self, counters: Callable[[], I64] | None, passed: dict[int, None]) -> _Lines:
        twin = _Lines(counters, passed)
        twin.lines = {tenant: line.copy() for tenant, line in self.lines.items()}
        twin.entered, twin.heap, twin.places = self.entered.copy(), self.heap.copy(), self.places.copy()
        twin.tenants, twin.firsts = self.tenants.copy(), self.firsts.copy()
        return twin

    def _key(self, tenant: int, line: _Line) -> _Entry:
        counter = 0 if self.counters is None else int(self.counters()[tenant])
        return (counter, line.first(), tenant)

    def _enter(self, tenant: int, line: _Line) -> None:
        """After a change of the line: the heap's entry is never larger than what holds, the column says what holds."""
        if tenant in self.passed:
            return
        key, entered = self._key(tenant, line), self.entered.get(tenant)
        if entered is None:
            self._append(tenant)
        self.firsts[self.places[tenant]] = key[1]
        if entered is None or key < entered:
            self.entered[tenant] = key
            heapq.heappush(self.heap, key)
            if len(self.heap) > 2 * len(self.entered) + _GARBAGE:
                self.heap = list(self.entered.values())
                heapq.heapify(self.heap)

    def _append(self, tenant: int) -> None:
        place = self.places[tenant] = len(self.places)
        if place == len(self.tenants):
            self.tenants = np.concatenate([self.tenants, np.zeros(place, np.int64)])
            self.firsts = np.concatenate([self.firsts, np.zeros(place, np.int64)])
        self.tenants[place] = tenant

    def _scan(self) -> _Entry:
        """The least by looking at all tenants; there is one."""
        count = len(self.places)
        tenants, firsts = self.tenants[:count], self.firsts[:count]
        counters = np.zeros(count, np.int64) if self.counters is None else self.counters()[tenants]
        least = counters.min()
        ties = (counters == least).nonzero()[0]
        place = ties[firsts[ties].argmin()]
        return (int(least), int(firsts[place]), int(tenants[place]))


class _Class:
    """One class of priority: its lines, and its prompt tokens."""

    def __init__(self, new: _Lines, returning: _Lines) -> None:
        self.new = new
        self.returning = returning
        self.left: tuple[int, int] | None = None  # who left `new` last, and its counter then: the floor when nobody competes
        self.num_tokens = 0  # prompt tokens, of the returning too: they are computed again
        self.num_returning_tokens = 0
        self.tenant_tokens: I64 = np.zeros(16, np.int64)  # [tenant] prompt tokens of the new
        self.bucket_tokens: dict[int, dict[int, int]] = {}  # tenant -> order_ns // _BUCKET_NS -> prompt tokens of the new

    def first(self) -> _Entry | None:
        return self.returning.first() or self.new.first()

    def least(self) -> int | None:
        """The least counter of the tenants that compete."""
        first = self.new.first()
        return None if first is None else first[0]

    @property
    def num_new_tokens(self) -> int:
        return self.num_tokens - self.num_returning_tokens

    def count_new(self, request: Waiting, sign: int) -> None:
        tenant, bucket, num_tokens = request.tenant, request.order_ns // _BUCKET_NS, sign * request.num_queued_tokens
        if tenant >= len(self.tenant_tokens):
            self.tenant_tokens = np.concatenate([self.tenant_tokens, np.zeros(2 * tenant, np.int64)])
        self.num_tokens += num_tokens
        self.tenant_tokens[tenant] += num_tokens
        buckets = self.bucket_tokens.setdefault(tenant, {})
        buckets[bucket] = buckets.get(bucket, 0) + num_tokens
        if not buckets[bucket]:
            del buckets[bucket]
        if not buckets:
            del self.bucket_tokens[tenant]

    def count_returning(self, request: Waiting, sign: int) -> None:
        self.num_tokens += sign * request.num_queued_tokens
        self.num_returning_tokens += sign * request.num_queued_tokens

    def copy(self, counters: Callable[[], I64], passed: dict[int, None]) -> _Class:
        """For thinking ahead."""
        twin = _Class(self.new.copy(counters, passed), self.returning.copy(None, passed))
        twin.left, twin.num_tokens, twin.num_returning_tokens = self.left, self.num_tokens, self.num_returning_tokens
        twin.tenant_tokens = self.tenant_tokens.copy()
        twin.bucket_tokens = {tenant: buckets.copy() for tenant, buckets in self.bucket_tokens.items()}
        return twin

    def own_before(self, tenant: int, order_ns: int | None) -> int:
        """Prompt tokens of the tenant's new ones that go before this order; None: all."""
        buckets = self.bucket_tokens.get(tenant, {})
        last = None if order_ns is None else order_ns // _BUCKET_NS
        return sum(num_tokens for bucket, num_tokens in buckets.items() if last is None or bucket <= last)


class Queue(Generic[R]):
    """Waiting requests: the new, and those that were running and came back."""

    def __init__(self, config: CoreConfig, tenants: Tenants) -> None:
        self.max_requests = config.max_queue_requests
        self.max_tokens = config.max_queue_tokens
        self.num_requests = 0  # new ones; several outputs of one prompt count once
        self.num_tokens = 0  # prompt tokens of the new
        self._oldest_every = config.oldest_every
        self._admissions = 0
        self._tenants = tenants
        self._new: dict[int, R] = {}  # by sequence_id
        self._returning: dict[int, R] = {}
        self._passed: dict[int, None] = {}
        self._classes = {
            priority: _Class(_Lines(self._counters, self._passed), _Lines(None, self._passed)) for priority in PRIORITIES
        }
        self._oldest = _Lines(None, self._passed)  # of all classes
        self._only: frozenset[int] | None = None  # sequence_ids that may be the head; None: all

    def __len__(self) -> int:
        return len(self._new) + len(self._returning)

    def __contains__(self, request: R) -> bool:
        return request.sequence_id in self._new or request.sequence_id in self._returning

    def knows(self, priority: int) -> bool:
        return priority in self._classes

    def has_room_for(self, num_tokens: int, others: int = 0, other_tokens: int = 0) -> bool:
        """Whether a new request of so many prompt tokens may wait. One always may when no other new one does. others: new ones
        that wait in other queues under the same limits, with so many prompt tokens."""
        num_new, num_waiting = self.num_requests + others, self.num_tokens + other_tokens
        return not num_new or (num_new < self.max_requests and num_waiting + num_tokens <= self.max_tokens)

    def returning(self) -> Iterable[R]:
        """Those that were running and came back."""
        return self._returning.values()

    # ----------------------------------------------------------------------------------------------- come and go

    def push(self, request: R) -> None:
        """A new one."""
        assert request not in self, f"sequence {request.sequence_id} waits already"
        tenant, sequence_id, cls = request.tenant, request.sequence_id, self._class_of(request)
        if tenant not in cls.new.lines:
            self._lift(cls, tenant)
        self._new[sequence_id] = request
        self.num_requests += request.num_queued_tokens > 0
        self.num_tokens += request.num_queued_tokens
        cls.new.push(tenant, request.order_ns, sequence_id)
        cls.count_new(request, 1)
        self._oldest.push(tenant, sequence_id, sequence_id)

    def push_back(self, request: R) -> None:
        """One that was running: it goes before the new ones of its class."""
        assert request not in self, f"sequence {request.sequence_id} waits already"
        tenant, sequence_id, cls = request.tenant, request.sequence_id, self._class_of(request)
        self._returning[sequence_id] = request
        cls.returning.push(tenant, sequence_id, sequence_id)
        cls.count_returning(request, 1)
        self._oldest.push(tenant, sequence_id, sequence_id)

    def take(self, request: R) -> None:
        """It is admitted."""
        self.remove(request)
        self._admissions += 1

    def remove(self, request: R) -> None:
        """It waits no longer."""
        tenant, sequence_id, cls = request.tenant, request.sequence_id, self._class_of(request)
        if self._new.pop(sequence_id, None) is not None:
            self.num_requests -= request.num_queued_tokens > 0
            self.num_tokens -= request.num_queued_tokens
            cls.count_new(request, -1)
            cls.new.discard(tenant, sequence_id)
            if tenant not in cls.new.lines and tenant not in self._passed:
                self._note_left(cls, tenant)
        else:
            del self._returning[sequence_id]
            cls.count_returning(request, -1)
            cls.returning.discard(tenant, sequence_id)
        self._oldest.discard(tenant, sequence_id)
        if tenant not in self._oldest.lines:
            self._passed.pop(tenant, None)  # its index may become another tenant's

    def pass_over(self, tenant: int) -> None:
        """Nobody of this tenant is the head until it is resumed or nothing of it waits. It does not compete: as if it had
        left."""
        if tenant in self._passed or tenant not in self._oldest.lines:
            return
        self._passed[tenant] = None
        for cls in self._classes.values():
            if tenant in cls.new.lines:
                self._note_left(cls, tenant)
        for lines in self._all_lines():
            lines.pass_over(tenant)

    def resume(self, tenant: int) -> None:
        if tenant not in self._passed:
            return
        for cls in self._classes.values():
            if tenant in cls.new.lines:
                self._lift(cls, tenant)
        del self._passed[tenant]
        for lines in self._all_lines():
            lines.resume(tenant)

    def resume_all(self) -> None:
        for tenant in list(self._passed):
            self.resume(tenant)

    def confine(self, only: frozenset[int] | None) -> None:
        """Nobody else is the head, by arrival, until it is called again. None: everybody, in the order above."""
        self._only = only

    # ------------------------------------------------------------------------------------------------ who is next

    @property
    def is_aged_turn(self) -> bool:
        """Whether the present head is there by rule 1."""
        return (self._admissions + 1) % self._oldest_every == 0

    def highest_priority(self) -> int:
        """Of all that wait; 0 when nobody does. `head` may be of a lower class."""
        return next((priority for priority, cls in self._classes.items() if cls.new.lines or cls.returning.lines), 0)

    def head(self) -> R | None:
        """Who is next; the same until something changes. None: nobody waits but those passed over."""
        if self._only is not None:
            return self._first_of(self._only)
        if self.is_aged_turn:
            return self._request(self._oldest.first())
        for cls in self._classes.values():
            first = cls.first()
            if first is not None:
                return self._request(first)
        return None

    def _first_of(self, only: frozenset[int]) -> R | None:
        """O(len(only))."""
        for sequence_id in sorted(only):
            request = self._new.get(sequence_id) or self._returning.get(sequence_id)
            if request is not None and request.tenant not in self._passed:
                return request
        return None

    def least_tenant(self, priority: int) -> int | None:
        """Whose new requests of this class are the next; None: nobody has one, but those passed over."""
        first = self._classes[priority].new.first()
        return None if first is None else first[2]

    def rank(self, request: R) -> int:
        """How many go before it if nobody comes and nothing but prompts is charged. Exact up to 100 where at most 1,000 wait,
        estimated otherwise. O(number waiting): for explaining only."""
        if len(self) > _EXACT_WAITING:
            return self._estimated_rank(request)
        queue = self._copy()
        queue.resume(request.tenant)
        for rank in range(_EXACT_RANK):
            head = queue.head()
            if head is None or head.sequence_id == request.sequence_id:
                return rank
            queue.take(head)
            queue._tenants.charge_input(head.tenant, head.num_queued_tokens)
        return max(_EXACT_RANK, self._estimated_rank(request))

    def tokens_ahead(self, priority: int, tenant: int, order_ns: int | None = None) -> int:
        """About how many prompt tokens would be computed before those of a new request of this class, tenant and order (None:
        behind all of its tenant): those of higher classes, of the returning, of its own tenant before it, and of the class's
        other tenants as many as their counters and weights allow meanwhile. Tenants passed over do not count.
        Vector operations over tenants, and a step for each half second that the own tenant's orders spread over."""
        tenants, passed = self._tenants, list(self._passed)
        ahead = 0
        for higher, cls in self._classes.items():
            if higher > priority:
                ahead += cls.num_tokens - int(self._new_tokens(cls)[passed].sum())
        cls = self._classes[priority]
        own = cls.own_before(tenant, order_ns)
        counter = max(int(tenants.served[tenant]), cls.least() or 0)
        others = self._new_tokens(cls).copy()
        others[passed] = 0
        others[tenant] = 0
        waiting = others.nonzero()[0]
        weight = tenants.weight[waiting]
        credit = np.maximum(counter - tenants.served[waiting], 0) // tenants.input_units * weight
        share = credit + own * weight // int(tenants.weight[tenant])
        return ahead + cls.num_returning_tokens + own + int(np.minimum(others[waiting], share).sum())

    # ----------------------------------------------------------------------------------------------------- inside

    def _class_of(self, request: R) -> _Class:
        return self._classes[request.header.priority]

    def _request(self, entry: _Entry | None) -> R | None:
        if entry is None:
            return None
        sequence_id = entry[1]
        request = self._new.get(sequence_id)
        return self._returning[sequence_id] if request is None else request

    def _counters(self) -> I64:
        return self._tenants.served

    def _all_lines(self) -> Iterator[_Lines]:
        for cls in self._classes.values():
            yield cls.new
            yield cls.returning
        yield self._oldest

    def _lift(self, cls: _Class, tenant: int) -> None:
        """The tenant begins to compete in the class."""
        floor = cls.least()
        if floor is None and cls.left is not None:  # alone: at least what the last to leave has by now
            last, counter = cls.left
            floor = max(counter, int(self._tenants.served[last]))
        self._tenants.lift(tenant, floor or 0)

    def _note_left(self, cls: _Class, tenant: int) -> None:
        cls.left = (tenant, int(self._tenants.served[tenant]))

    def _new_tokens(self, cls: _Class) -> I64:
        """[T] as long as the tenants' columns."""
        size = len(self._tenants.served)
        if size > len(cls.tenant_tokens):
            cls.tenant_tokens = np.concatenate([cls.tenant_tokens, np.zeros(size - len(cls.tenant_tokens), np.int64)])
        return cls.tenant_tokens

    def _estimated_rank(self, request: R) -> int:
        """The higher classes, the returning, its tenant's own before it, and of each other tenant of its class as many as
        counters and weights allow meanwhile if all prompts of the class are equally long. Without rule 1."""
        tenant, sequence_id, cls = request.tenant, request.sequence_id, self._class_of(request)
        higher = [self._classes[other] for other in PRIORITIES if other > request.header.priority]
        rank = sum(len(line) for other in higher for lines in (other.new, other.returning) for line in lines.lines.values())
        returning = [other for line in cls.returning.lines.values() for other in line]
        if sequence_id in self._returning:
            return rank + sum(1 for other in returning if other < sequence_id)
        before = cls.new.lines[tenant].num_before(sequence_id)
        numbers = {other: len(line) for other, line in cls.new.lines.items() if other != tenant and other not in self._passed}
        others, number = np.array(list(numbers), np.int64), np.array(list(numbers.values()), np.int64)
        weights, served = self._tenants.weight, self._tenants.served
        mean = max(1, cls.num_new_tokens // (int(number.sum()) + len(cls.new.lines[tenant])))
        credit = np.maximum(served[tenant] - served[others], 0) // (self._tenants.input_units * mean) * weights[others]
        share = credit + before * weights[others] // weights[tenant]
        return rank + len(returning) + before + int(np.minimum(number, share).sum())

    def _copy(self) -> Queue[R]:
        twin: Queue[R] = object.__new__(Queue)
        twin.__dict__.update(self.__dict__)
        twin._tenants = self._tenants.copy()
        twin._new, twin._returning, twin._passed = self._new.copy(), self._returning.copy(), self._passed.copy()
        twin._classes = {priority: cls.copy(twin._counters, twin._passed) for priority, cls in self._classes.items()}
        twin._oldest = self._oldest.copy(None, twin._passed)
        return twin
