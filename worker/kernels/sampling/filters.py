"""The least score that top-k and top-p keep, exactly, without a sort. Second and third of the four.

Among a row's distinct scores, the edge is the largest x for which at least k tokens reach x (top-k); then, of what top-k left,
the largest x for which the tokens that reach x hold at least p of the mass (top-p: before every token that is kept lies less
than p of it). Both sums fall as x grows, so x is searched among all float32 numbers, as integers in the same order: 16 pivots
a pass, 17 times fewer numbers after it; the first pass lays them from 1/8 to 22 below the best score, where edges are. It ends
once no two tokens lie between the bounds, in practice after three or four passes, at the worst after nine.

Passes over the whole vocabulary would be read by one program each, so the tokens no more than _REACH below the best one are
gathered into a list first (by all programs of the row), and the search goes over the list wherever the edge is certain to lie
in it: it holds k tokens, or p of the mass. Else it goes over the row.

The mass of a token, e^(score − best), is counted in units of 2⁻⁴⁴: integer sums are the same in any order, and cannot
overflow below 2¹⁹ tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from worker.kernels.sampling.order import PER_ROW, best_of_parts, float_of, is_drawn, key_of, packed_key

NEAR = 4096  # tokens that the list of a row has room for
SEARCH_BLOCK = 512  # tokens of a pass at a time, one a thread
_REACH = tl.constexpr(8.0)  # e⁻⁸ = 0.0003 of the best token's mass
_UNIT = tl.constexpr(2.0**44)
_LEAST_KEY = tl.constexpr(-(2**31))


@triton.jit
def _mass(score, best_score):
    return (tl.exp(score - best_score) * _UNIT).to(tl.int64)


@triton.jit(do_not_specialize=["num_parts", "blocks_of_part"], do_not_specialize_on_alignment=PER_ROW)
def gather_kernel(
    logits_ptr, best_ptr, temperature_ptr, top_k_ptr, top_p_ptr, mass_ptr, near_mass_ptr, num_near_ptr, near_ptr,
    vocab, row_stride, num_parts, blocks_of_part, BLOCK: tl.constexpr, PARTS: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """The mass of a part of the row, that of its tokens near the best one, and their logits to the row's list, in no order."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature, top_k, top_p = tl.load(temperature_ptr + row), tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    best = best_of_parts(best_ptr, row, num_parts, PARTS)
    if is_drawn(best, temperature) & (((top_k > 0) & (top_k < vocab)) | (top_p < 1)):
        best_score = tl.math.div_rn(float_of(packed_key(best)), temperature)
        mass = tl.zeros([BLOCK], tl.int64)
        near_mass = tl.zeros([BLOCK], tl.int64)
        for block in range(blocks_of_part):
            token = (part * blocks_of_part + block) * BLOCK + tl.arange(0, BLOCK)
            logits = tl.load(logits_ptr + row * row_stride + token, token < vocab, float("-inf"))
            score = tl.math.div_rn(logits.to(tl.float32), temperature)
            is_near = (score >= best_score - _REACH) & (token < vocab)
            own = _mass(score, best_score)
            mass += own
            near_mass += tl.where(is_near, own, 0)
            count = tl.sum(is_near.to(tl.int32), 0)
            if count > 0:
                at = tl.atomic_add(num_near_ptr + row, count) + tl.cumsum(is_near.to(tl.int32), 0) - 1
                tl.store(near_ptr + row * NEAR + at, logits, is_near & (at < NEAR))
        tl.store(mass_ptr + row * PARTS + part, tl.sum(mass, 0))
        tl.store(near_mass_ptr + row * PARTS + part, tl.sum(near_mass, 0))


