"""Who crashes the worker: requests that were computed when it was lost are suspects until they have got past that point.

The same ones are tried together again. When that crashes the worker too (`max_crashes` times), they are tried in halves, one
after the other, while everybody else waits: a half that gets past the point goes on, one that crashes is halved again, until a
request is alone. It is the culprit when it has crashed the worker `max_crashes` times alone, for one crash may be somebody
else's doing (kill -9). So n suspects cost about log2(n) more crashes. Knows requests; no rows, blocks, queue or clock.
"""

from __future__ import annotations

from collections.abc import Iterable

from scheduler.core.request import Request, Sequence


class Trials:
    """The suspects, and the groups of them that are tried one after the other; the first is on trial."""

    def __init__(self, max_crashes: int) -> None:
        self._max_crashes = max_crashes
        self._suspects: dict[int, Request] = {}  # by number
        self._groups: list[list[Request]] = []
        self._let_in: dict[int, Request] = {}  # by number; on trial, or got past it since the last crash

    @property
    def has_suspects(self) -> bool:
        return bool(self._suspects)

    @property
    def trials(self) -> list[list[Request]]:
        """Those still to be tried, in order; not to be changed. Each list is tried together."""
        return self._groups

    @property
    def groups(self) -> list[list[str]]:
        """Ids of those still to be tried; the first group is on trial."""
        return [[request.request_id for request in group] for group in self._groups]

    def eligible(self) -> frozenset[int] | None:
        """Sequences that may be admitted; None: all."""
        if not self._groups:
            return None
        return frozenset(sequence.sequence_id for request in self._let_in.values() for sequence in request.sequences)

    def crashed(self, computing: Iterable[tuple[Sequence, int]]) -> Request | None:
        """The worker was lost while it computed these, each up to so many tokens. Returns the culprit once that is certain."""
        points = list(computing)
        requests = list({sequence.request.number: sequence.request for sequence, _ in points}.values())
        if not requests:
            return None
        tried = [request for request in self._groups[0] if request in requests] if self._groups else []
        blamed = tried or requests
        for sequence, point in points:
            if sequence.request in blamed:
                sequence.crash_point = max(sequence.crash_point, point)
        for request in blamed:
            request.crashes += 1
            self._suspects[request.number] = request
        if len(requests) == 1:
            requests[0].crashes_alone += 1
            if requests[0].crashes_alone >= self._max_crashes:
                return requests[0]
        if tried:
            untried = [request for request in self._groups[0] if request not in tried]
            self._groups[:1] = [*_halves(tried), *([untried] if untried else [])]
        else:
            again = [request for request in blamed if request.crashes >= self._max_crashes]
            self._groups[:0] = _halves(again)
        self._let_in = {}
        self._begin()
        return None

    def passed(self, sequence: Sequence) -> bool:
        """It was computed past the point of its crash. True: whoever waited for that may come in now."""
        sequence.crash_point = 0
        request = sequence.request
        if any(sibling.crash_point for sibling in request.live()):
            return False
        request.crashes = request.crashes_alone = 0
        return self._leave(request)

    def ended(self, request: Request) -> bool:
        """True: whoever waited for that may come in now."""
        return self._leave(request)

    def take(self, request: Request, is_tried: bool, is_with_last: bool) -> None:
        """It comes from another core, with what is known of it there. is_with_last: it is tried together with the last one."""
        if any(sequence.crash_point for sequence in request.live()):
            self._suspects[request.number] = request
        if is_tried:
            if is_with_last and self._groups:
                self._groups[-1].append(request)
            else:
                self._groups.append([request])
            self._begin()

    def skip(self) -> None:
        """Those on trial can't get on, as nobody reads them: the next ones. They stay suspects."""
        del self._groups[0]
        self._begin()

    def _leave(self, request: Request) -> bool:
        if self._suspects.pop(request.number, None) is None:
            return False
        first = self._groups[0] if self._groups else None
        for group in self._groups:
            if request in group:
                group.remove(request)
        self._groups = [group for group in self._groups if group]
        if not self._groups or self._groups[0] is not first:
            self._begin()
        return first is not None

    def _begin(self) -> None:
        """Those who are the first group now come in."""
        if self._groups:
            self._let_in |= {request.number: request for request in self._groups[0]}
        else:
            self._let_in = {}


def _halves(requests: list[Request]) -> list[list[Request]]:
    if len(requests) < 2:
        return [requests] if requests else []
    middle = len(requests) // 2
    return [requests[:middle], requests[middle:]]
