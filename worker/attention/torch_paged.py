"""Paged attention out of torch operations, for any device; made for the CPU. Which rows there are is all it knows of a step.

Rows of about the same shape are computed together, as a group: their blocks are gathered into one buffer small enough to
stay in the processor's cache, and one scaled_dot_product_attention (FlashAttention, arXiv:2205.14135) runs over it. Where
each thing is to be found is worked out once a step, at its first layer, and used by all layers.

Legend: T tokens of the step, n rows of a group, Q tokens of its longest query, W blocks and L = W · block_size slots of its
longest context, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from worker.attention.base import AttentionInputs

Index = NDArray[np.int64]

_GROUP_BYTES = 6 << 20  # of gathered keys and values: 4 to 8 MiB measured best, with 32 MiB of cache


@dataclass(slots=True)
class _Group:
    num_rows: int
    query_len: int  # Q
    tokens: Tensor  # [n · Q] the step's token of each query; past the row's own: its last one again
    places: Tensor  # [n · Q] where its result goes; T, which is thrown away, past the row's own
    pages: Tensor  # [2 · n · K · W] what to gather: (index 0 or 1, block, head) of the layer as one number
    stale: Tensor  # gathered slots that no token has written, as rows of [2 · n · K · L, D]
    bias: Tensor  # [n, 1, Q, L] 0 where a query sees a slot, else −inf


@dataclass(slots=True)
class _Plan:
    blocks: Tensor  # [T] where the step's keys and values go
    offsets: Tensor  # [T]
    groups: list[_Group]


class TorchPagedAttention:
    """Holds one scratch buffer, which grows to the largest group that came along."""

    def __init__(self, group_bytes: int = _GROUP_BYTES) -> None:
        self._group_bytes = group_bytes
        self._scratch = torch.empty(0)

    def write(self, k_TKD: Tensor, v_TKD: Tensor, kv_layer: Tensor, inputs: AttentionInputs) -> None:
        plan = self._plan(kv_layer, inputs)
        kv_layer[0][plan.blocks, :, plan.offsets] = k_TKD
        kv_layer[1][plan.blocks, :, plan.offsets] = v_TKD

    def attend(self, q_THD: Tensor, kv_layer: Tensor, inputs: AttentionInputs, scale: float) -> Tensor:
        num_tokens, num_heads, head_dim = q_THD.shape
        out_THD = q_THD.new_empty(num_tokens + 1, num_heads, head_dim)
        for group in self._plan(kv_layer, inputs).groups:
            k_nKLD, v_nKLD = self._gather(kv_layer, group).float()
            q_xHD = q_THD.index_select(0, group.tokens).float()
            attend = _attend_one if group.query_len == 1 else _attend_many
            attended_xHD = attend(q_xHD, k_nKLD, v_nKLD, group.bias, scale)
            out_THD.index_copy_(0, group.places, attended_xHD.to(q_THD.dtype))
        return out_THD[:num_tokens]

    def _gather(self, kv_layer: Tensor, group: _Group) -> Tensor:
        """[2, n, K, L, D], zeros where nothing was written: 0 · NaN would be NaN."""
        _, _, num_kv_heads, block_size, head_dim = kv_layer.shape
        size = len(group.pages) * block_size * head_dim
        if self._scratch.numel() < size or self._scratch.dtype != kv_layer.dtype or self._scratch.device != kv_layer.device:
            with torch.inference_mode(False):  # it may be written to again where that mode is not on
                self._scratch = torch.empty(size, dtype=kv_layer.dtype, device=kv_layer.device)
        gathered = self._scratch[:size].view(len(group.pages), block_size * head_dim)
        torch.index_select(kv_layer.view(-1, block_size * head_dim), 0, group.pages, out=gathered)
        gathered.view(-1, head_dim).index_fill_(0, group.stale, 0)
        return gathered.view(2, group.num_rows, num_kv_heads, -1, head_dim)

    def _plan(self, kv_layer: Tensor, inputs: AttentionInputs) -> _Plan:
        if not isinstance(inputs.plan, _Plan):
            block_size = kv_layer.shape[3]
            slots = inputs.slot_mapping
            groups = [_group(rows, inputs, kv_layer) for rows in _alike(inputs, kv_layer, self._group_bytes)]
            inputs.plan = _Plan(slots // block_size, slots % block_size, groups)
        return inputs.plan


def _attend_one(q_nHD: Tensor, k_nKLD: Tensor, v_nKLD: Tensor, bias_n11L: Tensor, scale: float) -> Tensor:
    """One query a row: the heads of a group become the queries of their key-value head, which is read once for them."""
    n, num_heads, head_dim = q_nHD.shape
    q_nKGD = q_nHD.view(n, k_nKLD.shape[1], -1, head_dim)
    bias = bias_n11L.expand(n, 1, q_nKGD.shape[2], -1)
    return F.scaled_dot_product_attention(q_nKGD, k_nKLD, v_nKLD, bias, scale=scale).reshape(n, num_heads, head_dim)


def _attend_many(q_xHD: Tensor, k_nKLD: Tensor, v_nKLD: Tensor, bias_n1QL: Tensor, scale: float) -> Tensor:
    _, num_heads, head_dim = q_xHD.shape
    q_nHQD = q_xHD.view(len(k_nKLD), -1, num_heads, head_dim).transpose(1, 2)
    grouped = num_heads != k_nKLD.shape[1]
    out_nHQD = F.scaled_dot_product_attention(q_nHQD, k_nKLD, v_nKLD, bias_n1QL, scale=scale, enable_gqa=grouped)
    return out_nHQD.transpose(1, 2).reshape(-1, num_heads, head_dim)


# --------------------------------------------------------------------------------------------------------- once per step


def _alike(inputs: AttentionInputs, kv_layer: Tensor, group_bytes: int) -> Iterator[Index]:
    """Row numbers, in groups that waste little when padded: queries at most 1.42 times as long as the shortest (one token
    stands apart), contexts at most a quarter longer, in blocks, than the shortest and of one block only among themselves."""
    _, _, num_kv_heads, block_size, head_dim = kv_layer.shape
    most_blocks = group_bytes // (2 * num_kv_heads * block_size * head_dim * kv_layer.element_size())
    width = -(-inputs.context_lens_cpu // block_size)
    length_class = np.ceil(2 * np.log2(np.diff(inputs.query_start_cpu)))
    order = np.lexsort((width, length_class))
    width, length_class = width[order], length_class[order]
    at = 0
    while at < len(order):
        shortest = int(width[at])
        widest = shortest + (max(1, shortest // 4) if shortest > 1 else 0)
        class_end = int(np.searchsorted(length_class, length_class[at], "right"))
        end = at + int(np.searchsorted(width[at:class_end], widest, "right"))
        end = min(end, at + max(1, most_blocks // int(width[end - 1])))
        yield order[at:end]
        at = end


def _group(rows: Index, inputs: AttentionInputs, kv_layer: Tensor) -> _Group:
    _, num_blocks, num_kv_heads, block_size, _ = kv_layer.shape
    start, context = inputs.query_start_cpu[rows].astype(np.int64), inputs.context_lens_cpu[rows].astype(np.int64)
    query_len = inputs.query_start_cpu[rows + 1] - start
    assert (query_len >= 1).all() and (context >= query_len).all()
    width = -(-context // block_size)
    n, most_queries, most_blocks = len(rows), int(query_len.max()), int(width.max())
    own_nQ = np.arange(most_queries) < query_len[:, None]
    token_nQ = start[:, None] + np.minimum(np.arange(most_queries), query_len[:, None] - 1)
    # Past its own blocks a row reads its first one again: full (only one-block rows have none such, and they are alone), so
    # it holds numbers, and the bias hides them.
    block_nW = inputs.block_tables_cpu[rows, :most_blocks].astype(np.int64)
    block_nW = np.where(np.arange(most_blocks) < width[:, None], block_nW, block_nW[:, :1])
    index_2 = np.arange(2)[:, None, None, None]
    head_K = np.arange(num_kv_heads)[:, None]
    pages_2nKW = (index_2 * num_blocks + block_nW[:, None]) * num_kv_heads + head_K
    device = kv_layer.device
    token = torch.from_numpy(token_nQ).to(device)
    last = token - torch.from_numpy(start + query_len - context)[:, None].to(device)  # the last position that a query sees
    seen_nQL = torch.arange(most_blocks * block_size, device=device) <= last[:, :, None]
    bias = torch.zeros(seen_nQL.shape, device=device).masked_fill_(~seen_nQL, -torch.inf)
    return _Group(
        num_rows=n,
        query_len=most_queries,
        tokens=token.flatten(),
        places=torch.from_numpy(np.where(own_nQ, token_nQ, inputs.query_start_cpu[-1]).ravel()).to(device),
        pages=torch.from_numpy(pages_2nKW.ravel()).to(device),
        stale=torch.from_numpy(_stale(context, width * block_size, num_kv_heads, most_blocks * block_size)).to(device),
        bias=bias[:, None],
    )


def _stale(context: Index, held: Index, num_kv_heads: int, length: int) -> Index:
    """The slots context[i] .. held[i] − 1 of row i, in both halves and all heads, as rows of [2 · n · K · L, D]."""
    n, count = len(context), held - context
    row = np.repeat(np.arange(n), count)
    slot = context[row] + np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    half, head = np.arange(2)[:, None, None], np.arange(num_kv_heads)[:, None]
    return (((half * n + row) * num_kv_heads + head) * length + slot).ravel()
