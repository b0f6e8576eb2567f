"""The timeline as text: golden pictures of small batches."""

from __future__ import annotations

from carousel.v1 import inspect_pb2
from demo import timeline

LABELS = {"id-a": "A", "id-b": "B", "id-c": "C"}


def step(*rows: tuple, waiting: int = 0) -> inspect_pb2.WatchStepsResponse:
    """rows: (slot, request id, tokens, what) with what one of joined, padding or nothing."""
    record = inspect_pb2.WatchStepsResponse(waiting_requests=waiting)
    for slot, request_id, num_tokens, *what in rows:
        record.rows.add(
            request_id=request_id, slot=slot, num_tokens=num_tokens, joined="joined" in what, padding="padding" in what
        )
    return record


# A joins and decodes; B joins with a prompt in two chunks; A leaves, C takes its row; B has ended and is padding.
BATCH = [
    step((0, "id-a", 5, "joined"), waiting=12),
    step((0, "id-a", 1), (1, "id-b", 8, "joined"), waiting=1),
    step((0, "id-a", 1), (1, "id-b", 3), waiting=1),
    step((1, "id-b", 1), waiting=1),
    step((0, "id-c", 1, "joined"), (1, "id-b", 1)),
    step((0, "id-c", 1), (1, "id-b", 1, "padding")),
]


def test_every_step_has_a_column_when_there_is_room():
    assert timeline.chart(BATCH, LABELS, num_rows=3, per_column=1) == [
        "step     0",
        "row 0   |aAA.cC",
        "row 1   |.bbBB-",
        "row 2   |......",
        "waiting |+111..",
    ]


def test_a_column_of_several_steps_shows_who_joined_then_who_decoded_then_padding():
    assert timeline.chart(BATCH, LABELS, num_rows=2, per_column=2) == [
        "step     0",
        "row 0   |aAc",
        "row 1   |bbB",
        "waiting |+1.",
    ]
    assert timeline.chart(BATCH, LABELS, num_rows=2, per_column=6) == [
        "step     0",
        "row 0   |c",
        "row 1   |b",
        "waiting |+",
    ]


def test_the_ruler_names_the_step_that_each_tenth_column_begins():
    steps = [step((0, "id-a", 1))] * 75
    assert timeline.chart(steps, LABELS, num_rows=1, per_column=3) == [
        "step     0         30        60",
        "row 0   |AAAAAAAAAAAAAAAAAAAAAAAAA",
        "waiting |.........................",
    ]


def test_a_request_of_somebody_else_is_a_stranger():
    chart = timeline.chart([step((0, "other", 1)), step((0, "other", 1, "padding"))], LABELS, num_rows=1, per_column=1)
    assert chart[1] == "row 0   |?-"


def test_no_line_is_wider_than_the_terminal():
    for width in (60, 100, 120):
        for num_steps in (1, width - 9, width - 8, 1000):
            steps = [step((0, "id-a", 1))] * num_steps
            per_column = timeline.steps_per_column(num_steps, width)
            lines = timeline.chart(steps, LABELS, num_rows=1, per_column=per_column)
            assert max(map(len, lines[1:])) <= width
            assert sum(len(line) == len(lines[1]) for line in lines[1:]) == 2


def test_stays_begin_with_the_first_step_in_a_row_and_end_before_padding():
    assert timeline.stays(BATCH, LABELS) == [
        timeline.Stay("A", 0, 0, 2),
        timeline.Stay("B", 1, 1, 4),
        timeline.Stay("C", 0, 4, 5),
    ]


def test_a_preempted_request_has_two_stays():
    steps = [
        step((0, "id-a", 5, "joined")),
        step((0, "id-a", 1)),
        step((0, "id-b", 5, "joined")),
        step((0, "id-b", 1), (1, "id-a", 6, "joined")),
    ]
    assert timeline.joins_and_leaves(steps, LABELS, width=100) == [
        "A row 0 steps 0-1   A row 1 steps 3-3   B row 0 steps 2-3",
    ]


def test_joins_and_leaves_fill_lines_up_to_the_width():
    assert timeline.joins_and_leaves(BATCH, LABELS, width=40) == [
        "A row 0 steps 0-2   B row 1 steps 1-4",
        "C row 0 steps 4-5",
    ]
    assert timeline.joins_and_leaves([], LABELS, width=40) == []
