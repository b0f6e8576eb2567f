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


@dataclass(slots=True)
class Swapped:
    """A sequence that was swapped out: its first `computed` tokens are in these host blocks."""

    computed: int
    host_blocks: list[int]


class PlanMaker:
    """`start` and `end` sequences, then `plan` what each computes; tables grow as the tokens need it."""

    def __init__(self, facts: WorkerFacts, epoch: int = 1, group: int = 0, shuffle: int | None = None) -> None:
        self.facts, self.epoch, self.group = facts, epoch, group
        self.next_step = 0
        self.sequences: dict[int, Planned] = {}
        self.free = list(range(facts.num_blocks, 0, -1))
        self.free_host = list(range(facts.num_host_blocks, 0, -1))
        if shuffle is not None:
            np.random.default_rng(shuffle).shuffle(self.free)
            np.random.default_rng(shuffle).shuffle(self.free_host)
        self.refs = [0] * (facts.num_blocks + 1)  # tables that hold the block, and copies from it in the plan being made
        self._starts: list[tuple[SequenceStart, list[int], list[int]]] = []
        self._ended: list[int] = []
        self._copies: list[tuple[int, int]] = []
        self._swaps_out: list[tuple[int, int]] = []
        self._swaps_in: list[tuple[int, int]] = []
        self._left_on_host: list[int] = []  # host blocks that are free after the plan being made
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
        prefix_of: int | None = None,
        num_computed: int = 0,
        swapped: Swapped | None = None,
    ) -> None:
        """A sequence none of whose tokens are computed, with blocks for its first token and `spare_blocks` more. prefix_of: a
        slot whose first `num_computed` tokens are the same and computed; their blocks are shared, and copied if not full.
        swapped: what swap_out gave comes back, but for the full blocks that are shared."""
        tokens = [int(token) for token in tokens]
        blocks: list[int] = []
        if prefix_of is not None:
            blocks = self._share(prefix_of, num_computed)
        if swapped is not None:
            assert num_computed % self.facts.block_size == 0
            num_computed = swapped.computed
            returning = [(host, self._take()) for host in swapped.host_blocks[len(blocks) :]]
            self._swaps_in += returning
            self._left_on_host += swapped.host_blocks
            blocks += [block for _, block in returning]
        blocks += [self._take() for _ in range((not blocks) + spare_blocks)]
        prompt = len(tokens) if num_prompt_tokens is None else num_prompt_tokens
        start = SequenceStart(slot, self._next_id, output_index, prompt, len(tokens), num_computed, len(blocks), sampling)
        self._next_id += 1
        self._starts.append((start, tokens, blocks))
        self.sequences[slot] = Planned(len(tokens), num_computed, list(blocks))

    def end(self, *slots: int) -> None:
        for slot in slots:
            self._drop(self.sequences.pop(slot).blocks)
            self._ended.append(slot)

    def swap_out(self, slot: int) -> Swapped:
        """The sequence ends, and the next plan copies its blocks to the host first."""
        one = self.sequences[slot]
        blocks = one.blocks[: -(-one.computed // self.facts.block_size)]
        host_blocks = [self.free_host.pop() for _ in blocks]
        self._swaps_out += zip(blocks, host_blocks, strict=True)
        self.end(slot)
        return Swapped(one.computed, host_blocks)

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
                one.blocks.append(self._take())
                grown.append((slot, one.blocks[-1]))
        starts, ended, copies = self._starts, self._ended, self._copies
        swaps_out, swaps_in = self._swaps_out, self._swaps_in
        self._starts, self._ended, self._copies, self._swaps_out, self._swaps_in = [], [], [], [], []
        self._drop([source for source, _ in copies])
        self.free_host += self._left_on_host
        self._left_on_host = []
        step_id, self.next_step = self.next_step, self.next_step + 1
        return StepPlan(
            header=PlanHeader(self.group, self.epoch, step_id, tuple(start for start, _, _ in starts)),
            num_tokens=np.array(list(counts.values()), np.int32),
            grow_blocks=np.array([block for _, block in grown], np.int32),
            start_tokens=np.array([token for _, tokens, _ in starts for token in tokens], np.int32),
            start_blocks=np.array([block for _, _, blocks in starts for block in blocks], np.int32),
            swap_out_blocks=np.array([block for block, _ in swaps_out], np.int32),
            swap_out_host_blocks=np.array([host for _, host in swaps_out], np.int32),
            swap_in_host_blocks=np.array([host for host, _ in swaps_in], np.int32),
            swap_in_blocks=np.array([block for _, block in swaps_in], np.int32),
            copy_from=np.array([source for source, _ in copies], np.int32),
            copy_to=np.array([destination for _, destination in copies], np.int32),
            slots=np.array(list(counts), np.uint16),
            grow_slots=np.array([slot for slot, _ in grown], np.uint16),
            padding=np.array(list(padding), np.uint16),
            ended=np.array(ended, np.uint16),
        )

    def _share(self, slot: int, num_computed: int) -> list[int]:
        full, rest = divmod(num_computed, self.facts.block_size)
        source = self.sequences[slot].blocks
        shared = source[:full]
        for block in source[: full + (rest > 0)]:
            self.refs[block] += 1
        if rest:
            shared.append(self._take())
            self._copies.append((source[full], shared[-1]))
        return shared

    def _take(self) -> int:
        block = self.free.pop()
        self.refs[block] = 1
        return block

    def _drop(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.refs[block] -= 1
            if not self.refs[block]:
                self.free.append(block)
