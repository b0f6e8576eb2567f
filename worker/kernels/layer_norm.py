"""y = w · (x − mean(x)) / √(var(x) + ε) + b over the last dimension (Ba et al. 2016, arXiv:1607.06450): behind the addition
of a residual, alone, or plain (without w and b). In float32, the variance from centred numbers; else as rms_norm.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.rms_norm import as_rows, tiles


@triton.jit
def _normalized(x, mask, size, eps):
    """x [ROWS, COLUMNS], zeros where masked."""
    centred = tl.where(mask, x - (tl.sum(x, 1) / size)[:, None], 0.0)
    return centred * tl.rsqrt(tl.sum(centred * centred, 1) / size + eps)[:, None]


@triton.jit(do_not_specialize=["num_rows"])
def plain_layer_norm_kernel(
    x_ptr, y_ptr, num_rows, x_stride, eps, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < num_rows) & (column < SIZE)
    x = tl.load(x_ptr + row * x_stride + column, mask, 0.0).to(tl.float32)
    tl.store(y_ptr + row * SIZE + column, _normalized(x, mask, SIZE, eps), mask)


@triton.jit(do_not_specialize=["num_rows"])
def layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, num_rows, x_stride, eps, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < num_rows) & (column < SIZE)
    x = tl.load(x_ptr + row * x_stride + column, mask, 0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, column < SIZE, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, column < SIZE, 0.0).to(tl.float32)
    tl.store(y_ptr + row * SIZE + column, _normalized(x, mask, SIZE, eps) * weight + bias, mask)


@triton.jit(do_not_specialize=["num_rows"])
def add_layer_norm_kernel(
    residual_ptr, x_ptr, weight_ptr, bias_ptr, y_ptr, num_rows, residual_stride, x_stride, eps,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < num_rows) & (column < SIZE)
    x = tl.load(x_ptr + row * x_stride + column, mask, 0.0).to(tl.float32)
    residual_at = residual_ptr + row * residual_stride + column
    rounded = (tl.load(residual_at, mask, 0.0).to(tl.float32) + x).to(residual_ptr.dtype.element_ty)
    tl.store(residual_at, rounded, mask)
    weight = tl.load(weight_ptr + column, column < SIZE, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, column < SIZE, 0.0).to(tl.float32)
    y = _normalized(rounded.to(tl.float32), mask, SIZE, eps) * weight + bias
    tl.store(y_ptr + row * SIZE + column, y, mask)


def plain_layer_norm(x: Tensor, eps: float) -> Tensor:
    """x [..., C], rows of any stride, to a contiguous [..., C]."""
    rows = as_rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_rows, size = rows.shape
    grid, constants = tiles(num_rows, size)
    plain_layer_norm_kernel[grid](rows, y, num_rows, rows.stride(0), eps, **constants)
    return y


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x [..., C], rows of any stride, to a contiguous [..., C]."""
    rows = as_rows(x)
    assert weight.shape == bias.shape == rows.shape[1:] and weight.is_contiguous() and bias.is_contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_rows, size = rows.shape
    grid, constants = tiles(num_rows, size)
    layer_norm_kernel[grid](rows, weight, bias, y, num_rows, rows.stride(0), eps, **constants)
    return y


def add_layer_norm(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """residual [T, C] += x [T, C], in place, and its norm."""
    assert residual.ndim == 2 and residual.shape == x.shape and residual.dtype == x.dtype
    assert residual.stride(1) == 1 and x.stride(1) == 1
    assert weight.shape == bias.shape == x.shape[1:] and weight.is_contiguous() and bias.is_contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_rows, size = x.shape
    grid, constants = tiles(num_rows, size)
    add_layer_norm_kernel[grid](
        residual, x, weight, bias, y, num_rows, residual.stride(0), x.stride(0), eps, **constants
    )  # fmt: skip
    return y
