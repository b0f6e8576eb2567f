"""What the processes of a server take: CPU time and memory, by their role. From Linux's /proc; empty elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
SUPERVISOR, CORE, FRONTEND, WORKER = "supervisor", "core", "frontend", "worker"
_BY_ARGUMENTS = {"-m scheduler engine": CORE, "-m scheduler frontend": FRONTEND, "-m worker": WORKER}


@dataclass(frozen=True, slots=True)
class Taken:
    """Since the process began, and now."""

    cpu_s: float
    resident_bytes: int

    def __add__(self, other: Taken) -> Taken:
        return Taken(self.cpu_s + other.cpu_s, self.resident_bytes + other.resident_bytes)


def of_server(pid: int) -> dict[str, Taken]:
    """By role, all processes of it together: `pid` and its descendants."""
    stats = _stats()
    found: dict[str, Taken] = {}
    for one in _tree(pid, {child: parent for child, (parent, _) in stats.items()}):
        if one in stats:
            role, taken = _role(one), stats[one][1]
            found[role] = found[role] + taken if role in found else taken
    return found


def cpu_between(before: dict[str, Taken], after: dict[str, Taken]) -> dict[str, float]:
    """CPU seconds by role."""
    return {role: taken.cpu_s - before[role].cpu_s for role, taken in after.items() if role in before}


def _tree(root: int, parents: dict[int, int]) -> Iterable[int]:
    left = [root]
    while left:
        one = left.pop()
        yield one
        left += [child for child, parent in parents.items() if parent == one]


def _stats() -> dict[int, tuple[int, Taken]]:
    """(parent, taken) of every process."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()  # its name stands in brackets before
        except OSError:
            continue  # it has ended
        parent, user, system, pages = (int(fields[i]) for i in (1, 11, 12, 21))
        found[int(folder.name)] = parent, Taken((user + system) / _TICKS, pages * _PAGE)
    return found


def _role(pid: int) -> str:
    try:
        arguments = " ".join(Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[1:4])
    except OSError:
        return SUPERVISOR
    return next((role for beginning, role in _BY_ARGUMENTS.items() if arguments.startswith(beginning)), SUPERVISOR)
