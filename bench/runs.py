"""What a run leaves behind, in columns: of requests, of steps, of the times between tokens. What they are worth: figures.py."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wire import OutputEnded
from wire.messages import U32

Int64 = NDArray[np.int64]

NEVER = -(1 << 62)  # last token of an output that has none
_STEP_NUMBERS = 11  # the columns of Steps
_COMPACT = 1 << 20  # gaps kept one by one before they are counted


class Gaps:
    """Times between the tokens of an output, over all outputs: each different time and how often it was seen."""

    def __init__(self) -> None:
        self._last = np.full(1 << 12, NEVER, np.int64)
        self._pending: list[Int64] = []
        self._num_pending = 0
        self._counted: list[tuple[Int64, Int64]] = []  # values and how often, of each so many gaps

    def heard(self, handles: U32, now: int) -> None:
        """One token each."""
        index = handles.astype(np.intp)
        try:
            gaps = now - self._last.take(index)
        except IndexError:
            return self._grow(int(handles.max())).heard(handles, now)
        self._last[index] = now
        self._pending.append(gaps)
        self._num_pending += len(gaps)
        if self._num_pending >= _COMPACT:
            self._compact()

    def counted(self) -> tuple[Int64, Int64]:
        """Nanoseconds in order, and how often."""
        self._compact()
        if not self._counted:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        values, where = np.unique(np.concatenate([values for values, _ in self._counted]), return_inverse=True)
        weights = np.concatenate([counts for _, counts in self._counted])
        counts = np.bincount(where, weights, len(values)).astype(np.int64)
        self._counted = [(values, counts)]
        return values, counts

    def _compact(self) -> None:
        if not self._pending:
            return
        gaps = np.concatenate(self._pending)
        self._counted.append(np.unique(gaps[gaps < -NEVER // 2], return_counts=True))  # without those before a first token
        self._pending, self._num_pending = [], 0

    def _grow(self, handle: int) -> Gaps:
        wider = np.full(max(handle + 1, 2 * len(self._last)), NEVER, np.int64)
        wider[: len(self._last)] = self._last
        self._last = wider
        return self


@dataclass(frozen=True)
class Columns:
    """Requests in the order of their arrival, one entry an output; -1: not yet, or never."""

    arrival_ns: Int64
    prompt_tokens: Int64
    output_tokens: Int64  # that came
    first_ns: Int64  # arrival to first token
    end_ns: Int64
    reason: list[str]  # of its end; "refused"; "" while it lives
    cached_tokens: Int64
    recomputed_tokens: Int64
    preemptions: Int64
    queued_ns: Int64
    priority: Int64
    deadline_ns: Int64  # of its arrival; 0: none


@dataclass(frozen=True)
class Steps:
    """In the order in which they were planned."""

    begin_ns: Int64
    end_ns: Int64
    rows: Int64  # that computed tokens
    padding: Int64
    tokens: Int64  # without padding
    context: Int64  # attended to by the decodes
    pairs: Int64  # (token, token attended to) of the chunks
    sampled: Int64
    held_blocks: Int64
    used_tokens: Int64  # computed tokens in the held blocks, each once
    waiting: Int64  # requests


@dataclass(frozen=True)
class Run:
    requests: Columns
    steps: Steps
    gap_ns: Int64
    gap_counts: Int64
    num_rows: int  # of all groups' batches
    block_size: int
    refused: dict[str, int]  # by code
    counters: dict[str, int]  # of all cores together
    wall_s: float
    complete: bool  # False: it was stopped before the end


class RunLog:
    """Takes down what happens in a run. Handles count the outputs from 0, over all cores."""

    def __init__(self) -> None:
        self.gaps = Gaps()
        self.refused: dict[str, int] = {}
        self._added: list[tuple[int, int, int, int]] = []  # arrival, prompt tokens, priority, deadline
        self._ended: dict[int, tuple[str, tuple[int, ...]]] = {}  # reason, and the numbers of Columns from output_tokens on
        self._steps = array("q")  # the numbers of one step after those of the one before

    @property
    def num_ended(self) -> int:
        return len(self._ended)

    def added(self, now: int, prompt_tokens: int, priority: int, deadline_ns: int) -> int:
        """Its handle."""
        self._added.append((now, prompt_tokens, priority, deadline_ns))
        return len(self._added) - 1

    def was_refused(self, handle: int, code: str, now: int) -> None:
        self._ended[handle] = ("refused", (-1, -1, now, -1, -1, -1, -1))
        self.refused[code] = self.refused.get(code, 0) + 1

    def ended(self, ended: OutputEnded, now: int) -> None:
        stats = ended.stats
        first_ns = stats.first_token_ns if stats.output_tokens else -1
        times = (stats.output_tokens, first_ns, now, stats.cached_tokens, stats.recomputed_tokens)
        self._ended[ended.handle] = ended.reason.value, (*times, stats.preemptions, stats.queued_ns)

    def step(self, *numbers: int) -> None:
        """In the order of Steps."""
        self._steps.extend(numbers)

    def columns(self) -> Columns:
        added = np.array(self._added, np.int64).reshape(-1, 4)
        ends = np.full((len(added), 7), -1, np.int64)
        reasons = [""] * len(added)
        for handle, (reason, numbers) in self._ended.items():
            reasons[handle], ends[handle] = reason, numbers
        return Columns(
            arrival_ns=added[:, 0],
            prompt_tokens=added[:, 1],
            output_tokens=ends[:, 0],
            first_ns=ends[:, 1],
            end_ns=ends[:, 2],
            reason=reasons,
            cached_tokens=ends[:, 3],
            recomputed_tokens=ends[:, 4],
            preemptions=ends[:, 5],
            queued_ns=ends[:, 6],
            priority=added[:, 2],
            deadline_ns=added[:, 3],
        )

    def steps(self) -> Steps:
        return Steps(*np.array(self._steps, np.int64).reshape(-1, _STEP_NUMBERS).T)
