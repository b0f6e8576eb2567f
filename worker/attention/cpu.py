"""Paged attention on a CPU. Which rows there are is all it knows of a step.

A row that computes a few tokens is taken as that many single queries, and all single queries of a step are computed together,
from the blocks where they lie (singles.py). A row that computes many is a chunk: bound by arithmetic, not by memory, so its
keys and values may as well be gathered, and torch's own attention (FlashAttention, arXiv:2205.14135) runs over them.

Legend: T tokens of the step, n queries of a part of a chunk, L tokens of its context, H query heads, K key-value heads,
G = H / K, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from worker import compiled
from worker.attention.base import AttentionInputs
from worker.attention.singles import CompiledSingles, GatheredSingles, Queries, Singles

_MOST_SINGLES = 16
_PART = 128  # queries of a chunk that are computed together; each part skips what only later ones see


@dataclass(slots=True)
class _Part:
    first: int  # its queries in the step
    end: int
    bias: Tensor  # [n, L] 0 where a query sees a key, else −inf


@dataclass(slots=True)
class _Chunk:
    pages: Tensor  # [2 · K · blocks] what to gather: (index 0 or 1, block, head) of the layer as one number
    parts: list[_Part]


@dataclass(slots=True)
class _Plan:
    blocks: Tensor  # [T] where the step's keys and values go
    offsets: Tensor  # [T]
    singles: Singles | None = None
    chunks: list[_Chunk] | None = None  # None: not worked out yet


class CpuAttention:
    def __init__(
        self,
        ways: Sequence[type[Singles]] = (CompiledSingles, GatheredSingles),
        most_singles: float = _MOST_SINGLES,
    ) -> None:
        """`ways` to compute single queries, the best first; the first that can is taken. most_singles: tokens of a row that are
        taken one by one."""
        self._ways, self._most_singles = ways, most_singles

    def write(self, k_TKD: Tensor, v_TKD: Tensor, kv_layer: Tensor, inputs: AttentionInputs) -> None:
        if compiled.fits_cache(kv_layer) and k_TKD.dtype == torch.float32 and k_TKD.numel() <= compiled.MOST:
            return compiled.write(k_TKD, v_TKD, kv_layer, inputs.slot_mapping)
        plan = _plan(kv_layer, inputs)
        kv_layer[0][plan.blocks, :, plan.offsets] = k_TKD.to(kv_layer.dtype)
        kv_layer[1][plan.blocks, :, plan.offsets] = v_TKD.to(kv_layer.dtype)

    def attend(self, q_THD: Tensor, kv_layer: Tensor, inputs: AttentionInputs, scale: float) -> Tensor:
        plan = _plan(kv_layer, inputs)
        if plan.chunks is None:
            self._divide(plan, q_THD.shape[1], kv_layer, inputs)
            assert plan.chunks is not None
        out_THD = torch.empty_like(q_THD) if plan.singles is None else plan.singles.attend(q_THD, kv_layer, scale)
        for chunk in plan.chunks:
            _attend_chunk(q_THD, kv_layer, chunk, scale, out_THD)
        return out_THD

    def _divide(self, plan: _Plan, num_heads: int, kv_layer: Tensor, inputs: AttentionInputs) -> None:
        """Into single queries and chunks."""
        count = np.diff(inputs.query_start_cpu)
        assert (count >= 1).all() and (inputs.context_lens_cpu >= count).all()
        is_chunk = count > self._most_singles
        plan.chunks = [_chunk(int(row), kv_layer, inputs) for row in np.flatnonzero(is_chunk)]
        queries = queries_of(np.flatnonzero(~is_chunk), inputs)
        if len(queries.token):
            plan.singles = next(filter(None, (way.of(queries, num_heads, kv_layer) for way in self._ways)))


def _plan(kv_layer: Tensor, inputs: AttentionInputs) -> _Plan:
    if not isinstance(inputs.plan, _Plan):
        block_size = kv_layer.shape[3]
        inputs.plan = _Plan(inputs.slot_mapping // block_size, inputs.slot_mapping % block_size)
    return inputs.plan


def queries_of(rows: NDArray[np.intp], inputs: AttentionInputs) -> Queries:
    """All tokens that these rows compute: the last one of a row sees its whole context, the one before it one less, …"""
    first, context = inputs.query_start_cpu[rows].astype(np.int64), inputs.context_lens_cpu[rows].astype(np.int64)
    count = inputs.query_start_cpu[rows + 1] - first
    nth = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)  # of its row's
    return Queries(
        token=np.repeat(first, count) + nth,
        row=np.repeat(rows, count).astype(np.int64),
        length=np.repeat(context - count + 1, count) + nth,
        tables=inputs.block_tables_cpu,
        num_tokens=int(inputs.query_start_cpu[-1]),
    )


def _chunk(row: int, kv_layer: Tensor, inputs: AttentionInputs) -> _Chunk:
    _, num_blocks, num_kv_heads, block_size, _ = kv_layer.shape
    first, end = (int(at) for at in inputs.query_start_cpu[row : row + 2])
    length = int(inputs.context_lens_cpu[row])
    blocks = inputs.block_tables_cpu[row, : -(-length // block_size)].astype(np.int64)
    half_and_head = np.arange(2)[:, None, None] * num_blocks * num_kv_heads + np.arange(num_kv_heads)[:, None]
    pages = half_and_head + blocks * num_kv_heads
    hidden = torch.ones(end - first, length, dtype=torch.bool).triu_(length - (end - first) + 1)
    bias = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
    parts = []
    for at in range(first, end, _PART):
        until = min(at + _PART, end)
        parts.append(_Part(at, until, bias[at - first : until - first, : length - (end - until)]))
    return _Chunk(torch.from_numpy(pages.ravel()), parts)


def _attend_chunk(q_THD: Tensor, kv_layer: Tensor, chunk: _Chunk, scale: float, out_THD: Tensor) -> None:
    _, _, num_kv_heads, block_size, head_dim = kv_layer.shape
    gathered = kv_layer.view(-1, block_size * head_dim).index_select(0, chunk.pages).float()
    k_K1LD, v_K1LD = gathered.view(2, num_kv_heads, 1, -1, head_dim)
    for part in chunk.parts:
        (count, seen), group = part.bias.shape, q_THD.shape[1] // num_kv_heads
        q_KGnD = q_THD[part.first : part.end].float().view(count, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
        k_KGLD, v_KGLD = (x[:, :, :seen].expand(-1, group, -1, -1) for x in (k_K1LD, v_K1LD))
        attended_KGnD = F.scaled_dot_product_attention(q_KGnD, k_KGLD, v_KGLD, part.bias, scale=scale)
        out_THD[part.first : part.end] = attended_KGnD.permute(2, 0, 1, 3).flatten(1, 2)
