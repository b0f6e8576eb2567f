"""The compiled loops equal their torch twins, row by row; what does not fit them goes to torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from worker import compiled
from worker.attention.base import AttentionInputs
from worker.attention.cpu import CpuAttention
from worker.layers import products
from worker.layers.activation import gelu, silu_and_mul
from worker.layers.heads import norm_rotate_and_write, rotate_and_write
from worker.layers.norm import RMSNorm

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


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 7), (64, 5000), (2, 49152), (5, 1024), (5, 1025)])
def test_the_best_of_rows(rows: int, size: int) -> None:
    x = random(rows, size).round()  # so that several are the best
    for logits in (x, -x.abs(), x * torch.inf, torch.full_like(x, -torch.inf), x * 0, torch.where(x == 1, -torch.nan, x)):
        best, at = compiled.best(logits)
        expected, _ = logits.max(dim=1)
        assert torch.equal(best.nan_to_num(1e9), expected.nan_to_num(1e9))
        same = torch.where(expected.isnan()[:, None], logits.isnan(), logits == expected[:, None])
        assert torch.equal(at, same.int().argmax(dim=1)), "the first of them"


def test_a_norm_of_many_dimensions_is_over_the_last() -> None:
    x, weight = random(4, 3, 32), random(32)
    torch.testing.assert_close(compiled.rms_norm(x, weight, 1e-6), F.rms_norm(x, (32,), weight, 1e-6))


@pytest.mark.parametrize(("rows", "heads", "kv_heads", "size"), [(1, 4, 1, 64), (7, 6, 3, 32), (9, 12, 4, 96)])
@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_queries_are_turned_and_keys_and_values_written(
    rows: int, heads: int, kv_heads: int, size: int, with_norms: bool, stored: torch.dtype
) -> None:
    qkv = random(rows, heads + 2 * kv_heads, size)
    cos_sin = random(rows, 1, size // 2), random(rows, 1, size // 2 + 1)[..., : size // 2].contiguous()
    block_size, num_blocks = 16, 4
    slots = torch.randperm(block_size * num_blocks, generator=torch.Generator().manual_seed(1))[:rows]
    inputs = AttentionInputs.of(
        np.arange(rows + 1, dtype=np.int32), np.ones(rows, np.int32), np.zeros((rows, 1), np.int32), slots.numpy()
    )

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        cache = torch.full((2, num_blocks, kv_heads, block_size, size), torch.nan, dtype=stored)
        backend, x = CpuAttention(), qkv.clone()
        if with_norms:
            norms = norm_of(size, 1), norm_of(size, 2)
            return norm_rotate_and_write(x, heads, *norms, cos_sin, backend, cache, inputs), cache
        return rotate_and_write(x, heads, cos_sin, backend, cache, inputs), cache

    fast = run()
    compiled.unload()
    torch.testing.assert_close(fast, run(), equal_nan=True)


def norm_of(size: int, seed: int) -> RMSNorm:
    norm = RMSNorm.__new__(RMSNorm)
    torch.nn.Module.__init__(norm)
    norm.weight = torch.nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(seed)), requires_grad=False)
    norm.eps = 1e-6
    return norm


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


def test_bfloat16_is_rounded_as_torch_does() -> None:
    """To the nearest, to even in the middle, also at the ends and past them."""
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38, 1e-40, 1.00390625, 1.01171875, 1 + 2**-8 + 2**-20]
    values = torch.cat((torch.tensor(special), random(2048 - len(special)))).view(1, 1, 2048)
    cache = torch.zeros(2, 1, 1, 1, 2048, dtype=torch.bfloat16)
    compiled.write(values, -values, cache, torch.zeros(1, dtype=torch.int64))
    torch.testing.assert_close(cache[0].flatten(), values.flatten().bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(cache[1].flatten(), -values.flatten().bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 7), (33, 100), (200, 501)])
def test_a_deterministic_worker_has_loops_for_activations_and_for_any_number_of_rows(rows: int, size: int) -> None:
    x = random(rows, 2 * size)
    assert not compiled.activates(x)
    expected_silu, expected_gelu = silu_and_mul(x), gelu(x)
    compiled.load(deterministic=True)
    assert compiled.activates(x) and compiled.fits(torch.empty(2 * compiled.MOST))
    torch.testing.assert_close(silu_and_mul(x), expected_silu)
    torch.testing.assert_close(gelu(x), expected_gelu)
    alone = torch.cat([silu_and_mul(row[None]) for row in x]), torch.cat([gelu(row[None]) for row in x])
    assert torch.equal(silu_and_mul(x), alone[0]) and torch.equal(gelu(x), alone[1])
    compiled.load()
    assert not compiled.activates(x) and not compiled.fits(torch.empty(2 * compiled.MOST))


def test_activations_at_the_ends_of_the_range() -> None:
    compiled.load(deterministic=True)
    gate = torch.tensor([[-1e30, -100.0, 0.0, 100.0, 1e30, torch.nan, 1.0]])
    got = silu_and_mul(torch.cat((gate, torch.ones_like(gate)), dim=1))
    torch.testing.assert_close(got, F.silu(gate), equal_nan=True)
    torch.testing.assert_close(gelu(gate), F.gelu(gate), equal_nan=True)


CHANGED = """
import torch
from worker import compiled
compiled.load()
print(compiled.rms_norm(torch.ones(1, 4), torch.ones(4), 0.0).tolist())
"""


def test_a_change_in_another_file_is_compiled_anew(tmp_path: Path) -> None:
    """Of the same size and time: numba looks at the file of the function that is called, and at no other."""
    shutil.copytree(Path(compiled.__file__).parents[1], tmp_path / "worker", ignore=shutil.ignore_patterns("__pycache__"))
    source = tmp_path / "worker" / "compiled" / "rows.py"

    def told() -> str:
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
        command = [sys.executable, "-c", CHANGED]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert told() == told() == "[[1.0, 1.0, 1.0, 1.0]]\n"
    before, text = source.stat(), source.read_text()
    source.write_text(text.replace("factor = np.float32(1)", "factor = np.float32(2)", 1))
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert told() == "[[2.0, 2.0, 2.0, 2.0]]\n"
