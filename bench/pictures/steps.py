"""What the pictures are made of: steps, the rows of each and the KV cache at its planning. Values only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

PREFILL, DECODE, PADDING = "prefill", "decode", "padding"
PREEMPTED = "preempted"  # the reason of a leave; all others are ends


class Row(Protocol):
    """A row of a step, as the core's records and WatchSteps have it."""

    @property
    def request_id(self) -> str: ...
    @property
    def slot(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def sampled(self) -> bool: ...
    @property
    def joined(self) -> bool: ...
    @property
    def padding(self) -> bool: ...
    @property
    def output_index(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Memory:
    """Blocks of the pool. used_tokens: whose keys and values are in held blocks, those of a shared block counted once."""

    total: int
    held: int
    shared: int  # of the held ones: in two tables or more
    cached: int
    free: int
    used_tokens: int
    block_size: int
    reserved: int = 0  # blocks that the same requests would hold, had each been given room for its longest output; 0: not known

    @property
    def retiring(self) -> int:
        return max(0, self.total - self.held - self.cached - self.free)

    @property
    def used(self) -> float:
        """Blocks' worth of tokens in held blocks."""
        return min(float(self.held), self.used_tokens / self.block_size)

    @property
    def wasted(self) -> float:
        """Blocks' worth of held room without tokens."""
        return self.held - self.used


@dataclass(frozen=True, slots=True)
class Step:
    start_ns: int
    end_ns: int
    rows: Sequence[Row]
    leaves: Sequence[tuple[str, str]]  # (request, reason), with this step's result
    waiting: int  # requests, when it was planned
    policy: str
    memory: Memory


def kind_of(row: Row) -> str:
    """A chunk of a prompt computes several tokens, or is the first that is computed, or samples none."""
    if row.padding:
        return PADDING
    return PREFILL if row.num_tokens > 1 or row.joined or not row.sampled else DECODE


def numbered(steps: Sequence[Step]) -> dict[str, str]:
    """Short names for requests, in the order in which they joined: 1, 2, 3, …"""
    labels: dict[str, str] = {}
    for step in steps:
        for row in step.rows:
            labels.setdefault(row.request_id, str(len(labels) + 1))
    return labels
