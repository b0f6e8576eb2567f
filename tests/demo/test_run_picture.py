"""The picture of a batch: well-formed, one bar per stretch of work, padding told from work."""

from __future__ import annotations

from xml.etree import ElementTree

from carousel.v1 import inspect_pb2
from demo.picture import picture

SVG = "{http://www.w3.org/2000/svg}"
BACKGROUND = {"#ffffff", "#f6f8fa"}


def step(number: int, *rows: inspect_pb2.StepRow) -> inspect_pb2.WatchStepsResponse:
    return inspect_pb2.WatchStepsResponse(step_id=number, planned_ns=number * 1000, duration_ns=1000, rows=rows)


def row(request_id: str, slot: int, num_tokens: int = 1, padding: bool = False, joined: bool = False) -> inspect_pb2.StepRow:
    return inspect_pb2.StepRow(request_id=request_id, slot=slot, num_tokens=num_tokens, padding=padding, joined=joined)


def bars(svg: str) -> list[tuple[float, float, float, str]]:
    """(x, y, width, fill) of every bar."""
    rects = ElementTree.fromstring(svg).iter(f"{SVG}rect")
    found = [(rect.get("x"), rect.get("y"), rect.get("width"), rect.get("fill") or "") for rect in rects]
    return [(float(x or 0), float(y or 0), float(w or 0), fill) for x, y, w, fill in found if fill not in BACKGROUND]


def test_a_request_is_a_pale_and_a_full_bar_and_grey_once_it_has_ended() -> None:
    steps = [
        step(0, row("a", 0, num_tokens=8, joined=True)),
        step(1, row("a", 0), row("b", 1, num_tokens=4, joined=True)),
        step(2, row("a", 0), row("b", 1)),
        step(3, row("a", 0, padding=True), row("b", 1)),
    ]
    drawn = sorted(bars(picture([("static", steps)], {"a": "A", "b": "B"}, num_rows=2)), key=lambda bar: (bar[1], bar[0]))
    assert len(drawn) == 5
    (prompt, decode, padding), (_, other) = drawn[:3], drawn[3:]
    assert padding[3] == "#c4c9cf" and prompt[3] != decode[3]
    assert abs(decode[2] - 2 * prompt[2]) < 0.2 and abs(other[2] - decode[2]) < 0.2
    assert prompt[1] == decode[1] == padding[1] < other[1]


def test_panels_share_one_axis() -> None:
    short, long = [step(0, row("a", 0))], [step(i, row("a", 0)) for i in range(4)]
    one, four = sorted(bars(picture([("x", short), ("y", long)], {"a": "A"}, num_rows=1)), key=lambda bar: bar[1])
    assert abs(four[2] - 4 * one[2]) < 0.5


def test_labels_can_not_break_the_file() -> None:
    svg = picture([("<&", [step(0, row("a", 0))])], {"a": "<"}, num_rows=1)
    assert ElementTree.fromstring(svg) is not None
