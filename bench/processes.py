"""What the processes of a server take: CPU time and memory, by their role. From Linux's /proc; empty elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
SUPERVISOR, CORE, FRONTEND, EXPORTER, WORKER = "supervisor", "core", "frontend", "exporter", "worker"
_BY_ARGUMENTS = {
    "-m scheduler engine": CORE,
    "-m scheduler frontend": FRONTEND,
    "-m scheduler exporter": EXPORTER,
    "-m worker": WORKER,
}


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


@dataclass(frozen=True, slots=True)
class Process:
    """One that is no zombie. Its id and when it began say which one: ids come again."""

    pid: int
    began: int  # clock ticks after the machine's start
    role: str


def members(pid: int) -> list[Process]:
    """`pid` and its descendants."""
    parents = {child: parent for child, (parent, _) in _stats().items()}
    found = ((one, began(one)) for one in _tree(pid, parents))
    return [Process(one, ticks, _role(one)) for one, ticks in found if ticks is not None]


def began(pid: int) -> int | None:
    """None: there is no such process, or nothing but its exit code is left of it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def open_files(pid: int) -> int:
    """Descriptors: files, sockets, pipes; 0 when it has ended."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def resident_bytes(pid: int) -> int:
    """Memory; 0 when it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


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
