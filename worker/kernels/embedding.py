"""Row ids[t] of a table for every token. An id below 0 stands for the token that slot −1 − id drew last, which is read on the
device: so a sequence's next step can be started before the host has seen what it drew."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # numbers of a row that a program copies


@triton.jit(do_not_specialize=["num_ids"])
def embedding_kernel(ids_ptr, table_ptr, last_tokens_ptr, out_ptr, num_ids, size, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    given = tl.load(ids_ptr + token).to(tl.int64)
    last = tl.load(last_tokens_ptr + (-1 - given), given < 0, 0).to(tl.int64)
    row = tl.where(given < 0, last, given)
    mask = column < size
    known = (row >= 0) & (row < num_ids)  # else it is our mistake: zeros, not another process's memory
    value = tl.load(table_ptr + row * size + column, mask & known, 0.0)
    tl.store(out_ptr + token * size + column, value, mask)


def embedding(ids_T: Tensor, table_VC: Tensor, last_tokens_S: Tensor, dtype: torch.dtype) -> Tensor:
    """ids_T int32 or int64, each from −S to V − 1; last_tokens_S int32. [T, C] of `dtype`."""
    assert ids_T.ndim == 1 and ids_T.dtype in (torch.int32, torch.int64) and ids_T.is_contiguous() and len(ids_T) > 0
    assert table_VC.ndim == 2 and table_VC.is_contiguous()
    assert last_tokens_S.dtype == torch.int32 and last_tokens_S.is_contiguous()
    num_ids, size = table_VC.shape
    out_TC = torch.empty((len(ids_T), size), dtype=dtype, device=table_VC.device)
    grid = (len(ids_T), triton.cdiv(size, BLOCK))
    embedding_kernel[grid](ids_T, table_VC, last_tokens_S, out_TC, num_ids, size, BLOCK=BLOCK, num_warps=4)
    return out_TC
