"""silu(gate) · up of [gate, up] side by side, silu(g) = g / (1 + e⁻ᵍ) (SwiGLU, Shazeer 2020, arXiv:2002.05202). In float32,
rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # numbers a program: 8 a thread of 4 warps, 16 bytes of bf16 in one load


@triton.jit
def silu_and_mul_kernel(gate_up_ptr, out_ptr, size, row_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    gate = tl.load(gate_up_ptr + row * row_stride + column, mask, 0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * row_stride + size + column, mask, 0.0).to(tl.float32)
    tl.store(out_ptr + row * size + column, gate / (1.0 + tl.exp(-gate)) * up, mask)


def silu_and_mul(gate_up_TF: Tensor) -> Tensor:
    """[T, 2F], rows of any stride, to a contiguous [T, F]."""
    num_rows, double = gate_up_TF.shape
    assert num_rows > 0 and double % 2 == 0 and gate_up_TF.stride(1) == 1
    size = double // 2
    out_TF = torch.empty((num_rows, size), dtype=gate_up_TF.dtype, device=gate_up_TF.device)
    grid = (num_rows, triton.cdiv(size, BLOCK))
    silu_and_mul_kernel[grid](gate_up_TF, out_TF, size, gate_up_TF.stride(0), BLOCK=BLOCK, num_warps=4)
    return out_TF
