"""Puts the partial results of a divided context together: out = Σ wₙ outₙ, wₙ = exp(lseₙ) / Σ exp(lseₙ).

Flash-Decoding (arXiv:2311.01282); the log-sum-exp of the whole is log Σ exp(lseₙ), which is what attention over a shared prefix
and attention over the rest are merged by in turn (arXiv:2402.05099). A split that saw nothing says -inf and weighs nothing.

Legend: N splits, P query tiles, S = P · BLOCK_Q places, T tokens of the step, H query heads, D head size, R rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.heuristics import MAX_SPLITS, power_of_two


@triton.jit(
    do_not_specialize=["num_splits", "num_places"],
    do_not_specialize_on_alignment=["lse_ptr", "query_start_ptr", "tile_row_ptr", "tile_first_ptr", "out_lse_ptr"],
)
def merge_splits_kernel(
    partial_ptr,  # [N, S, H, D] float32
    lse_ptr,  # [N, S, H] float32
    out_ptr,  # [T, H, D]
    out_lse_ptr,  # [T, H] float32
    query_start_ptr,
    tile_row_ptr,
    tile_first_ptr,
    num_splits,
    num_places,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    WRITE_LSE: tl.constexpr,
):
    place, head = tl.program_id(0), tl.program_id(1)
    tile = place // BLOCK_Q
    row = tl.load(tile_row_ptr + tile)
    if row < 0:
        return
    nth = tl.load(tile_first_ptr + tile) + place % BLOCK_Q
    begin_query = tl.load(query_start_ptr + row)
    if nth >= tl.load(query_start_ptr + row + 1) - begin_query:
        return
    n = tl.arange(0, MAX_SPLITS)
    d = tl.arange(0, HEAD_PAD)
    at = (n.to(tl.int64) * num_places + place) * NUM_HEADS + head
    lse = tl.load(lse_ptr + at, mask=n < num_splits, other=float("-inf"))
    there = (n[:, None] < num_splits) & (d[None, :] < HEAD_DIM)
    partial = tl.load(partial_ptr + at[:, None] * HEAD_DIM + d[None, :], mask=there, other=0.0)

    peak = tl.max(lse, 0)
    weight = tl.exp(lse - tl.where(peak == float("-inf"), 0.0, peak))
    total = tl.sum(weight, 0)
    out = tl.sum(partial * weight[:, None], 0) * tl.where(total > 0, 1 / total, 0.0)
    token = (begin_query + nth).to(tl.int64)
    tl.store(out_ptr + (token * NUM_HEADS + head) * HEAD_DIM + d, out.to(out_ptr.dtype.element_ty), mask=d < HEAD_DIM)
    if WRITE_LSE:
        tl.store(out_lse_ptr + token * NUM_HEADS + head, tl.where(total > 0, peak + tl.log(total), float("-inf")))


def merge_splits(
    partial_NSHD: Tensor,
    lse_NSH: Tensor,
    out_THD: Tensor,
    query_start_R1: Tensor,
    tile_row_P: Tensor,
    tile_first_P: Tensor,
    *,
    out_lse_TH: Tensor | None = None,
) -> None:
    """Writes the results of the tiles' queries to out, their log-sum-exp (natural) to out_lse; other rows stay as they are."""
    num_splits, num_places, num_heads, head_dim = partial_NSHD.shape
    assert 1 <= num_splits <= MAX_SPLITS and lse_NSH.shape == partial_NSHD.shape[:3]
    assert partial_NSHD.dtype == lse_NSH.dtype == torch.float32
    assert partial_NSHD.is_contiguous() and lse_NSH.is_contiguous() and out_THD.is_contiguous()
    assert out_THD.shape[1:] == (num_heads, head_dim)
    numbers = (query_start_R1, tile_row_P, tile_first_P)
    assert all(x.dtype == torch.int32 and x.is_contiguous() and x.device == out_THD.device for x in numbers)
    if out_lse_TH is not None:
        assert out_lse_TH.shape == out_THD.shape[:2] and out_lse_TH.dtype == torch.float32 and out_lse_TH.is_contiguous()
    if num_places == 0:
        return
    assert num_places % len(tile_row_P) == 0
    merge_splits_kernel[(num_places, num_heads)](
        partial_NSHD,
        lse_NSH,
        out_THD,
        lse_NSH if out_lse_TH is None else out_lse_TH,
        query_start_R1,
        tile_row_P,
        tile_first_P,
        num_splits,
        num_places,
        **merge_constants(num_heads, head_dim, num_places // len(tile_row_P), write_lse=out_lse_TH is not None),
        num_warps=4,
        num_stages=1,
    )


def merge_constants(num_heads: int, head_dim: int, block_q: int, *, write_lse: bool) -> dict[str, int | bool]:
    return {
        "NUM_HEADS": num_heads,
        "HEAD_DIM": head_dim,
        "HEAD_PAD": power_of_two(head_dim),
        "BLOCK_Q": block_q,
        "MAX_SPLITS": MAX_SPLITS,
        "WRITE_LSE": write_lse,
    }
