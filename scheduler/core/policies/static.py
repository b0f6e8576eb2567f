"""Static (request-level) batching: the baseline that continuous batching is measured against, on the same kernels.

A batch is admitted at once, with blocks reserved for prompt + max_tokens of each request; its prompts are computed, then all
rows decode together. Nobody joins before everybody has ended; rows that ended early stay in the batch as padding.
"""

from __future__ import annotations

import numpy as np

from scheduler.core.policies import Batch, Selection, chunked


class Static:
    name = "static"
    keeps_ended_rows = True
    reserves_outputs = True

    def select(self, batch: Batch) -> Selection:
        batch.make_room()
        running = batch.running()
        if not len(running):
            batch.release_padding()
            if batch.is_empty():
                self._admit_batch(batch)
                running = batch.running()
        if not len(running):
            return Selection(running, np.empty(0, np.int32))  # the last results of this batch are on their way
        missing = batch.missing(running)
        prompts = missing > 1
        if prompts.any():
            takes = chunked(missing[prompts], batch.token_budget)
            return Selection(running[prompts][takes > 0], takes[takes > 0])
        running = batch.with_blocks(running)  # those that another policy admitted may need one
        return Selection(running, np.ones(len(running), np.int32), batch.padding())

    def _admit_batch(self, batch: Batch) -> None:
        for _ in range(batch.static_batch_size):
            if batch.admit() is None:
                break
