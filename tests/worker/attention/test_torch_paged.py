"""The paged backend gives what its slow twin gives, which gives what attention without any paging gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers.attention_case import MIXED, Case, close
from worker.attention.base import AttentionInputs
from worker.attention.reference import ReferenceAttention, dense_attention
from worker.attention.torch_paged import TorchPagedAttention

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def test_the_reference_gives_what_attention_without_paging_gives() -> None:
    case = Case(MIXED)
    assert torch.equal(case.reference(), case.dense())


def test_dense_attention_is_scaled_dot_product_attention_of_torch() -> None:
    q, k, v = torch.randn(9, 4, 16), torch.randn(9, 4, 16), torch.randn(9, 4, 16)
    by_torch = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1).double() for x in (q, k, v)), is_causal=True, scale=0.3
    )
    close(dense_attention(q, k, v, 0.3), by_torch.transpose(0, 1).float())


@pytest.mark.parametrize("device", DEVICES)
def test_chunks_and_single_tokens_mixed_in_one_step(device: str) -> None:
    case = Case(MIXED, device=device)
    close(case.by(TorchPagedAttention()), case.dense(), 5e-6 if device == "cpu" else 1e-4)


@pytest.mark.parametrize("head_dim", [32, 48, 64, 80, 96, 112, 128])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (16, 1)])
def test_head_sizes_and_groups(head_dim: int, num_heads: int, num_kv_heads: int) -> None:
    case = Case(MIXED, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    close(case.by(TorchPagedAttention()), case.dense())


@pytest.mark.parametrize("block_size", [1, 16, 24, 32, 64, 128])
def test_block_sizes(block_size: int) -> None:
    case = Case(MIXED, block_size=block_size)
    close(case.by(TorchPagedAttention()), case.dense())


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80, 96, 112, 128])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 3])
def test_every_shape(num_kv_heads: int, group: int, head_dim: int, block_size: int) -> None:
    seed = num_kv_heads + 10 * group + 1000 * head_dim + block_size
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 200, 12).tolist()
    rows = [(1 if rng.random() < 0.6 else int(rng.integers(1, length + 1)), length) for length in lengths]
    case = Case(
        rows,
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        seed=seed,
    )
    close(case.by(TorchPagedAttention()), case.dense())


@pytest.mark.parametrize("seed", range(10))
def test_random_rows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 300, rng.integers(1, 40)).tolist()
    rows = [(1 if rng.random() < 0.7 else int(rng.integers(1, length + 1)), length) for length in lengths]
    case = Case(rows, block_size=int(rng.choice([16, 32])), num_heads=4, num_kv_heads=2, head_dim=16, seed=seed)
    close(case.by(TorchPagedAttention()), case.dense())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precisions(dtype: torch.dtype, tolerance: float) -> None:
    case = Case(MIXED, dtype=dtype)
    close(case.by(TorchPagedAttention()), case.dense(), tolerance)


def test_the_size_of_the_groups_changes_nothing() -> None:
    case = Case([(1, length) for length in range(1, 90, 3)] + [(9, 80), (11, 85)])
    small, large = case.by(TorchPagedAttention(group_bytes=1)), case.by(TorchPagedAttention(group_bytes=1 << 30))
    close(small, case.dense())
    close(large, case.dense())


def test_one_backend_serves_steps_of_changing_size_and_dtype() -> None:
    backend = TorchPagedAttention()
    for case in (Case([(1, 5)]), Case(MIXED), Case([(2, 3)], dtype=torch.bfloat16), Case([(1, 40)] * 3)):
        close(case.by(backend), case.dense(), 1e-2 if case.q_THD.dtype == torch.bfloat16 else 5e-6)


def test_an_empty_step_gives_nothing() -> None:
    empty = AttentionInputs.of(np.zeros(1, np.int32), np.zeros(0, np.int32), np.zeros((0, 0), np.int32), np.zeros(0, np.int64))
    case = Case([(1, 5)])
    assert TorchPagedAttention().attend(case.q_THD[:0], case.kv_layer, empty, 1.0).shape == (0, 6, 32)


@pytest.mark.parametrize("sick", range(len(MIXED)))
def test_a_row_with_nan_of_its_own_is_the_only_one_that_has_it(sick: int) -> None:
    case = Case(MIXED)
    expected = case.dense()
    first = case.tables[sick][0]
    case.kv_layer[:, first, :, 0] = torch.nan
    queries = slice(*case.inputs.query_start_cpu[sick : sick + 2])
    got = case.by(TorchPagedAttention())
    assert got[queries].isnan().all()
    got[queries] = expected[queries]
    close(got, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_write_changes_its_own_slots_only(device: str) -> None:
    case = Case(MIXED, device=device)
    slots = [
        table[at // 16] * 16 + at % 16 for (n, end), table in zip(MIXED, case.tables, strict=True) for at in range(end - n, end)
    ]
    k_TKD = torch.randn(len(slots), 2, 32, device=device)
    v_TKD = torch.randn(len(slots), 2, 32, device=device)
    expected = case.kv_layer.clone()
    ReferenceAttention().write(k_TKD, v_TKD, expected, case.inputs)
    TorchPagedAttention().write(k_TKD, v_TKD, case.kv_layer, case.inputs)
    torch.testing.assert_close(case.kv_layer, expected, atol=0, rtol=0, equal_nan=True)
    assert expected[0, slots[3] // 16, :, slots[3] % 16].equal(k_TKD[3])


def test_write_takes_strided_keys_and_values() -> None:
    case = Case([(3, 3), (1, 20)])
    qkv = torch.randn(4, 10, 32)
    TorchPagedAttention().write(qkv[:, 6:8], qkv[:, 8:], case.kv_layer, case.inputs)
    last = case.tables[1][1]
    assert case.kv_layer[0, last, :, 3].equal(qkv[3, 6:8]) and case.kv_layer[1, last, :, 3].equal(qkv[3, 8:])
