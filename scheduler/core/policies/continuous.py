"""Continuous batching (iteration-level scheduling, Orca 2022) with chunked prefill (Sarathi-Serve 2024): the default.

Each step has one token budget. Decodes come first, then chunks of prompts in order of admission, then new requests for as
long as rows, blocks and budget last. Requests join and leave at every step.
"""

from __future__ import annotations

import numpy as np

from scheduler.core.policies import Batch, Selection, chunked


class Continuous:
    name = "continuous"
    keeps_ended_rows = False

    def select(self, batch: Batch) -> Selection:
        running = batch.running()
        decodes = batch.with_blocks(running[batch.missing(running) == 1])
        slots, takes = [decodes], [np.ones(len(decodes), np.int32)]
        budget = batch.token_budget - len(decodes)

        if len(decodes) < len(running):
            running = batch.running()  # some may have been preempted for the decodes' blocks
            missing = batch.missing(running)
            prompts = missing > 1
            chunks = chunked(missing[prompts], budget)
            slots.append(running[prompts][chunks > 0])
            takes.append(chunks[chunks > 0])
            budget -= int(chunks.sum())

        while budget > 0 and (slot := batch.admit(reserve_outputs=False)) is not None:
            new = np.array([slot])
            slots.append(new)
            takes.append(np.minimum(batch.missing(new), budget))
            budget -= int(takes[-1][0])
        return Selection(np.concatenate(slots), np.concatenate(takes))
