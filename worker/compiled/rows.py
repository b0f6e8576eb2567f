"""What loops compute of one row, inlined into those that go over many: kernels.py and walk.py. Sums may be reordered and
products contracted (that is what makes them vector code); NaN and infinities mean what they mean elsewhere, and no row reads
another.

Legend: C numbers of a row, G query heads of a key-value head, D head size, P blocks of the layer, S tokens of a block, W blocks
of a table, L tokens that a query sees.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numba import njit, types
from numba.extending import overload

FASTMATH = {"reassoc", "contract", "nsz"}  # not "there is no NaN and no infinity", and no reciprocal for a quotient
LOG2_E = math.log2(math.e)


# numba keeps what it compiled under a function's name and knows its file alone; what it calls stands in the others, too.
_SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()[:12]


class Loop:
    """A function that is compiled for exactly these types when it is first called, and kept on disk where that can be."""

    all: ClassVar[list[Loop]] = []

    def __init__(self, function: Callable[..., None], signatures: Sequence[Any]) -> None:
        function.__qualname__ += f"_{_SOURCES}"
        options: dict[str, Any] = {"fastmath": FASTMATH, "error_model": "numpy", "boundscheck": False, "nogil": True}
        try:
            self._function = njit(cache=True, **options)(function)
        except RuntimeError:  # no folder to keep it in
            self._function = njit(**options)(function)
        self._signatures, self._is_compiled, self._lock = signatures, False, threading.Lock()
        self.all.append(self)

    def compile(self) -> None:
        with self._lock:
            for signature in () if self._is_compiled else self._signatures:
                self._function.compile(signature)
            self._is_compiled = True

    def __call__(self, *arguments: Any) -> None:
        if not self._is_compiled:
            self.compile()
        self._function(*arguments)


def compiled(*signatures: Any) -> Callable[[Callable[..., None]], Loop]:
    return lambda function: Loop(function, signatures)


inlined = njit(fastmath=FASTMATH, error_model="numpy", boundscheck=False, nogil=True)


def _number(stored):  # type: ignore[no-untyped-def]
    """A number of the cache as float32."""


def put(cache_D, at, number):  # type: ignore[no-untyped-def]
    """float32 into the cache, rounded to the nearest, to even in the middle."""


@overload(_number, inline="always")
def _number_of(stored):  # type: ignore[no-untyped-def]
    if stored == types.float32:
        return lambda stored: stored
    return lambda stored: np.uint32(np.uint32(stored) << np.uint32(16)).view(np.float32)


@overload(put)
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


@inlined
def rms_norm_of(x_C, weight_C, eps, y_C):  # type: ignore[no-untyped-def]
    """y = w · x / √(mean(x²) + ε); y may be x."""
    size, total = len(x_C), np.float32(0)
    for j in range(size):
        total += x_C[j] * x_C[j]
    factor = np.float32(1) / np.float32(math.sqrt(total / np.float32(size) + eps))
    for j in range(size):
        y_C[j] = x_C[j] * factor * weight_C[j]


@inlined
def layer_norm_of(x_C, weight_C, bias_C, eps, y_C):  # type: ignore[no-untyped-def]
    """y = w · (x − mean(x)) / √(var(x) + ε) + b; y may be x."""
    size, total, squares = np.float32(len(x_C)), np.float32(0), np.float32(0)
    for j in range(len(x_C)):
        total += x_C[j]
    mean = total / size
    for j in range(len(x_C)):
        squares += (x_C[j] - mean) * (x_C[j] - mean)
    factor = np.float32(1) / np.float32(math.sqrt(squares / size + eps))
    for j in range(len(x_C)):
        y_C[j] = (x_C[j] - mean) * factor * weight_C[j] + bias_C[j]


@inlined
def relu_of(x_F, y_F):  # type: ignore[no-untyped-def]
    """y = max(x, 0), NaN where x is"""
    for j in range(len(y_F)):
        y_F[j] = np.float32(0) if x_F[j] < np.float32(0) else x_F[j]


@inlined
def gelu_of(x_F, y_F):  # type: ignore[no-untyped-def]
    """y = x · (1 + erf(x / √2)) / 2"""
    for j in range(len(y_F)):
        y_F[j] = np.float32(0.5) * x_F[j] * (np.float32(1) + math.erf(x_F[j] * np.float32(math.sqrt(0.5))))


@inlined
def turn(x_D, cos_D, sin_D, y_D):  # type: ignore[no-untyped-def]
    """(a, b) → (a cos − b sin, b cos + a sin), the halves of a head; y may be x."""
    half = len(x_D) // 2
    for d in range(half):
        a, b = x_D[d], x_D[half + d]
        y_D[d] = a * cos_D[d] - b * sin_D[d]
        y_D[half + d] = b * cos_D[d] + a * sin_D[d]


@inlined
def put_all(numbers_D, cache_D):  # type: ignore[no-untyped-def]
    """Into the cache, rounded if it holds bfloat16."""
    for d in range(len(numbers_D)):
        put(cache_D, d, numbers_D[d])


@inlined
def quantize(x_C, levels, zero, least_scale, y_C):  # type: ignore[no-untyped-def]
    """y = round(x / scale) + zero, and the scale; a row with a NaN or an infinity has the scale NaN. The largest number is
    found by its bits: without sign they have the order of the numbers, NaN above all."""
    bits_C, most_bits = x_C.view(np.int32), np.int32(0)
    for j in range(len(x_C)):
        most_bits = max(most_bits, np.int32(bits_C[j] & np.int32(0x7FFFFFFF)))
    most = np.int32(most_bits).view(np.float32)
    scale = max(most, least_scale) / levels
    for j in range(len(x_C)):
        y_C[j] = np.uint8(np.int32(x_C[j] / scale + (zero + np.float32(0.5))))
    return scale + most * np.float32(0)


_RUN = 1024  # numbers


@inlined
def best_of(x_C):  # type: ignore[no-untyped-def]
    """The largest number and where it first stands; NaN is above all. By bits that have the order of the numbers, run by run:
    vector code, and where it stands is then looked for in one run."""
    best, begin = np.float32(-math.inf), 0
    for first in range(0, len(x_C), _RUN):
        of_run = x_C[first : first + _RUN]
        bits_R, most, most_without_sign = of_run.view(np.int32), np.int32(-0x80000000), np.int32(0)
        for j in range(len(bits_R)):
            bits = bits_R[j]
            most_without_sign = max(most_without_sign, np.int32(bits & np.int32(0x7FFFFFFF)))
            most = max(most, np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF))))
        if most_without_sign > np.int32(0x7F800000):
            for j in range(len(of_run)):
                if of_run[j] != of_run[j]:
                    return of_run[j], first + j
        number = np.int32(most ^ ((most >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)
        if number > best:
            best, begin = number, first
    while x_C[begin] != best:
        begin += 1
    return best, begin


@inlined
def power_of_two(x):  # type: ignore[no-untyped-def]
    """2ˣ for x of at most 127, and 2⁻¹²⁶ for x below −126: by its whole part, which becomes the exponent's bits, and the Taylor
    series of the rest on −½ … ½. Right to about 2⁻²³, and vector code where exp is not. NaN gives some number."""
    x = min(max(x, np.float32(-126)), np.float32(127))
    whole = np.rint(x)
    rest = x - whole
    power = np.float32(1.5403530393381606e-4)  # (ln 2)^n / n!, from n = 6
    power = power * rest + np.float32(1.3333558146428443e-3)
    power = power * rest + np.float32(9.618129107628477e-3)
    power = power * rest + np.float32(5.550410866482158e-2)
    power = power * rest + np.float32(2.402265069591007e-1)
    power = power * rest + np.float32(6.931471805599453e-1)
    power = power * rest + np.float32(1)
    return power * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@inlined
def silu_and_mul_of(gate_F, up_F, y_F):  # type: ignore[no-untyped-def]
    """y = gate / (1 + e^−gate) · up"""
    for j in range(len(y_F)):
        y_F[j] = gate_F[j] / (np.float32(1) + power_of_two(gate_F[j] * np.float32(-LOG2_E))) * up_F[j]


@inlined
def highest_of(x_L, length):  # type: ignore[no-untyped-def]
    """The largest number, if none is NaN. By bits that have the order of the numbers, which is vector code."""
    bits_L, most = x_L.view(np.int32), np.int32(-0x80000000)
    for at in range(length):
        bits = bits_L[at]
        most = max(most, np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF))))
    return np.int32(most ^ ((most >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)


@inlined
def softmax(scores_L, length):  # type: ignore[no-untyped-def]
    """2^(score − the largest), in place, and their sum; NaN if a score is none or infinite."""
    most = highest_of(scores_L, length)
    total, poison = np.float32(0), np.float32(0)
    for at in range(length):
        poison += scores_L[at] * np.float32(0)
        power = power_of_two(scores_L[at] - most)
        scores_L[at] = power
        total += power
    return total + poison


@inlined
def _scores(q_D, keys_SD, there, scale, scores_S):  # type: ignore[no-untyped-def]
    """log2 e · scale · q · k of the first `there` keys."""
    size, in_bits = len(q_D), scale * np.float32(LOG2_E)
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


@inlined
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


@inlined
def attend_head(q_GD, keys_PSD, values_PSD, table_W, length, scale, weights_GL, out_GD):  # type: ignore[no-untyped-def]
    """The queries of one key-value head over the first `length` tokens of the blocks table_W. Keys and values are read where
    they lie, several tokens at a time so that queries and sums stay in registers; slots past the length are not read."""
    (group, size), block = q_GD.shape, keys_PSD.shape[1]
    for at in range(0, length, block):
        keys_SD, there = keys_PSD[table_W[at // block]], min(block, length - at)
        for g in range(group):
            _scores(q_GD[g], keys_SD, there, scale, weights_GL[g, at:])
    for g in range(group):
        total, sums_D = softmax(weights_GL[g], length), out_GD[g]
        for d in range(size):
            sums_D[d] = 0
        for at in range(0, length, block):
            values_SD, there = values_PSD[table_W[at // block]], min(block, length - at)
            _weigh(weights_GL[g, at:], values_SD, there, sums_D)
        for d in range(size):
            sums_D[d] /= total
