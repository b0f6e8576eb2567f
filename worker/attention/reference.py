"""Attention the slow and obvious way, in float64: the twin that every faster backend is held against.

Legend: T tokens of the step, n tokens of one row's query, L tokens of its context, H query heads, K key-value heads, D head
size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from worker.attention.base import AttentionInputs


def dense_attention(q_nHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) v without any paging, [n, H, D]; query i sees the first L - n + i + 1 keys."""
    n, num_heads, _ = q_nHD.shape
    length, num_kv_heads, _ = k_LKD.shape
    group = num_heads // num_kv_heads
    k_LHD = k_LKD.double().repeat_interleave(group, dim=1)
    v_LHD = v_LKD.double().repeat_interleave(group, dim=1)
    scores_HnL = torch.einsum("nhd,lhd->hnl", q_nHD.double(), k_LHD) * scale
    position_n1 = torch.arange(length - n, length, device=q_nHD.device)[:, None]
    hidden_nL = torch.arange(length, device=q_nHD.device) > position_n1
    weights_HnL = torch.softmax(scores_HnL.masked_fill(hidden_nL, -torch.inf), dim=-1)
    return torch.einsum("hnl,lhd->nhd", weights_HnL, v_LHD).to(q_nHD.dtype)


class ReferenceAttention:
    """Paged by a loop over rows and tokens."""

    def write(self, k_TKD: Tensor, v_TKD: Tensor, kv_layer: Tensor, inputs: AttentionInputs) -> None:
        block_size = kv_layer.shape[3]
        for token, slot in enumerate(inputs.slot_mapping.tolist()):
            kv_layer[0, slot // block_size, :, slot % block_size] = k_TKD[token]
            kv_layer[1, slot // block_size, :, slot % block_size] = v_TKD[token]

    def attend(self, q_THD: Tensor, kv_layer: Tensor, inputs: AttentionInputs, scale: float) -> Tensor:
        out_THD = torch.empty_like(q_THD)
        block_size = kv_layer.shape[3]
        for row, length in enumerate(inputs.context_lens.tolist()):
            first, end = inputs.query_start[row : row + 2].tolist()
            table = inputs.block_tables[row].tolist()
            slots = [(table[at // block_size], at % block_size) for at in range(length)]
            k_LKD = torch.stack([kv_layer[0, block, :, offset] for block, offset in slots])
            v_LKD = torch.stack([kv_layer[1, block, :, offset] for block, offset in slots])
            out_THD[first:end] = dense_attention(q_THD[first:end], k_LKD, v_LKD, scale)
        return out_THD
