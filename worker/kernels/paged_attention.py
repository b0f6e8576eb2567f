"""Paged attention for any mix of chunks and single tokens: softmax(scale · q kᵀ) v over each row's blocks, causal.

FlashAttention-2 (arXiv:2307.08691) reads keys and values tile by tile and keeps a running peak and total of the softmax; the
blocks are found through block tables (PagedAttention, arXiv:2309.06180); the query heads of a group, which read the same
key-value head (GQA, arXiv:2305.13245), are packed into the rows of one matrix product: row m is query m // G, head m % G.
When rows are few, each row's context is divided among programs (Flash-Decoding, arXiv:2311.01282), whose partial results
merge_splits.py puts together. All sums are float32. What a step looks like (which rows, which tiles, how many splits) comes
ready from worker/attention; nothing here reads a length on the host.

Legend: T tokens of the step, H query heads, K key-value heads, G = H / K, D head size, R rows, W blocks of the widest table,
P query tiles, N splits, S = P · BLOCK_Q places of partial results.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from worker.kernels.heuristics import AttentionConfig

_LOG2_E = math.log2(math.e)
_LN_2 = tl.constexpr(math.log(2))


@triton.jit
def _load_block(table_ptr, tile, most, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """The block of each of the tile's tokens: one for all where a tile is a part of a block, else [TILE]. Past the last: 0."""
    if TILE <= BLOCK_SIZE:
        nth, token = tile // (BLOCK_SIZE // TILE), tile * TILE
    else:
        t = tl.arange(0, TILE)
        nth, token = tile * (TILE // BLOCK_SIZE) + t // BLOCK_SIZE, tile * TILE + t
    return tl.load(table_ptr + nth, mask=token < most, other=0)


@triton.jit
def _attend_tiles(
    q,  # [BLOCK_M, HEAD_PAD]
    acc,  # [BLOCK_M, HEAD_PAD] float32: Σ p v so far
    peak,  # [BLOCK_M] float32: the largest score so far, in units of log2
    total,  # [BLOCK_M] float32: Σ p so far
    k_head_ptr,
    v_head_ptr,
    table_ptr,
    begin_tile,
    end_tile,
    seen_m,  # [BLOCK_M] tokens that each query sees
    most,  # tokens that the tile's last query sees
    scale_log2e,
    window,
    BLOCK_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    t = tl.arange(0, TILE)
    d = tl.arange(0, HEAD_PAD)
    block = _load_block(table_ptr, begin_tile, most, BLOCK_SIZE, TILE)
    for tile in range(begin_tile, end_tile):
        token = tile * TILE + t
        # 64-bit: pools exceed 2^31 elements.
        place = block.to(tl.int64) * BLOCK_STRIDE
        if TILE <= BLOCK_SIZE:
            offset = place + (tile % (BLOCK_SIZE // TILE) * (TILE * HEAD_DIM) + (t[:, None] * HEAD_DIM + d[None, :]))
        else:  # a tile begins where a block begins
            offset = place[:, None] + (t[:, None] % BLOCK_SIZE * HEAD_DIM + d[None, :])
        # One tile ahead, and by hand: were keys found by a load of the same iteration, the compiler would give the two loads a
        # stage each, and keep a single buffer of keys, which nothing overlaps with.
        block = _load_block(table_ptr, tile + 1, most, BLOCK_SIZE, TILE)
        # Unused slots may hold NaN: neither keys nor values past the last token are read.
        if MASKED and HEAD_PAD != HEAD_DIM:
            there = (token[:, None] < most) & (d[None, :] < HEAD_DIM)
            k = tl.load(k_head_ptr + offset, mask=there, other=0.0)
            v = tl.load(v_head_ptr + offset, mask=there, other=0.0)
        elif MASKED:
            k = tl.load(k_head_ptr + offset, mask=token[:, None] < most, other=0.0)
            v = tl.load(v_head_ptr + offset, mask=token[:, None] < most, other=0.0)
        elif HEAD_PAD != HEAD_DIM:
            k = tl.load(k_head_ptr + offset, mask=d[None, :] < HEAD_DIM, other=0.0)
            v = tl.load(v_head_ptr + offset, mask=d[None, :] < HEAD_DIM, other=0.0)
        else:
            k = tl.load(k_head_ptr + offset)
            v = tl.load(v_head_ptr + offset)

        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            visible = token[None, :] < seen_m[:, None]
            if WINDOWED:
                visible &= token[None, :] >= seen_m[:, None] - window
            scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2e)
        # A query may see nothing of a split's first tiles: -inf - -inf would be NaN.
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
        p = tl.math.exp2(scores * scale_log2e - shift[:, None])
        decay = tl.math.exp2(peak - shift)
        total = total * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        peak = new_peak
    return acc, peak, total


# Numbers that differ from step to step must not make new variants: no specialization on 1 or on divisibility by 16. (q_stride
# is always divisible, and queries are loaded sixteen bytes at a time because the compiler knows it.)
@triton.jit(
    do_not_specialize=["table_stride", "num_places", "window"],
    do_not_specialize_on_alignment=[
        "block_tables_ptr",
        "context_lens_ptr",
        "query_start_ptr",
        "tile_row_ptr",
        "tile_first_ptr",
        "lse_ptr",
    ],
)
def paged_attention_kernel(
    q_ptr,  # [T, H, D]
    k_ptr,  # [1 + blocks, K, BLOCK_SIZE, D]
    v_ptr,
    out_ptr,  # [T, H, D]; PARTIAL: float32 [N, S, H, D]
    lse_ptr,  # PARTIAL: float32 [N, S, H]
    block_tables_ptr,  # [R, W]
    context_lens_ptr,  # [R]
    query_start_ptr,  # [R + 1]
    tile_row_ptr,  # [P], -1: no tile
    tile_first_ptr,  # [P]
    q_stride,
    table_stride,
    num_places,  # S
    scale_log2e,
    window,  # tokens that a query sees at most, itself among them
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    MASK_ALL: tl.constexpr,
    WINDOWED: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(tile_row_ptr + tile)
    if row < 0:
        return
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    first = tl.load(tile_first_ptr + tile)
    begin_query = tl.load(query_start_ptr + row)
    num_queries = tl.load(query_start_ptr + row + 1) - begin_query
    context_len = tl.load(context_lens_ptr + row)

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, HEAD_PAD)
    nth = first + m // GROUP  # of the row's queries
    head = kv_head * GROUP + m % GROUP
    own_m = (nth < num_queries) & (m < BLOCK_Q * GROUP)
    own = own_m[:, None] & (d[None, :] < HEAD_DIM)
    token_m = (begin_query + nth).to(tl.int64)
    q_offset = (token_m * q_stride + head * HEAD_DIM)[:, None] + d[None, :]
    q = tl.load(q_ptr + q_offset, mask=own, other=0.0)

    # Query i of n sees context_len - n + i + 1 tokens. Rows of the product past the tile's end see zeros, and are not stored.
    end = tl.minimum(first + BLOCK_Q, num_queries)
    before = context_len - num_queries
    most, least = before + end, before + first + 1
    seen_m = before + nth + 1
    begin_tile = 0
    if WINDOWED:
        begin_tile = tl.maximum(least - window, 0) // TILE
    end_tile = (most + TILE - 1) // TILE
    share = (end_tile - begin_tile + tl.num_programs(2) - 1) // tl.num_programs(2)
    begin_tile += split * share
    end_tile = tl.minimum(end_tile, begin_tile + share)

    acc = tl.zeros([BLOCK_M, HEAD_PAD], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    table_ptr = block_tables_ptr + row.to(tl.int64) * table_stride
    k_head_ptr = k_ptr + kv_head * (BLOCK_SIZE * HEAD_DIM)
    v_head_ptr = v_ptr + kv_head * (BLOCK_SIZE * HEAD_DIM)
    BLOCK_STRIDE: tl.constexpr = NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM
    masked_tile = begin_tile
    if not MASK_ALL:  # all queries see the tiles before this one whole
        masked_tile = tl.maximum(begin_tile, tl.minimum(end_tile, least // TILE))
        acc, peak, total = _attend_tiles(
            q, acc, peak, total, k_head_ptr, v_head_ptr, table_ptr, begin_tile, masked_tile, seen_m, most, scale_log2e, window,
            BLOCK_STRIDE, BLOCK_SIZE, HEAD_DIM, HEAD_PAD, TILE, False, False,
        )  # fmt: skip
    acc, peak, total = _attend_tiles(
        q, acc, peak, total, k_head_ptr, v_head_ptr, table_ptr, masked_tile, end_tile, seen_m, most, scale_log2e, window,
        BLOCK_STRIDE, BLOCK_SIZE, HEAD_DIM, HEAD_PAD, TILE, True, WINDOWED,
    )  # fmt: skip

    out = acc * tl.where(total > 0, 1 / total, 0.0)[:, None]  # nothing seen: zeros
    if PARTIAL:
        place = split.to(tl.int64) * num_places + tile * BLOCK_Q + m // GROUP
        tl.store(out_ptr + (place * (NUM_HEADS * HEAD_DIM) + head * HEAD_DIM)[:, None] + d[None, :], out, mask=own)
        lse = tl.where(total > 0, (peak + tl.math.log2(total)) * _LN_2, float("-inf"))
        tl.store(lse_ptr + place * NUM_HEADS + head, lse, mask=own_m)
    else:
        out_offset = (token_m * (NUM_HEADS * HEAD_DIM) + head * HEAD_DIM)[:, None] + d[None, :]
        tl.store(out_ptr + out_offset, out.to(out_ptr.dtype.element_ty), mask=own)


def paged_attention(
    q_THD: Tensor,
    kv_layer: Tensor,
    out: Tensor,
    lse: Tensor | None,
    block_tables_RW: Tensor,
    context_lens_R: Tensor,
    query_start_R1: Tensor,
    tile_row_P: Tensor,
    tile_first_P: Tensor,
    *,
    scale: float,
    num_splits: int,
    config: AttentionConfig,
    window: int = 0,
) -> None:
    """Attends for the queries of the tiles; other rows of `out` stay as they are.

    q_THD: heads contiguous, tokens at any stride that is a multiple of 16 (a slice of a fused projection). kv_layer
    [2, 1 + blocks, K, block_size, D]. Without `lse`, out is [T, H, D] of q's dtype and num_splits is 1. With it both are
    partial results for merge_splits: out [N, S, H, D] and lse [N, S, H], float32, S = P · config.block_q. `window`: tokens that
    a query sees at most, itself among them; 0: all.
    """
    _, num_heads, head_dim = q_THD.shape
    halves, _, num_kv_heads, block_size, _ = kv_layer.shape
    group = num_heads // num_kv_heads
    assert halves == 2 and kv_layer.shape[4] == head_dim and num_heads == group * num_kv_heads
    assert kv_layer.is_contiguous() and kv_layer.dtype == q_THD.dtype
    assert q_THD.stride(2) == 1 and q_THD.stride(1) == head_dim and q_THD.stride(0) % 16 == 0 and head_dim % 16 == 0
    assert config.block_q * group <= config.block_m and config.tile % block_size * (block_size % config.tile) == 0
    assert block_tables_RW.stride(1) == 1 and tile_row_P.shape == tile_first_P.shape
    numbers = (block_tables_RW, context_lens_R, query_start_R1, tile_row_P, tile_first_P)
    assert all(x.dtype == torch.int32 and x.device == q_THD.device for x in numbers)
    assert all(x.is_contiguous() for x in numbers[1:])
    assert scale > 0 and window >= 0 and num_splits >= 1
    num_places = len(tile_row_P) * config.block_q
    if lse is None:
        assert num_splits == 1 and out.shape == q_THD.shape and out.is_contiguous() and out.dtype == q_THD.dtype
    else:
        assert out.shape == (num_splits, num_places, num_heads, head_dim) and lse.shape == out.shape[:3]
        assert out.is_contiguous() and lse.is_contiguous() and out.dtype == lse.dtype == torch.float32
    if len(tile_row_P) == 0:
        return
    paged_attention_kernel[(len(tile_row_P), num_kv_heads, num_splits)](
        q_THD,
        kv_layer[0],
        kv_layer[1],
        out,
        out if lse is None else lse,
        block_tables_RW,
        context_lens_R,
        query_start_R1,
        tile_row_P,
        tile_first_P,
        q_THD.stride(0),
        block_tables_RW.stride(0),
        num_places,
        scale * _LOG2_E,
        window,
        **config.constants(num_kv_heads, group, head_dim, block_size, windowed=window > 0, partial=lse is not None),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
