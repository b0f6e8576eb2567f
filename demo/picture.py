"""The batch as a picture (SVG): one panel per run, one line per row; drawn as `carousel draw` draws it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.pictures.canvas import svg
from bench.pictures.timeline import Panel, timeline
from bench.pictures.watched import steps_of
from carousel.v1 import inspect_pb2

Step = inspect_pb2.WatchStepsResponse


def picture(panels: Sequence[tuple[str, Sequence[Step]]], labels: Mapping[str, str], num_rows: int) -> str:
    """An SVG of the panels (title, steps), one above the other, all on the time axis of the longest."""
    drawn = [Panel(title, steps_of(steps), num_rows, labels) for title, steps in panels]
    return svg(timeline("The same requests, step by step", drawn))
