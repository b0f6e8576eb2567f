"""The mirror: what a worker knows of the sequences that it computes, as columns indexed by slot. No torch, no model.

The scheduler sends only differences (wire.messages.StepPlan); the mirror adds them up, and refuses with PlanError a plan that
does not fit what it knows (of blocks: in blocks.py). Tokens that the worker sampled are fed back here by the worker itself,
so that a plan may ask for the token after one that the scheduler has not seen yet.

Legend: S slots, L largest number of tokens, W blocks of a table, R rows computed, P padding rows, N rows that draw a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wire.messages import I32, U16, SequenceStart, StepPlan, WorkerFacts
from worker.blocks import Blocks, PlanError, moves, refuse, repeated
from worker.sampling_columns import SamplingColumns, SamplingRows

Index = NDArray[np.intp]
I64 = NDArray[np.int64]


@dataclass(slots=True)
class StepRows:
    """What one step computes: the R rows of the plan, then its P padding rows. Positions count from 0 in the sequence."""

    slots: Index  # [R+P]
    first: I64  # [R+P] position of the first token to compute
    count: I64  # [R+P] tokens to compute; 1 for a padding row
    drawing: Index  # [N+P] which of the rows end in a draw: those that then know all, and, for its cost, the padding
    num_padding: int  # P
    num_sampled: int  # N, the first of `drawing`

    @property
    def sampled_slots(self) -> Index:
        return self.slots[self.drawing[: self.num_sampled]]


class Sequences:
    """All sequences of one worker. `apply` takes the plans of an epoch in order; `feed` the tokens sampled in each step."""

    def __init__(self, facts: WorkerFacts) -> None:
        self.max_model_len, self.block_size = facts.max_model_len, facts.block_size
        self.vocab_size, self.max_step_tokens = facts.vocab_size, facts.max_step_tokens
        rows = facts.max_batch_rows
        # Memory of the two wide arrays is taken page by page, when it is first written.
        self.tokens: I32 = np.empty((rows, self.max_model_len), np.int32)  # [S, L]
        self.block_tables: I32 = np.zeros(
            (rows, -(-self.max_model_len // self.block_size)), np.int32
        )  # [S, W], 0 past num_blocks
        self.num_blocks = np.zeros(rows, np.int64)
        self.num_tokens = np.zeros(rows, np.int64)  # known
        self.num_computed = np.zeros(rows, np.int64)  # of these, keys and values in the cache
        self.num_prompt = np.zeros(rows, np.int64)
        self.num_given = np.zeros(rows, np.int64)  # came with the start; those behind them were drawn here
        self.output_index = np.zeros(rows, np.int32)
        self.columns = SamplingColumns(rows, self.vocab_size)
        self.live = np.zeros(rows, np.bool_)
        self.blocks = Blocks(facts.num_blocks, facts.num_host_blocks)
        self.next_step = 0
        self._written: list[tuple[Index, I32]] = []
        self._mark = np.zeros(rows, np.intp)  # scratch of _distinct

    def reset(self) -> None:
        """A new epoch: no sequence is known, and the next plan is step 0."""
        self.block_tables[self.live] = 0
        self.live[:] = False
        self.num_blocks[:] = 0
        self.blocks.reset()
        self.next_step = 0

    def apply(self, plan: StepPlan) -> StepRows:
        """Takes the plan's changes up and counts its step as done. Raises PlanError if it does not fit."""
        if plan.header.step_id != self.next_step:
            raise PlanError(f"step {plan.header.step_id} came where step {self.next_step} was expected")
        self.next_step += 1
        self._written.clear()
        self._end(plan.ended)
        moving = moves(plan)
        if moving:
            self.blocks.check_moves(plan)
        self._start(plan)
        self._grow(plan.grow_slots, plan.grow_blocks)
        if moving:
            self.blocks.move(plan)
        for start in plan.header.starts:
            if start.num_computed_tokens:
                self._check_computed(start)
        return self._advance(plan.slots, plan.num_tokens, plan.padding)

    def feed(self, rows: StepRows, sampled: I32) -> None:
        """Writes the N tokens that this step sampled behind the tokens of their sequences."""
        drawing = rows.drawing[: rows.num_sampled]
        self.tokens[rows.slots[drawing], rows.first[drawing] + rows.count[drawing]] = sampled

    def table_writes(self) -> tuple[Index, I32]:
        """What the last plan wrote to the block tables: places in the flat array, none twice, and the blocks there."""
        places = [where for where, _ in self._written] or [np.empty(0, np.intp)]
        return np.concatenate(places), np.concatenate([blocks for _, blocks in self._written] or [np.empty(0, np.int32)])

    def sampling(self, rows: StepRows) -> SamplingRows:
        slots = rows.slots[rows.drawing]
        position = rows.first[rows.drawing] + rows.count[rows.drawing]
        return self.columns.of(slots, position, self.output_index, self.tokens, self.num_prompt)

    # ------------------------------------------------------------------------------------------------- the plan's changes

    def _end(self, ended: U16) -> None:
        if not len(ended):
            return
        slots = self._known(ended, "ended")
        width = int(self.num_blocks[slots].max(initial=0))
        np.subtract.at(self.blocks.refs, self.block_tables[slots, :width].ravel(), 1)
        self.blocks.refs[0] = 0  # the zeros past a table's end were counted too
        self.block_tables[slots, :width] = 0
        self.num_blocks[slots] = 0
        self.live[slots] = False

    def _start(self, plan: StepPlan) -> None:
        tokens, blocks = plan.start_tokens, plan.start_blocks
        if sum(s.num_tokens for s in plan.header.starts) != len(tokens):
            raise PlanError("the starts' num_tokens do not add up to start_tokens")
        if sum(s.num_blocks for s in plan.header.starts) != len(blocks):
            raise PlanError("the starts' num_blocks do not add up to start_blocks")
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise PlanError(f"a token id is not in 0..{self.vocab_size - 1}")
        self.blocks.check_ids(blocks)
        token_at = block_at = 0
        for start in plan.header.starts:
            self._check_start(start)
            self._take_up(start, tokens[token_at : token_at + start.num_tokens], blocks[block_at : block_at + start.num_blocks])
            token_at += start.num_tokens
            block_at += start.num_blocks

    def _check_start(self, start: SequenceStart) -> None:
        who = f"sequence {start.sequence_id} in slot {start.slot}"
        if not 0 <= start.slot < len(self.live):
            raise PlanError(f"{who}: slots are 0..{len(self.live) - 1}")
        if self.live[start.slot]:
            raise PlanError(f"{who}: the slot is taken")
        if not 1 <= start.num_tokens <= self.max_model_len:
            raise PlanError(f"{who}: {start.num_tokens} tokens, allowed are 1..{self.max_model_len}")
        if not 0 <= start.num_computed_tokens < start.num_tokens:
            raise PlanError(f"{who}: {start.num_computed_tokens} of {start.num_tokens} tokens computed; one at least is to be")
        if not 0 <= start.num_prompt_tokens <= start.num_tokens:
            raise PlanError(f"{who}: {start.num_prompt_tokens} of {start.num_tokens} tokens are its prompt")
        if not 0 <= start.num_blocks <= self.block_tables.shape[1]:
            raise PlanError(f"{who}: {start.num_blocks} blocks, allowed are 0..{self.block_tables.shape[1]}")
        if start.num_computed_tokens > start.num_blocks * self.block_size:
            raise PlanError(f"{who}: {start.num_blocks} blocks do not hold {start.num_computed_tokens} computed tokens")

    def _take_up(self, start: SequenceStart, tokens: I32, blocks: I32) -> None:
        slot = start.slot
        refuse(repeated(blocks), blocks, f"sequence {start.sequence_id} in slot {slot}: block {{}} stands twice in its table")
        self.tokens[slot, : len(tokens)] = tokens
        self.block_tables[slot, : len(blocks)] = blocks
        self._written.append((slot * self.block_tables.shape[1] + np.arange(len(blocks)), blocks))
        np.add.at(self.blocks.refs, blocks, 1)
        self.num_blocks[slot] = len(blocks)
        self.num_tokens[slot] = start.num_tokens
        self.num_computed[slot] = start.num_computed_tokens
        self.num_prompt[slot] = start.num_prompt_tokens
        self.num_given[slot] = start.num_tokens
        self.output_index[slot] = start.output_index
        self.columns.put(slot, start.sampling)
        self.live[slot] = True

    def _check_computed(self, start: SequenceStart) -> None:
        """What is said to be computed is in its blocks, now that swaps and copies are done."""
        computed, size = start.num_computed_tokens, self.block_size
        table = self.block_tables[start.slot, : -(-computed // size)]
        said = np.minimum(computed - size * np.arange(len(table)), size)
        filled = self.blocks.filled[table]
        if (filled < said).any():
            i = int((filled < said).argmax())
            raise PlanError(
                f"sequence {start.sequence_id} in slot {start.slot}: {said[i]} of its computed tokens are to be in block "
                f"{table[i]}, which holds {filled[i]}"
            )

    def _grow(self, grow_slots: U16, blocks: I32) -> None:
        if len(grow_slots) != len(blocks):
            raise PlanError(f"{len(grow_slots)} slots grow by {len(blocks)} blocks")
        if not len(blocks):
            return
        slots = self._known(grow_slots, "grow_slots", distinct=False)
        self.blocks.check_ids(blocks)
        column = self.num_blocks[slots] + _rank(slots)
        if column.max() >= self.block_tables.shape[1]:
            slot = slots[column.argmax()]
            raise PlanError(f"slot {slot} grows beyond the {self.block_tables.shape[1]} blocks of max_model_len")
        self.block_tables[slots, column] = blocks
        self._written.append((slots * self.block_tables.shape[1] + column, blocks))
        np.add.at(self.num_blocks, slots, 1)
        np.add.at(self.blocks.refs, blocks, 1)

    def _advance(self, plan_slots: U16, num_tokens: I32, padding: U16) -> StepRows:
        if len(plan_slots) != len(num_tokens):
            raise PlanError(f"{len(plan_slots)} slots, {len(num_tokens)} counts of tokens")
        if int(num_tokens.sum()) + len(padding) > self.max_step_tokens:
            wanted = int(num_tokens.sum()) + len(padding)
            raise PlanError(f"{wanted} tokens in a step, this worker was sized for {self.max_step_tokens}")
        slots = self._known(np.concatenate((plan_slots, padding)), "slots and padding")
        rows, pads = slots[: len(plan_slots)], slots[len(plan_slots) :]
        first, count = self.num_computed[rows], num_tokens.astype(np.int64)
        after, known = first + count, self.num_tokens[rows]
        self._check_rows(rows, count, after, known)
        self._fill(rows, first, after)
        samples = after == known
        self.num_computed[rows] = after
        self.num_tokens[rows] += samples
        sampled = np.flatnonzero(samples)
        return StepRows(
            slots=slots,
            first=np.concatenate((first, self.num_tokens[pads] - 1)),
            count=np.concatenate((count, np.ones(len(pads), np.int64))),
            drawing=np.concatenate((sampled, np.arange(len(rows), len(slots)))),
            num_padding=len(pads),
            num_sampled=len(sampled),
        )

    def _check_rows(self, slots: Index, count: I64, after: I64, known: I64) -> None:
        def refuse_row(wrong: NDArray[np.bool_], what: str) -> None:
            if wrong.any():
                i = int(wrong.argmax())
                raise PlanError(f"slot {slots[i]} {what} (computes {count[i]} up to {after[i]}, knows {known[i]})")

        refuse_row(count < 1, "computes no token")
        refuse_row(after > known, "computes more tokens than it knows")
        refuse_row(after > self.num_blocks[slots] * self.block_size, "lacks a block")
        refuse_row((after == known) & (known >= self.max_model_len), f"would exceed max_model_len {self.max_model_len}")

    def _fill(self, slots: Index, first: I64, after: I64) -> None:
        """The rows write these tokens to their blocks; a block that is written belongs to one table only."""
        size = self.block_size
        first_block = first // size
        count = (after - 1) // size - first_block + 1
        row = np.repeat(np.arange(len(slots)), count)
        column = np.arange(len(row)) + np.repeat(first_block - np.cumsum(count) + count, count)
        block = self.block_tables[slots[row], column]
        refs = self.blocks.refs[block]
        if (refs != 1).any():
            i = int((refs != 1).argmax())
            raise PlanError(f"slot {slots[row[i]]} writes block {block[i]}, which {refs[i]} tables hold")
        self.blocks.filled[block] = np.minimum(after[row] - column * size, size)

    # ------------------------------------------------------------------------------------------------------------- checks

    def _known(self, wire_slots: U16, name: str, distinct: bool = True) -> Index:
        """These slots as an index; all of them must be live."""
        slots = wire_slots.astype(np.intp)
        if len(slots) and slots.max() >= len(self.live):
            raise PlanError(f"{name}: slot {slots.max()} of {len(self.live)}")
        if not self.live[slots].all():
            raise PlanError(f"{name}: slot {slots[~self.live[slots]][0]} holds no sequence")
        if distinct:
            places = np.arange(len(slots))
            self._mark[slots] = places
            if (self._mark[slots] != places).any():
                raise PlanError(f"{name}: slot {slots[self._mark[slots] != places][0]} stands twice")
        return slots


def _rank(slots: Index) -> Index:
    """For each entry, how many equal ones stand before it."""
    order = np.argsort(slots, kind="stable")
    in_order = slots[order]
    rank = np.empty(len(slots), np.intp)
    rank[order] = np.arange(len(slots)) - np.searchsorted(in_order, in_order)
    return rank
