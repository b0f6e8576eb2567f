"""When something must end or begin because of the clock: a heap of times. It knows no clock; times are arguments."""

from __future__ import annotations

import heapq

from scheduler.core.request import Request

PARTIAL_MARGIN_NS = 50_000_000  # an answer that is cut short leaves so long before its deadline, so that it arrives …
_PARTIAL_SHARE = 10  # … but at most one part in so many of the time that it had
_LEAST_HEAP = 64


class Deadlines:
    """Alarms of requests. A request that has ended leaves its alarms behind; they are dropped when their time comes, or when
    there are more of them than of the living."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Request]] = []
        self._most = _LEAST_HEAP  # entries before those of ended requests are looked for

    def set(self, at_ns: int, request: Request) -> None:
        heapq.heappush(self._heap, (at_ns, request.number, request))
        if len(self._heap) > self._most:
            self._heap = [alarm for alarm in self._heap if alarm[2].num_live]
            heapq.heapify(self._heap)
            self._most = max(_LEAST_HEAP, 2 * len(self._heap))

    def next_ns(self) -> int:
        """When `due` has something next; 0: never."""
        while self._heap and not self._heap[0][2].num_live:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else 0

    def due(self, now: int) -> list[Request]:
        """Those whose alarm is over, by time; each alarm rings once."""
        requests = []
        while self._heap and self._heap[0][0] <= now:
            request = heapq.heappop(self._heap)[2]
            if request.num_live:
                requests.append(request)
        return requests


def expiry(request: Request) -> int:
    """When the request must end: its deadline, or for one that wants its partial answer a margin before."""
    header = request.header
    if not header.partial_at_deadline:
        return header.deadline_ns
    return header.deadline_ns - min(PARTIAL_MARGIN_NS, (header.deadline_ns - request.accepted_ns) // _PARTIAL_SHARE)
