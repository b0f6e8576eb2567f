"""The loops, compiled by numba for exactly these types when this module is imported, and cached on disk where that can be.

One thread each. Sums may be reordered and products contracted (that is what makes them vector code); NaN and infinities mean
what they mean elsewhere, and no row reads another.

Legend: T rows, C numbers of a row, A = H + 2K heads of a fused projection, N queries, H query heads, K key-value
heads, D head size, P blocks of the layer, S tokens of a block, W blocks of the widest table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import float32, int64, njit, uint8, void

VERSION = numba.__version__

_FASTMATH = {"reassoc", "contract", "nsz"}  # not "there is no NaN and no infinity", and no reciprocal for a quotient

_Rows, _Vector = float32[:, ::1], float32[::1]


def _compiled(signature: Any) -> Callable[[Callable[..., None]], Any]:
    def compile_it(function: Callable[..., None]) -> Any:
        options: dict[str, Any] = {"fastmath": _FASTMATH, "error_model": "numpy", "boundscheck": False}
        try:
            return njit(signature, cache=True, **options)(function)
        except RuntimeError:  # no folder to cache in
            return njit(signature, **options)(function)

    return compile_it


@_compiled(void(_Rows, _Vector, float32, _Rows))
def rms_norm(x_TC, weight_C, eps, out_TC):  # type: ignore[no-untyped-def]
    rows, size = x_TC.shape
    for i in range(rows):
        total = np.float32(0)
        for j in range(size):
            total += x_TC[i, j] * x_TC[i, j]
        factor = np.float32(1) / np.float32(math.sqrt(total / np.float32(size) + eps))
        for j in range(size):
            out_TC[i, j] = x_TC[i, j] * factor * weight_C[j]


@_compiled(void(_Rows, _Rows, _Vector, float32, _Rows))
def add_rms_norm(residual_TC, x_TC, weight_C, eps, out_TC):  # type: ignore[no-untyped-def]
    rows, size = x_TC.shape
    for i in range(rows):
        total = np.float32(0)
        for j in range(size):
            y = residual_TC[i, j] + x_TC[i, j]
            residual_TC[i, j] = y
            total += y * y
        factor = np.float32(1) / np.float32(math.sqrt(total / np.float32(size) + eps))
        for j in range(size):
            out_TC[i, j] = residual_TC[i, j] * factor * weight_C[j]


_Cache = float32[:, :, :, :, ::1]


@_compiled(void(float32[:, :, :], float32[:, :, :], _Cache, int64[::1]))
def write(k_TKD, v_TKD, kv_2PKSD, slots_T):  # type: ignore[no-untyped-def]
    rows, kv_heads, size = k_TKD.shape
    block = kv_2PKSD.shape[3]
    for i in range(rows):
        b, s = slots_T[i] // block, slots_T[i] % block
        for k in range(kv_heads):
            for d in range(size):
                kv_2PKSD[0, b, k, s, d] = k_TKD[i, k, d]
            for d in range(size):
                kv_2PKSD[1, b, k, s, d] = v_TKD[i, k, d]


@_compiled(void(float32[:, :, ::1], _Rows, _Rows, _Cache, int64[::1], float32[:, :, ::1]))
def rotate_and_write(qkv_TAD, cos_TD, sin_TD, kv_2PKSD, slots_T, q_THD):  # type: ignore[no-untyped-def]
    """cos and sin: [T, D / 2]."""
    rows, heads, size = q_THD.shape
    kv_heads, block, half = kv_2PKSD.shape[2], kv_2PKSD.shape[3], size // 2
    for i in range(rows):
        b, s = slots_T[i] // block, slots_T[i] % block
        for h in range(heads):
            for d in range(half):
                x, y = qkv_TAD[i, h, d], qkv_TAD[i, h, half + d]
                q_THD[i, h, d] = x * cos_TD[i, d] - y * sin_TD[i, d]
                q_THD[i, h, half + d] = y * cos_TD[i, d] + x * sin_TD[i, d]
        for k in range(kv_heads):
            for d in range(half):
                x, y = qkv_TAD[i, heads + k, d], qkv_TAD[i, heads + k, half + d]
                kv_2PKSD[0, b, k, s, d] = x * cos_TD[i, d] - y * sin_TD[i, d]
                kv_2PKSD[0, b, k, s, half + d] = y * cos_TD[i, d] + x * sin_TD[i, d]
            for d in range(size):
                kv_2PKSD[1, b, k, s, d] = qkv_TAD[i, heads + kv_heads + k, d]


@_compiled(void(float32[:, :, ::1], int64, int64, _Vector, float32))
def norm_heads(qkv_TAD, first, end, weight_D, eps):  # type: ignore[no-untyped-def]
    """rms_norm over each of the heads `first` to `end` of x, in place."""
    rows, _, size = qkv_TAD.shape
    for i in range(rows):
        for h in range(first, end):
            total = np.float32(0)
            for d in range(size):
                total += qkv_TAD[i, h, d] * qkv_TAD[i, h, d]
            factor = np.float32(1) / np.float32(math.sqrt(total / np.float32(size) + eps))
            for d in range(size):
                qkv_TAD[i, h, d] = qkv_TAD[i, h, d] * factor * weight_D[d]


@_compiled(void(_Rows, float32, float32, float32, uint8[:, ::1], _Rows))
def quantize_rows(x_TC, levels, zero, least_scale, out_TC, scale_T1):  # type: ignore[no-untyped-def]
    """round(x / scale) + zero; a row with a NaN or an infinity gets the scale NaN."""
    rows, size = x_TC.shape
    for i in range(rows):
        most, poison = np.float32(0), np.float32(0)
        for j in range(size):
            most = max(most, abs(x_TC[i, j]))
            poison += x_TC[i, j] * np.float32(0)
        scale = max(most, least_scale) / levels
        for j in range(size):
            out_TC[i, j] = np.uint8(x_TC[i, j] / scale + (zero + np.float32(0.5)))
        scale_T1[i, 0] = scale + poison


@_compiled(void(float32[:, :, ::1], _Cache, int64[:, ::1], int64[::1], float32, float32[:, :, ::1]))
def attend(q_NHD, kv_2PKSD, tables_NW, lengths_N, scale, out_NHD):  # type: ignore[no-untyped-def]
    """The query heads of a group read each key and value together."""
    queries, heads, size = q_NHD.shape
    kv_heads, block = kv_2PKSD.shape[2], kv_2PKSD.shape[3]
    group = heads // kv_heads
    longest = 0
    for n in range(queries):
        longest = max(longest, lengths_N[n])
    weights = np.empty((group, longest), np.float32)
    sums = np.empty((group, size), np.float32)
    for n in range(queries):
        length = lengths_N[n]
        for k in range(kv_heads):
            for at in range(length):
                b, s = tables_NW[n, at // block], at % block
                for g in range(group):
                    score = np.float32(0)
                    for d in range(size):
                        score += q_NHD[n, k * group + g, d] * kv_2PKSD[0, b, k, s, d]
                    weights[g, at] = score * scale
            for g in range(group):
                most = weights[g, 0]
                for at in range(length):
                    most = max(most, weights[g, at])
                total = np.float32(0)
                for at in range(length):
                    weight = np.float32(math.exp(weights[g, at] - most))
                    weights[g, at] = weight
                    total += weight
                for at in range(length):
                    weights[g, at] /= total
                for d in range(size):
                    sums[g, d] = 0
            for at in range(length):
                b, s = tables_NW[n, at // block], at % block
                for g in range(group):
                    for d in range(size):
                        sums[g, d] += weights[g, at] * kv_2PKSD[1, b, k, s, d]
            for g in range(group):
                for d in range(size):
                    out_NHD[n, k * group + g, d] = sums[g, d]
