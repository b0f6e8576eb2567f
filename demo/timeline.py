"""The steps of a run as plain text: who held which row of the batch when. Pure: takes step records, returns lines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from carousel.v1 import inspect_pb2

IDLE, PADDING, STRANGER = ".", "-", "?"
LEGEND = (
    "One line of letters is one row of the batch, time runs to the right, and a letter is the request that holds the row:",
    f"  a  its prompt is computed (it joined)      A  it makes a token in each step      {IDLE}  nobody holds the row",
    f"  {PADDING}  it has ended, and its row is computed for nothing      waiting: requests without a row (+: more than 9)",
)
_MARGIN = 9  # characters before the chart

Step = inspect_pb2.WatchStepsResponse


@dataclass(frozen=True)
class Stay:
    """One request in one row without a break. Steps are counted from the first one of the chart; both ends included."""

    label: str
    slot: int
    first_step: int
    last_step: int


def columns_of(width: int) -> int:
    """Columns left for steps in lines of `width` characters."""
    return width - _MARGIN


def steps_per_column(num_steps: int, width: int) -> int:
    return max(1, math.ceil(num_steps / columns_of(width)))


def chart(steps: Sequence[Step], labels: Mapping[str, str], num_rows: int, per_column: int) -> list[str]:
    """One line per row of the batch, one per-column character per `per_column` steps. labels: capital letter by request id."""
    groups = [steps[start : start + per_column] for start in range(0, len(steps), per_column)]
    lines = [f"{'step':<{_MARGIN}}{_ruler(len(groups), per_column)}".rstrip()]
    for slot in range(num_rows):
        cells = "".join(_cell([_mark(step, slot, labels) for step in group]) for group in groups)
        lines.append(f"{f'row {slot}':<{_MARGIN - 1}}|{cells}")
    waiting = "".join(_digit(max(step.waiting_requests for step in group)) for group in groups)
    lines.append(f"{'waiting':<{_MARGIN - 1}}|{waiting}")
    return lines


def stays(steps: Sequence[Step], labels: Mapping[str, str]) -> list[Stay]:
    """Every stay of a known request, by label, then by time. Steps as padding don't count: the request had ended."""
    found: list[Stay] = []
    open_stays: dict[str, Stay] = {}
    for index, step in enumerate(steps):
        for row in step.rows:
            label = labels.get(row.request_id)
            if label is None or row.padding:
                continue
            stay = open_stays.get(label)
            if stay is None or row.joined:
                found += [stay] if stay is not None else []
                stay = Stay(label, row.slot, index, index)
            open_stays[label] = Stay(label, stay.slot, stay.first_step, index)
    return sorted([*found, *open_stays.values()], key=lambda stay: (stay.label, stay.first_step))


def joins_and_leaves(steps: Sequence[Step], labels: Mapping[str, str], width: int) -> list[str]:
    """`A row 0 steps 0-23`, as many to a line as fit."""
    texts = [f"{stay.label} row {stay.slot} steps {stay.first_step}-{stay.last_step}" for stay in stays(steps, labels)]
    if not texts:
        return []
    column = max(map(len, texts)) + 3
    per_line = max(1, (width + 3) // column)
    return ["".join(f"{text:<{column}}" for text in texts[i : i + per_line]).rstrip() for i in range(0, len(texts), per_line)]


def _mark(step: Step, slot: int, labels: Mapping[str, str]) -> str:
    for row in step.rows:
        if row.slot == slot:
            if row.padding:
                return PADDING
            label = labels.get(row.request_id, STRANGER)
            return label.lower() if row.joined or row.num_tokens > 1 else label
    return IDLE


def _cell(marks: Iterable[str]) -> str:
    """What a column shows for several steps: who joined last, else who made tokens, else padding, else nothing."""
    ranked = sorted(marks, key=_rank)  # stable: the latest of equal rank is last
    return ranked[-1]


def _rank(mark: str) -> int:
    if mark in (IDLE, PADDING):
        return (IDLE, PADDING).index(mark)
    return 3 if mark.islower() else 2


def _digit(count: int) -> str:
    return IDLE if count == 0 else str(count) if count < 10 else "+"


def _ruler(num_columns: int, per_column: int) -> str:
    """Step numbers, each above the column that it begins."""
    gap = max(10, len(str(num_columns * per_column)) + 2)
    return "".join(f"{column * per_column:<{gap}}" for column in range(0, num_columns, gap))
