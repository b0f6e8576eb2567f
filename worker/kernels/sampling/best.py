"""argmax of each part of each row, the lowest token where logits tie; a NaN is best of all, as for torch. First of the four."""

from __future__ import annotations

import triton
import triton.language as tl

from worker.kernels.sampling.order import NOTHING, PER_ROW, pack


@triton.jit(do_not_specialize=["blocks_of_part"], do_not_specialize_on_alignment=PER_ROW)
def best_kernel(
    logits_ptr, best_ptr, num_near_ptr, vocab, row_stride, blocks_of_part, BLOCK: tl.constexpr, PARTS: tl.constexpr
):
    """Also sets the number of tokens near the best to 0, for the next kernel to count."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    best = tl.full([BLOCK], NOTHING, tl.int64)
    for block in range(blocks_of_part):
        token = (part * blocks_of_part + block) * BLOCK + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + row * row_stride + token, token < vocab, 0.0).to(tl.float32)
        best = tl.maximum(best, tl.where(token < vocab, pack(logits, token), NOTHING))
    tl.store(best_ptr + row * PARTS + part, tl.max(best, 0))
    if part == 0:
        tl.store(num_near_ptr + row, 0)
