"""The picture of a batch: well-formed, a bar for each step and row, padding told from work, requests by their letters."""

from __future__ import annotations

from collections import Counter
from xml.etree import ElementTree

from carousel.v1 import inspect_pb2
from demo.picture import picture

SVG = "{http://www.w3.org/2000/svg}"
BARS = {"prefill", "decode", "decode-next", "padding"}


def step(number: int, *rows: inspect_pb2.StepRow) -> inspect_pb2.WatchStepsResponse:
    return inspect_pb2.WatchStepsResponse(step_id=number, planned_ns=number * 1000, duration_ns=1000, rows=rows)


def row(request_id: str, slot: int, num_tokens: int = 1, padding: bool = False, joined: bool = False) -> inspect_pb2.StepRow:
    return inspect_pb2.StepRow(
        request_id=request_id, slot=slot, num_tokens=num_tokens, padding=padding, joined=joined, sampled=not padding
    )


def bars(svg: str) -> list[tuple[float, float, float, str]]:
    """(y, x, width, kind) of every bar that is higher than the legend's."""
    rects = [rect for rect in ElementTree.fromstring(svg).iter(f"{SVG}rect") if rect.get("class") in BARS]
    found = [tuple(float(rect.get(name, 0)) for name in ("y", "x", "width", "height")) for rect in rects]
    return sorted((y, x, w, rect.get("class", "")) for (y, x, w, h), rect in zip(found, rects, strict=True) if h > 12)


def test_a_row_is_its_prompt_then_its_tokens_and_grey_once_it_has_ended() -> None:
    steps = [
        step(0, row("a", 0, num_tokens=8, joined=True)),
        step(1, row("a", 0), row("b", 1, num_tokens=4, joined=True)),
        step(2, row("a", 0), row("b", 1)),
        step(3, row("a", 0, padding=True), row("b", 1)),
    ]
    svg = picture([("static", steps)], {"a": "A", "b": "B"}, num_rows=2)
    drawn = bars(svg)
    assert [kind for *_, kind in drawn] == ["prefill", "decode", "decode", "padding", "prefill", "decode", "decode"]
    assert len({y for y, *_ in drawn}) == 2
    letters = {text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")}
    assert {"A", "B", "static", "slot 0", "slot 1"} <= letters


def test_panels_share_one_axis() -> None:
    short, long = [step(0, row("a", 0))], [step(i, row("a", 0)) for i in range(4)]
    drawn = bars(picture([("x", short), ("y", long)], {"a": "A"}, num_rows=1))
    rows = Counter(y for y, *_ in drawn)
    assert [rows[y] for y in sorted(rows)] == [1, 4]
    assert max(width for *_, width, _ in drawn) - min(width for *_, width, _ in drawn) < 0.1, "a step is as wide in both"


def test_labels_can_not_break_the_file() -> None:
    svg = picture([("<&", [step(0, row("a", 0))])], {"a": "<"}, num_rows=1)
    assert ElementTree.fromstring(svg) is not None
