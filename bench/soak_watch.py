"""What the processes of a long run hold: memory and descriptors of each, time and again, and whether they stay flat.

Reads /proc.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench import processes
from bench.processes import Process

MEMORY_BYTES = 24 << 20  # that a process may grow by once it is warm, and a share of what it has
MEMORY_SHARE = 0.05
FILES = 8  # descriptors that a process may have more at the end of the calm time than at its beginning
IDLE_FILES = 4  # … and an idle one more than an idle one of its role had at the start


@dataclass(frozen=True, slots=True)
class Sample:
    at_s: float  # CLOCK_MONOTONIC
    resident_bytes: int
    files: int


@dataclass
class Watch:
    """Samples by process, in their order."""

    samples: dict[Process, list[Sample]] = field(default_factory=dict)
    most_journal_bytes: int = 0

    def look(self, members: Iterable[Process], journal: Path) -> None:
        now_s = time.monotonic()
        for process in members:
            sample = Sample(now_s, processes.resident_bytes(process.pid), processes.open_files(process.pid))
            if processes.began(process.pid) == process.began:
                self.samples.setdefault(process, []).append(sample)
        self.most_journal_bytes = max(self.most_journal_bytes, size_of(journal))


@dataclass(frozen=True)
class Growth:
    """Of a process that lived through the calm time: the most of its first third, the most of its last."""

    role: str
    resident_bytes: tuple[int, int]
    files: tuple[int, int]

    @property
    def too_much(self) -> str:
        """In words; empty: it is flat."""
        words = []
        (first, last), (few, many) = self.resident_bytes, self.files
        if last > first * (1 + MEMORY_SHARE) + MEMORY_BYTES:
            words.append(f"{self.role}: memory grew from {first / 2**20:.0f} to {last / 2**20:.0f} MiB")
        if many > few + FILES:
            words.append(f"{self.role}: {many - few} more descriptors than before")
        return "; ".join(words)


def growths(watch: Watch, calm_from_s: float) -> Iterator[Growth]:
    """calm_from_s: since then nothing was killed, and what runs is warm."""
    for process, samples in watch.samples.items():
        calm = [sample for sample in samples if sample.at_s >= calm_from_s]
        if len(calm) < 3 or samples[0].at_s > calm_from_s:
            continue  # it began later, or the time was too short to say
        third = max(1, len(calm) // 3)
        first, last = calm[:third], calm[-third:]
        yield Growth(
            process.role,
            (max(sample.resident_bytes for sample in first), max(sample.resident_bytes for sample in last)),
            (max(sample.files for sample in first), max(sample.files for sample in last)),
        )


def idle_files(members: Iterable[Process]) -> dict[str, int]:
    """Descriptors by role, of the one that has most."""
    found: dict[str, int] = {}
    for process in members:
        found[process.role] = max(found.get(process.role, 0), processes.open_files(process.pid))
    return found


def more_files(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """What is too much, in words."""
    pairs = ((role, before.get(role, 0), count) for role, count in after.items())
    return [
        f"an idle {role} has {after} descriptors, {before} at the start"
        for role, before, after in pairs
        if after > before + IDLE_FILES
    ]


def size_of(folder: Path) -> int:
    """Bytes of the files in it; those that go meanwhile count nothing."""
    total = 0
    for path in folder.glob("*"):
        try:
            total += path.stat().st_size
        except OSError:
            continue
    return total
