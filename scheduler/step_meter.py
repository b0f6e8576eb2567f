"""Measures steps for the metrics: how long each was, how many tokens it computed, how long outputs waited for their next token.

Works on what the core process holds anyway; nothing is done per token. Knows no metrics library, no names and no sockets.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

from kvcache.block_table import Slots
from scheduler.core import Core
from scheduler.core.core import InFlight
from wire import Distribution, Facts, MetricsReply, StepPlan, StepResult

# Seconds. A step of a small model on a GPU takes 2 ms, a chunk of a large one on a CPU seconds.
STEP_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
STEP_TOKENS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0)
# Seconds between tokens: a reader sees 10 ms as a stream, 100 ms as slow, 1 s as a stop.
INTER_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0)
_NONE = -1


class _Counts:
    """One distribution."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def told(self) -> Distribution:
        return Distribution(self.bounds, tuple(self.counts), self.total)


class StepMeter:
    """While a step samples the same rows as the one before it, which is nearly always, all of them have waited equally long:
    that is one addition. Only when the rows change, each is looked at."""

    def __init__(self, max_rows: int) -> None:
        self._seconds, self._tokens, self._gaps = _Counts(STEP_SECONDS), _Counts(STEP_TOKENS), _Counts(INTER_TOKEN_SECONDS)
        self._last_ns = np.full(max_rows, _NONE, np.int64)  # [slot] when its sequence had its last token; _NONE: it had none
        self._same = b""  # slots of the last step, which all had a token at `_same_ns`, whatever `_last_ns` says
        self._same_slots: Slots = np.empty(0, np.intp)
        self._same_ns = 0

    def planned(self, core: Core, plan: StepPlan) -> None:
        """A plan with starts has been made: these rows have other sequences than before."""
        self._write_down()
        for start in plan.header.starts:
            before = core.rows.sequence(start.slot).preempted_by
            has_tokens = start.num_tokens > start.num_prompt_tokens
            # It lost its row at most two steps from its last token, which may have come after that.
            self._last_ns[start.slot] = before[-1].at_ns if has_tokens and before else _NONE

    def result(self, step: InFlight, result: StepResult, now: int) -> None:
        """A result has been applied; `step` was the oldest in flight before."""
        header, plan = result.header, step.plan.header
        if (header.epoch, header.step_id) != (plan.epoch, plan.step_id):  # late words of a worker that was given up
            return
        self._seconds.add(header.duration_ns / 1e9)
        self._tokens.add(step.num_tokens)
        if not len(step.sampled):
            return
        slots = result.slots.tobytes()
        if slots == self._same:
            self._gaps.add((now - self._same_ns) / 1e9, len(step.sampled))
        else:
            self._write_down()
            for last, count in zip(*np.unique(self._last_ns[step.sampled], return_counts=True), strict=True):
                if last != _NONE:
                    self._gaps.add((now - int(last)) / 1e9, int(count))
        self._same, self._same_slots, self._same_ns = slots, step.sampled, now

    def _write_down(self) -> None:
        self._last_ns[self._same_slots] = self._same_ns
        self._same, self._same_slots = b"", self._same_slots[:0]

    def reply(self, core: Core, facts: Facts, query_id: int) -> MetricsReply:
        """All that there is to tell. Looks at every block and row: called when somebody asks."""
        kv, rows = core.kv, core.rows
        held = np.flatnonzero(kv.tables.num_blocks)
        slots = int(kv.tables.num_blocks[held].sum()) * kv.block_size
        return MetricsReply(
            query_id=query_id,
            facts=facts,
            load=core.load(query_id),
            group=core.config.group,
            epoch=core.epoch,
            block_size=kv.block_size,
            shared_blocks=int(np.count_nonzero(kv.pool.ref_counts > 1)),
            empty_slots=max(0, slots - int(rows.num_computed[held].sum())),
            step_seconds=self._seconds.told(),
            step_tokens=self._tokens.told(),
            inter_token_seconds=self._gaps.told(),
        )
