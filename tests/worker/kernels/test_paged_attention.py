"""The attention kernels give what their slow twin gives, for any step; unused slots hold NaN."""

from __future__ import annotations

import dataclasses
import itertools
import mmap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from tests.helpers.attention_case import MIXED, Case, close
from worker import kernels
from worker.attention.base import AttentionInputs
from worker.attention.reference import ReferenceAttention
from worker.attention.triton_paged import AttentionPlan, AttentionShape, TritonPagedAttention, attend, gpu_of, scratch
from worker.kernels.heuristics import Gpu, decode_config, num_splits, prefill_config, query_tiles
from worker.kernels.merge_splits import MAX_SPLITS, merge_splits
from worker.kernels.paged_attention import paged_attention

NO_RESERVE = 0x4000  # mmap.MAP_NORESERVE, which Python has since 3.13
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What rounding gives: bfloat16 has 8 bits, and the interpreter cuts off where a GPU rounds.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}
SHORT = [(1, 1), (1, 70), (5, 5), (17, 40), (1, 33), (1, 64)]


def shape_of(case: Case) -> AttentionShape:
    return AttentionShape.of(case.q_THD, case.kv_layer)


def plan_of(case: Case) -> AttentionPlan:
    return AttentionPlan.of(case.inputs.query_start_cpu, case.inputs.context_lens_cpu, shape_of(case))


def divided(case: Case, splits: int) -> Tensor:
    """With each context of the decode rows in this many parts."""
    plan = plan_of(case)
    assert plan.decode is not None
    plan.partial_NSHD, plan.lse_NSH = scratch(splits, len(plan.decode.row) * plan.decode.config.block_q, shape_of(case))
    plan.partial_NSHD.fill_(torch.nan)
    plan.lse_NSH.fill_(torch.nan)
    out = torch.full_like(case.q_THD, torch.nan)
    attend(case.q_THD, case.kv_layer, case.inputs, plan, case.scale, out)
    return out


def windowed(case: Case, window: int) -> Tensor:
    """The slow and obvious way."""
    out, first = torch.empty_like(case.q_THD), 0
    for (count, length), k_LKD, v_LKD in zip(case.rows, case.k_LKD, case.v_LKD, strict=True):
        group = case.q_THD.shape[1] // k_LKD.shape[1]
        q = case.q_THD[first : first + count].double()
        k, v = (x.double().repeat_interleave(group, 1) for x in (k_LKD, v_LKD))
        position = torch.arange(length - count, length, device=q.device)[:, None]
        token = torch.arange(length, device=q.device)
        hidden = (token > position) | (token <= position - window)
        weights = torch.softmax((torch.einsum("nhd,lhd->hnl", q, k) * case.scale).masked_fill(hidden, -torch.inf), -1)
        out[first : first + count] = torch.einsum("hnl,lhd->nhd", weights, v).to(out.dtype)
        first += count
    return out


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_chunks_and_single_tokens_mixed_in_one_step(dtype: torch.dtype) -> None:
    case = Case([*MIXED[:5], (33, 90)], dtype=dtype, device=DEVICE)
    plan = plan_of(case)
    assert plan.decode is not None and plan.prefill is not None
    close(case.by(TritonPagedAttention()), case.reference(), TOLERANCE[dtype])


@pytest.mark.parametrize("head_dim", range(32, 257, 16))
def test_head_sizes(head_dim: int) -> None:
    for dtype in (torch.float32, torch.float16):
        case = Case([(1, 35), (9, 20)], num_heads=2, num_kv_heads=1, head_dim=head_dim, dtype=dtype, device=DEVICE)
        close(case.by(TritonPagedAttention()), case.reference(), TOLERANCE[dtype])


