"""The headline experiment's plots, arranged as the post's: bars of throughput for each cap, a latency CDF for each load; and KV
waste for each cap. Takes a summary, returns pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.anyscale_summary import CONTINUOUS, PREFILL_FIRST, STATIC, SYSTEMS, Load, Summary
from bench.cpu_workload import Noise
from bench.pictures.canvas import Line, Picture, Rect, Shape, Text, text_width
from bench.tables import number

ROLES = {system: f"series-{at}" for at, system in enumerate(SYSTEMS, 1)}
_RESERVED = "reserved"  # for the model's longest sequence
_WASTE_ROLES = {
    _RESERVED: "series-1",
    STATIC: ROLES[STATIC],
    PREFILL_FIRST: ROLES[PREFILL_FIRST],
    CONTINUOUS: ROLES[CONTINUOUS],
}
_WASTE_NAMES = {
    _RESERVED: "reserve the model's length (computed)",
    STATIC: "Carousel, static (reserves the cap)",
    PREFILL_FIRST: "Carousel, prefill_first (reserves the cap)",
    CONTINUOUS: "Carousel, continuous",
}
_WIDTH, _LEFT, _RIGHT, _TOP, _PLOT, _BELOW = 960, 76, 20, 88, 270, 56
_LEGEND_ROW = 20
_MARK_ROOM = 52  # pixels of a number below an axis


@dataclass(frozen=True)
class _Frame:
    """A plot's place, and its scales."""

    left: float
    right: float
    top: float
    bottom: float
    most: float  # of the vertical axis, from 0

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * value / self.most


def ticks(most: float, about: int = 5) -> list[float]:
    """Round numbers from 0 to `most` or a little more."""
    if most <= 0:
        return [0.0, 1.0]
    rough = most / about
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * 0.999)
    return [step * at for at in range(math.ceil(most / step - 1e-9) + 1)]


def short(value: float) -> str:
    """Two or three digits, to stand above a bar."""
    if value < 1000:
        return f"{value:.0f}"
    return f"{value / 1000:.1f}k" if value < 9950 else f"{value / 1000:.0f}k"


def _legend(names: Sequence[tuple[str, str]], top: float) -> tuple[list[Shape], int]:
    """(role, text) in rows, and how many rows."""
    shapes: list[Shape] = []
    x, rows = float(_LEFT), 1
    for role, text in names:
        width = 30 + text_width(text, "small")
        if x + width > _WIDTH - _RIGHT:
            x, rows = float(_LEFT), rows + 1
        y = top + (rows - 1) * _LEGEND_ROW
        shapes += [Rect(x, y - 10, 14, 10, role), Text(x + 19, y, text, size="small")]
        x += width + 8
    return shapes, rows


def _axis(frame: _Frame, marks: Sequence[float], write: str, unit: str) -> Iterator[Shape]:
    for mark in marks:
        y = frame.y(mark)
        yield Line(frame.left, y, frame.right, y, "grid")
        text = f"{mark:.0%}" if write == "share" else number(mark)
        yield Text(frame.left - 8, y + 4, text, "muted", "small", "end")
    yield Text(12, frame.top - 16, unit, "muted", "small")


def _whisker(x: float, frame: _Frame, noise: Noise) -> Iterator[Shape]:
    """From the least to the most of the rounds."""
    if noise.most > noise.least:
        low, high = frame.y(noise.least), frame.y(noise.most)
        yield Line(x, low, x, high, "ink")
        yield Line(x - 3, low, x + 3, low, "ink")
        yield Line(x - 3, high, x + 3, high, "ink")


def _bars(
    title: str,
    about: str,
    groups: Sequence[tuple[str, dict[str, Noise]]],
    roles: dict[str, str],
    names: dict[str, str],
    write: str,
    unit: str,
) -> Picture:
    """groups: what stands below each, and its bars by name."""
    shown = [name for name in roles if any(name in bars for _, bars in groups)]
    legend, rows = _legend([(roles[name], names[name]) for name in shown], 50)
    top = _TOP + (rows - 1) * _LEGEND_ROW
    most = max((noise.most for _, bars in groups for noise in bars.values()), default=1.0)
    marks = ticks(most)
    frame = _Frame(_LEFT, _WIDTH - _RIGHT, top, top + _PLOT, marks[-1])
    picture = Picture(_WIDTH, int(top + _PLOT + _BELOW), about)
    picture.add([Text(_LEFT, 26, title, size="title")])
    picture.add(legend)
    picture.add(_axis(frame, marks, write, unit))
    room = (frame.right - frame.left) / max(1, len(groups))
    width = min(34.0, room * 0.84 / max(1, len(shown)))
    for at, (below, bars) in enumerate(groups):
        first = frame.left + room * (at + 0.5) - width * len(shown) / 2
        for place, name in enumerate(shown):
            if name not in bars:
                continue
            noise, x = bars[name], first + place * width
            y = frame.y(noise.median)
            picture.add([Rect(x + 1, y, width - 2, frame.bottom - y, roles[name])])
            picture.add(_whisker(x + width / 2, frame, noise))
            value = f"{noise.median:.0%}" if write == "share" else short(noise.median)
            picture.add([Text(x + width / 2, frame.y(noise.most) - 5, value, "muted", "tiny", "middle")])
        for row, line in enumerate(below.split("\n")):
            picture.add(
                [Text(frame.left + room * (at + 0.5), frame.bottom + 20 + 16 * row, line, size="small", anchor="middle")]
            )
    picture.add([Line(frame.left, frame.bottom, frame.right, frame.bottom, "ink")])
    return picture


