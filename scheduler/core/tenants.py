"""Who is served, by whose account: the tenants' weights, quotas and virtual token counters, as columns.

Knows no request, no class and no order; the queue asks and lifts, the core charges. Integers only.

The counters are those of VTC (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): whoever waits and has the
smallest goes first. A prompt token and an output token count by their weights, divided by the tenant's own.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from scheduler.core.config import EVERY_TENANT, CoreConfig, TenantLimits

SCALE = 1 << 16  # counts of a weighted token at weight 1: 2^63 of them are 2 years of 1,000,000 output tokens a second
MAX_IDLE = 10_000  # tenants without a request that are remembered, apart from those listed

_SECOND = 1_000_000_000
_COLUMNS = ("served", "weight", "max_blocks", "held_blocks", "num_requests", "max_requests", "max_per_s", "due_ns")

I64 = NDArray[np.int64]


class Tenants:
    """Columns by index. They grow, and then are other arrays: take them from here each time.

    The core says `enter` for each request that it accepts and `leave` when that has ended. A tenant without a request is idle;
    of the idle some are remembered, with their counters, the others' indices become those of new tenants."""

    def __init__(self, config: CoreConfig, max_idle: int = MAX_IDLE) -> None:
        self._limits = {tenant.name: tenant for tenant in config.tenants}
        self._everybody = self._limits.pop(EVERY_TENANT, None if config.tenants else TenantLimits(EVERY_TENANT))
        self.input_units = config.input_token_weight * SCALE
        self.output_units = config.output_token_weight * SCALE
        self._max_idle = max_idle
        self._indices: dict[str, int] = {}
        self._names: list[str] = []  # [T]; of one forgotten its last
        self._idle: dict[int, None] = {}  # not those listed
        self._free: list[int] = []  # indices of the forgotten, a heap
        self.served: I64 = np.zeros(0, np.int64)  # [T or more] virtual tokens * SCALE; never falls while it is remembered
        self.weight: I64 = np.zeros(0, np.int64)
        self.max_blocks: I64 = np.zeros(0, np.int64)  # 0: no quota
        self.held_blocks: I64 = np.zeros(0, np.int64)  # the core's to keep
        self.num_requests: I64 = np.zeros(0, np.int64)
        self.max_requests: I64 = np.zeros(0, np.int64)  # 0: no limit
        self.max_per_s: I64 = np.zeros(0, np.int64)  # 0: no limit
        self.due_ns: I64 = np.zeros(0, np.int64)  # when the next request would come, if they came at equal distances
        for limits in self._limits.values():
            self._remember(limits.name, limits)

    def __len__(self) -> int:
        return len(self._indices)

    def index_of(self, name: str) -> int | None:
        """None: this tenant is not served. The index holds until the tenant is idle and another name is new."""
        index = self._indices.get(name)
        if index is None and self._everybody is not None:
            index = self._remember(name, self._everybody)
            self._idle[index] = None
        return index

    def name(self, index: int) -> str:
        return self._names[index]

    def enter(self, index: int) -> None:
        """One more request of this tenant lives."""
        self.num_requests[index] += 1
        self._idle.pop(index, None)

    def wait_ns(self, index: int, now: int, due_ns: int = 0) -> int:
        """Until one more request keeps to the tenant's number a second; 0: it may come now. A second's worth may come at once
        (the generic cell rate algorithm, ITU-T I.371). due_ns: of the same tenant in other cores."""
        rate = int(self.max_per_s[index])
        return max(0, max(int(self.due_ns[index]), due_ns) - now - (_SECOND - _SECOND // rate)) if rate else 0

    def count(self, index: int, now: int, due_ns: int = 0) -> None:
        """A request was accepted."""
        rate = int(self.max_per_s[index])
        if rate:
            self.due_ns[index] = max(int(self.due_ns[index]), due_ns, now) + _SECOND // rate

    def standing(self, name: str) -> tuple[int, int]:
        """(requests alive, when the next one would come) of a tenant, if it is remembered. Changes nothing."""
        index = self._indices.get(name)
        return (0, 0) if index is None else (int(self.num_requests[index]), int(self.due_ns[index]))

    def leave(self, index: int) -> None:
        self.num_requests[index] -= 1
        assert self.num_requests[index] >= 0, f"tenant {self._names[index]!r} ends more requests than it had"
        if not self.num_requests[index] and self._names[index] not in self._limits:
            self._idle[index] = None

    def charge_input(self, index: int, num_tokens: int) -> None:
        self.served[index] += num_tokens * self.input_units // int(self.weight[index])

    def charge_outputs(self, indices: NDArray[np.integer]) -> None:
        """One output token for each row; indices[i] is the tenant of row i."""
        counts = np.bincount(indices)
        charged = counts.nonzero()[0]
        self.served[charged] += counts[charged] * self.output_units // self.weight[charged]

    def lift(self, index: int, floor: int) -> None:
        """Who begins to compete gets at least the least counter of those who do: no credit for the time it was away."""
        if self.served[index] < floor:
            self.served[index] = floor

    def tokens_of(self, index: int) -> int:
        """The counter in tokens, for people."""
        return int(self.served[index]) // SCALE

    def copy(self) -> Tenants:
        """For thinking ahead: what is charged or lifted there does not count here."""
        twin = object.__new__(Tenants)
        twin.__dict__.update(self.__dict__)
        twin.served = self.served.copy()
        return twin

    def _remember(self, name: str, limits: TenantLimits) -> int:
        if len(self._idle) >= self._max_idle:
            self._forget()
        if self._free:
            index = heapq.heappop(self._free)
            self._names[index] = name
        else:
            index = len(self._names)
            self._names.append(name)
            if index == len(self.served):
                self._grow(max(16, 2 * index))
        self._indices[name] = index
        self.served[index] = 0
        self.weight[index] = limits.weight
        self.max_blocks[index] = limits.max_blocks
        self.max_requests[index] = limits.max_requests
        self.max_per_s[index] = limits.max_requests_per_s
        self.due_ns[index] = 0
        return index

    def _forget(self) -> None:
        """The half of the idle that was served least: they would be lifted over what they had anyway. Sorts them once in
        max_idle / 2 new names."""
        by_served = sorted(self._idle, key=lambda index: (int(self.served[index]), index))
        for index in by_served[: (len(by_served) + 1) // 2]:
            del self._idle[index]
            del self._indices[self._names[index]]
            heapq.heappush(self._free, index)

    def _grow(self, size: int) -> None:
        for column in _COLUMNS:
            wider = np.zeros(size, np.int64)
            old = getattr(self, column)
            wider[: len(old)] = old
            setattr(self, column, wider)
