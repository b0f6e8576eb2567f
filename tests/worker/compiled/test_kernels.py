"""The compiled loops equal their torch twins, row by row; what does not fit them goes to torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from worker import compiled
from worker.layers import products
from worker.layers.rotary import rotate

SHAPES = [(1, 1), (1, 576), (3, 7), (5, 64), (64, 576), (33, 1000)]  # rows, numbers of a row


@pytest.fixture(autouse=True)
def loops() -> Iterator[None]:
    pytest.importorskip("numba")
    assert compiled.load().startswith("numba ")
    yield
    compiled.unload()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 3


@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_norms(rows: int, size: int) -> None:
    x, residual, weight = random(rows, size), random(rows, size + 1)[:, :size].contiguous(), random(size)
    torch.testing.assert_close(compiled.rms_norm(x, weight, 1e-5), F.rms_norm(x, (size,), weight, 1e-5))
    total = residual + x
    torch.testing.assert_close(compiled.add_rms_norm(residual, x, weight, 1e-5), F.rms_norm(total, (size,), weight, 1e-5))
    assert torch.equal(residual, total), "the sum is left in its place"


def test_a_norm_of_many_dimensions_is_over_the_last() -> None:
    x, weight = random(4, 3, 32), random(32)
    torch.testing.assert_close(compiled.rms_norm(x, weight, 1e-6), F.rms_norm(x, (32,), weight, 1e-6))


@pytest.mark.parametrize(("rows", "heads", "size", "count"), [(1, 5, 64, 4), (7, 3, 2, 3), (9, 12, 96, 1)])
def test_rotation(rows: int, heads: int, size: int, count: int) -> None:
    x, cos, sin = random(rows, heads, size), random(rows, 1, size // 2), random(rows, 1, size // 2 + 1)[..., : size // 2]
    sin = sin.contiguous()
    fast = rotate(x, cos, sin, count)
    compiled.unload()
    torch.testing.assert_close(fast, rotate(x, cos, sin, count))


@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_quantizing(rows: int, size: int) -> None:
    x = random(rows, size)
    x[0] = 0
    fast, fast_scale = products.quantize_rows(x)
    compiled.unload()
    slow, slow_scale = products.quantize_rows(x)
    assert torch.equal(fast, slow) and torch.equal(fast_scale, slow_scale)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_row(poison: float) -> None:
    x, weight = random(4, 48), random(48)
    bad = x.clone()
    bad[2, 5] = poison
    good = torch.tensor([0, 1, 3])
    quantized, scale = products.quantize_rows(bad)
    whole, whole_scale = products.quantize_rows(x)
    assert torch.equal(quantized[good], whole[good]) and torch.equal(scale[good], whole_scale[good])
    assert not scale[2].isfinite()
    normed = compiled.rms_norm(bad, weight, 1e-5)
    assert torch.equal(normed[good], compiled.rms_norm(x, weight, 1e-5)[good]) and not normed[2].isfinite().all()


def test_a_row_is_the_same_bits_in_any_company() -> None:
    x, weight = random(40, 576), random(576)
    for i in (0, 17, 39):
        alone = x[i : i + 1].contiguous()
        assert torch.equal(compiled.rms_norm(x, weight, 1e-5)[i : i + 1], compiled.rms_norm(alone, weight, 1e-5))
        assert all(
            torch.equal(a[i : i + 1], b) for a, b in zip(products.quantize_rows(x), products.quantize_rows(alone), strict=True)
        )


def test_half_precision_views_and_many_rows_do_not_fit() -> None:
    assert compiled.fits(random(4, 8))
    assert not compiled.fits(random(4, 8).bfloat16()) and not compiled.fits(random(4, 8)[:, :4])
    assert not compiled.fits(torch.empty(0, 8)) and not compiled.fits(torch.empty(compiled.MOST + 1))
    compiled.unload()
    assert not compiled.fits(random(4, 8))
