"""From a fused projection of queries, keys and values to what attention needs: queries turned, keys and values in the cache.

Legend: T tokens, A = H + 2K heads of the projection, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from torch import Tensor

from worker import compiled, kernels
from worker.attention.base import AttentionBackend, AttentionInputs
from worker.layers.norm import RMSNorm
from worker.layers.rotary import CosSin, rotate


def rotate_and_write(
    qkv_TAD: Tensor, num_heads: int, cos_sin: CosSin, attention: AttentionBackend, kv_layer: Tensor, inputs: AttentionInputs
) -> Tensor:
    """Turns the queries and the keys, writes keys and values to their slots, and returns the queries [T, H, D]."""
    if compiled.fits(qkv_TAD) and compiled.fits_cache(kv_layer):
        return compiled.rotate_and_write(qkv_TAD, num_heads, cos_sin, kv_layer, inputs.slot_mapping)
    if kernels.fits(qkv_TAD):
        return kernels.rotate_and_write(qkv_TAD, num_heads, *cos_sin, kv_layer, inputs.slot_mapping)
    num_kv_heads = (qkv_TAD.shape[1] - num_heads) // 2
    qk_TBD = rotate(qkv_TAD, *cos_sin, num_heads + num_kv_heads)  # B = H + K
    attention.write(qk_TBD[:, num_heads:], qkv_TAD[:, num_heads + num_kv_heads :], kv_layer, inputs)
    return qk_TBD[:, :num_heads]


def norm_rotate_and_write(
    qkv_TAD: Tensor,
    num_heads: int,
    q_norm: RMSNorm,
    k_norm: RMSNorm,
    cos_sin: CosSin,
    attention: AttentionBackend,
    kv_layer: Tensor,
    inputs: AttentionInputs,
) -> Tensor:
    """The same with a norm over each head of the queries and the keys before they are turned (arXiv:2010.04245)."""
    if compiled.fits(qkv_TAD) and compiled.fits_cache(kv_layer):
        weights = (q_norm.weight, k_norm.weight)
        return compiled.norm_rotate_and_write(qkv_TAD, num_heads, *weights, q_norm.eps, cos_sin, kv_layer, inputs.slot_mapping)
    if kernels.fits(qkv_TAD):
        weights = (q_norm.weight, k_norm.weight)
        return kernels.norm_rotate_and_write(qkv_TAD, num_heads, *weights, q_norm.eps, *cos_sin, kv_layer, inputs.slot_mapping)
    num_kv_heads = (qkv_TAD.shape[1] - num_heads) // 2
    q_THD, k_TKD, v_TKD = qkv_TAD.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    q_THD, k_TKD = rotate(q_norm(q_THD), *cos_sin), rotate(k_norm(k_TKD), *cos_sin)
    attention.write(k_TKD, v_TKD, kv_layer, inputs)
    return q_THD
