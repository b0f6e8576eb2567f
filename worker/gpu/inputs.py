"""What one step tells the device, as one array of 32-bit integers: one copy a step, cut into its parts where it arrives.

Tokens that were drawn here never come back to be sent again: where the host does not know a token, its id says in which slot
the device finds it. Vector operations only; knows no kernel and no stream.

Legend: T tokens, R rows (the plan's, then padding), N rows that draw, G entries of block tables that change, S slots; slot S
is the dump: its table is all zeros, so what is written there goes to block 0, and what it draws is read by nobody.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Generic, TypeVar

import numpy as np
from torch import Tensor

from wire.messages import I32
from worker.sequences import Sequences, StepRows

Array = TypeVar("Array", I32, Tensor)


@dataclass(frozen=True, slots=True)
class Sizes:
    tokens: int  # T
    rows: int  # R
    draws: int  # N
    writes: int  # G

    @staticmethod
    def of_decode(count: int) -> Sizes:
        """A step of `count` rows that compute a token each and draw the next; a row takes at most one new block."""
        return Sizes(count, count, count, count)

    @property
    def total(self) -> int:
        return sum(map(_aligned, _lengths(self)))


@dataclass(slots=True)
class StepInputs(Generic[Array]):
    """All int32. On the host and on the device the same parts of one array."""

    ids: Array  # [T] token ids; −1 − s: the token that slot s drew last
    positions: Array  # [T] in the sequence, from 0
    token_slots: Array  # [T] whose block table says where the token's key and value go
    query_start: Array  # [R + 1]
    context_lens: Array  # [R] tokens in the cache after this step's write; 0 for a row that is no row
    row_slots: Array  # [R]
    drawing: Array  # [N] token of the step whose hidden state draws
    draw_slots: Array  # [N] whose parameters it draws with, and who is fed; the dump for padding
    draw_positions: Array  # [N] of the token to be drawn
    write_places: Array  # [G] in the flat block tables [S + 1, W]
    write_blocks: Array  # [G]


def _lengths(sizes: Sizes) -> tuple[int, ...]:
    tokens, rows, draws, writes = sizes.tokens, sizes.rows, sizes.draws, sizes.writes
    return (tokens, tokens, tokens, rows + 1, rows, rows, draws, draws, draws, writes, writes)


def _aligned(length: int) -> int:
    """Each part begins at a multiple of 16 bytes: Triton compiles a kernel once more for pointers that do not."""
    return -(-length // 4) * 4


def cut(whole: Array, sizes: Sizes) -> StepInputs[Array]:
    """The parts of an array of at least sizes.total numbers, as views."""
    lengths = _lengths(sizes)
    begins = accumulate(map(_aligned, lengths[:-1]), initial=0)
    return StepInputs(*(whole[begin : begin + length] for begin, length in zip(begins, lengths, strict=True)))


def step_inputs(sequences: Sequences, rows: StepRows) -> tuple[Sizes, StepInputs[I32]]:
    """Of a step as it was planned. A padding row attends to its row's context and draws, but writes to block 0, and what it
    draws is not fed."""
    dump = len(sequences.live)
    query_start = np.zeros(len(rows.slots) + 1, np.int64)
    np.cumsum(rows.count, out=query_start[1:])
    slots_T = np.repeat(rows.slots, rows.count)
    positions_T = np.arange(query_start[-1]) + np.repeat(rows.first - query_start[:-1], rows.count)
    drawn_here = positions_T >= sequences.num_given[slots_T]
    ids_T = np.where(drawn_here, -1 - slots_T, sequences.tokens[slots_T, positions_T])
    draw_slots = rows.slots[rows.drawing]
    if rows.num_padding:
        slots_T[-rows.num_padding :] = dump
        draw_slots[-rows.num_padding :] = dump
    places, blocks = sequences.table_writes()
    sizes = Sizes(len(ids_T), len(rows.slots), len(rows.drawing), len(places))
    parts = (
        ids_T,
        positions_T,
        slots_T,
        query_start,
        rows.first + rows.count,
        rows.slots,
        query_start[1:][rows.drawing] - 1,
        draw_slots,
        (rows.first + rows.count)[rows.drawing],
        places,
        blocks,
    )
    return sizes, StepInputs(*(part.astype(np.int32) for part in parts))


def put(inputs: StepInputs[I32], target: StepInputs[I32]) -> None:
    """Copies the parts; the target's may not be longer."""
    for part in fields(StepInputs):
        getattr(target, part.name)[:] = getattr(inputs, part.name)


def put_padded(inputs: StepInputs[I32], target: StepInputs[I32], dump: int, table_width: int) -> None:
    """Copies a decode step's parts to longer ones, filled up with rows of the dump that see nothing."""
    count, writes = len(inputs.ids), len(inputs.write_places)
    nothing = {
        "ids": -1 - dump,
        "token_slots": dump,
        "row_slots": dump,
        "draw_slots": dump,
        "write_places": dump * table_width,
    }
    for part in fields(StepInputs):
        given, whole = getattr(inputs, part.name), getattr(target, part.name)
        used = writes if part.name.startswith("write_") else len(given)
        whole[:used] = given
        whole[used:] = nothing.get(part.name, 0)
    target.query_start[count + 1 :] = np.arange(count + 1, len(target.query_start))
    target.drawing[count:] = np.arange(count, len(target.drawing))
