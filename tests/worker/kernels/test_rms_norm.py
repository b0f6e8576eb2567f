"""RMS norms equal torch's, for any row length, stride and type."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.interpreter import as_stored
from worker import kernels

TOLERANCES = {torch.float32: (2e-6, 2e-6), torch.bfloat16: (8e-3, 1e-3), torch.float16: (1e-3, 1e-4)}
SHAPES = [(1, 1), (3, 7), (5, 64), (33, 128), (2, 1000), (1, 4096), (2, 5120), (1, 16384)]  # rows, numbers of a row


def random(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 3).to(device, dtype)


def close(ours: torch.Tensor, twin: torch.Tensor) -> None:
    relative, absolute = TOLERANCES[ours.dtype]
    torch.testing.assert_close(ours.float(), twin.float(), rtol=relative, atol=absolute)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_norm_of_rows(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
    x, weight = random(device, rows, size, dtype=dtype), random(device, size, dtype=dtype)
    y = kernels.rms_norm(x, weight, 1e-5)
    assert y.dtype is dtype
    close(y, F.rms_norm(x.float(), (size,), weight.float(), 1e-5))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_norm_behind_a_residual(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
    x, weight = random(device, rows, size, dtype=dtype), random(device, size, dtype=dtype)
    residual = random(device, rows, size + 1, dtype=dtype)[:, :size].contiguous()
    total = as_stored(residual.float() + x.float(), dtype)
    y = kernels.add_rms_norm(residual, x, weight, 1e-5)
    assert torch.equal(residual, total), "the sum is left in its place"
    close(y, F.rms_norm(total.float(), (size,), weight.float(), 1e-5))


def test_rows_of_a_wider_tensor(device: torch.device) -> None:
    wide, weight = random(device, 5, 100), random(device, 48)
    x, residual = wide[:, 30:78], wide.clone()[:, 2:50]
    close(kernels.rms_norm(x, weight, 1e-6), F.rms_norm(x, (48,), weight, 1e-6))
    around, total = residual._base.clone(), residual + x
    around[:, 2:50] = total
    close(kernels.add_rms_norm(residual, x, weight, 1e-6), F.rms_norm(total, (48,), weight, 1e-6))
    assert torch.equal(residual._base, around), "nothing beside the rows is written"


def test_norm_of_each_head_also_of_a_fused_product(device: torch.device) -> None:
    fused, weight = random(device, 6, 9, 32), random(device, 32)
    heads = fused[:, 2:7]
    y = kernels.rms_norm(heads, weight, 1e-6)
    assert y.shape == heads.shape and y.is_contiguous()
    close(y, F.rms_norm(heads, (32,), weight, 1e-6))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(poison: float, device: torch.device) -> None:
    x, weight = random(device, 8, 48), random(device, 48)
    bad = x.clone()
    bad[2, 5] = poison
    good = [0, 1, 3, 4, 5, 6, 7]
    y = kernels.rms_norm(bad, weight, 1e-5)
    assert torch.equal(y[good], kernels.rms_norm(x, weight, 1e-5)[good]) and not y[2].isfinite().all()


def test_only_what_the_kernels_can_read_fits(device: torch.device) -> None:
    assert kernels.fits(random(device, 4, 8)) and kernels.fits(random(device, 4, 8)[:, :4])
    assert not kernels.fits(random(device, 4, 8).T) and not kernels.fits(random(device, 4, 8).double())
    assert not kernels.fits(random(device, 0, 8))
    kernels.unload()
    assert not kernels.fits(random(device, 4, 8)) and not kernels.is_loaded()