def throughput(found: Summary) -> Picture:
    groups = [
        (f"cap {cap.cap} (the post's {cap.post_cap})\nmean output {cap.mean_output:.1f}", cap.tokens_per_s)
        for cap in found.caps
    ]
    title = "Throughput by the largest output length: prompt and output tokens a second"
    about = (
        "Bars for each system in four groups, one for each cap of the output length: tokens a second; whiskers from the least"
    )
    return _bars(title, f"{about} to the most of the rounds", groups, ROLES, SYSTEMS, "number", "tokens/s")


def kv_waste(found: Summary) -> Picture:
    groups = []
    for cap in found.caps:
        bars = {_RESERVED: Noise.of([cap.reserve_max_waste])} | {
            name: noise for name, noise in cap.kv_waste.items() if name in _WASTE_ROLES
        }
        groups.append((f"cap {cap.cap} (the post's {cap.post_cap})", bars))
    title = "KV cache that is allocated and not used; perfect is 0%"
    about = "Bars for each cap of the output length: share of the allocated KV cache that holds nothing"
    return _bars(title, about, groups, _WASTE_ROLES, _WASTE_NAMES, "share", "of allocated")


def latency(found: Summary) -> Picture:
    """A panel for each load, side by side."""
    shown = [name for name in SYSTEMS if any(name in load.e2e_s for load in found.loads)]
    legend, rows = _legend([(ROLES[name], SYSTEMS[name]) for name in shown], 50)
    top = _TOP + 22 + (rows - 1) * _LEGEND_ROW
    picture = Picture(
        _WIDTH, int(top + _PLOT + _BELOW), "Cumulative distributions of the latency of requests, a panel for each load"
    )
    picture.add(
        [Text(_LEFT, 26, "Latency of a request, from its arrival to its last token: share of requests within", size="title")]
    )
    picture.add(legend)
    room = (_WIDTH - _LEFT - _RIGHT + 40) / max(1, len(found.loads))
    # One scale for all panels: what hardly moves from one to the other is seen not to move.
    longest = max((values[-1] for load in found.loads for values in load.e2e_s.values()), default=1.0)
    shortest = min((values[0] for load in found.loads for values in load.e2e_s.values()), default=0.1)
    for at, load in enumerate(found.loads):
        left = _LEFT + at * room
        frame = _Frame(left, left + room - 60, top, top + _PLOT, 1.0)
        picture.add(_panel(frame, load, shortest, longest))
    return picture


def decades(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, … from below `low` to above `high`."""
    found: list[float] = []
    size = 10.0 ** math.floor(math.log10(low))
    while not found or found[-1] < high:
        found += [size * factor for factor in (1, 2, 5)]
        size *= 10
    first = max((at for at, mark in enumerate(found) if mark <= low), default=0)
    last = next(at for at, mark in enumerate(found) if mark >= high)
    return found[first : last + 1]


def named(marks: Sequence[float], room: float) -> Sequence[float]:
    """Those that are written: all if there is room for so many, else every third, the powers of ten."""
    powers = [mark for mark in marks if math.isclose(10 ** round(math.log10(mark)), mark)]
    return marks if len(marks) <= room else powers


def _panel(frame: _Frame, load: Load, shortest: float, longest: float) -> Iterator[Shape]:
    marks = decades(max(shortest, 1e-3), longest)
    low, high = math.log(marks[0]), math.log(marks[-1])

    def x(value: float) -> float:
        share = (math.log(max(value, marks[0])) - low) / max(high - low, 1e-9)
        return frame.left + (frame.right - frame.left) * share

    title = f"{load.load:g} × what static can serve: {number(float(f'{load.rate:.3g}'))} requests/s"
    yield Text(frame.left, frame.top - 12, title, size="panel")
    for mark in ticks(1.0, 4):
        y = frame.y(mark)
        yield Line(frame.left, y, frame.right, y, "grid")
        yield Text(frame.left - 8, y + 4, f"{mark:.0%}", "muted", "small", "end")
    for mark in marks:
        yield Line(x(mark), frame.top, x(mark), frame.bottom, "grid")
    for mark in named(marks, (frame.right - frame.left) / _MARK_ROOM):
        yield Text(x(mark), frame.bottom + 18, f"{mark:g} s", "muted", "small", "middle")
    for system, values in load.e2e_s.items():
        yield from _steps([x(value) for value in values], frame, ROLES[system])
    yield Line(frame.left, frame.bottom, frame.right, frame.bottom, "ink")


def _steps(at: Sequence[float], frame: _Frame, role: str) -> Iterator[Shape]:
    """The empirical distribution: up by 1 ÷ n at each value."""
    y = frame.bottom
    for number_of, x in enumerate(at, 1):
        above = frame.y(number_of / len(at))
        yield Line(x, y, x, above, role, width=2)
        if number_of < len(at):
            yield Line(x, above, at[number_of], above, role, width=2)
        y = above
    if at:
        yield Line(at[-1], y, frame.right, y, role, width=2)
