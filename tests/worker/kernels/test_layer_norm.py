"""Layer norms equal torch's, for any row length, stride and type."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.interpreter import as_stored
from worker import kernels

TOLERANCES = {torch.float32: (2e-6, 4e-6), torch.bfloat16: (8e-3, 1e-3), torch.float16: (1e-3, 2e-4)}
SHAPES = [(1, 2), (3, 7), (33, 64), (2, 768), (3, 5120)]  # rows, numbers of a row


def random(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 3 + 1).to(device, dtype)


def close(ours: torch.Tensor, twin: torch.Tensor) -> None:
    relative, absolute = TOLERANCES[ours.dtype]
    torch.testing.assert_close(ours.float(), twin.float(), rtol=relative, atol=absolute)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_norms_of_rows(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
    x, weight = random(device, rows, size, dtype=dtype), random(device, size, dtype=dtype)
    bias = random(device, size + 1, dtype=dtype)[:size]
    twin = F.layer_norm(x.float(), (size,), weight.float(), bias.float(), 1e-5)
    close(kernels.layer_norm(x, weight, bias, 1e-5), twin)
    close(kernels.plain_layer_norm(x, 1e-5), F.layer_norm(x.float(), (size,), eps=1e-5))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_norm_behind_a_residual(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
    x, weight = random(device, rows, size, dtype=dtype), random(device, size, dtype=dtype)
    bias, residual = random(device, size + 1, dtype=dtype)[:size], random(device, rows, size + 1, dtype=dtype)[:, :size]
    total = as_stored(residual.float() + x.float(), dtype)
    y = kernels.add_layer_norm(residual, x, weight, bias, 1e-5)
    assert torch.equal(residual, total), "the sum is left in its place"
    close(y, F.layer_norm(total.float(), (size,), weight.float(), bias.float(), 1e-5))


def test_rows_of_a_wider_tensor_with_a_large_mean(device: torch.device) -> None:
    x = random(device, 5, 100)[:, 30:78] + 1000
    wide = torch.full((5, 100), float("nan"), device=device)
    wide[:, 30:78] = x
    twin = F.layer_norm(x.double(), (48,), eps=1e-5).float()
    torch.testing.assert_close(kernels.plain_layer_norm(wide[:, 30:78], 1e-5), twin, rtol=1e-4, atol=1e-4)