@pytest.mark.parametrize("group", range(1, 17))
def test_groups(group: int) -> None:
    rows = [(1, 18), (16 // group, 40), (16 // group + 1, 40), (128 // group + 1, 128 // group + 3)]
    case = Case(rows, num_heads=group, num_kv_heads=1, dtype=torch.float16, device=DEVICE, seed=group)
    close(case.by(TritonPagedAttention()), case.reference(), TOLERANCE[torch.float16])


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_block_sizes(block_size: int, dtype: torch.dtype) -> None:
    """Smaller than a tile, as large, and larger."""
    rows = [(1, 64), (1, 130), (40, 129)] if dtype is torch.float16 else [(1, 33), (8, 20)]
    case = Case(rows, block_size=block_size, dtype=dtype, device=DEVICE)
    close(case.by(TritonPagedAttention()), case.reference(), TOLERANCE[dtype])


@pytest.mark.parametrize("splits", range(1, 9))
def test_a_divided_context_gives_the_same(splits: int) -> None:
    """Also for rows with less tiles than parts, and where scratch memory holds NaN before."""
    case = Case([(1, 1), (1, 120), (2, 33)], num_heads=3, num_kv_heads=1, device=DEVICE)
    close(divided(case, splits), case.reference())


@pytest.mark.parametrize("splits", [1, 3, MAX_SPLITS])
def test_the_log_sum_exp_is_that_of_the_whole_context(splits: int) -> None:
    case = Case([(1, 1), (2, 65)], device=DEVICE)
    plan = plan_of(case)
    assert plan.decode is not None
    tiles = plan.decode
    partial, lse = scratch(splits, len(tiles.row) * tiles.config.block_q, shape_of(case))
    numbers = (case.inputs.block_tables, case.inputs.context_lens, case.inputs.query_start, tiles.row, tiles.first)
    rules = dict(scale=case.scale, num_splits=splits, config=tiles.config)
    paged_attention(case.q_THD, case.kv_layer, partial, lse, *numbers, **rules)
    out, out_lse = torch.empty_like(case.q_THD), torch.empty(case.q_THD.shape[:2], device=DEVICE)
    merge_splits(partial, lse, out, case.inputs.query_start, tiles.row, tiles.first, out_lse_TH=out_lse)
    close(out, case.reference())
    first = 0
    for (count, length), k_LKD in zip(case.rows, case.k_LKD, strict=True):
        k_LHD = k_LKD.repeat_interleave(3, 1)
        for i in range(count):
            scores = torch.einsum("hd,lhd->hl", case.q_THD[first + i], k_LHD[: length - count + i + 1]) * case.scale
            close(out_lse[first + i], scores.logsumexp(1), 1e-5)
        first += count


@pytest.mark.parametrize("window", [1, 16, 33, 1000])
def test_a_window_hides_what_is_behind_it(window: int) -> None:
    case = Case([(1, 1), (1, 90), (3, 70), (20, 50)], device=DEVICE)
    close(case.by(TritonPagedAttention(window)), windowed(case, window))


def test_what_lies_before_the_window_is_not_read() -> None:
    """Its blocks may belong to others by now."""
    case = Case([(1, 150)], dtype=torch.float16, device=DEVICE)
    backend = TritonPagedAttention(window=20)
    before = case.by(backend)
    case.inputs.block_tables[:, : (150 - 20) // 64 * 4] = 1 << 29  # no such block: whoever reads it dies
    assert torch.equal(case.by(backend), before)


def test_queries_may_be_a_part_of_a_fused_projection() -> None:
    case = Case(SHORT, device=DEVICE)
    expected = case.reference()
    wide = torch.full((len(case.q_THD), 10, 32), torch.nan, device=DEVICE)
    wide[:, :6] = case.q_THD
    case.q_THD = wide[:, :6]
    got = case.by(TritonPagedAttention())
    assert got.is_contiguous()
    close(got, expected)


def test_rows_of_a_static_plan_without_context_give_zeros() -> None:
    """Padding of a CUDA graph's rows; its block tables point nowhere."""
    rows, padding = [(1, 20), (1, 130), (1, 1)], 2
    case = Case(rows, device=DEVICE)
    i = case.inputs
    inputs = dataclasses.replace(
        i,
        query_start=torch.arange(6, dtype=torch.int32, device=DEVICE),
        context_lens=torch.cat([i.context_lens, i.context_lens.new_zeros(padding)]),
        block_tables=torch.cat([i.block_tables, i.block_tables.new_full((padding, i.block_tables.shape[1]), 1 << 29)]),
    )
    q = torch.cat([case.q_THD, torch.full_like(case.q_THD[:padding], torch.nan)])
    for max_context in (63, 512):
        inputs.plan = AttentionPlan.of_decode(len(rows) + padding, max_context, shape_of(case))
        assert (inputs.plan.partial_NSHD is None) == (max_context == 63)
        got = TritonPagedAttention().attend(q, case.kv_layer, inputs, case.scale)
        close(got[:3], case.reference())
        assert torch.equal(got[3:], torch.zeros_like(got[3:]))


@pytest.mark.parametrize("splits", [1, 2])
def test_a_padded_tile_does_nothing(splits: int) -> None:
    """What lies before the first row is a row as well to whoever takes its number, -1: it would write token -1."""
    case = Case([(1, 20), (1, 70)], device=DEVICE)
    i = case.inputs
    inputs = dataclasses.replace(
        i,
        query_start=torch.cat([i.query_start.new_tensor([-1]), i.query_start])[1:],
        context_lens=torch.cat([i.context_lens.new_tensor([5]), i.context_lens])[1:],
        block_tables=torch.cat([i.block_tables[:1], i.block_tables])[1:],
    )
    q_THD = torch.cat([case.q_THD[:1], case.q_THD])[1:]
    plan = plan_of(case)
    assert plan.decode is not None
    none = plan.decode.row.new_tensor([-1])
    plan.decode.row = torch.cat([none, plan.decode.row, none])
    plan.decode.first = torch.zeros_like(plan.decode.row)
    if splits > 1:
        plan.partial_NSHD, plan.lse_NSH = scratch(splits, 4 * plan.decode.config.block_q, shape_of(case))
    before_and_out = torch.full((3, *q_THD.shape[1:]), 7.0, device=DEVICE)
    attend(q_THD, case.kv_layer, inputs, plan, case.scale, before_and_out[1:])
    close(before_and_out[1:], case.reference())
    assert (before_and_out[0] == 7).all()


def test_a_step_writes_its_keys_and_values_and_attends_to_them() -> None:
    case, backend = Case(SHORT, device=DEVICE), TritonPagedAttention()
    expected = case.reference()
    last = [slice(length - count, length) for count, length in case.rows]
    k_TKD = torch.cat([k_LKD[new] for k_LKD, new in zip(case.k_LKD, last, strict=True)])
    v_TKD = torch.cat([v_LKD[new] for v_LKD, new in zip(case.v_LKD, last, strict=True)])
    slots, block_size = case.inputs.slot_mapping, case.block_size
    case.kv_layer[:, slots // block_size, :, slots % block_size] = torch.nan
    backend.write(k_TKD, v_TKD, case.kv_layer, case.inputs)
    close(case.by(backend), expected)


def test_no_row_depends_on_its_neighbours() -> None:
    case, first = Case([(1, 70), (20, 40), (1, 20)], device=DEVICE), 0
    together = case.by(TritonPagedAttention())
    for number, (count, _) in enumerate(case.rows):
        close(together[first : first + count], case.only(number).by(TritonPagedAttention()))
        first += count


@pytest.mark.skipif(DEVICE != "cpu", reason="by addresses of main memory")
@pytest.mark.parametrize("block_size", [16, 128])
def test_blocks_of_a_pool_larger_than_2_to_the_31_elements(block_size: int) -> None:
    """The pool is address space: only the pages of two blocks are ever touched."""
    case = Case([(1, block_size + 5)], block_size=block_size, dtype=torch.float16, num_heads=2)
    block_elements = 2 * block_size * 32
    blocks = case.inputs.block_tables_cpu[0]
    shift = (1 << 31) // block_elements + 3  # of the blocks' ids
    size = 2 * (case.kv_layer.numel() + (shift + 1) * block_elements)
    space = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    near = torch.frombuffer(space, dtype=torch.float16, count=case.kv_layer.numel()).view(case.kv_layer.shape)
    near.fill_(torch.nan)
    far = torch.frombuffer(space, dtype=torch.float16, count=near.numel(), offset=2 * shift * block_elements)
    far.view(near.shape)[:, blocks.astype(np.int64)] = case.kv_layer[:, blocks.astype(np.int64)]
    inputs = dataclasses.replace(case.inputs, block_tables=case.inputs.block_tables + shift, plan=None)
    got = TritonPagedAttention().attend(case.q_THD, near, inputs, case.scale)
    close(got, case.reference(), TOLERANCE[torch.float16])


@settings(max_examples=5, deadline=None, derandomize=True)
@given(st.data())
def test_random_steps(data: st.DataObject) -> None:
    kernels.load()
    lengths = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=3))
    rows = [(data.draw(st.one_of(st.just(1), st.integers(1, min(length, 40)))), length) for length in lengths]
    num_kv_heads, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 16))
    case = Case(
        rows,
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=data.draw(st.sampled_from([32, 48, 64])),
        block_size=data.draw(st.sampled_from([16, 32, 64, 128])),
        dtype=data.draw(st.sampled_from(list(TOLERANCE))),
        device=DEVICE,
        seed=data.draw(st.integers(0, 1000)),
    )
    close(case.by(TritonPagedAttention()), case.reference(), TOLERANCE[case.q_THD.dtype])
    if plan_of(case).decode is not None:
        close(divided(case, data.draw(st.integers(1, 8))), case.reference(), TOLERANCE[case.q_THD.dtype])


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", range(32, 257, 16))
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16])
def test_every_shape(group: int, head_dim: int) -> None:
    """Block sizes take turns, so that each meets every head size and every group."""
    block_size = (16, 32, 64, 128)[(group + head_dim // 16) % 4]
    seed = group + 100 * head_dim + block_size
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 200, 5).tolist()
    rows = [(1 if rng.random() < 0.6 else int(rng.integers(1, length + 1)), length) for length in lengths]
    dtype = list(TOLERANCE)[seed % 3]
    sizes = dict(num_heads=2 * group, num_kv_heads=2, head_dim=head_dim, block_size=block_size)
    case = Case(rows, dtype=dtype, device=DEVICE, seed=seed, **sizes)
    close(case.by(TritonPagedAttention()), case.reference(), TOLERANCE[dtype])


# ------------------------------------------------------------------------------------------------------------ rules


def test_tiles_cover_every_query_once_those_that_see_most_first() -> None:
    query_lens, context_lens = np.array([5, 1, 9], np.int32), np.array([50, 3, 9], np.int32)
    row, first = query_tiles(np.array([0, 2], np.int32), query_lens, context_lens, 4)
    assert list(zip(row.tolist(), first.tolist(), strict=True)) == [(0, 4), (0, 0), (2, 8), (2, 4), (2, 0)]
    row, first = query_tiles(np.zeros(0, np.int32), query_lens, context_lens, 4)
    assert len(row) == len(first) == 0 and row.dtype == first.dtype == np.int32


H200 = Gpu("cuda", 90, 132)


@pytest.mark.parametrize(
    ("num_tiles", "num_kv_heads", "max_context", "expected"),
    [
        (0, 8, 8192, 1),
        (64, 8, 8192, 1),
        (27, 8, 8192, 1),
        (1, 8, 8192, 28),
        (8, 8, 8192, 4),
        (1, 8, 512, 2),
        (1, 1, 1 << 20, 55),
    ],
)
def test_contexts_are_divided_where_rows_are_few(num_tiles: int, num_kv_heads: int, max_context: int, expected: int) -> None:
    assert num_splits(num_tiles, num_kv_heads, max_context, 64, H200) == expected


def test_a_chunk_of_few_tiles_takes_smaller_ones() -> None:
    gpu = dataclasses.replace(gpu_of(torch.device("cpu")), num_sms=100)
    shape = AttentionShape(32, 8, 128, torch.bfloat16, torch.device("cpu"), gpu)

    def block_m(query_len: int) -> int:
        plan = AttentionPlan.of(np.array([0, query_len], np.int32), np.array([query_len], np.int32), shape)
        assert plan.prefill is not None and plan.decode is None
        return plan.prefill.config.block_m

    assert block_m(12 * 32) == 64 and block_m(13 * 32) == 128


@pytest.mark.parametrize("head_dim", range(32, 257, 16))
def test_no_variant_needs_more_shared_memory_than_there_is(head_dim: int) -> None:
    """Queries, and every buffer of keys and values: 227 KB on Hopper, 99 KB on the smaller Amperes, 64 KB on CDNA 3."""
    for gpu, limit in ((H200, 227), (Gpu("cuda", 80, 108), 99), (Gpu("hip", 94, 304), 64)):
        for group, few in itertools.product(range(1, 17), (True, False)):
            for config in (decode_config(group, head_dim, 2, gpu), prefill_config(group, head_dim, 2, gpu, few=few)):
                is_wide = gpu.has_wide_products and config.block_m >= 64  # else one stage is in registers
                buffers = config.num_stages if is_wide else config.num_stages - 1
                head_pad = 1 << (head_dim - 1).bit_length()
                assert 2 * head_pad * (config.block_m + 2 * buffers * config.tile) <= limit << 10
                assert 1 <= config.block_q <= config.block_m / group


def test_the_reference_is_what_the_cases_are_held_against() -> None:
    """The cases would hide a mistake if both sides read the same wrong slots: dense attention knows no slots."""
    case = Case(SHORT, device=DEVICE)
    assert isinstance(case.inputs, AttentionInputs)
    close(ReferenceAttention().attend(case.q_THD, case.kv_layer, case.inputs, case.scale), case.dense())
