"""One moment of a server as lines of a terminal of any size. Pure: a snapshot and a size go in, lines come out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from client.printing import harmless
from client.top.seen import CACHED, FREE, RETIRING, SHARED, Row, Snapshot, Waiting

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
_COLOURS = (
    "cyan",
    "green",
    "yellow",
    "magenta",
    "blue",
    "bright_red",
    "bright_cyan",
    "bright_green",
    "bright_yellow",
    "bright_blue",
)
_LEAST_WIDTH, _LEAST_HEIGHT = 20, 4  # smaller terminals get the lines of such a one, cut off
_SAMPLED = 9  # of a cell's blocks are looked at where a cell stands for more


@dataclass(frozen=True)
class Glyphs:
    spark: str
    done: str  # prompt tokens computed
    missing: str  # prompt tokens not computed
    made: str  # output tokens
    shared: str
    more: str
    dot: str


UNICODE = Glyphs("▁▂▃▄▅▆▇█", "█", "░", "▓", "◆", "…", " · ")
ASCII = Glyphs("_.:-=+*#", "#", "-", "=", "%", "~", ", ")


def picture(seen: Snapshot, width: int, height: int, glyphs: Glyphs = UNICODE) -> list[Text]:
    """At most `height` lines of at most `width` characters. height 0: as many lines as it takes."""
    width = max(_LEAST_WIDTH, width)
    drawing = _Drawing(seen, width, glyphs)
    head, queue = drawing.head(), drawing.queue(3 if not height or height >= 20 else 1)
    map_lines = 4 if not height else max(1, min(8, (height - 8) // 4))
    blocks = drawing.blocks(map_lines)
    if height and height < 12:
        lines = [*head, *drawing.rows(max(1, height - len(head)))]
    else:
        room = height - len(head) - len(queue) - len(blocks) if height else len(seen.rows) + 2
        lines = [*head, *drawing.rows(max(2, room)), *queue, *blocks]
    for line in lines:
        line.truncate(width, overflow="crop")
        line.no_wrap = True
    return lines[: max(height, _LEAST_HEIGHT)] if height else lines


class _Drawing:
    def __init__(self, seen: Snapshot, width: int, glyphs: Glyphs) -> None:
        self._seen, self._width, self._glyphs = seen, width, glyphs

    # ---------------------------------------------------------------------------------------------------------- head

    def head(self) -> list[Text]:
        seen, load, dot = self._seen, self._seen.load, self._glyphs.dot
        where = f"{seen.target}{dot}{seen.policy}{dot}up {_age(seen.uptime_s)}"
        if seen.num_groups > 1:
            where += f"{dot}group {seen.group} of 0-{seen.num_groups - 1}"
        name = Text.assemble((f"{seen.model} ", "bold"), where)
        if seen.trouble:
            name = Text(seen.trouble, "bold red")
        shared = Counter(seen.blocks)[SHARED]
        held = f"KV {load.held_blocks} of {load.total_blocks} blocks held, {seen.waste:.1%} empty, {shared} shared"
        memory = f"{held}{dot}{load.cached_blocks} cached{dot}{load.free_blocks} free"
        return [name, self._rates(), self._budget(), Text(memory)]

    def _rates(self) -> Text:
        seen, room = self._seen, max(0, (self._width - 48) // 3)
        parts = (
            ("tokens/s", seen.tokens_per_s, _short),
            ("TTFT", seen.ttft_ms, _time),
            ("ITL", seen.itl_ms, _time),
        )
        line = Text()
        for name, values, words in parts:
            said = words(values[-1]) if values else "-"
            line.append(f"{name} ").append(f"{said:<8}", "bold").append(self._spark(values, room), "cyan").append("  ")
        line.rstrip()
        return line

    def _budget(self) -> Text:
        seen, load = self._seen, self._seen.load
        line = Text(f"batch {load.running_requests} running in {seen.max_batch_rows} rows, {load.waiting_requests} waiting")
        if seen.step_tokens:
            tokens, budget = seen.step_tokens[-1]
            room = max(0, self._width - len(line) - 28)
            line.append(f"{self._glyphs.dot}step {tokens} of {budget} tokens ")
            line.append(self._spark([part / max(1, whole) for part, whole in seen.step_tokens], room, 1.0), "yellow")
        return line

    def _spark(self, values: Sequence[float], room: int, top: float = 0.0) -> str:
        """The last values, from 0 to the largest of them or `top`."""
        shown = values[len(values) - min(room, len(values)) :]
        most, marks = max([*shown, top]), self._glyphs.spark
        return "".join(marks[min(len(marks) - 1, int(value / most * len(marks)))] if most else marks[0] for value in shown)

    # ---------------------------------------------------------------------------------------------------------- rows

    def rows(self, lines: int) -> list[Text]:
        """A heading and the rows by slot; those for which there is no line are counted in the last one."""
        rows = self._seen.rows
        if not rows:
            return [Text("no request is in the batch", "dim")]
        fits = len(rows) <= lines - 1
        shown = rows if fits else rows[: max(0, lines - 2)]
        width = self._width
        names = max(
            8,
            min(
                36,
                max(
                    (len(row.request_id) + (2 + len(str(row.output_index))) * (row.num_outputs > 1) for row in shown), default=8
                ),
            ),
        )
        tenants = max((len(row.tenant) for row in shown), default=0)
        tenants = min(14, max(6, tenants)) if tenants and width >= 72 else 0
        names = min(names, max(8, width - 46 - tenants)) if width >= 60 else max(4, width - 36)
        bar = max(0, width - names - tenants - (1 if tenants else 0) - 34)
        heading = f"  SLOT {'REQUEST':<{names}} " + (f"{'TENANT':<{tenants}} " if tenants else "")
        heading += f"{'PROGRESS' if bar > 8 else '':<{bar}} {'TOKENS':>11} {'BLOCKS':>6} STATE"
        longest = max((max(row.computed_tokens, row.prompt_tokens) for row in rows), default=1)
        table = [Text(heading, "dim")]
        table += [self._row(row, names, tenants, bar, max(1, longest)) for row in shown]
        if not fits:
            states = Counter(row.state for row in rows[len(shown) :])
            said = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
            table.append(Text(f"{self._glyphs.more} and {len(rows) - len(shown)} more rows: {said}", "dim"))
        return table[: max(1, lines)]

    def _row(self, row: Row, names: int, tenants: int, bar: int, longest: int) -> Text:
        name = row.request_id + (f" #{row.output_index}" if row.num_outputs > 1 else "")
        made = max(0, row.computed_tokens - row.prompt_tokens) + 1 if row.state == "decode" and row.prompt_tokens else 0
        tokens = f"{row.prompt_tokens}+{made}" if row.prompt_tokens else f"{row.computed_tokens}"
        line = Text.assemble(
            (f"{_letter(row.slot)} ", f"bold {_colour(row.slot)}"),
            f"{row.slot:>4} ",
            _fitted(name, names, self._glyphs.more),
            " ",
        )
        if tenants:
            line.append(f"{_fitted(row.tenant or '-', tenants, self._glyphs.more)} ", "dim")
        if bar:
            line.append_text(self._bar(row, bar, longest))
        return line.append(f" {tokens:>11} {row.blocks:>6} ").append(row.state, "yellow" if row.state == "prompt" else "")

    def _bar(self, row: Row, room: int, longest: int) -> Text:
        """Prompt tokens computed and missing, then output tokens; the longest row fills it."""
        prompt = row.prompt_tokens or row.computed_tokens
        done, total = min(row.computed_tokens, prompt), max(row.computed_tokens, prompt)
        cells = [math.ceil(room * count / longest) for count in (done, prompt, total)]
        glyphs, bar = self._glyphs, Text()
        bar.append(glyphs.done * cells[0], "yellow").append(glyphs.missing * (cells[1] - cells[0]), "dim")
        bar.append(glyphs.made * (cells[2] - cells[1]), _colour(row.slot))
        return bar.append(" " * (room - cells[2]))

    # ------------------------------------------------------------------------------------------------- queue, blocks

    def queue(self, lines: int) -> list[Text]:
        waiting, shown = self._seen.load.waiting_requests, self._seen.waiting[: max(0, lines - 1)]
        if not waiting:
            return [Text("queue: nobody waits", "dim")]
        if lines == 1:
            return [Text(f"queue: {waiting} waiting, {self._seen.load.waiting_tokens} prompt tokens")]
        more = waiting - len(shown)
        heading = f"queue: {waiting} waiting, {self._seen.load.waiting_tokens} prompt tokens"
        said = [Text(heading + (f"; the oldest {len(shown)}:" if more > 0 and shown else ""))]
        return said + [Text(f"  {self._waiting(each)}") for each in shown]

    def _waiting(self, each: Waiting) -> str:
        name, tenant = (
            _fitted(each.request_id, 24, self._glyphs.more).rstrip(),
            f" of {harmless(each.tenant)}" if each.tenant else "",
        )
        tokens = f"{each.prompt_tokens} tokens" + (f" + {each.output_tokens} made" if each.output_tokens else "")
        return f"{name}{tenant}: {each.state} for {_age(each.age_s)}, {tokens}, {each.priority}"

    def blocks(self, lines: int) -> list[Text]:
        """Each cell is one block, or several of which most are alike."""
        blocks, glyphs = self._seen.blocks, self._glyphs
        if not blocks:
            return [Text("blocks: not known yet", "dim")]
        each = max(1, math.ceil(len(blocks) / (self._width * lines)))
        about = f"blocks, {each} in a cell: " if each > 1 else "blocks: "
        legend = Text.assemble(
            about,
            ("a-z", "bold"),
            " who holds it, ",
            (glyphs.shared, "bold reverse"),
            " shared, : cached, ~ given back, . free",
        )
        cells = [_owner(blocks[start : start + each]) for start in range(0, len(blocks), each)]
        drawn = [legend]
        for start in range(0, len(cells), self._width):
            line = Text()
            for owner, count in _runs(cells[start : start + self._width]):
                mark, style = self._mark(owner)
                line.append(mark * count, style)
            drawn.append(line)
        return drawn

    def _mark(self, owner: int) -> tuple[str, str]:
        match owner:
            case _ if owner == SHARED:
                return self._glyphs.shared, "bold reverse"
            case _ if owner == CACHED:
                return ":", "dim"
            case _ if owner == RETIRING:
                return "~", "dim"
            case _ if owner == FREE:
                return ".", "dim"
        return _letter(owner), _colour(owner)


def _owner(blocks: Sequence[int]) -> int:
    """Of most of them; of many, some are looked at."""
    if len(blocks) == 1:
        return blocks[0]
    every = max(1, len(blocks) // _SAMPLED)
    return Counter(blocks[::every]).most_common(1)[0][0]


def _runs(cells: Sequence[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for cell in cells:
        if runs and runs[-1][0] == cell:
            runs[-1] = (cell, runs[-1][1] + 1)
        else:
            runs.append((cell, 1))
    return runs


def _letter(slot: int) -> str:
    return _LETTERS[slot % len(_LETTERS)]


def _colour(slot: int) -> str:
    return _COLOURS[slot % len(_COLOURS)]


def _fitted(text: str, width: int, more: str) -> str:
    """In exactly so many columns; some characters take two."""
    text = harmless(text).replace("\n", " ").replace("\t", " ")
    return set_cell_size(text, width) if cell_len(text) <= width else set_cell_size(text, width - 1) + more


def _short(value: float) -> str:
    return f"{value:.0f}" if value < 100_000 else f"{value / 1000:.0f}k"


def _time(ms: float) -> str:
    return f"{ms:.3g} ms" if ms < 1000 else f"{ms / 1000:.3g} s"


def _age(seconds: float) -> str:
    whole = int(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if whole < 10 else f"{whole} s"
    return f"{whole // 60}:{whole % 60:02}" if whole < 3600 else f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
