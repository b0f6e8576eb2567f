"""The KV cache over time: what its blocks were for, as bands that always add up to the whole pool. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from bench.pictures.canvas import Area, Line, Picture, Rect, Shape, Text
from bench.pictures.steps import Memory, Step
from bench.pictures.timeline import PAUSE_NS, add_legend, axis

_WIDTH, _LEFT, _RIGHT, _TOP = 1000, 96, 24, 74
_PLOT = 270  # pixels, of the whole pool
_SEEN_SHARE = 200  # a pause is shown from this part of the whole time on
_MOST_RESERVED = 2.0  # times the pool; beyond it the plot ends
_WORD_PX = 60  # room for a word
_LINE = "reserved"
_MOST_COLUMNS = 900  # more than there are pixels would not be seen

# From below; in blocks' worth of tokens.
_BANDS: Sequence[tuple[str, str, Callable[[Memory], float]]] = (
    ("used", "used by one request", lambda memory: max(0.0, memory.used - memory.shared)),
    ("shared", "used by several (shared)", lambda memory: min(memory.shared, memory.used)),
    ("wasted", "held, but empty (wasted)", lambda memory: memory.wasted),
    ("retiring", "given back, still in flight", lambda memory: memory.retiring),
    ("cached", "kept for the prefix cache", lambda memory: memory.cached),
    ("free", "free", lambda memory: memory.free),
)


def bands(steps: Sequence[Step]) -> dict[str, list[float]]:
    """Blocks of each band, by step."""
    return {role: [value(step.memory) for step in steps] for role, _, value in _BANDS}


def memory_picture(title: str, steps: Sequence[Step], notes: Sequence[str] = ()) -> Picture:
    """steps: one at least."""
    begin_ns, end_ns = steps[0].start_ns, steps[-1].end_ns
    stretches = _thinned(steps)
    shown = [step for stretch in stretches for step in stretch]
    pool = max(1, *(step.memory.total for step in shown))
    most = max(pool, min(_MOST_RESERVED * pool, max(step.memory.reserved for step in shown)))  # blocks, of the plot's height
    down = 17 * len(notes)
    bottom = _TOP + down + _PLOT
    scale = (_WIDTH - _LEFT - _RIGHT) / max(1, end_ns - begin_ns)
    picture = Picture(_WIDTH, 0, f"{title}. {_facts(steps)}")
    picture.add([Text(14, 26, title, size="title"), Text(14, 46, _facts(steps), "muted", "small")])
    picture.add(Text(14, 63 + 17 * i, note, "muted", "small") for i, note in enumerate(notes))
    gone = 0.0  # where the stretch before ends
    for stretch in stretches:
        edges = [_LEFT + (step.start_ns - begin_ns) * scale for step in stretch]
        edges.append(_LEFT + (stretch[-1].end_ns - begin_ns) * scale)
        picture.add(_stretch(stretch, edges, bottom, most))
        if stretch is not stretches[0] and edges[0] - gone > _WORD_PX:
            picture.add([Text((gone + edges[0]) / 2, bottom - _PLOT / 2, "no step", "muted", "small", "middle")])
        gone = edges[-1]
    if most > pool:
        y = bottom - _PLOT * pool / most
        picture.add(
            [Line(_LEFT, y, _WIDTH - _RIGHT, y, "ink", dashed=True), Text(_LEFT + 6, y - 5, "the whole pool", "ink", "tiny")]
        )
    picture.add(_blocks_axis(pool, bottom, _PLOT / most))
    picture.add(axis(_LEFT, bottom + 8, end_ns - begin_ns, scale))
    roles = {shape.role for shape in picture.shapes}
    entries = [(role, words) for role, words, _ in _BANDS if role in roles]
    entries += [(_LINE, "what reserving each one's longest output would hold")] if any(s.memory.reserved for s in shown) else []
    picture.height = round(add_legend(picture, bottom + 36, entries, _swatch)) + 12
    return picture


def _thinned(steps: Sequence[Step]) -> list[list[Step]]:
    """Stretches without a pause, as many steps in all as can be told apart. In a pause nobody is in the batch, and what was
    held is free or cached: there is nothing to draw."""
    every = -(-len(steps) // _MOST_COLUMNS)
    stretches: list[list[Step]] = []
    least_ns = max(PAUSE_NS, (steps[-1].end_ns - steps[0].start_ns) // _SEEN_SHARE)
    before: Step | None = None
    for number, step in enumerate(steps):
        pauses = before is None or step.start_ns - before.end_ns > least_ns
        if pauses:
            if before is not None and stretches[-1][-1] is not before:
                stretches[-1].append(before)
            stretches.append([step])
        elif number % every == 0:
            stretches[-1].append(step)
        before = step
    if before is not None and stretches[-1][-1] is not before:
        stretches[-1].append(before)
    return stretches


def _stretch(stretch: Sequence[Step], edges: Sequence[float], bottom: float, most: int | float) -> Iterator[Shape]:
    below = [0.0] * len(stretch)
    for role, values in bands(stretch).items():
        above = [low + value for low, value in zip(below, values, strict=True)]
        if any(values):
            yield _area(role, edges, below, above, bottom, _PLOT / most)
        below = above
    if any(step.memory.reserved for step in stretch):
        yield from _reserved(stretch, edges, bottom, most)


def _area(role: str, edges: Sequence[float], below: Sequence[float], above: Sequence[float], zero: float, unit: float) -> Area:
    """A staircase; unit: pixels of a block."""
    upper = [(x, zero - value * unit) for i, value in enumerate(above) for x in edges[i : i + 2]]
    lower = [(x, zero - value * unit) for i, value in enumerate(below) for x in edges[i : i + 2]]
    return Area((*upper, *reversed(lower)), role)


def _reserved(shown: Sequence[Step], edges: Sequence[float], bottom: float, most: float) -> Iterator[Shape]:
    """A staircase, cut off where it leaves the plot."""
    levels = [bottom - _PLOT * min(1.0, step.memory.reserved / most) for step in shown]
    for i, y in enumerate(levels):
        yield Line(edges[i], y, edges[i + 1], y, "ink", width=2)
        if i and levels[i - 1] != y:
            yield Line(edges[i], levels[i - 1], edges[i], y, "ink")


def _blocks_axis(pool: int, bottom: float, unit: float) -> Iterator[Shape]:
    """unit: pixels of a block."""
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = bottom - pool * share * unit
        yield Line(_LEFT - 5, y, _LEFT, y, "muted")
        yield Text(_LEFT - 8, y + 4, f"{pool * share:,.0f}", "muted", "tiny", "end")
    yield Text(14, bottom - pool * unit + 4, "blocks", "muted", "small")


def _facts(steps: Sequence[Step]) -> str:
    """Means over time, weighted by the steps' lengths."""
    times = [max(1, step.end_ns - step.start_ns) for step in steps]

    def mean(values: Iterable[float]) -> float:
        return sum(time * value for time, value in zip(times, values, strict=True)) / sum(times)

    held, wasted = mean(step.memory.held for step in steps), mean(step.memory.wasted for step in steps)
    first = steps[0].memory
    most = max(step.memory.held for step in steps)
    pool = f"{first.total:,} blocks of {first.block_size} tokens"
    waste = f"{wasted / held:.1%} of held room empty" if held else "nothing held"
    shared = max(step.memory.shared for step in steps)
    return f"{pool} · at most {most:,} held, {shared:,} of them shared at most · in the mean {waste}"


def _swatch(role: str, x: float, y: float) -> Iterator[Shape]:
    if role == _LINE:
        yield Line(x, y + 6, x + 22, y + 6, "ink", width=2)
    else:
        yield Rect(x, y, 22, 12, role)
