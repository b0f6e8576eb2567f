"""A step's keys and values to their slots in the KV cache: alone; behind the rotation of queries and keys (Su et al. 2021,
arXiv:2104.09864); or behind a norm over each query and key head (Qwen3, arXiv:2505.09388) and the rotation.

    (a, b) → (a cos − b sin, b cos + a sin), a and b the halves of a head; y = w · x / √(mean(x²) + ε) before it

In float32, rounded once. Slot = block id · block size + offset; the layer is [2, 1 + blocks, K, block size, D].

A program takes one token and some of its heads. Those lie side by side in the fused product, so loads are one run of bytes; in
the cache each head of a token lies by itself, a run of D numbers: 128 bytes and more for D ≥ 64 in bf16, which are whole
32-byte sectors wherever D is a multiple of 16. Queries, keys and values are told apart by the head's number: a masked store
moves nothing, so that one program may hold all three.

Legend: T tokens, A = H + 2K heads of the fused product: H of queries, K of keys, K of values; D head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["num_blocks"])
def write_kv_kernel(
    k_ptr, v_ptr, kv_ptr, slots_ptr,
    k_token_stride, k_head_stride, v_token_stride, v_head_stride, num_blocks,
    NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, DIM)[None, :]
    mask = (head < NUM_KV_HEADS) & (d < HEAD_DIM)
    slot = tl.load(slots_ptr + token)
    at = ((slot // BLOCK_SIZE * NUM_KV_HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM + d
    k = tl.load(k_ptr + token * k_token_stride + head * k_head_stride + d, mask, 0.0)
    v = tl.load(v_ptr + token * v_token_stride + head * v_head_stride + d, mask, 0.0)
    tl.store(kv_ptr + at, k, mask)
    values = num_blocks.to(tl.int64) * (NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM)  # behind all keys
    tl.store(kv_ptr + values + at, v, mask)


@triton.jit
def _turn_and_store(
    a, b, cos_ptr, sin_ptr, q_ptr, kv_ptr, slots_ptr, token, head, d, mask, num_blocks,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HALF_DIM: tl.constexpr,
):  # fmt: skip
    """Halves a and b [HEADS, HALF] of some heads of a token, float32, to where they go."""
    cos = tl.load(cos_ptr + token * HALF_DIM + d, d < HALF_DIM, 0.0)
    sin = tl.load(sin_ptr + token * HALF_DIM + d, d < HALF_DIM, 0.0)
    is_query, is_value = head < NUM_HEADS, head >= NUM_HEADS + NUM_KV_HEADS
    turned_a = tl.where(is_value, a, a * cos - b * sin)
    turned_b = tl.where(is_value, b, b * cos + a * sin)
    query_at = q_ptr + (token * NUM_HEADS + head) * 2 * HALF_DIM + d
    tl.store(query_at, turned_a, mask & is_query)
    tl.store(query_at + HALF_DIM, turned_b, mask & is_query)
    slot = tl.load(slots_ptr + token)
    kv_head = head - NUM_HEADS - tl.where(is_value, NUM_KV_HEADS, 0)
    row = (slot // BLOCK_SIZE * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE
    values = num_blocks.to(tl.int64) * (NUM_KV_HEADS * BLOCK_SIZE * 2 * HALF_DIM)  # behind all keys
    kv_at = kv_ptr + tl.where(is_value, values, 0) + row * 2 * HALF_DIM + d
    tl.store(kv_at, turned_a, mask & ~is_query)
    tl.store(kv_at + HALF_DIM, turned_b, mask & ~is_query)


@triton.jit(do_not_specialize=["num_blocks"])
def rotate_and_write_kernel(
    qkv_ptr, cos_ptr, sin_ptr, q_ptr, kv_ptr, slots_ptr,
    token_stride, head_stride, num_blocks,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HALF_DIM: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, HALF)[None, :]
    mask = (head < NUM_HEADS + 2 * NUM_KV_HEADS) & (d < HALF_DIM)
    x_at = qkv_ptr + token * token_stride + head * head_stride + d
    a = tl.load(x_at, mask, 0.0).to(tl.float32)
    b = tl.load(x_at + HALF_DIM, mask, 0.0).to(tl.float32)
    _turn_and_store(
        a, b, cos_ptr, sin_ptr, q_ptr, kv_ptr, slots_ptr, token, head, d, mask, num_blocks,
        NUM_HEADS, NUM_KV_HEADS, BLOCK_SIZE, HALF_DIM,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_blocks"])
def norm_rotate_and_write_kernel(
    qkv_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_ptr, kv_ptr, slots_ptr,
    token_stride, head_stride, num_blocks, eps,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HALF_DIM: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, HALF)[None, :]
    mask = (head < NUM_HEADS + 2 * NUM_KV_HEADS) & (d < HALF_DIM)
    x_at = qkv_ptr + token * token_stride + head * head_stride + d
    a = tl.load(x_at, mask, 0.0).to(tl.float32)
    b = tl.load(x_at + HALF_DIM, mask, 0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(a * a + b * b, 1) / (2 * HALF_DIM) + eps)[:, None]
    is_query, is_value = head < NUM_HEADS, head >= NUM_HEADS + NUM_KV_HEADS
    q_low = tl.load(q_weight_ptr + d, d < HALF_DIM, 0.0).to(tl.float32)
    k_low = tl.load(k_weight_ptr + d, d < HALF_DIM, 0.0).to(tl.float32)
    q_high = tl.load(q_weight_ptr + HALF_DIM + d, d < HALF_DIM, 0.0).to(tl.float32)
    k_high = tl.load(k_weight_ptr + HALF_DIM + d, d < HALF_DIM, 0.0).to(tl.float32)
    a = tl.where(is_value, a, a * factor * tl.where(is_query, q_low, k_low))
    b = tl.where(is_value, b, b * factor * tl.where(is_query, q_high, k_high))
    _turn_and_store(
        a, b, cos_ptr, sin_ptr, q_ptr, kv_ptr, slots_ptr, token, head, d, mask, num_blocks,
        NUM_HEADS, NUM_KV_HEADS, BLOCK_SIZE, HALF_DIM,
    )  # fmt: skip


def write_kv(k_TKD: Tensor, v_TKD: Tensor, kv_layer: Tensor, slot_mapping_T: Tensor) -> None:
    """k and v may be parts of wider rows."""
    num_tokens, num_kv_heads, head_dim = k_TKD.shape
    assert v_TKD.shape == k_TKD.shape and k_TKD.stride(2) == v_TKD.stride(2) == 1
    _check_cache(kv_layer, slot_mapping_T, num_tokens, num_kv_heads, head_dim)
    constants = write_constants(num_kv_heads, kv_layer.shape[3], head_dim)
    grid = (num_tokens, triton.cdiv(num_kv_heads, constants["HEADS"]))
    write_kv_kernel[grid](
        k_TKD, v_TKD, kv_layer, slot_mapping_T, *k_TKD.stride()[:2], *v_TKD.stride()[:2], kv_layer.shape[1],
        **constants, num_warps=4,
    )  # fmt: skip


def rotate_and_write(
    qkv_TAD: Tensor, num_heads: int, cos_T1D: Tensor, sin_T1D: Tensor, kv_layer: Tensor, slot_mapping_T: Tensor
) -> Tensor:
    """The turned queries [T, H, D]; turned keys and plain values go to their slots. cos and sin: float32 [T, 1, D / 2]."""
    _check_fused(qkv_TAD, num_heads, cos_T1D, sin_T1D, kv_layer, slot_mapping_T)
    q_THD = _queries_like(qkv_TAD, num_heads)
    grid, constants = _tiles(qkv_TAD, num_heads, kv_layer)
    rotate_and_write_kernel[grid](
        qkv_TAD, cos_T1D, sin_T1D, q_THD, kv_layer, slot_mapping_T, *qkv_TAD.stride()[:2], kv_layer.shape[1],
        **constants,
    )  # fmt: skip
    return q_THD


def norm_rotate_and_write(
    qkv_TAD: Tensor,
    num_heads: int,
    q_weight_D: Tensor,
    k_weight_D: Tensor,
    eps: float,
    cos_T1D: Tensor,
    sin_T1D: Tensor,
    kv_layer: Tensor,
    slot_mapping_T: Tensor,
) -> Tensor:
    """As rotate_and_write, queries and keys normed before they are turned."""
    _check_fused(qkv_TAD, num_heads, cos_T1D, sin_T1D, kv_layer, slot_mapping_T)
    assert (
        q_weight_D.shape == k_weight_D.shape == qkv_TAD.shape[2:] and q_weight_D.is_contiguous() and k_weight_D.is_contiguous()
    )
    q_THD = _queries_like(qkv_TAD, num_heads)
    grid, constants = _tiles(qkv_TAD, num_heads, kv_layer)
    norm_rotate_and_write_kernel[grid](
        qkv_TAD, q_weight_D, k_weight_D, cos_T1D, sin_T1D, q_THD, kv_layer, slot_mapping_T, *qkv_TAD.stride()[:2],
        kv_layer.shape[1], eps, **constants,
    )  # fmt: skip
    return q_THD


def _queries_like(qkv_TAD: Tensor, num_heads: int) -> Tensor:
    return torch.empty((len(qkv_TAD), num_heads, qkv_TAD.shape[2]), dtype=qkv_TAD.dtype, device=qkv_TAD.device)


def _tiles(qkv_TAD: Tensor, num_heads: int, kv_layer: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    num_tokens, num_all_heads, head_dim = qkv_TAD.shape
    constants = fused_constants(num_heads, kv_layer.shape[2], kv_layer.shape[3], head_dim)
    return (num_tokens, triton.cdiv(num_all_heads, constants["HEADS"])), constants | {"num_warps": 4}


def write_constants(num_kv_heads: int, block_size: int, head_dim: int) -> dict[str, int]:
    """1024 keys and as many values a program."""
    dim = triton.next_power_of_2(head_dim)
    return {
        "NUM_KV_HEADS": num_kv_heads,
        "BLOCK_SIZE": block_size,
        "HEAD_DIM": head_dim,
        "HEADS": min(triton.next_power_of_2(num_kv_heads), max(1, 1024 // dim)),
        "DIM": dim,
    }


def fused_constants(num_heads: int, num_kv_heads: int, block_size: int, head_dim: int) -> dict[str, int]:
    """1024 numbers a program, both halves together, 8 a thread; for one token of 48 heads, 6 programs."""
    half = triton.next_power_of_2(head_dim // 2)
    return {
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "BLOCK_SIZE": block_size,
        "HALF_DIM": head_dim // 2,
        "HEADS": min(triton.next_power_of_2(num_heads + 2 * num_kv_heads), max(1, 512 // half)),
        "HALF": half,
    }


def _check_fused(
    qkv_TAD: Tensor, num_heads: int, cos_T1D: Tensor, sin_T1D: Tensor, kv_layer: Tensor, slot_mapping_T: Tensor
) -> None:
    num_tokens, num_all_heads, head_dim = qkv_TAD.shape
    num_kv_heads = kv_layer.shape[2]
    assert num_all_heads == num_heads + 2 * num_kv_heads and qkv_TAD.stride(2) == 1 and head_dim % 2 == 0
    assert cos_T1D.shape == sin_T1D.shape == (num_tokens, 1, head_dim // 2)
    assert cos_T1D.dtype == sin_T1D.dtype == torch.float32 and cos_T1D.is_contiguous() and sin_T1D.is_contiguous()
    _check_cache(kv_layer, slot_mapping_T, num_tokens, num_kv_heads, head_dim)


def _check_cache(kv_layer: Tensor, slot_mapping_T: Tensor, num_tokens: int, num_kv_heads: int, head_dim: int) -> None:
    assert kv_layer.ndim == 5 and kv_layer.is_contiguous()
    assert kv_layer.shape[0] == 2 and kv_layer.shape[2] == num_kv_heads and kv_layer.shape[4] == head_dim <= 256
    assert slot_mapping_T.shape == (num_tokens,) and slot_mapping_T.dtype == torch.int64 and slot_mapping_T.is_contiguous()
    assert num_tokens > 0
