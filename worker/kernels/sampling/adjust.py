"""Logits before sampling, in place, in worker/sampler.adjust's order: logit bias; then repetition penalty (arXiv:1909.05858,
section 4.1), presence and frequency penalties (as the OpenAI API defines them); then −inf for what must not be drawn.

What a row has seen is a row of `seen` [rows, V] int32, for the few sequences that have a penalty: 2 · times in the output,
+ 1 if in the prompt. The prompt counts for repetition only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.sampling.order import BLOCK, PER_ROW, parts_of

LISTED = 32  # entries of a list at a time


@dataclass(frozen=True, slots=True)
class AdjustColumns:
    """What is done to the logits of N rows, on the device. Lists end with −1; no token is twice in one."""

    repetition_penalty: Tensor  # float32; 1 = off
    presence_penalty: Tensor  # float32; 0 = off
    frequency_penalty: Tensor  # float32; 0 = off
    seen_row: Tensor  # int32, row of `seen`; −1: no penalty
    bias_tokens: Tensor  # int32 [N, W]
    bias_values: Tensor  # float32 [N, W]
    masked_tokens: Tensor  # int32 [N, W']

    def check(self, num_rows: int) -> None:
        for column in (self.repetition_penalty, self.presence_penalty, self.frequency_penalty):
            assert column.shape == (num_rows,) and column.dtype == torch.float32 and column.is_contiguous()
        assert self.seen_row.shape == (num_rows,) and self.seen_row.is_contiguous()
        assert self.bias_tokens.shape == self.bias_values.shape and len(self.bias_tokens) == len(self.masked_tokens) == num_rows
        assert self.bias_tokens.stride() == self.bias_values.stride() and self.bias_tokens.stride(1) == 1
        assert self.masked_tokens.stride(1) == 1 and self.bias_values.dtype == torch.float32
        assert self.seen_row.dtype == self.bias_tokens.dtype == self.masked_tokens.dtype == torch.int32


@triton.jit(
    do_not_specialize=["blocks_of_part", "bias_width", "bias_stride", "masked_width", "masked_stride"],
    do_not_specialize_on_alignment=[*PER_ROW, "bias_tokens_ptr", "bias_values_ptr", "masked_tokens_ptr"],
)
def adjust_kernel(
    logits_ptr, repetition_ptr, presence_ptr, frequency_ptr, seen_ptr, seen_row_ptr,
    bias_tokens_ptr, bias_values_ptr, masked_tokens_ptr,
    vocab, row_stride, seen_stride, blocks_of_part, bias_width, bias_stride, masked_width, masked_stride,
    BLOCK: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """A part of a row. A list's tokens elsewhere are another program's; barriers keep the order among this one's threads."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = part * blocks_of_part * BLOCK
    end = tl.minimum(begin + blocks_of_part * BLOCK, vocab)
    logits_ptr += row * row_stride

    for first in range(0, bias_width, LISTED):
        at = first + tl.arange(0, LISTED)
        token = tl.load(bias_tokens_ptr + row * bias_stride + at, at < bias_width, -1)
        mine = (token >= begin) & (token < end)
        bias = tl.load(bias_values_ptr + row * bias_stride + at, mine, 0.0)
        tl.store(logits_ptr + token, tl.load(logits_ptr + token, mine, 0.0) + bias, mine)
    tl.debug_barrier()

    seen_row = tl.load(seen_row_ptr + row).to(tl.int64)
    if seen_row >= 0:
        repetition = tl.load(repetition_ptr + row)
        presence, frequency = tl.load(presence_ptr + row), tl.load(frequency_ptr + row)
        for block in range(blocks_of_part):
            token = begin + block * BLOCK + tl.arange(0, BLOCK)
            seen = tl.load(seen_ptr + seen_row * seen_stride + token, token < vocab, 0)
            logits = tl.load(logits_ptr + token, seen > 0, 0.0)
            repeated = tl.where(logits > 0, tl.math.div_rn(logits, repetition), logits * repetition)
            times = (seen >> 1).to(tl.float32)
            more = tl.where(times > 0, presence, 0.0) + frequency * times
            tl.store(logits_ptr + token, repeated - more, seen > 0)
    tl.debug_barrier()

    for first in range(0, masked_width, LISTED):
        at = first + tl.arange(0, LISTED)
        token = tl.load(masked_tokens_ptr + row * masked_stride + at, at < masked_width, -1)
        tl.store(logits_ptr + token, float("-inf"), (token >= begin) & (token < end))


