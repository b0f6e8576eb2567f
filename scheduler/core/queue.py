"""The waiting requests: bounded, by class of priority, inside a class by arrival; the preempted before the new.

Never scanned: the next one, adding and removing are O(1).
"""

from __future__ import annotations

from collections import OrderedDict

from scheduler.core.request import Request


class Queue:
    """Waiting requests. `num_tokens` counts their prompt tokens."""

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.num_tokens = 0
        # sequence_id -> request; classes from the most to the least urgent
        self._classes: dict[int, OrderedDict[int, Request]] = {priority: OrderedDict() for priority in (3, 2, 1)}

    def __len__(self) -> int:
        return sum(len(waiting) for waiting in self._classes.values())

    def knows(self, priority: int) -> bool:
        return priority in self._classes

    def has_room_for(self, num_tokens: int) -> bool:
        """Whether a new request of so many prompt tokens may wait. One always may when nobody does."""
        return not len(self) or (len(self) < self.max_requests and self.num_tokens + num_tokens <= self.max_tokens)

    def push(self, request: Request) -> None:
        self._class_of(request)[request.sequence_id] = request
        self.num_tokens += request.num_prompt_tokens

    def push_front(self, request: Request) -> None:
        """Back to the head of its class: it was running and was preempted."""
        self.push(request)
        self._class_of(request).move_to_end(request.sequence_id, last=False)

    def head(self) -> Request | None:
        for waiting in self._classes.values():
            if waiting:
                return next(iter(waiting.values()))
        return None

    def remove(self, request: Request) -> None:
        del self._class_of(request)[request.sequence_id]
        self.num_tokens -= request.num_prompt_tokens

    def __contains__(self, request: Request) -> bool:
        return request.sequence_id in self._class_of(request)

    def _class_of(self, request: Request) -> OrderedDict[int, Request]:
        return self._classes[request.header.priority]
