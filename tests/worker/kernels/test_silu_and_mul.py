"""SwiGLU equals torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from worker import kernels


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 7), (5, 1024), (2, 1537), (1, 14336)])
def test_product_of_the_halves(rows: int, size: int, dtype: torch.dtype, tolerance: float, device: torch.device) -> None:
    x = (torch.randn(rows, 2 * size, generator=torch.Generator().manual_seed(size)) * 5).to(device, dtype)
    out = kernels.silu_and_mul(x)
    gate, up = x.float().chunk(2, dim=-1)
    assert out.dtype is dtype and out.shape == (rows, size)
    torch.testing.assert_close(out.float(), F.silu(gate) * up, rtol=tolerance, atol=1e-7 if dtype is torch.float32 else 1e-4)


def test_very_negative_gates_close_and_nothing_beside_the_rows_is_read(device: torch.device) -> None:
    wide = torch.full((3, 50), float("nan"), device=device)
    wide[:, 10:30] = torch.tensor([-1e30, -200.0, -1.0, 0.0, 200.0] * 4, device=device)
    gate, up = wide[:, 10:30].chunk(2, dim=-1)
    torch.testing.assert_close(kernels.silu_and_mul(wide[:, 10:30]), F.silu(gate) * up)
