"""argmax of score + Gumbel noise among the tokens that a row's filters keep, which follows their softmax exactly (Gumbel 1954).
Last of the four, in two kernels: a row's parts, then its token, which is also put where the next step's embedding finds it.

Noise lies between GUMBEL_MIN = −2.82 and GUMBEL_MAX = 16.64, so a token 19.46 below the best one can't win. Blocks of tokens
that can't win cost a read and no random number; of a sharp distribution that is nearly all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from worker.kernels.sampling.noise import gumbel_noise
from worker.kernels.sampling.order import (
    NOTHING,
    PER_ROW,
    best_of_parts,
    float_of,
    is_drawn,
    key_of,
    pack,
    packed_index,
    packed_key,
)

_HOPELESS = tl.constexpr(19.5)


@triton.jit(do_not_specialize=["num_parts", "blocks_of_part"], do_not_specialize_on_alignment=PER_ROW)
def draw_kernel(
    logits_ptr, best_ptr, edge_ptr, temperature_ptr, min_p_ptr, seed_ptr, position_ptr, output_index_ptr, drawn_ptr,
    vocab, row_stride, num_parts, blocks_of_part, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    best = best_of_parts(best_ptr, row, num_parts, PARTS)
    if is_drawn(best, temperature):
        best_score = tl.math.div_rn(float_of(packed_key(best)), temperature)
        hopeless = best_score - _HOPELESS - tl.abs(best_score) * 2.0**-20  # with room for the rounding of sums
        edge, min_p = tl.load(edge_ptr + row), tl.load(min_p_ptr + row)
        seed, position, output_index = (
            tl.load(seed_ptr + row), tl.load(position_ptr + row), tl.load(output_index_ptr + row)
        )  # fmt: skip
        drawn = tl.full([BLOCK], NOTHING, tl.int64)
        for block in range(blocks_of_part):
            begin = (part * blocks_of_part + block) * BLOCK
            token = begin + tl.arange(0, BLOCK)
            logits = tl.load(logits_ptr + row * row_stride + token, token < vocab, float("-inf"))
            score = tl.math.div_rn(logits.to(tl.float32), temperature)
            kept = (score >= hopeless) & (key_of(score) >= edge) & (tl.exp(score - best_score) >= min_p) & (token < vocab)
            if tl.max(kept.to(tl.int32), 0) > 0:
                noise = gumbel_noise(begin, seed, position, output_index, BLOCK)
                drawn = tl.maximum(drawn, tl.where(kept, pack(score + noise, token), NOTHING))
        tl.store(drawn_ptr + row * PARTS + part, tl.max(drawn, 0))


@triton.jit(do_not_specialize=["num_parts"], do_not_specialize_on_alignment=PER_ROW)
def finish_kernel(best_ptr, drawn_ptr, temperature_ptr, slots_ptr, tokens_ptr, last_tokens_ptr, num_parts, PARTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    best = best_of_parts(best_ptr, row, num_parts, PARTS)
    token = packed_index(best)
    if is_drawn(best, tl.load(temperature_ptr + row)):
        token = packed_index(best_of_parts(drawn_ptr, row, num_parts, PARTS))
    tl.store(tokens_ptr + row, token)
    tl.store(last_tokens_ptr + tl.load(slots_ptr + row), token)
