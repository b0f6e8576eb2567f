"""Continuous batching (iteration-level scheduling, Orca 2022) with chunked prefill (Sarathi-Serve 2024): the default.

Each step has one token budget. Decodes come first. What is left, and keeps to the inter-token time, goes to prompts class by
class: chunks of those admitted, in order of admission, then new requests for as long as rows, blocks and budget last; only
now and then the prompt admitted first goes before all classes. Requests join and leave at every step.
"""

from __future__ import annotations

import numpy as np

from kvcache.block_table import Slots
from scheduler.core.policies import Batch, Selection


class Continuous:
    name = "continuous"
    keeps_ended_rows = False
    reserves_outputs = False

    def select(self, batch: Batch) -> Selection:
        batch.make_room()
        running = batch.running()
        decodes = batch.with_blocks(running[batch.missing(running) == 1])
        if len(decodes) < len(running):
            running = batch.running()  # some may have been preempted for the decodes' blocks
            prompts = running[batch.missing(running) > 1]
            num_first = 1 if batch.is_oldest_turn() else 0
            first, prompts = prompts[:num_first], prompts[num_first:]
            prompts = np.append(first, prompts[np.argsort(-batch.priority(prompts), kind="stable")])
        else:
            prompts, num_first = running[:0], 0
        if not len(prompts) and not batch.next_priority():
            return Selection(decodes, np.ones(len(decodes), np.int32))
        slots, takes = self._prompts(batch, prompts, num_first, batch.chunk_budget(decodes, prompts))
        ones = np.ones(len(decodes), np.int32)
        if not slots:
            return Selection(decodes, ones)
        return Selection(np.append(decodes, slots), np.append(ones, np.array(takes, np.int32)))

    def _prompts(self, batch: Batch, prompts: Slots, num_first: int, left: int) -> tuple[list[int], list[int]]:
        """Slots and how many tokens of each, at most `left` together; nobody is admitted before the `num_first` first."""
        slots: list[int] = []
        takes: list[int] = []
        has_place = True

        def take(slot: int, missing: int) -> None:
            nonlocal left
            slots.append(slot)
            takes.append(min(missing, left))
            left -= takes[-1]

        def admit(above: int) -> None:
            nonlocal has_place
            while left and has_place and batch.next_priority() > above:
                slot = batch.admit()
                has_place = slot is not None
                if slot is not None:
                    take(slot, int(batch.missing(np.array([slot]))[0]))

        columns = prompts.tolist(), batch.missing(prompts).tolist(), batch.priority(prompts).tolist()
        for i, (slot, missing, priority) in enumerate(zip(*columns, strict=True)):
            if i >= num_first:
                admit(above=priority)
            if not left:
                break
            take(slot, missing)
        admit(above=0)
        return slots, takes
