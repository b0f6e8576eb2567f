"""What a part of the check says, and when it must have said it: figures, problems, time. Standard library only.

A part is a process of its own that writes a line of JSON for each figure or problem as it comes; whoever started it reads them.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

MARK = "@gpu-check "  # lines of a part's output that are meant for the reader; libraries print too


@dataclass(frozen=True)
class Figure:
    """Something that was measured."""

    target: str  # of PERFORMANCE's table, as "G8"; empty: it belongs to none
    what: str
    value: float
    unit: str = ""  # empty: a ratio or a count
    limit: str = ""  # what it is held against: the limit, or the best known
    goal: float | None = None
    at_most: bool = False  # the goal is an upper bound
    note: str = ""  # how it was measured, how much of it
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool | None:
        """None: no goal."""
        if self.goal is None:
            return None
        return self.value <= self.goal if self.at_most else self.value >= self.goal


@dataclass(frozen=True)
class Problem:
    """Something that could not be measured, and why in one line."""

    what: str
    why: str


Said: TypeAlias = Figure | Problem
Measure: TypeAlias = Callable[[], Iterator[Figure]]


@dataclass(frozen=True)
class Limits:
    """Of this GPU, measured."""

    bandwidth: float  # bytes a second that a large copy reads and writes
    peak: float  # operations a second of a large bf16 matrix product


@dataclass(frozen=True)
class Check:
    """What a part is told."""

    device: str  # cuda or cpu
    tiny: bool  # a few tokens of a tiny model: whether it runs, not how fast
    quick: bool  # half of everything
    limits: Limits
    deadline: float  # time.monotonic() at which all must have been said

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def count(self, full: int, tiny: int) -> int:
        """So many requests, tokens, rounds."""
        return tiny if self.tiny else max(1, full // 2) if self.quick else full

    def attempt(self, what: str, measure: Measure, seconds: float) -> bool:
        """Says what `measure` yields. Its failure is said too, and the others go on. seconds: what it may take; it is not begun
        with less time left. Whether it was done."""
        if self.left_s < (0 if self.tiny else seconds):
            say(Problem(what, "not run: no time left"))
            return False
        began = time.monotonic()
        try:
            for figure in measure():
                say(figure)
        except Exception as error:
            traceback.print_exc()
            say(Problem(what, one_line(error)))
            return False
        print(f"{what}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
        return True


def say(said: Said) -> None:
    kind = "figure" if isinstance(said, Figure) else "problem"
    print(MARK + json.dumps({kind: asdict(said)}, ensure_ascii=False), flush=True)


def heard(line: str) -> Said | None:
    """What a line of a part's output says; None: it is none of those."""
    if not line.startswith(MARK):
        return None
    said = json.loads(line.removeprefix(MARK))
    return Figure(**said["figure"]) if "figure" in said else Problem(**said["problem"])


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__
