"""From what a step computes to what the model reads: flat token, position and slot arrays. Vector operations only.

Legend: T tokens of the step, rows one after the other; R rows of the plan and then P padding rows; N + P rows that draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from worker.attention.base import AttentionInputs
from worker.sequences import Sequences, StepRows


@dataclass(slots=True)
class Batch:
    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    attention: AttentionInputs
    drawing: Tensor  # [N + P] int64: the last token of each row that draws; only these get logits


def build(sequences: Sequences, rows: StepRows, device: torch.device | str) -> Batch:
    """The batch of one step. A padding row attends to its row's context but writes to block 0, which nobody reads."""
    block_size = sequences.block_size
    query_start = np.zeros(len(rows.slots) + 1, np.int64)
    np.cumsum(rows.count, out=query_start[1:])
    slots_T = np.repeat(rows.slots, rows.count)
    positions_T = np.arange(query_start[-1]) + np.repeat(rows.first - query_start[:-1], rows.count)
    column_T = positions_T // block_size
    slot_mapping_T = sequences.block_tables[slots_T, column_T] * np.int64(block_size) + positions_T % block_size
    if rows.num_padding:
        slot_mapping_T[-rows.num_padding :] = np.arange(rows.num_padding) % block_size
    context_lens = rows.first + rows.count
    width = -(-int(context_lens.max(initial=0)) // block_size)
    attention = AttentionInputs.of(
        query_start=query_start.astype(np.int32),
        context_lens=context_lens.astype(np.int32),
        block_tables=sequences.block_tables[:, :width][rows.slots],
        slot_mapping=slot_mapping_T,
        device=device,
    )
    input_ids_T = sequences.tokens[slots_T, positions_T].astype(np.int64)
    last_token = query_start[1:][rows.drawing] - 1
    input_ids, positions, drawing = (torch.from_numpy(array).to(device) for array in (input_ids_T, positions_T, last_token))
    return Batch(input_ids, positions, attention, drawing)
