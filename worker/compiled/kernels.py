"""The loops, compiled by numba for exactly these types when this module is imported, and cached on disk where that can be.

One thread each; attention takes parts, for several (threads.py). Sums may be reordered and products contracted (that is what
makes them vector code); NaN and infinities mean what they mean elsewhere, and no row reads another.

Legend: T rows, C numbers of a row, A = H + 2K heads of a fused projection, N queries, H query heads, K key-value
heads, D head size, P blocks of the layer, S tokens of a block, W blocks of the widest table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import float32, int64, njit, types, uint8, uint16, void
from numba.extending import overload

VERSION = numba.__version__

_FASTMATH = {"reassoc", "contract", "nsz"}  # not "there is no NaN and no infinity", and no reciprocal for a quotient

_LOG2_E = math.log2(math.e)
_Rows, _Vector = float32[:, ::1], float32[::1]
_CACHES = (float32[:, :, :, :, ::1], uint16[:, :, :, :, ::1])  # the latter holds the bits of bfloat16


def compiled(*signatures: Any) -> Callable[[Callable[..., None]], Any]:
    def compile_it(function: Callable[..., None]) -> Any:
        options: dict[str, Any] = {"fastmath": _FASTMATH, "error_model": "numpy", "boundscheck": False, "nogil": True}
        try:
            return njit(list(signatures), cache=True, **options)(function)
        except RuntimeError:  # no folder to cache in
            return njit(list(signatures), **options)(function)

    return compile_it


def _number(stored):  # type: ignore[no-untyped-def]
    """A number of the cache as float32."""


def _put(cache_D, at, number):  # type: ignore[no-untyped-def]
    """float32 into the cache, rounded to the nearest, to even in the middle."""


@overload(_number, inline="always")
def _number_of(stored):  # type: ignore[no-untyped-def]
    if stored == types.float32:
        return lambda stored: stored
    return lambda stored: np.uint32(np.uint32(stored) << np.uint32(16)).view(np.float32)


@overload(_put)
def _put_into(cache_D, at, number):  # type: ignore[no-untyped-def]
    if cache_D.dtype == types.float32:

        def put(cache_D, at, number):  # type: ignore[no-untyped-def]
            cache_D[at] = number
    else:

        def put(cache_D, at, number):  # type: ignore[no-untyped-def]
            bits = np.float32(number).view(np.uint32)
            if number == number:
                bits += np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
            else:
                bits |= np.uint32(0x400000)  # a NaN stays one
            cache_D[at] = np.uint16(bits >> np.uint32(16))

    return put


@compiled(void(_Rows, _Vector, float32, _Rows))
def rms_norm(x_TC, weight_C, eps, out_TC):  # type: ignore[no-untyped-def]
    rows, size = x_TC.shape
    for i in range(rows):
        total = np.float32(0)
        for j in range(size):
            total += x_TC[i, j] * x_TC[i, j]
        factor = np.float32(1) / np.float32(math.sqrt(total / np.float32(size) + eps))
        for j in range(size):
            out_TC[i, j] = x_TC[i, j] * factor * weight_C[j]


@compiled(void(_Rows, _Rows, _Vector, float32, _Rows))
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


@compiled(*(void(float32[:, :, :], float32[:, :, :], cache, int64[::1]) for cache in _CACHES))
def write(k_TKD, v_TKD, kv_2PKSD, slots_T):  # type: ignore[no-untyped-def]
    rows, kv_heads, size = k_TKD.shape
    block = kv_2PKSD.shape[3]
    for i in range(rows):
        b, s = slots_T[i] // block, slots_T[i] % block
        for k in range(kv_heads):
            keys_D, values_D = kv_2PKSD[0, b, k, s], kv_2PKSD[1, b, k, s]
            for d in range(size):
                _put(keys_D, d, k_TKD[i, k, d])
            for d in range(size):
                _put(values_D, d, v_TKD[i, k, d])


@compiled(*(void(float32[:, :, ::1], _Rows, _Rows, cache, int64[::1], float32[:, :, ::1]) for cache in _CACHES))
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
            keys_D, values_D = kv_2PKSD[0, b, k, s], kv_2PKSD[1, b, k, s]
            for d in range(half):
                x, y = qkv_TAD[i, heads + k, d], qkv_TAD[i, heads + k, half + d]
                _put(keys_D, d, x * cos_TD[i, d] - y * sin_TD[i, d])
                _put(keys_D, half + d, y * cos_TD[i, d] + x * sin_TD[i, d])
            for d in range(size):
                _put(values_D, d, qkv_TAD[i, heads + kv_heads + k, d])


@compiled(void(float32[:, :, ::1], int64, int64, _Vector, float32))
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


@compiled(void(_Rows, float32, float32, float32, uint8[:, ::1], _Rows))
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


_inlined = njit(fastmath=_FASTMATH, error_model="numpy", boundscheck=False, nogil=True)


@_inlined
def _scores(q_D, keys_SD, there, scale, scores_S):  # type: ignore[no-untyped-def]
    """log2 e · scale · q · k of the first `there` keys."""
    size, in_bits = len(q_D), scale * np.float32(_LOG2_E)
    whole = there - there % 4
    for s in range(0, whole, 4):
        a, b, c, e = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for d in range(size):
            x = q_D[d]
            a += x * _number(keys_SD[s, d])
            b += x * _number(keys_SD[s + 1, d])
            c += x * _number(keys_SD[s + 2, d])
            e += x * _number(keys_SD[s + 3, d])
        scores_S[s], scores_S[s + 1], scores_S[s + 2], scores_S[s + 3] = a * in_bits, b * in_bits, c * in_bits, e * in_bits
    for s in range(whole, there):
        a = np.float32(0)
        for d in range(size):
            a += q_D[d] * _number(keys_SD[s, d])
        scores_S[s] = a * in_bits


@_inlined
def _softmax(scores_L, length):  # type: ignore[no-untyped-def]
    """2^(score − the largest), in place, and their sum; NaN if a score is none or infinite. 2ˣ by its whole part, which becomes
    the exponent's bits, and the Taylor series of the rest on −½ … ½: right to about 2⁻²³, and vector code where exp is not."""
    most, total, poison = scores_L[0], np.float32(0), np.float32(0)
    for at in range(length):
        most = max(most, scores_L[at])
    for at in range(length):
        poison += scores_L[at] * np.float32(0)
        x = max(scores_L[at] - most, np.float32(-126))
        whole = np.rint(x)
        rest = x - whole
        power = np.float32(1.5403530393381606e-4)  # (ln 2)^n / n!, from n = 6
        power = power * rest + np.float32(1.3333558146428443e-3)
        power = power * rest + np.float32(9.618129107628477e-3)
        power = power * rest + np.float32(5.550410866482158e-2)
        power = power * rest + np.float32(2.402265069591007e-1)
        power = power * rest + np.float32(6.931471805599453e-1)
        power = power * rest + np.float32(1)
        power *= np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)
        scores_L[at] = power
        total += power
    return total + poison


