"""The iteration timeline: one line per row of the batch, time to the right, prompts and tokens told apart. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from bench.pictures.canvas import Area, Line, Picture, Rect, Shape, Text, text_width
from bench.pictures.steps import DECODE, PADDING, PREEMPTED, PREFILL, Row, Step, kind_of, numbered

WIDTH = 1000
LEFT, RIGHT = 96, 24  # margins beside the rows
_HEAD, _PANEL_GAP = 30, 14
_AXIS, _QUEUE = 18, 26
MOST_ROWS = 32  # of a panel; more could not be told apart
PAUSE_NS = 50_000_000  # of the whole batch; a longer one is shown
_CELL_PX = 4.5  # a step narrower than this is not drawn apart from the next one of its stay


@dataclass(frozen=True)
class Panel:
    """num_rows: of the batch. labels: short names by request; without: numbers in the order of joining."""

    title: str
    steps: Sequence[Step]
    num_rows: int
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def shown_rows(self) -> int:
        return min(self.num_rows, MOST_ROWS)

    @property
    def span_ns(self) -> int:
        return self.steps[-1].end_ns - self.steps[0].start_ns if self.steps else 0


def timeline(title: str, panels: Sequence[Panel], notes: Sequence[str] = ()) -> Picture:
    """Panels one below the other, all on the time axis of the longest."""
    row_px = 20 if max(panel.shown_rows for panel in panels) <= 16 else 13
    heights = [_HEAD + panel.shown_rows * row_px + _QUEUE + _AXIS + _PANEL_GAP for panel in panels]
    top = 40 + 17 * len(notes)
    picture = Picture(WIDTH, 0, f"{title}. {' '.join(panel.title for panel in panels)}")
    picture.add([Text(14, 26, title, size="title")])
    picture.add(Text(14, 46 + 17 * i, note, "muted", "small") for i, note in enumerate(notes))
    scale = (WIDTH - LEFT - RIGHT) / max(1, *(panel.span_ns for panel in panels))
    y = float(top)
    for panel, height in zip(panels, heights, strict=True):
        picture.add(_Drawing(panel, y, row_px, scale).shapes())
        y += height
    picture.height = round(add_legend(picture, y + 8, _entries(picture), _swatch)) + 12
    return picture


@dataclass
class _Stay:
    """A row held by one output of one request without a break."""

    key: tuple[str, int]
    number: int  # of the stays of its slot
    end_ns: int
    bars: list[tuple[str, int, int]] = field(
        default_factory=list
    )  # tokens and padding that are not drawn yet: kind, begin, end
    over: bool = False  # the request has left; what is computed for it from now on is for nothing


class _Drawing:
    """One panel."""

    def __init__(self, panel: Panel, top: float, row_px: int, scale: float) -> None:
        self._panel, self._top, self._row_px, self._scale = panel, top, row_px, scale
        self._labels = panel.labels or numbered(panel.steps)
        self._begin_ns = panel.steps[0].start_ns if panel.steps else 0
        self._rows_y = top + _HEAD
        steps = max(1, len(panel.steps))
        self._marks: list[Shape] = []
        self._cells = panel.span_ns * scale / steps >= _CELL_PX

    def shapes(self) -> Iterator[Shape]:
        panel = self._panel
        yield Text(14, self._top + 18, panel.title, size="panel")
        yield Text(WIDTH - RIGHT, self._top + 18, _facts(panel), "muted", "small", "end")
        for slot in range(panel.shown_rows):
            y = self._y(slot)
            name = f"slot {slot}" if self._row_px >= 16 or slot % 4 == 0 else ""
            yield Text(LEFT - 8, y + self._row_px - 6, name, "muted", "small", "end")
            yield Rect(LEFT, y, panel.span_ns * self._scale, self._row_px - 3, "idle")
        yield from self._bars()
        yield from self._queue()
        yield from self._axis()

    def _y(self, slot: int) -> float:
        return self._rows_y + slot * self._row_px

    def _x(self, at_ns: int) -> float:
        return LEFT + (at_ns - self._begin_ns) * self._scale

    # ---------------------------------------------------------------------------------------------------------- bars

    def _bars(self) -> Iterator[Shape]:
        """Chunks and padding as they come; tokens by step where there is room, else by stretch. Marks above all of them."""
        stays: dict[int, _Stay] = {}
        steps = self._panel.steps
        for index, step in enumerate(steps):
            for row in step.rows:
                if row.slot < self._panel.shown_rows:
                    yield from self._bar(step, row, stays)
            following = steps[index + 1].rows if step.leaves and index + 1 < len(steps) else ()
            going_on = {(row.request_id, row.output_index) for row in following}
            for request_id, reason in step.leaves:
                open_stays = [(slot, stay) for slot, stay in stays.items() if stay.key[0] == request_id and not stay.over]
                if open_stays:  # of several outputs, that which is not in the next step
                    slot, stay = min(open_stays, key=lambda each: each[1].key in going_on)
                    yield from self._rest(slot, stay)
                    self._marks += self._leave(slot, stay.end_ns, reason)
                    stay.over = True
        for slot, stay in stays.items():
            yield from self._rest(slot, stay)
        yield from self._marks

    def _bar(self, step: Step, row: Row, stays: dict[int, _Stay]) -> Iterator[Shape]:
        stay, key = stays.get(row.slot), (row.request_id, row.output_index)
        if stay is None or stay.key != key or row.joined:
            if stay is not None:
                yield from self._rest(row.slot, stay)
                if not stay.over:  # its end is in a step that was left out
                    self._marks += self._leave(row.slot, stay.end_ns, "")
            stay = stays[row.slot] = _Stay(key, stay.number + 1 if stay is not None else 0, step.end_ns)
            if row.joined:
                self._marks.append(self._join(row.slot, step.start_ns))
        stay.end_ns = step.end_ns
        kind = PADDING if stay.over else kind_of(row)
        if kind == PREFILL:
            yield self._rect(row.slot, step.start_ns, step.end_ns, kind)
        elif self._goes_on(stay, kind, step):
            stay.bars[-1] = (kind, stay.bars[-1][1], step.end_ns)
        else:
            stay.bars.append((kind, step.start_ns, step.end_ns))

    def _goes_on(self, stay: _Stay, kind: str, step: Step) -> bool:
        """Whether this step is drawn in one with the one before."""
        return not self._cells and bool(stay.bars) and stay.bars[-1][0] == kind and step.start_ns - stay.bars[-1][2] < PAUSE_NS

    def _rest(self, slot: int, stay: _Stay) -> Iterator[Shape]:
        """What of a stay was not drawn yet, and whose it is."""
        bars, stay.bars = stay.bars, []
        role = "decode-next" if stay.number % 2 else "decode"
        for kind, begin_ns, end_ns in bars:
            yield self._rect(slot, begin_ns, end_ns, role if kind == DECODE else kind)
        tokens = [bar for bar in bars if bar[0] == DECODE]
        if not tokens:
            return
        left, right, label = self._x(tokens[0][1]), self._x(tokens[-1][2]), self._labels.get(stay.key[0], "")
        width = text_width(label, "tiny") + 6
        if right - left > width + 4:
            if self._cells:  # the lines between steps would run through it
                yield Rect((left + right - width) / 2, self._y(slot), width, self._row_px - 3, f"under-{role}")
            yield Text((left + right) / 2, self._y(slot) + self._row_px / 2 + 2.2, label, f"on-{role}", "tiny", "middle")

    def _rect(self, slot: int, begin_ns: int, end_ns: int, role: str) -> Rect:
        x, width = self._x(begin_ns), (end_ns - begin_ns) * self._scale
        gap = 0.7 if self._cells else 0.0
        return Rect(x, self._y(slot), max(0.5, width - gap), self._row_px - 3, role)

    def _join(self, slot: int, at_ns: int) -> Area:
        """A small wedge on the row's upper edge: what the row computes stays visible."""
        return _wedge(self._x(at_ns), self._y(slot) - 2.5)

    def _leave(self, slot: int, at_ns: int, reason: str) -> Iterator[Shape]:
        x, y, height = self._x(at_ns), self._y(slot), self._row_px - 3
        if reason == PREEMPTED:
            yield Rect(x - 2, y - 1.5, 4, height + 3, "preempted")
        else:
            yield Rect(x - 1.6, y, 1.6, height, "ink")

    # --------------------------------------------------------------------------------------------------- queue, axis

    def _queue(self) -> Iterator[Shape]:
        """Requests that wait, as a strip under the rows."""
        panel, bottom = self._panel, self._y(self._panel.shown_rows) + 21
        most = max((step.waiting for step in panel.steps), default=0)
        yield Text(LEFT - 8, bottom - 3, f"≤ {most} waiting" if most else "0 waiting", "muted", "small", "end")
        yield Line(LEFT, bottom, self._x(self._begin_ns + panel.span_ns), bottom, "grid")
        if not most:
            return
        corners: list[tuple[float, float]] = []
        for step, following in zip(panel.steps, [*panel.steps[1:], None], strict=True):
            y = bottom - 16 * step.waiting / most
            end_ns = following.start_ns if following is not None else step.end_ns
            corners += [(self._x(step.start_ns), y), (self._x(end_ns), y)]
        yield Area(((corners[0][0], bottom), *corners, (corners[-1][0], bottom)), "waiting")

    def _axis(self) -> Iterator[Shape]:
        panel, y = self._panel, self._y(self._panel.shown_rows) + _QUEUE
        yield from axis(self._x(self._begin_ns), y, panel.span_ns, self._scale)
        x = self._x(self._begin_ns + panel.span_ns)
        yield Line(x, self._rows_y - 3, x, y, "ink", dashed=True)


