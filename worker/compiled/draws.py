"""Drawing the token of a row, inlined into the loop over rows (kernels.py); the same tokens as sampler.sample without it. Only
the scores about an edge are sorted, the noise's words are made for 256 tokens at a time as vector code, and a logarithm is
taken only for tokens that can win.

Legend: V vocabulary, B bins of scores, G groups of four tokens, C tokens whose words are made at a time.
"""

from __future__ import annotations

import math

import numpy as np

from worker import philox
from worker.compiled.rows import LOG2_E, highest_of, inlined, power_of_two

BINS = 1024
GROUPS = 64  # whose words are made at a time
LANES = philox.LANES
_RUN = 256  # scores
_LEAST, _MOST = np.float32(1e-30), np.float32(64)  # that bins divide; what is farther below the best has no mass
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)  # as philox.py has them
_W0, _W1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_32 = np.uint64(32)
_MOST_NOISE = philox.GUMBEL_MAX


@inlined
def edge_of(scores_V, top, top_k, top_p, bins_V, near_V, counts_B, masses_B):  # type: ignore[no-untyped-def]
    """The least score that is among the top_k best (0: all) and then among the best before which less than top_p of their mass
    lies. `top` is the best; −inf is no score. bins_V to masses_B are written to."""
    lowest = _lowest_of(scores_V)
    if lowest == top:
        return top
    _fill(scores_V, top, np.float32(BINS - 1) / min(max(top - lowest, _LEAST), _MOST), bins_V, counts_B, masses_B)
    edge, seen, total = lowest, 0, np.float64(0)
    for b in range(BINS if 0 < top_k < len(scores_V) else 0):
        if seen + counts_B[b] >= top_k:
            num_near = _sort(scores_V, bins_V, b, near_V)
            edge = near_V[num_near - (top_k - seen)]
            masses_B[b + 1 :] = 0
            masses_B[b] = 0
            for i in range(num_near):
                if near_V[i] >= edge:
                    masses_B[b] += _mass(near_V[i], top)
            break
        seen += counts_B[b]
    if top_p >= np.float32(1):
        return edge
    for b in range(BINS):
        total += masses_B[b]
    wanted, before = np.float64(top_p) * total, np.float64(0)
    for b in range(BINS):
        if counts_B[b] and before + masses_B[b] >= wanted:
            i = _sort(scores_V, bins_V, b, near_V) - 1
            before += _mass(near_V[i], top)
            while before < wanted and i > 0:
                i -= 1
                before += _mass(near_V[i], top)
            return max(edge, near_V[i])
        before += masses_B[b]
    return edge


@inlined
def _lowest_of(x_V):  # type: ignore[no-untyped-def]
    """The least number that is not −inf; by bits, as highest_of."""
    bits_V, least, infinite = x_V.view(np.int32), np.int32(0x7FFFFFFF), np.int32(-0x7F800001)
    for at in range(len(bits_V)):
        bits = bits_V[at]
        ordered = np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))
        least = min(least, ordered if ordered != infinite else np.int32(0x7FFFFFFF))
    return np.int32(least ^ ((least >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)


@inlined
def _mass(score, top):  # type: ignore[no-untyped-def]
    return np.float64(power_of_two((score - top) * np.float32(LOG2_E)))


@inlined
def _fill(scores_V, top, bins_per_score, bins_V, counts_B, masses_B):  # type: ignore[no-untyped-def]
    """How many scores lie in each bin, from the best on, and their mass; which bin, score by score (−inf: one behind all)."""
    masses_R = np.empty(_RUN, np.float32)
    counts_B[:] = 0
    masses_B[:] = 0
    for first in range(0, len(scores_V), _RUN):
        scores_R, bins_R = scores_V[first : first + _RUN], bins_V[first : first + _RUN]
        for i in range(len(scores_R)):
            below = min(top - scores_R[i], _MOST)
            b = np.int32(min(below * bins_per_score, np.float32(BINS - 1)))
            bins_R[i] = b if scores_R[i] > np.float32(-math.inf) else np.int32(BINS)
            masses_R[i] = power_of_two(below * np.float32(-LOG2_E))
        for i in range(len(scores_R)):
            b = bins_R[i]
            counts_B[b] += 1
            masses_B[b] += masses_R[i]


@inlined
def _sort(scores_V, bins_V, b, near_V):  # type: ignore[no-untyped-def]
    """The scores of a bin from the least on, and how many they are."""
    count = 0
    for j in range(len(scores_V)):
        near_V[count] = scores_V[j]
        count += bins_V[j] == b
    near_V[:count].sort()
    return count


@inlined
def draw_of(scores_V, top, token, edge, seed, position, output_index, words_4G):  # type: ignore[no-untyped-def]
    """Of the scores of at least `edge`. The bar is set by the token that has the best score; after it they come in order."""
    _words_of(token // LANES, seed, position, output_index, words_4G[:, :1])
    reached = np.float32(top + _gumbel_of(words_4G[token % LANES, 0]))
    for first in range(0, len(scores_V), GROUPS * LANES):
        scores_C = scores_V[first : first + GROUPS * LANES]
        highest = highest_of(scores_C, len(scores_C))
        if highest < edge or highest + _MOST_NOISE < reached:
            continue
        least, most = _least_word(reached, highest), np.uint32(0)
        _words_of(first // LANES, seed, position, output_index, words_4G)
        for lane in range(LANES):
            for g in range(GROUPS):
                most = max(most, words_4G[lane, g])
        if most < least:
            continue
        for j in range(len(scores_C)):
            word = words_4G[j % LANES, j // LANES]
            if word >= least and scores_C[j] >= edge:
                total = np.float32(scores_C[j] + _gumbel_of(word))
                if total > reached or (total == reached and first + j < token):
                    reached, token = total, first + j
    return token


@inlined
def _words_of(first, seed, position, output_index, words_4G):  # type: ignore[no-untyped-def]
    """As philox.words, of the groups from `first` on."""
    for g in range(words_4G.shape[1]):
        c0, c1, c2, c3 = np.uint32(first + g), position, output_index, np.uint32(0)
        k0, k1 = np.uint32(seed), np.uint32(seed >> _32)
        for _ in range(10):
            product_0, product_1 = np.uint64(c0) * _M0, np.uint64(c2) * _M1
            c0 = np.uint32(np.uint32(product_1 >> _32) ^ c1 ^ k0)
            c2 = np.uint32(np.uint32(product_0 >> _32) ^ c3 ^ k1)
            c1, c3 = np.uint32(product_1), np.uint32(product_0)
            k0, k1 = np.uint32(k0 + _W0), np.uint32(k1 + _W1)
        words_4G[0, g], words_4G[1, g], words_4G[2, g], words_4G[3, g] = c0, c1, c2, c3


@inlined
def _gumbel_of(word):  # type: ignore[no-untyped-def]
    """As philox.gumbel."""
    uniform = (np.float64(word >> np.uint32(9)) + 0.5) * 2.0**-23
    return np.float32(-math.log(-math.log(uniform)))


@inlined
def _least_word(reached, highest):  # type: ignore[no-untyped-def]
    """As sampler._least_word."""
    high, goal = np.float64(highest), np.float64(reached)
    noise = goal - high - 1e-5 - 2.0**-22 * (abs(high) + abs(goal))
    uniform = math.exp(-math.exp(-min(max(noise, -4.0), 20.0)))
    return np.uint32(np.uint32(uniform * 2.0**23) << np.uint32(9))