@_inlined
def _weigh(weights_S, values_SD, there, sums_D):  # type: ignore[no-untyped-def]
    """sums += Σ weight · value over the first `there` values."""
    size, whole = len(sums_D), there - there % 8
    for s in range(0, whole, 8):
        a, b, c, e = weights_S[s], weights_S[s + 1], weights_S[s + 2], weights_S[s + 3]
        f, g, h, i = weights_S[s + 4], weights_S[s + 5], weights_S[s + 6], weights_S[s + 7]
        for d in range(size):
            near = a * _number(values_SD[s, d]) + b * _number(values_SD[s + 1, d])
            near += c * _number(values_SD[s + 2, d]) + e * _number(values_SD[s + 3, d])
            far = f * _number(values_SD[s + 4, d]) + g * _number(values_SD[s + 5, d])
            far += h * _number(values_SD[s + 6, d]) + i * _number(values_SD[s + 7, d])
            sums_D[d] += near + far
    for s in range(whole, there):
        weight = weights_S[s]
        for d in range(size):
            sums_D[d] += weight * _number(values_SD[s, d])


@compiled(
    *(
        void(float32[:, :, ::1], cache, int64[:, ::1], int64[::1], float32, float32[:, :, ::1], int64, int64)
        for cache in _CACHES
    )
)
def attend(q_NHD, kv_2PKSD, tables_NW, lengths_N, scale, out_NHD, first, end):  # type: ignore[no-untyped-def]
    """Of the N · K pairs of a query and a key-value head, those from `first` to `end`. Keys and values are read where they lie,
    several tokens at a time so that queries and sums stay in registers; slots past a length are not read."""
    heads, size = q_NHD.shape[1], q_NHD.shape[2]
    kv_heads, block = kv_2PKSD.shape[2], kv_2PKSD.shape[3]
    group = heads // kv_heads
    longest = 0
    for n in range(first // kv_heads, (end + kv_heads - 1) // kv_heads):
        longest = max(longest, lengths_N[n])
    weights_GL = np.empty((group, longest), np.float32)
    for pair in range(first, end):
        n, k = pair // kv_heads, pair % kv_heads
        length = lengths_N[n]
        for at in range(0, length, block):
            keys_SD, there = kv_2PKSD[0, tables_NW[n, at // block], k], min(block, length - at)
            for g in range(group):
                _scores(q_NHD[n, k * group + g], keys_SD, there, scale, weights_GL[g, at:])
        for g in range(group):
            total, sums_D = _softmax(weights_GL[g], length), out_NHD[n, k * group + g]
            for d in range(size):
                sums_D[d] = 0
            for at in range(0, length, block):
                values_SD, there = kv_2PKSD[1, tables_NW[n, at // block], k], min(block, length - at)
                _weigh(weights_GL[g, at:], values_SD, there, sums_D)
            for d in range(size):
                sums_D[d] /= total
