"""What the demo shows while a run goes on: a live picture of the batch on a terminal, lines otherwise. Measures nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from carousel.v1 import inspect_pb2
from demo import callers
from demo.workload import Work

_FRAME_S = 0.12
_SHOWN_LINES = 6  # of each finished text, above the live picture
_COLORS = ("cyan", "green", "yellow", "magenta", "blue", "bright_red", "bright_cyan", "bright_green")


def color_of(label: str) -> str:
    """The same color for a request in every picture."""
    return _COLORS[(ord(label.upper()) - ord("A")) % len(_COLORS)]


def colored(chart_line: str) -> Text:
    """A line of the timeline's chart, its requests in their colors."""
    text = Text(chart_line)
    for position in range(chart_line.find("|") + 1, len(chart_line)):
        mark = chart_line[position]
        text.stylize(color_of(mark) if mark.isalpha() else "dim", position, position + 1)
    return text


class View(Protocol):
    """Takes everything that callers saw, in order. with_text: show the requests' text, not only that they ended."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def show(self, seen: callers.Seen) -> None: ...


def view_for(console: Console, works: list[Work], num_rows: int, policy: str, with_text: bool) -> View:
    if console.is_terminal:
        return LiveView(console, works, num_rows, policy, with_text)
    return PlainView(console, with_text)


def printable(text: str) -> str:
    """A model's text as a terminal may have it: no escape sequence, no carriage return."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)


class PlainView:
    """Lines: `[A] ` and what request A has to say, each line as soon as it is whole."""

    def __init__(self, console: Console, with_text: bool) -> None:
        self._console = console
        self._with_text = with_text
        self._begun: dict[str, str] = {}  # lines that are not whole yet, by label
        self._sent_s: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def show(self, seen: callers.Seen) -> None:
        match seen:
            case callers.Sent(work) if self._with_text:
                *lines, last = work.prompt.split("\n")
                for line in lines:
                    self._line(work.label, ">", line)
                self._begun[work.label] = last
            case callers.Text(label, _, text) if self._with_text:
                *lines, last = (self._begun[label] + text).split("\n")
                for line in lines:
                    self._line(label, " ", line)
                self._begun[label] = last
            case callers.Ended(outcome):
                if begun := self._begun.pop(outcome.label, ""):
                    self._line(outcome.label, " ", begun)
                tokens, took_s = len(outcome.token_ids), outcome.ended_s - outcome.sent_s
                first_ms = (outcome.first_token_s - outcome.sent_s) * 1000
                self._line(outcome.label, "=", f"{tokens} tokens in {took_s:.2f} s, the first after {first_ms:.0f} ms")

    def _line(self, label: str, mark: str, line: str) -> None:
        self._console.out(f"[{label}] {mark} {printable(line)}".rstrip(), highlight=False)


class LiveView:
    """The batch, redrawn while it turns; finished texts scroll away above it."""

    def __init__(self, console: Console, works: list[Work], num_rows: int, policy: str, with_text: bool) -> None:
        self._console = console
        self._works: Mapping[str, Work] = {work.label: work for work in works}
        self._labels = {callers.request_id(work): work.label for work in works}
        self._num_rows = num_rows
        self._policy = policy
        self._with_text = with_text
        self._texts = dict.fromkeys(self._works, "")
        self._counts = dict.fromkeys(self._works, 0)
        self._num_sent = self._num_ended = self._num_steps = 0
        self._step = inspect_pb2.WatchStepsResponse()
        self._began_s = self._drawn_s = time.monotonic()
        self._live = Live(console=console, auto_refresh=False, get_renderable=self._picture)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.__exit__(kind, error, trace)

    def show(self, seen: callers.Seen) -> None:
        match seen:
            case callers.Sent():
                self._num_sent += 1
            case callers.Text(label, num_tokens, text):
                self._texts[label] += printable(text)
                self._counts[label] += num_tokens
            case callers.Ended(outcome):
                self._num_ended += 1
                if self._with_text:
                    self._console.print(self._finished(outcome.label))
            case inspect_pb2.WatchStepsResponse():
                self._step = seen
                self._num_steps += 1
        if time.monotonic() - self._drawn_s >= _FRAME_S:
            self._live.refresh()
            self._drawn_s = time.monotonic()

    def _finished(self, label: str) -> Text:
        prompt = self._works[label].prompt.rstrip("\n").rpartition("\n")[2]
        lines = self._texts[label].rstrip().split("\n")
        more = f"\n… and {len(lines) - _SHOWN_LINES} more lines" if len(lines) > _SHOWN_LINES else ""
        joint = "\n" if self._works[label].prompt.endswith("\n") else ""
        said = joint + "\n".join(lines[:_SHOWN_LINES])
        return Text.assemble((f"{label} ", f"bold {color_of(label)}"), (prompt, "dim"), said, (more, "dim italic"), "\n")

    def _picture(self) -> Group:
        rows = {row.slot: row for row in self._step.rows}
        table = Table(box=None, expand=True, pad_edge=False, show_header=False)
        table.add_column(width=6, style="dim")
        table.add_column(width=1)
        table.add_column(width=24)
        table.add_column(width=12, justify="right")
        table.add_column(no_wrap=True, overflow="ellipsis")
        for slot in range(self._num_rows):
            table.add_row(f"row {slot}", *self._row(rows.get(slot)))
        return Group(self._headline(), table)

    def _row(self, row: inspect_pb2.StepRow | None) -> tuple[Text | str, ProgressBar | str, str, Text]:
        label = self._labels.get(row.request_id) if row is not None else None
        if row is None or label is None:
            return "", "", "", Text("free", "dim")
        work, count = self._works[label], self._counts[label]
        name = Text(label, f"bold {color_of(label)}")
        if row.padding:
            return name, "", "padding", Text("ended; its row is computed for nothing", "dim")
        said = f"+{row.num_tokens} prompt" if row.joined or row.num_tokens > 1 else f"{count}/{work.max_tokens}"
        last = " ".join((work.prompt + self._texts[label]).split())[-160:]
        width = max(10, self._console.width - 50)
        bar = ProgressBar(work.max_tokens, min(count, work.max_tokens), width=24, complete_style=color_of(label))
        return name, bar, said, Text(last[-width:])

    def _headline(self) -> Text:
        step, made = self._step, sum(self._counts.values())
        rate = made / max(time.monotonic() - self._began_s, 0.001)
        parts = (
            f"step {self._num_steps}",
            f"{step.waiting_requests} waiting",
            f"{step.held_blocks} of {step.total_blocks} KV blocks held",
            f"{rate:.0f} tokens/s",
            f"{self._num_ended} of {len(self._works)} requests done",
        )
        return Text.assemble((f"{self._policy}  ", "bold"), " · ".join(parts))