def axis(left: float, y: float, span_ns: int, scale: float) -> Iterator[Shape]:
    """Ticks at round times from the left end on. scale: pixels a nanosecond."""
    tick_ns = _tick_ns(80 / scale)
    for i in range(int(span_ns // tick_ns) + 1):
        x = left + i * tick_ns * scale
        yield Line(x, y - 5, x, y, "muted")
        yield Text(x, y + 12, _seconds(i * tick_ns), "muted", "tiny", "middle")


def _tick_ns(least_ns: float) -> int:
    """1, 2 or 5 times a power of ten."""
    unit = 1
    while True:
        for factor in (1, 2, 5):
            if factor * unit >= least_ns:
                return factor * unit
        unit *= 10


def _seconds(ns: int) -> str:
    return f"{ns / 1e9:g} s" if ns >= 1_000_000_000 or not ns else f"{ns / 1e6:g} ms"


def _facts(panel: Panel) -> str:
    """What it was worth, from the steps alone."""
    if not panel.steps:
        return "no step"
    busy = sum((step.end_ns - step.start_ns) * sum(not row.padding for row in step.rows) for step in panel.steps)
    share = busy / max(1, panel.num_rows * panel.span_ns)
    seconds = max(1e-9, panel.span_ns / 1e9)
    tokens = sum(row.sampled and not row.padding for step in panel.steps for row in step.rows)
    preemptions = sum(reason == PREEMPTED for step in panel.steps for _, reason in step.leaves)
    more = f" · {preemptions} preemptions" if preemptions else ""
    parts = f"{len(panel.steps)} steps in {seconds:.3g} s · {_number(tokens / seconds)} tokens/s"
    return f"{parts} · {share:.0%} of the slots' time used{more}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _entries(picture: Picture) -> list[tuple[str, str]]:
    """Of what occurs, and of what every picture is read with."""
    roles = {shape.role for shape in picture.shapes}
    entries = [("prefill", "prompt chunk"), ("decode", "decode step (next request: light blue)")]
    entries += [("padding", "has ended: computed for nothing")] if "padding" in roles else []
    entries += [("idle", "idle slot"), ("join", "joins"), ("leave", "leaves")]
    return entries + ([("preempted", "preempted")] if "preempted" in roles else [])


def add_legend(
    picture: Picture, y: float, entries: Sequence[tuple[str, str]], swatch: Callable[[str, float, float], Iterable[Shape]]
) -> float:
    """Role and words of each, in as many lines as it takes; returns where they end. swatch: draws a role's sign at x, y."""
    x = float(LEFT)
    for role, words in entries:
        width = 27 + text_width(words, "small")
        if x + width > WIDTH:
            x, y = float(LEFT), y + 20
        picture.add(swatch(role, x, y))
        picture.add([Text(x + 27, y + 11, words, "ink", "small")])
        x += width + 12
    return y + 12


def _wedge(x: float, y: float) -> Area:
    return Area(((x - 0.5, y), (x + 5.5, y), (x - 0.5, y + 7)), "ink")


def _swatch(role: str, x: float, y: float) -> Iterator[Shape]:
    match role:
        case "join":
            yield _wedge(x + 12, y + 3)
        case "leave":
            yield Rect(x + 12, y, 1.6, 12, "ink")
        case "preempted":
            yield Rect(x + 10, y - 1, 4, 14, "preempted")
        case "decode":
            yield Rect(x, y, 11, 12, "decode")
            yield Rect(x + 11, y, 11, 12, "decode-next")
        case _:
            yield Rect(x, y, 22, 12, role)
