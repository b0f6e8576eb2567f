"""Philox-4x32-10, the counter-based generator behind every draw. Numbers only: no tokens' meaning, no torch.

Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011). A counter of 4 × 32 bits and a key of
2 × 32 bits give 4 × 32 random bits; equal inputs give equal bits on any machine and in any order.

Carousel's use of it, which a device kernel must reproduce (tl.philox): the key is the request's 64-bit seed (low word, high
word), the counter is (token_id // 4, position, output_index, 0), and token_id % 4 picks the word x of the four. From x:
    u = ((x >> 9) + 1/2) · 2⁻²³      odd multiples of 2⁻²⁴, exact in float32 (with 24 bits the last would round to 1)
    gumbel = −log(−log(u))           in [GUMBEL_MIN, GUMBEL_MAX], float32
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
F32 = NDArray[np.float32]

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)  # multipliers
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)  # what the key grows by, each round
_LOW, _32, _9 = np.uint64(0xFFFFFFFF), np.uint64(32), np.uint64(9)
_CHUNK = 8192  # counters at a time: the temporaries (64 KiB each) stay in the second-level cache
LANES = 4

GUMBEL_MIN = np.float32(-np.log(-np.log(2.0**-24)))  # -2.81
GUMBEL_MAX = np.float32(-np.log(-np.log1p(-(2.0**-24))))  # 16.64


def philox4x32(c0: U64, c1: U64, c2: U64, c3: U64, k0: U64, k1: U64, rounds: int = 10) -> U64:
    """[n] each, values below 2³², to [n, 4] words below 2³² (in uint64, as the products are)."""
    out = np.empty((len(c0), LANES), np.uint64)
    for at in range(0, len(c0), _CHUNK):
        part = slice(at, at + _CHUNK)
        counter = [c[part].copy() for c in (c0, c1, c2, c3)]
        _turn(counter, [k[part].copy() for k in (k0, k1)], rounds)
        out[part].T[:] = counter
    return out


def _turn(counter: list[U64], key: list[U64], rounds: int) -> None:
    """`rounds` rounds on counter and key, in place: three times as fast as with temporaries."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    product_0, product_1 = np.empty_like(c0), np.empty_like(c0)
    for _ in range(rounds):
        np.multiply(c0, _M0, out=product_0)
        np.multiply(c2, _M1, out=product_1)
        np.right_shift(product_1, _32, out=c0)
        np.right_shift(product_0, _32, out=c2)
        c0 ^= c1
        c0 ^= k0
        c2 ^= c3
        c2 ^= k1
        np.bitwise_and(product_1, _LOW, out=c1)
        np.bitwise_and(product_0, _LOW, out=c3)
        k0 += _W0
        k0 &= _LOW
        k1 += _W1
        k1 &= _LOW


def words(seed: U64, c0: U64, position: U64, output_index: U64, c3: int = 0) -> U64:
    """The four words [n, 4] at counters (c0, position, output_index, c3) under each 64-bit seed."""
    return philox4x32(c0, position, output_index, np.full(len(c0), c3, np.uint64), seed & _LOW, seed >> _32)


def gumbel(word: U64) -> F32:
    """Standard Gumbel noise of random words, same shape. Computed in float64 and rounded, so that no math library's last
    digit shows in it."""
    u = ((word >> _9).astype(np.float64) + 0.5) * 2.0**-23
    return (-np.log(-np.log(u))).astype(np.float32)
