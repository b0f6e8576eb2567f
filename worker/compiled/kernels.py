"""The loops over rows, compiled by numba when they are first called (rows.Loop). One thread each; attention takes parts, for
several (threads.py).

Legend: T rows, C numbers of a row, A = H + 2K heads of a fused projection, N queries or rows of logits, M of these that draw, V
vocabulary, H query heads, K key-value heads, D head size, P blocks of the layer, S tokens of a block, W blocks of the widest
table.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from numba import float32, int32, int64, uint8, uint16, uint32, uint64, void

from worker.compiled.draws import BINS, GROUPS, LANES, draw_of, edge_of
from worker.compiled.rows import attend_head, best_of, compiled, put_all, quantize, rms_norm_of, turn

VERSION = numba.__version__

_Rows, _Vector = float32[:, ::1], float32[::1]
_CACHES = (float32[:, :, :, :, ::1], uint16[:, :, :, :, ::1])  # the latter holds the bits of bfloat16


@compiled(void(_Rows, _Vector, float32, _Rows))
def rms_norm(x_TC, weight_C, eps, out_TC):  # type: ignore[no-untyped-def]
    for i in range(len(x_TC)):
        rms_norm_of(x_TC[i], weight_C, eps, out_TC[i])


@compiled(void(_Rows, _Rows, _Vector, float32, _Rows))
def add_rms_norm(residual_TC, x_TC, weight_C, eps, out_TC):  # type: ignore[no-untyped-def]
    rows, size = x_TC.shape
    for i in range(rows):
        for j in range(size):
            residual_TC[i, j] += x_TC[i, j]
        rms_norm_of(residual_TC[i], weight_C, eps, out_TC[i])


@compiled(*(void(float32[:, :, :], float32[:, :, :], cache, int64[::1]) for cache in _CACHES))
def write(k_TKD, v_TKD, kv_2PKSD, slots_T):  # type: ignore[no-untyped-def]
    block = kv_2PKSD.shape[3]
    for i in range(len(k_TKD)):
        b, s = slots_T[i] // block, slots_T[i] % block
        for k in range(k_TKD.shape[1]):
            put_all(k_TKD[i, k], kv_2PKSD[0, b, k, s])
            put_all(v_TKD[i, k], kv_2PKSD[1, b, k, s])


@compiled(*(void(float32[:, :, ::1], _Rows, _Rows, cache, int64[::1], float32[:, :, ::1]) for cache in _CACHES))
def rotate_and_write(qkv_TAD, cos_TD, sin_TD, kv_2PKSD, slots_T, q_THD):  # type: ignore[no-untyped-def]
    """cos and sin: [T, D / 2]. The keys are turned in their place too."""
    rows, heads, _ = q_THD.shape
    kv_heads, block = kv_2PKSD.shape[2], kv_2PKSD.shape[3]
    for i in range(rows):
        b, s = slots_T[i] // block, slots_T[i] % block
        for h in range(heads):
            turn(qkv_TAD[i, h], cos_TD[i], sin_TD[i], q_THD[i, h])
        for k in range(kv_heads):
            key_D = qkv_TAD[i, heads + k]
            turn(key_D, cos_TD[i], sin_TD[i], key_D)
            put_all(key_D, kv_2PKSD[0, b, k, s])
            put_all(qkv_TAD[i, heads + kv_heads + k], kv_2PKSD[1, b, k, s])


@compiled(void(float32[:, :, ::1], int64, int64, _Vector, float32))
def norm_heads(qkv_TAD, first, end, weight_D, eps):  # type: ignore[no-untyped-def]
    """rms_norm over each of the heads `first` to `end` of x, in place."""
    for i in range(len(qkv_TAD)):
        for h in range(first, end):
            rms_norm_of(qkv_TAD[i, h], weight_D, eps, qkv_TAD[i, h])


@compiled(void(_Rows, _Vector, int64[::1]))
def best(x_NV, best_N, at_N):  # type: ignore[no-untyped-def]
    for i in range(len(x_NV)):
        best_N[i], at_N[i] = best_of(x_NV[i])


@compiled(
    void(
        *(_Rows, int64[::1], _Vector, int32[::1], _Vector, _Vector),
        *(uint64[::1], uint32[::1], uint32[::1], int64[::1]),
    )
)
def draw(logits_NV, row_M, temperature_M, top_k_M, top_p_M, min_p_M, seed_M, position_M, output_index_M, token_M):  # type: ignore[no-untyped-def]
    """The tokens of some of the rows."""
    vocab = logits_NV.shape[1]
    scores_V, near_V, bins_V = np.empty(vocab, np.float32), np.empty(vocab, np.float32), np.empty(vocab, np.int32)
    counts_B, masses_B = np.empty(BINS + 1, np.int64), np.empty(BINS + 1, np.float64)
    words_4G = np.empty((LANES, GROUPS), np.uint32)
    for i in range(len(row_M)):
        logits_V, temperature = logits_NV[row_M[i]], temperature_M[i]
        for j in range(vocab):
            scores_V[j] = logits_V[j] / temperature
        top, token = best_of(scores_V)
        if not top < np.float32(math.inf):  # divided by so little that it is infinite now
            token_M[i] = token
            continue
        edge = np.float32(-3.4e38)
        if 0 < top_k_M[i] < vocab or top_p_M[i] < np.float32(1):
            edge = edge_of(scores_V, top, top_k_M[i], top_p_M[i], bins_V, near_V, counts_B, masses_B)
        if min_p_M[i] > np.float32(0):
            edge = max(edge, np.float32(np.float64(top) + math.log(np.float64(min_p_M[i]))))
        token_M[i] = draw_of(scores_V, top, token, edge, seed_M[i], position_M[i], output_index_M[i], words_4G)


@compiled(void(_Rows, float32, float32, float32, uint8[:, ::1], _Rows))
def quantize_rows(x_TC, levels, zero, least_scale, out_TC, scale_T1):  # type: ignore[no-untyped-def]
    for i in range(len(x_TC)):
        scale_T1[i, 0] = quantize(x_TC[i], levels, zero, least_scale, out_TC[i])


@compiled(
    *(
        void(float32[:, :, ::1], cache, int64[:, ::1], int64[::1], float32, float32[:, :, ::1], int64, int64)
        for cache in _CACHES
    )
)
def attend(q_NHD, kv_2PKSD, tables_NW, lengths_N, scale, out_NHD, first, end):  # type: ignore[no-untyped-def]
    """Of the N · K pairs of a query and a key-value head, those from `first` to `end`."""
    heads, kv_heads = q_NHD.shape[1], kv_2PKSD.shape[2]
    group = heads // kv_heads
    longest = 0
    for n in range(first // kv_heads, (end + kv_heads - 1) // kv_heads):
        longest = max(longest, lengths_N[n])
    weights_GL = np.empty((group, longest), np.float32)
    for pair in range(first, end):
        n, k = pair // kv_heads, pair % kv_heads
        of_head = slice(k * group, (k + 1) * group)
        attend_head(
            q_NHD[n, of_head],
            kv_2PKSD[0, :, k],
            kv_2PKSD[1, :, k],
            tables_NW[n],
            lengths_N[n],
            scale,
            weights_GL,
            out_NHD[n, of_head],
        )
