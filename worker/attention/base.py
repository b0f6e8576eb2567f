"""What a model asks of attention, and the inputs of one step. No backend here, no model, no scheduler.

Legend: T tokens of the step (rows one after the other), R rows, W blocks of the widest table, H query heads, K key-value
heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

I32 = NDArray[np.int32]
I64 = NDArray[np.int64]


@dataclass(slots=True)
class AttentionInputs:
    """Where the tokens of one step stand in the cache; passed as an argument through the whole forward.

    Row r computes the tokens query_start[r] .. query_start[r + 1] of the flat step. Their keys and values are written first;
    then the i-th of its n tokens attends to the first context_lens[r] - n + i + 1 tokens of the row (causal, aligned at the
    lower right).
    """

    query_start: Tensor  # [R + 1] int32, from 0 to T
    context_lens: Tensor  # [R] int32: tokens of the row that are in the cache after this step's write; at least its query's
    block_tables: Tensor  # [R, W] int32, entries past the row's blocks are 0
    slot_mapping: Tensor  # [T] int64: block_id * block_size + offset where each token's key and value go
    # The same numbers on the host, for whatever a backend works out before it launches anything.
    query_start_cpu: I32
    context_lens_cpu: I32
    block_tables_cpu: I32
    max_query_len: int
    plan: object | None = None  # a backend's own: worked out at the first layer, used by the others

    @classmethod
    def of(
        cls, query_start: I32, context_lens: I32, block_tables: I32, slot_mapping: I64, device: torch.device | str = "cpu"
    ) -> AttentionInputs:
        """From the host's arrays; on the CPU the tensors share their memory."""
        assert len(query_start) == len(context_lens) + 1 == len(block_tables) + 1
        assert query_start[-1] == len(slot_mapping)
        return cls(
            query_start=torch.from_numpy(query_start).to(device),
            context_lens=torch.from_numpy(context_lens).to(device),
            block_tables=torch.from_numpy(block_tables).to(device),
            slot_mapping=torch.from_numpy(slot_mapping).to(device),
            query_start_cpu=query_start,
            context_lens_cpu=context_lens,
            block_tables_cpu=block_tables,
            max_query_len=int(np.diff(query_start).max(initial=0)),
        )


class AttentionBackend(Protocol):
    """Paged attention. `kv_layer` is one of KVStorage.layers: [2, 1 + blocks, K, block_size, D].

    Slots that a row's context does not reach may hold anything, NaN too; none of it may reach the result.
    """

    def write(self, k_TKD: Tensor, v_TKD: Tensor, kv_layer: Tensor, inputs: AttentionInputs) -> None:
        """Puts the step's keys and values into their slots."""

    def attend(self, q_THD: Tensor, kv_layer: Tensor, inputs: AttentionInputs, scale: float) -> Tensor:
        """softmax(scale · q kᵀ) v over each row's context, causal, [T, H, D]. H is a multiple of K; head h reads the
        key-value head h // (H // K) (grouped-query attention, arXiv:2305.13245)."""