@triton.jit(do_not_specialize_on_alignment=PER_ROW)
def count_drawn_kernel(seen_ptr, seen_row_ptr, tokens_ptr, vocab, seen_stride):
    row = tl.program_id(0)
    seen_row, token = tl.load(seen_row_ptr + row).to(tl.int64), tl.load(tokens_ptr + row)
    tl.atomic_add(seen_ptr + seen_row * seen_stride + token, 2, (seen_row >= 0) & (token >= 0) & (token < vocab))


@triton.jit(do_not_specialize=["row", "num_tokens", "num_prompt"], do_not_specialize_on_alignment=["tokens_ptr"])
def fill_seen_kernel(seen_ptr, tokens_ptr, row, num_tokens, num_prompt, vocab, seen_stride, BLOCK: tl.constexpr):
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens_ptr + position, position < num_tokens, -1)
    at = seen_ptr + row.to(tl.int64) * seen_stride + token
    known = (token >= 0) & (token < vocab)
    tl.atomic_or(at, 1, known & (position < num_prompt))
    tl.atomic_add(at, 2, known & (position >= num_prompt))


def adjust(logits_NV: Tensor, columns: AdjustColumns, seen_PV: Tensor) -> None:
    """In place; float32. Several rows may share a row of `seen`."""
    num_rows, vocab = logits_NV.shape
    assert num_rows > 0 and logits_NV.dtype == torch.float32 and logits_NV.stride(1) == 1
    columns.check(num_rows)
    _check_seen(seen_PV, vocab)
    num_parts, blocks_of_part = parts_of(num_rows, vocab)
    adjust_kernel[(num_rows, num_parts)](
        logits_NV, columns.repetition_penalty, columns.presence_penalty, columns.frequency_penalty,
        seen_PV, columns.seen_row, columns.bias_tokens, columns.bias_values, columns.masked_tokens,
        vocab, logits_NV.stride(0), seen_PV.stride(0), blocks_of_part,
        columns.bias_tokens.shape[1], columns.bias_tokens.stride(0),
        columns.masked_tokens.shape[1], columns.masked_tokens.stride(0),
        BLOCK=BLOCK, LISTED=LISTED, num_warps=4,
    )  # fmt: skip


def count_drawn(seen_PV: Tensor, seen_row_N: Tensor, tokens_N: Tensor) -> None:
    """Behind the draw: one more time in the output for each row that has a penalty."""
    _check_seen(seen_PV, seen_PV.shape[1])
    assert seen_row_N.shape == tokens_N.shape and seen_row_N.dtype == tokens_N.dtype == torch.int32
    assert seen_row_N.is_contiguous() and tokens_N.is_contiguous() and len(tokens_N) > 0
    count_drawn_kernel[(len(tokens_N),)](seen_PV, seen_row_N, tokens_N, seen_PV.shape[1], seen_PV.stride(0), num_warps=1)


def fill_seen(seen_PV: Tensor, row: int, tokens_L: Tensor, num_prompt: int) -> None:
    """A row of `seen` anew, from a sequence's tokens, the first num_prompt of them prompt."""
    _check_seen(seen_PV, seen_PV.shape[1])
    assert 0 <= row < len(seen_PV) and tokens_L.ndim == 1 and tokens_L.dtype == torch.int32 and tokens_L.is_contiguous()
    seen_PV[row].zero_()
    if len(tokens_L):
        fill_seen_kernel[(triton.cdiv(len(tokens_L), BLOCK),)](
            seen_PV, tokens_L, row, len(tokens_L), num_prompt, seen_PV.shape[1], seen_PV.stride(0), BLOCK=BLOCK, num_warps=4
        )  # fmt: skip


def _check_seen(seen_PV: Tensor, vocab: int) -> None:
    assert seen_PV.ndim == 2 and seen_PV.shape[1] == vocab and seen_PV.dtype == torch.int32 and seen_PV.stride(1) == 1
