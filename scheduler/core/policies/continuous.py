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
        missing = batch.missing(running)
        decodes = batch.with_blocks(running[missing == 1])[: batch.token_budget]
        budget = batch.token_budget - len(decodes)

        running = batch.running()  # some may have been preempted for the decodes' blocks
        missing = batch.missing(running)
        chunks, missing = running[missing > 1], missing[missing > 1]
        takes = chunked(missing, budget)
        chunks, takes = chunks[takes > 0], takes[takes > 0]
        budget -= int(takes.sum())

        new: list[int] = []
        new_takes: list[int] = []
        while budget > 0 and (slot := batch.admit(reserve_outputs=False)) is not None:
            take = min(budget, int(batch.missing(np.array([slot], np.uint16))[0]))
            new.append(slot)
            new_takes.append(take)
            budget -= take
        return Selection(
            np.concatenate([decodes, chunks, np.array(new, np.uint16)]).astype(np.uint16),
            np.concatenate([np.ones(len(decodes), np.int32), takes, np.array(new_takes, np.int32)]).astype(np.int32),
        )
