"""y = w · x / √(mean(x²) + ε) over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467), alone or behind the addition
of a residual. In float32; the sum with the residual is rounded to the residual's type before it is normed.

A program holds whole rows in registers, so each number is read once: one long row, or several short ones (heads).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_COLUMNS = 16384  # numbers of a row; 16 warps hold 32 each


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    x_ptr, weight_ptr, y_ptr, num_rows, x_stride, eps, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < num_rows) & (column < SIZE)
    x = tl.load(x_ptr + row * x_stride + column, mask, 0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, column < SIZE, 0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(x * x, 1) / SIZE + eps)
    tl.store(y_ptr + row * SIZE + column, x * factor[:, None] * weight, mask)


@triton.jit(do_not_specialize=["num_rows"])
def add_rms_norm_kernel(
    residual_ptr, x_ptr, weight_ptr, y_ptr, num_rows, residual_stride, x_stride, eps,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < num_rows) & (column < SIZE)
    x = tl.load(x_ptr + row * x_stride + column, mask, 0.0).to(tl.float32)
    residual_at = residual_ptr + row * residual_stride + column
    rounded = (tl.load(residual_at, mask, 0.0).to(tl.float32) + x).to(residual_ptr.dtype.element_ty)
    tl.store(residual_at, rounded, mask)
    total = rounded.to(tl.float32)
    weight = tl.load(weight_ptr + column, column < SIZE, 0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(total * total, 1) / SIZE + eps)
    tl.store(y_ptr + row * SIZE + column, total * factor[:, None] * weight, mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., C], rows of any stride, to a contiguous [..., C]."""
    rows = as_rows(x)
    assert weight.shape == rows.shape[1:] and weight.is_contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_rows, size = rows.shape
    grid, constants = tiles(num_rows, size)
    rms_norm_kernel[grid](rows, weight, y, num_rows, rows.stride(0), eps, **constants)
    return y


def add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual [T, C] += x [T, C], in place, and its norm."""
    assert residual.ndim == 2 and residual.shape == x.shape and residual.dtype == x.dtype
    assert residual.stride(1) == 1 and x.stride(1) == 1 and weight.shape == x.shape[1:] and weight.is_contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_rows, size = x.shape
    grid, constants = tiles(num_rows, size)
    add_rms_norm_kernel[grid](
        residual, x, weight, y, num_rows, residual.stride(0), x.stride(0), eps, **constants
    )  # fmt: skip
    return y


def as_rows(x: Tensor) -> Tensor:
    """[..., C] as [R, C], a copy only where no one stride leads from row to row."""
    assert x.stride(-1) == 1
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def tiles(num_rows: int, size: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and constants: 2048 numbers a program, or one row; 16 numbers a thread, at most 16 warps."""
    assert 0 < size <= MOST_COLUMNS and num_rows > 0
    columns = triton.next_power_of_2(size)
    rows = max(1, 2048 // columns)
    num_warps = min(max(rows * columns // 512, 4), 16)
    return (triton.cdiv(num_rows, rows),), {"SIZE": size, "ROWS": rows, "COLUMNS": columns, "num_warps": num_warps}
