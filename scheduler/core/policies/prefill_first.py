"""Iteration-level scheduling as Orca (2022) has it: prompts first and whole, blocks reserved for the worst case. A baseline.

New requests join at every step and are computed before everybody else's next token; a request is admitted only with blocks
for prompt + max_tokens, so nobody is ever preempted and most of what is reserved stays unused. A prompt is cut only where the
worker can't take it in one step.
"""

from __future__ import annotations

import numpy as np

from scheduler.core.policies import Batch, Selection
from wire.messages import I32


class PrefillFirst:
    name = "prefill_first"
    keeps_ended_rows = False
    reserves_outputs = True

    def select(self, batch: Batch) -> Selection:
        batch.make_room()
        running = batch.running()
        decodes = batch.with_blocks(running[batch.missing(running) == 1])  # wanted only by rows that another policy admitted
        running = batch.running()
        prompts = running[batch.missing(running) > 1]
        budget = batch.token_budget - int(batch.missing(prompts).sum())
        while budget > 0 and batch.next_priority() and (slot := batch.admit()) is not None:
            prompts = np.append(prompts, slot)
            budget -= int(batch.missing(prompts[-1:])[0])
        takes = whole(batch.missing(prompts), batch.token_budget)
        prompts, takes = prompts[takes > 0], takes[takes > 0]
        decodes = decodes[: batch.token_budget - int(takes.sum())]
        return Selection(np.append(prompts, decodes), np.append(takes, np.ones(len(decodes), np.int32)))


def whole(missing: I32, budget: int) -> I32:
    """All of each row's missing tokens, in order, up to the first that does not fit; cut is only one that stands first."""
    fits = np.cumsum(missing) <= budget
    takes = np.where(np.logical_and.accumulate(fits), missing, 0).astype(np.int32)
    if len(missing) and not fits[0]:
        takes[0] = budget
    return takes
