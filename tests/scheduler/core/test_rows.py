"""The columns: slots taken and freed, their order, outputs and end tokens."""

from __future__ import annotations

import numpy as np
import pytest

from scheduler.core.request import Request, Sequence
from scheduler.core.rows import PREEMPTED, RETIRING, Rows
from wire import AddHeader, SamplingSpec

VOCAB = 100


def sequence(number: int, *, outputs: tuple[int, ...] = (), stop: tuple[int, ...] = (), num_prompt: int = 3) -> Sequence:
    header = AddHeader(number, f"r{number}", 0, 2, 50, SamplingSpec(0.0, 0, 1.0, 0.0, 0, 0, stop))
    request = Request(header, 7, number, np.arange(num_prompt, dtype=np.int32), 0, 50, b"", 0)
    made = Sequence(request, 0, number, 0)
    made.outputs = np.array(outputs, np.int32)
    return made


def start(rows: Rows, made: Sequence, *, computed: int = 0, window: int = 100, now: int = 0) -> int:
    return rows.start(made, computed, window, now)


def slots(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.intp)


def tokens(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


def test_a_new_row_knows_its_sequence() -> None:
    rows = Rows(2, VOCAB)
    one = sequence(9, outputs=(5, 6))
    assert start(rows, one, now=40) == one.slot == 0
    assert (rows.num_tokens[0], rows.max_tokens[0], rows.num_computed[0]) == (5, 53, 0)
    assert (rows.num_outputs[0], rows.max_outputs[0], rows.outputs[0, :2].tolist()) == (2, 50, [5, 6])
    assert (rows.handle[0], rows.frontend[0], rows.started_ns[0]) == (9, 7, 40)


def test_slots_are_taken_lowest_first_and_order_is_by_admission() -> None:
    rows = Rows(3, VOCAB)
    for number in range(3):
        start(rows, sequence(number))
    rows.leave(0, RETIRING)
    assert rows.in_order().tolist() == [1, 2] and rows.num_free == 0
    rows.free(0)
    assert start(rows, sequence(3)) == 0
    assert rows.in_order().tolist() == [1, 2, 0]


def test_a_slot_freed_and_taken_again_stands_once_at_the_end() -> None:
    rows = Rows(2, VOCAB)
    start(rows, sequence(0)), start(rows, sequence(1))
    rows.in_order()
    rows.leave(0, PREEMPTED)
    rows.free(0)
    start(rows, sequence(2))
    assert rows.in_order().tolist() == [1, 0]


def test_a_padding_row_keeps_its_place_and_gets_no_more_tokens() -> None:
    rows = Rows(2, VOCAB)
    start(rows, sequence(0)), start(rows, sequence(1))
    rows.pad(0)
    assert rows.in_order().tolist() == [0, 1] and rows.num_tokens[0] == rows.max_tokens[0]


def test_a_row_that_did_not_leave_is_not_freed() -> None:
    rows = Rows(1, VOCAB)
    start(rows, sequence(0))
    with pytest.raises(AssertionError):
        rows.free(0)


@pytest.mark.parametrize("count", [1, 63, 64, 65, 300])
def test_outputs_are_kept_however_many(count: int) -> None:
    rows = Rows(2, VOCAB)
    start(rows, sequence(0)), start(rows, sequence(1, outputs=(7,)))
    for number in range(count):
        assert rows.append_outputs(slots(0), tokens(number % VOCAB)).tolist() == [number + 1]
    assert rows.outputs[0, :count].tolist() == [number % VOCAB for number in range(count)]
    assert rows.append_outputs(slots(1, 0), tokens(8, 9)).tolist() == [2, count + 1]
    assert rows.outputs[1, :2].tolist() == [7, 8]


def test_end_tokens_count_for_their_own_row_only_and_as_long_as_it_lives() -> None:
    rows = Rows(3, VOCAB)
    start(rows, sequence(0, stop=(5, 6)))
    start(rows, sequence(1, stop=(5,)))
    start(rows, sequence(2, stop=tuple(range(20, 99))))
    assert rows.stopped(slots(0, 1, 2), tokens(6, 6, 6)).tolist() == [True, False, False]
    assert rows.stopped(slots(2, 0, 1), tokens(5, 5, 5)).tolist() == [False, True, True]
    assert rows.stopped(slots(0, 1, 2), tokens(98, 98, 98)).tolist() == [False, False, True]
    rows.leave(0, RETIRING)
    rows.free(0)
    start(rows, sequence(3))
    assert rows.stopped(slots(0, 1), tokens(5, 5)).tolist() == [False, True]
    assert rows.stopped(slots(0, 1), tokens(6, 6)).tolist() == [False, False]


def test_the_same_end_token_twice_in_a_request_counts_once() -> None:
    rows = Rows(1, VOCAB)
    start(rows, sequence(0, stop=(5, 5)))
    rows.leave(0, RETIRING)
    rows.free(0)
    assert not rows._num_stops.any()
