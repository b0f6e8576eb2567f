"""The queue: order, bounds, and its counts."""

from __future__ import annotations

import numpy as np

from scheduler.core.queue import Queue
from scheduler.core.request import Request
from tests.helpers.fake_worker import GREEDY
from wire import AddHeader


def request(number: int, priority: int = 2, num_tokens: int = 1) -> Request:
    header = AddHeader(number, f"r{number}", 0, priority, 1, GREEDY)
    return Request(header, 0, number, np.zeros(num_tokens, np.int32), 1)


def drained(queue: Queue) -> list[int]:
    order = []
    while (head := queue.head()) is not None:
        queue.remove(head)
        order.append(head.sequence_id)
    return order


def test_an_empty_queue_has_no_head() -> None:
    queue = Queue(1, 1)
    assert queue.head() is None and len(queue) == 0


def test_first_by_class_then_by_arrival() -> None:
    queue = Queue(10, 10)
    for number, priority in enumerate([1, 2, 3, 2, 1, 3]):
        queue.push(request(number, priority))
    assert drained(queue) == [2, 5, 1, 3, 0, 4]


def test_the_preempted_stand_before_the_new_of_their_class() -> None:
    queue = Queue(10, 10)
    queue.push(request(3, 2)), queue.push(request(4, 3)), queue.push(request(5, 1))
    queue.push_front(request(2, 2))
    queue.push_front(request(1, 2))
    assert drained(queue) == [4, 1, 2, 3, 5]


def test_anybody_can_be_removed_from_the_middle() -> None:
    queue = Queue(10, 10)
    some = [request(number, num_tokens=number) for number in range(5)]
    for one in some:
        queue.push(one)
    queue.remove(some[2])
    assert some[2] not in queue and some[3] in queue
    assert (len(queue), queue.num_tokens) == (4, 8)
    assert drained(queue) == [0, 1, 3, 4] and queue.num_tokens == 0


def test_room_is_bounded_by_requests_and_by_tokens_but_one_may_always_wait() -> None:
    queue = Queue(max_requests=2, max_tokens=10)
    assert queue.has_room_for(10_000)
    queue.push(request(0, num_tokens=4))
    assert queue.has_room_for(6) and not queue.has_room_for(7)
    queue.push(request(1, priority=3))
    assert not queue.has_room_for(1)


def test_only_the_three_classes_are_known() -> None:
    queue = Queue(1, 1)
    assert [priority for priority in range(-1, 6) if queue.knows(priority)] == [1, 2, 3]
