"""log Σ eˣ of each row, which turns logits to log-probabilities: in float32, by the best logit and a sum relative to it of each
part of the row (as in online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867), put together by a second kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.sampling.order import BLOCK, PARTS, parts_of


@triton.jit(do_not_specialize=["blocks_of_part"])
def part_sums_kernel(
    logits_ptr, peak_ptr, sum_ptr, vocab, row_stride, blocks_of_part, BLOCK: tl.constexpr, PARTS: tl.constexpr
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = part * blocks_of_part * BLOCK
    peaks = tl.full([BLOCK], float("-inf"), tl.float32)
    for block in range(blocks_of_part):
        token = begin + block * BLOCK + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + row * row_stride + token, token < vocab, float("-inf")).to(tl.float32)
        peaks = tl.maximum(peaks, logits)
    peak = tl.max(peaks, 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)  # a part without a possible token adds nothing
    sums = tl.zeros([BLOCK], tl.float32)
    for block in range(blocks_of_part):
        token = begin + block * BLOCK + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + row * row_stride + token, token < vocab, float("-inf")).to(tl.float32)
        sums += tl.exp(logits - base)
    tl.store(peak_ptr + row * PARTS + part, peak)
    tl.store(sum_ptr + row * PARTS + part, tl.sum(sums, 0))


@triton.jit(do_not_specialize=["num_parts"])
def log_sum_exp_kernel(peak_ptr, sum_ptr, out_ptr, num_parts, PARTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    peaks = tl.load(peak_ptr + row * PARTS + part, part < num_parts, float("-inf"))
    sums = tl.load(sum_ptr + row * PARTS + part, part < num_parts, 0.0)
    peak = tl.max(peaks, 0)
    tl.store(out_ptr + row, peak + tl.log(tl.sum(sums * tl.exp(peaks - peak), 0)))


def log_sum_exp(logits_NV: Tensor) -> Tensor:
    """Float32 [N]. The logits may be half precision."""
    num_rows, vocab = logits_NV.shape
    assert num_rows > 0 and logits_NV.stride(1) == 1
    num_parts, blocks_of_part = parts_of(num_rows, vocab)
    peak, total = torch.empty((2, num_rows, PARTS), dtype=torch.float32, device=logits_NV.device).unbind()
    out_N = torch.empty(num_rows, dtype=torch.float32, device=logits_NV.device)
    part_sums_kernel[(num_rows, num_parts)](
        logits_NV, peak, total, vocab, logits_NV.stride(0), blocks_of_part, BLOCK=BLOCK, PARTS=PARTS, num_warps=4
    )  # fmt: skip
    log_sum_exp_kernel[(num_rows,)](peak, total, out_N, num_parts, PARTS=PARTS, num_warps=1)
    return out_N
