"""The CPU backend, by each of its ways, gives what its slow twin gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from tests.helpers.attention_case import MIXED, Case, close
from worker import compiled
from worker.attention.cpu import CpuAttention
from worker.attention.reference import ReferenceAttention
from worker.attention.singles import CompiledSingles, GatheredSingles, Singles

HAS_LOOPS = bool(compiled.load())
WAYS = [
    pytest.param(CompiledSingles, id="compiled", marks=pytest.mark.skipif(not HAS_LOOPS, reason="numba is not installed")),
    pytest.param(GatheredSingles, id="gathered"),
]


@pytest.fixture(autouse=True)
def loops(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiled, and for any number of queries."""
    compiled.load()
    yield
    compiled.unload()


compiled.unload()


def by(way: type[Singles]) -> CpuAttention:
    return CpuAttention((way,))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("block_size", [1, 16, 32])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (6, 2), (9, 3), (8, 8)])
def test_equals_the_reference(way: type[Singles], block_size: int, num_heads: int, num_kv_heads: int) -> None:
    case = Case(MIXED, num_heads=num_heads, num_kv_heads=num_kv_heads, block_size=block_size)
    close(case.by(by(way)), case.reference())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("head_dim", [8, 16, 64, 80, 128])
@pytest.mark.parametrize("seed", [1, 2])
def test_any_head_size(way: type[Singles], head_dim: int, seed: int) -> None:
    case = Case(MIXED, head_dim=head_dim, seed=seed)
    close(case.by(by(way)), case.reference())


@pytest.mark.parametrize("rows", [[(1, 1)], [(1, 500)], [(200, 200)], [(150, 400), (1, 3)], [(16, 16), (17, 17)]], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_any_rows(way: type[Singles], rows: list[tuple[int, int]]) -> None:
    case = Case(rows)
    close(case.by(by(way)), case.reference())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_take_the_way_that_can(dtype: torch.dtype) -> None:
    case = Case(MIXED, dtype=dtype)
    assert dtype == torch.bfloat16 or CompiledSingles.of(None, 6, case.kv_layer) is None  # type: ignore[arg-type]
    close(case.by(CpuAttention()).float(), case.reference().float(), tolerance=2e-2)


@pytest.mark.parametrize("way", [CompiledSingles, GatheredSingles])
def test_a_cache_of_bfloat16_is_attended_to_in_float32(way: type[Singles]) -> None:
    case = Case(MIXED, dtype=torch.bfloat16)
    case.q_THD = case.q_THD.float()
    exact = case.kv_layer.float()
    got = by(way).attend(case.q_THD, case.kv_layer, dataclasses.replace(case.inputs, plan=None), case.scale)
    assert got.dtype == torch.float32
    close(got, ReferenceAttention().attend(case.q_THD, exact, case.inputs, case.scale))


def test_no_row_depends_on_its_neighbours() -> None:
    case = Case(MIXED)
    together, backend = case.by(CpuAttention()), CpuAttention()
    first = 0
    for number, (count, _) in enumerate(MIXED):
        alone = case.only(number).by(backend)
        close(together[first : first + count], alone)
        first += count


def test_keys_and_values_are_written_alike_with_and_without_loops() -> None:
    """Also as parts of wider rows, as they come out of a fused projection."""
    case = Case(MIXED)
    wide = torch.randn(len(case.q_THD), 9, case.kv_layer.shape[-1])
    k_TKD, v_TKD = wide[:, 3:5], wide[:, 6:8]
    fast, slow = case.kv_layer.clone(), case.kv_layer.clone()
    CpuAttention().write(k_TKD, v_TKD, fast, dataclasses.replace(case.inputs, plan=None))
    compiled.unload()
    CpuAttention().write(k_TKD, v_TKD, slow, dataclasses.replace(case.inputs, plan=None))
    assert torch.equal(fast.nan_to_num(7.0), slow.nan_to_num(7.0)) and not torch.equal(fast[0], case.kv_layer[0])
