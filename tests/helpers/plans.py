"""Plans written by hand: a scheduler's bookkeeping without its thinking. Blocks are handed out in order, or at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from wire.messages import PlanHeader, SamplingSpec, SequenceStart, StepPlan, WorkerFacts

GREEDY = SamplingSpec(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)


@dataclass(slots=True)
class Planned:
    """What the plans so far say of one sequence."""

    known: int
    computed: int
    blocks: list[int]


class PlanMaker:
    """`start` and `end` sequences, then `plan` what each computes; tables grow as the tokens need it."""

    def __init__(self, facts: WorkerFacts, epoch: int = 1, group: int = 0, shuffle: int | None = None) -> None:
        self.facts, self.epoch, self.group = facts, epoch, group
        self.next_step = 0
        self.sequences: dict[int, Planned] = {}
        self.free = list(range(facts.num_blocks, 0, -1))
        if shuffle is not None:
            np.random.default_rng(shuffle).shuffle(self.free)
        self._starts: list[tuple[SequenceStart, list[int], list[int]]] = []
        self._ended: list[int] = []
        self._next_id = 0

    def start(
        self,
        slot: int,
        tokens: Sequence[int],
        sampling: SamplingSpec = GREEDY,
        *,
        num_prompt_tokens: int | None = None,
        output_index: int = 0,
        spare_blocks: int = 0,
    ) -> None:
        """A sequence none of whose tokens are computed, with blocks for its first token and `spare_blocks` more."""
        tokens = [int(token) for token in tokens]
        blocks = [self.free.pop() for _ in range(1 + spare_blocks)]
        prompt = len(tokens) if num_prompt_tokens is None else num_prompt_tokens
        start = SequenceStart(slot, self._next_id, output_index, prompt, len(tokens), 0, len(blocks), sampling)
        self._next_id += 1
        self._starts.append((start, tokens, blocks))
        self.sequences[slot] = Planned(len(tokens), 0, list(blocks))

    def end(self, *slots: int) -> None:
        for slot in slots:
            self.free += self.sequences.pop(slot).blocks
            self._ended.append(slot)

    def plan(self, counts: Mapping[int, int] | None = None, padding: Sequence[int] = ()) -> StepPlan:
        """The next step: slot → number of tokens it computes; absent: each sequence computes all that it knows."""
        if counts is None:
            counts = {slot: one.known - one.computed for slot, one in self.sequences.items() if slot not in padding}
        grown: list[tuple[int, int]] = []
        for slot, count in counts.items():
            one = self.sequences[slot]
            one.computed += count
            one.known += one.computed == one.known
            while len(one.blocks) * self.facts.block_size < one.computed:
                one.blocks.append(self.free.pop())
                grown.append((slot, one.blocks[-1]))
        starts, ended = self._starts, self._ended
        self._starts, self._ended = [], []
        step_id, self.next_step = self.next_step, self.next_step + 1
        return StepPlan(
            header=PlanHeader(self.group, self.epoch, step_id, tuple(start for start, _, _ in starts)),
            num_tokens=np.array(list(counts.values()), np.int32),
            grow_blocks=np.array([block for _, block in grown], np.int32),
            start_tokens=np.array([token for _, tokens, _ in starts for token in tokens], np.int32),
            start_blocks=np.array([block for _, _, blocks in starts for block in blocks], np.int32),
            slots=np.array(list(counts), np.uint16),
            grow_slots=np.array([slot for slot, _ in grown], np.uint16),
            padding=np.array(list(padding), np.uint16),
            ended=np.array(ended, np.uint16),
        )
