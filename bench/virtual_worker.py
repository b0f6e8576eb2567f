"""A worker that is only arithmetic: it keeps of every sequence how far it is, and says how long a step takes.

No clock, no tokens of any meaning, no checks: worker.sim_executor is the one that forgives nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bench.cost_models import CostModel, StepWork
from wire import ResultHeader, SequenceStart, StepPlan, StepResult, WorkerFacts
from wire.messages import U16

I64 = NDArray[np.int64]

_sum = np.add.reduce  # for a few numbers, faster than their method of that name
STOP, TOKEN = 0, 1  # the end token; every other token of every sequence, jobs.token_ids gives it to replies too


class VirtualWorker:
    """Computes plans in their order."""

    def __init__(self, facts: WorkerFacts, costs: CostModel) -> None:
        self.facts, self._costs = facts, costs
        self._computed = np.zeros(facts.max_batch_rows, np.int64)  # by slot: tokens with keys and values
        self._known = np.zeros(facts.max_batch_rows, np.int64)
        self._prompt = np.zeros(facts.max_batch_rows, np.int32)
        self._end = np.zeros(facts.max_batch_rows, np.int32)  # tokens with which it draws STOP; 0: never
        self._any_ends = False
        self._tokens = np.full(facts.max_batch_rows, TOKEN, np.int32)

    def will_end(self, start: SequenceStart, output_tokens: int) -> None:
        """To be said before the plan with this start is run."""
        self._end[start.slot] = start.num_prompt_tokens + output_tokens if output_tokens else 0
        self._any_ends |= output_tokens > 0

    def run(self, plan: StepPlan) -> tuple[StepWork, StepResult]:
        """The result's duration is the step's."""
        computed, known, header = self._computed, self._known, plan.header
        for start in header.starts:
            computed[start.slot], known[start.slot] = start.num_computed_tokens, start.num_tokens
            self._prompt[start.slot] = start.num_prompt_tokens
        slots = plan.slots.astype(np.intp)
        after = computed.take(slots) + plan.num_tokens  # a few rows: take is faster than an index
        computed[slots] = after
        all_known = known.take(slots)
        draws = after == all_known
        if np.logical_and.reduce(draws):
            sampled, sampled_slots = slots, plan.slots
            known[slots] = all_known + 1
        else:
            sampled, sampled_slots = slots[draws], plan.slots[draws]
            known[sampled] += 1
        work = self._work(plan, after)
        work.sampled = len(sampled) + len(plan.padding)
        duration_ns = self._costs.step_ns(work) + self.facts.swap_block_ns * work.moved_blocks
        result = ResultHeader(header.group, header.epoch, header.step_id, duration_ns)
        tokens = self._tokens[: len(sampled)]
        if self._any_ends:
            tokens = np.where(known[sampled] == self._end[sampled], STOP, TOKEN).astype(np.int32)
        return work, StepResult(result, tokens, sampled_slots)

    def positions(self, slots: U16) -> I64:
        """Of the tokens just sampled, in their outputs."""
        positions: I64 = self._known[slots] - self._prompt[slots] - 1
        return positions

    def _work(self, plan: StepPlan, after: I64) -> StepWork:
        num_rows, counts = len(plan.slots), plan.num_tokens
        work = StepWork(num_rows, int(_sum(after)))
        if _sum(counts) > num_rows:
            is_chunk = counts > 1
            n, last = counts[is_chunk].astype(np.int64), after[is_chunk]
            first = last - n
            work.chunks = len(n)
            work.chunk_tokens = int(n.sum())
            work.chunk_context = int(last.sum())
            work.chunk_pairs = int((n * first + n * (n + 1) // 2).sum())
            work.decodes -= work.chunks
            work.decode_context -= work.chunk_context
        if len(plan.padding):
            work.decodes += len(plan.padding)
            work.decode_context += int(self._computed[plan.padding].sum())
        work.moved_blocks = len(plan.swap_out_blocks) + len(plan.swap_in_blocks)
        work.copied_blocks = len(plan.copy_from)
        return work