@triton.jit
def _search(
    logits_ptr, size, temperature, best_score, least_count, least_mass, low, count_at_low, mass_at_low,
    SEARCH_BLOCK: tl.constexpr,
):  # fmt: skip
    """The edge among `size` logits: the largest key ≥ low that `least_count` tokens with `least_mass` (float64) reach, or any
    lower one that the same tokens reach; with their number and mass, which are given for `low`."""
    best_key = key_of(best_score).to(tl.int64)
    high, count_at_high = best_key + 1, count_at_low * 0  # which nobody reaches
    j = tl.arange(0, 16)
    pivot = key_of(best_score - tl.exp2((15 - j).to(tl.float32) * 0.5 - 3)).to(tl.int64)
    pivot = tl.minimum(tl.maximum(pivot, low + 1), high)
    while (high - low > 1) & (count_at_low - count_at_high > 1):
        counts = tl.zeros([SEARCH_BLOCK, 16], tl.int32)
        masses = tl.zeros([SEARCH_BLOCK, 16], tl.int64)
        for begin in range(0, size, SEARCH_BLOCK):
            at = begin + tl.arange(0, SEARCH_BLOCK)
            logits = tl.load(logits_ptr + at, at < size, float("-inf"))
            score = tl.math.div_rn(logits.to(tl.float32), temperature)
            reaches = (key_of(score)[:, None] >= pivot.to(tl.int32)[None, :]) & (at < size)[:, None]
            counts += reaches.to(tl.int32)
            masses += tl.where(reaches, _mass(score, best_score)[:, None], 0)
        count, mass = tl.sum(counts, 0), tl.sum(masses, 0)
        enough = (count >= least_count) & (mass.to(tl.float64) >= least_mass) & (pivot <= best_key)
        low = tl.maximum(low, tl.max(tl.where(enough, pivot, low), 0))
        high = tl.minimum(high, tl.min(tl.where(enough, high, pivot), 0))
        count_at_low = tl.minimum(count_at_low, tl.min(tl.where(enough, count, count_at_low), 0))
        mass_at_low = tl.minimum(mass_at_low, tl.min(tl.where(enough, mass, mass_at_low), 0))
        count_at_high = tl.maximum(count_at_high, tl.max(tl.where(enough, count_at_high, count), 0))
        pivot = tl.minimum(low + (high - low + 16) // 17 * (1 + j), high)
    return low, count_at_low, mass_at_low


@triton.jit(do_not_specialize=["num_parts"], do_not_specialize_on_alignment=PER_ROW)
def filter_kernel(
    logits_ptr, best_ptr, temperature_ptr, top_k_ptr, top_p_ptr, mass_ptr, near_mass_ptr, num_near_ptr, near_ptr, edge_ptr,
    vocab, row_stride, num_parts, SEARCH_BLOCK: tl.constexpr, PARTS: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """The key of the least score that each row keeps, to edge [N] int32."""
    row = tl.program_id(0).to(tl.int64)
    temperature, top_k, top_p = tl.load(temperature_ptr + row), tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    has_k, has_p = (top_k > 0) & (top_k < vocab), top_p < 1
    best = best_of_parts(best_ptr, row, num_parts, PARTS)
    low = tl.full([], _LEAST_KEY, tl.int64)
    if is_drawn(best, temperature) & (has_k | has_p):
        best_score = tl.math.div_rn(float_of(packed_key(best)), temperature)
        part = tl.arange(0, PARTS)
        mass = tl.sum(tl.load(mass_ptr + row * PARTS + part, part < num_parts, 0), 0)
        near_mass = tl.sum(tl.load(near_mass_ptr + row * PARTS + part, part < num_parts, 0), 0)
        num_near = tl.load(num_near_ptr + row)
        share = tl.maximum(top_p, 0.0).to(tl.float64)
        source, size, mass_at_low = logits_ptr + row * row_stride, num_near * 0 + vocab, mass
        holds_p = near_mass.to(tl.float64) >= share * mass.to(tl.float64)
        if (num_near <= NEAR) & tl.where(has_k, num_near >= top_k, holds_p):
            source, size, mass_at_low = near_ptr + row * NEAR, num_near, near_mass
            low = key_of(best_score - _REACH).to(tl.int64)
        count = size
        if has_k:
            low, count, mass = _search(
                source, size, temperature, best_score, top_k, 0.0, low, count, mass_at_low, SEARCH_BLOCK
            )  # fmt: skip
            mass_at_low = mass
        if has_p:
            wanted = share * mass.to(tl.float64)
            low, count, mass = _search(
                source, size, temperature, best_score, 0, wanted, low, count, mass_at_low, SEARCH_BLOCK
            )  # fmt: skip
    tl.store(edge_ptr + row, low.to(tl.int32))
