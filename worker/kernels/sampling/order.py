"""Floats as integers in the same order, a value with its index as one integer, and the parts of a row. For the other kernels.

A float32's bits, read as int32, ascend with positive floats and descend with negative ones, whose lower 31 bits are flipped
therefore. −0 counts as 0, and NaN as more than infinity, which is how torch's argmax sees them.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 1024  # tokens at a time
PARTS = 64  # of a row, at most: as many partial results are read in one go
# One number of each is read by a row. They are rows of one table, so how they are aligned depends on the number of rows; a
# kernel that specialized on that would be compiled while somebody waits.
PER_ROW = [
    *("temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "seed_ptr", "position_ptr", "output_index_ptr", "slots_ptr"),
    *("repetition_ptr", "presence_ptr", "frequency_ptr", "seen_row_ptr", "num_near_ptr", "edge_ptr", "tokens_ptr"),
]

INFINITY_KEY = tl.constexpr(0x7F800000)
MINUS_INFINITY_KEY = tl.constexpr(-0x7F800001)
NAN_KEY = tl.constexpr(0x7FFFFFFF)
NOTHING = tl.constexpr(-(2**63))  # less than any value with its index


@triton.jit
def key_of(x):
    """float32 to int32; the larger float has the larger key."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, NAN_KEY, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def float_of(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def pack(x, index):
    """int64 that is larger for a larger x, and for the lower index where x is equal."""
    return (key_of(x).to(tl.int64) << 32) | (~index & 0x7FFFFFFF).to(tl.int64)


@triton.jit
def packed_key(packed):
    return (packed >> 32).to(tl.int32)


@triton.jit
def packed_index(packed):
    return ~(packed & 0x7FFFFFFF).to(tl.int32) & 0x7FFFFFFF


@triton.jit
def best_of_parts(parts_ptr, row, num_parts, PARTS: tl.constexpr):
    """The largest of a row's packed partial results [N, PARTS]."""
    part = tl.arange(0, PARTS)
    return tl.max(tl.load(parts_ptr + row * PARTS + part, part < num_parts, NOTHING), 0)


@triton.jit
def is_drawn(best, temperature):
    """Whether a row with this packed best logit draws at random: not greedy, and its best score is a number."""
    best_key = packed_key(best)
    is_number = (best_key < INFINITY_KEY) & (best_key > MINUS_INFINITY_KEY)
    score = tl.math.div_rn(float_of(best_key), tl.maximum(temperature, 1e-5))
    return (temperature >= 1e-5) & is_number & (tl.abs(score) < float("inf"))


def parts_of(num_rows: int, vocab: int) -> tuple[int, int]:
    """Parts of a row, and blocks of a part: about 512 programs, four for each of Hopper's 132 multiprocessors, if there are so
    many blocks; one for each row from 512 rows on."""
    blocks = triton.cdiv(vocab, BLOCK)
    blocks_of_part = triton.cdiv(blocks, min(max(512 // num_rows, 1), PARTS))
    return triton.cdiv(blocks, blocks_of_part), blocks_of_part
