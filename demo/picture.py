"""The batch as a picture (SVG): one panel per run, one line per row, time to the right, one colour per request. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from xml.sax.saxutils import escape

from carousel.v1 import inspect_pb2

Step = inspect_pb2.WatchStepsResponse

_LEFT, _RIGHT, _TOP, _ROW, _GAP, _WIDTH = 150, 20, 34, 16, 46, 1000
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#24292f}.small{font-size:11px;fill:#57606a}"
    ".in{font-size:9px;fill:#fff;pointer-events:none}"
)


def picture(panels: Sequence[tuple[str, Sequence[Step]]], labels: Mapping[str, str], num_rows: int) -> str:
    """An SVG of the panels (title, steps), one above the other, all on the time axis of the longest."""
    longest = max(_end_ns(steps) - steps[0].planned_ns for _, steps in panels)
    scale = (_WIDTH - _LEFT - _RIGHT) / longest
    height = len(panels) * (_TOP + num_rows * _ROW + _GAP) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}">',
        f"<style>{_STYLE}</style>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for number, (title, steps) in enumerate(panels):
        top = number * (_TOP + num_rows * _ROW + _GAP)
        parts += _panel(title, steps, labels, num_rows, top, scale)
    parts.append(
        f'<text class="small" x="{_LEFT}" y="{height - 8}">colour: one request · pale: its prompt is computed · '
        "grey: it has ended and its row is computed for nothing · white: nobody holds the row</text></svg>"
    )
    return "\n".join(parts) + "\n"


def _panel(
    title: str, steps: Sequence[Step], labels: Mapping[str, str], num_rows: int, top: int, scale: float
) -> Iterator[str]:
    begin = steps[0].planned_ns
    yield f'<text x="10" y="{top + 22}" font-weight="600">{escape(title)}</text>'
    for slot in range(num_rows):
        y = top + _TOP + slot * _ROW
        yield f'<text class="small" x="{_LEFT - 8}" y="{y + 12}" text-anchor="end">row {slot}</text>'
        yield f'<rect x="{_LEFT}" y="{y}" width="{_WIDTH - _LEFT - _RIGHT}" height="{_ROW - 2}" fill="#f6f8fa"/>'
    for (slot, label, kind), start, end in _runs(steps, labels):
        x, width = _LEFT + (start - begin) * scale, max(0.6, (end - start) * scale)
        y = top + _TOP + slot * _ROW
        yield f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_ROW - 2}" fill="{_colour(label, kind)}"/>'
        if kind == "decode" and width > 14:
            yield f'<text class="in" x="{x + width / 2:.1f}" y="{y + 10}" text-anchor="middle">{escape(label)}</text>'
    seconds = (_end_ns(steps) - begin) / 1e9
    x = _LEFT + seconds * 1e9 * scale
    bottom = top + _TOP + num_rows * _ROW
    yield f'<line x1="{x:.1f}" y1="{top + _TOP - 4}" x2="{x:.1f}" y2="{bottom}" stroke="#24292f" stroke-dasharray="3 3"/>'
    anchor = "end" if x > _WIDTH - 120 else "start"
    yield f'<text class="small" x="{x:.1f}" y="{bottom + 14}" text-anchor="{anchor}">all done after {seconds:.1f} s</text>'


_Key = tuple[int, str, str]  # slot, label, kind


def _runs(steps: Sequence[Step], labels: Mapping[str, str]) -> Iterator[tuple[_Key, int, int]]:
    """Stretches of time in which a row held the same request for the same kind of work."""
    open_runs: dict[int, tuple[_Key, int, int]] = {}
    for i, step in enumerate(steps):
        end = steps[i + 1].planned_ns if i + 1 < len(steps) else _end_ns(steps)
        held: dict[int, _Key] = {}
        for row in step.rows:
            kind = "padding" if row.padding else "decode" if row.num_tokens == 1 and not row.joined else "prompt"
            held[row.slot] = (row.slot, labels.get(row.request_id, "?"), kind)
        for slot in sorted(set(open_runs) | set(held)):
            run = open_runs.get(slot)
            if run is not None and held.get(slot) == run[0]:
                open_runs[slot] = (run[0], run[1], end)
                continue
            if run is not None:
                yield run
                del open_runs[slot]
            if slot in held:
                open_runs[slot] = (held[slot], step.planned_ns, end)
    yield from open_runs.values()


def _end_ns(steps: Sequence[Step]) -> int:
    return steps[-1].planned_ns + steps[-1].duration_ns


def _colour(label: str, kind: str) -> str:
    if kind == "padding":
        return "#c4c9cf"
    hue = (ord(label[0]) * 137) % 360
    return f"hsl({hue} 55% {'78%' if kind == 'prompt' else '45%'})"
