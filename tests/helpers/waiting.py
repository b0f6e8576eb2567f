"""Requests as the queue sees them, and the queue's slow twin: the same rules, read off by looking at everybody."""

from __future__ import annotations

from dataclasses import dataclass, field

from scheduler.core.tenants import Tenants


@dataclass(frozen=True)
class Header:
    priority: int = 2


@dataclass(eq=False)
class Waiting:
    """A request in the queue."""

    sequence_id: int
    header: Header = field(default_factory=Header)
    tenant: int = 0
    order_ns: int = 0
    num_queued_tokens: int = 1


def waiting(number: int, priority: int = 2, tenant: int = 0, order: int | None = None, tokens: int = 1) -> Waiting:
    """order None: by arrival."""
    return Waiting(number, Header(priority), tenant, number if order is None else order, tokens)


class SlowQueue:
    """Without a heap, a cache or a lazy deletion. It lifts the counters of its own tenants."""

    def __init__(self, tenants: Tenants, oldest_every: int) -> None:
        self.tenants = tenants
        self.oldest_every = oldest_every
        self.admissions = 0
        self.new: list[Waiting] = []
        self.returning: list[Waiting] = []
        self.passed: set[int] = set()
        self.left: dict[int, tuple[int, int]] = {}  # priority -> who left last, its counter then

    def push(self, request: Waiting) -> None:
        priority, tenant = request.header.priority, request.tenant
        if not self._new(priority, tenant):
            self._lift(priority, tenant)
        self.new.append(request)

    def push_back(self, request: Waiting) -> None:
        self.returning.append(request)

    def take(self, request: Waiting) -> None:
        self.remove(request)
        self.admissions += 1

    def remove(self, request: Waiting) -> None:
        priority, tenant = request.header.priority, request.tenant
        if request in self.new:
            self.new.remove(request)
            if not self._new(priority, tenant) and tenant not in self.passed:
                self.left[priority] = (tenant, int(self.tenants.served[tenant]))
        else:
            self.returning.remove(request)
        if all(other.tenant != tenant for other in self.new + self.returning):
            self.passed.discard(tenant)

    def pass_over(self, tenant: int) -> None:
        if tenant in self.passed or all(request.tenant != tenant for request in self.new + self.returning):
            return
        self.passed.add(tenant)
        for priority in (3, 2, 1):
            if self._new(priority, tenant):
                self.left[priority] = (tenant, int(self.tenants.served[tenant]))

    def resume(self, tenant: int) -> None:
        if tenant in self.passed:
            for priority in (3, 2, 1):
                if self._new(priority, tenant):
                    self._lift(priority, tenant)
            self.passed.discard(tenant)

    def head(self) -> Waiting | None:
        everybody = [request for request in self.new + self.returning if request.tenant not in self.passed]
        if not everybody:
            return None
        if (self.admissions + 1) % self.oldest_every == 0:
            return min(everybody, key=lambda request: request.sequence_id)
        highest = max(request.header.priority for request in everybody)
        cls = [request for request in everybody if request.header.priority == highest]
        returning = [request for request in cls if request in self.returning]
        if returning:
            return min(returning, key=lambda request: request.sequence_id)
        firsts = [self._first(highest, tenant) for tenant in sorted({request.tenant for request in cls})]
        return min(firsts, key=lambda request: (int(self.tenants.served[request.tenant]), request.sequence_id))

    def _new(self, priority: int, tenant: int) -> list[Waiting]:
        return [request for request in self.new if request.header.priority == priority and request.tenant == tenant]

    def _first(self, priority: int, tenant: int) -> Waiting:
        return min(self._new(priority, tenant), key=lambda request: (request.order_ns, request.sequence_id))

    def _lift(self, priority: int, tenant: int) -> None:
        competing = {
            request.tenant
            for request in self.new
            if request.header.priority == priority and request.tenant not in self.passed | {tenant}
        }
        floor = 0
        if competing:
            floor = min(int(self.tenants.served[other]) for other in competing)
        elif priority in self.left:
            last, counter = self.left[priority]
            floor = max(counter, int(self.tenants.served[last]))
        self.tenants.lift(tenant, floor)
