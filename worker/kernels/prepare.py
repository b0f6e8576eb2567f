"""What a step needs before its first layer, out of its packed numbers and of what the device knows by slot.

    tables[place] = block                                   for the blocks that sequences got
    id = id if id ≥ 0 else last_tokens[−1 − id]             tokens that were drawn here never leave the device
    slot_mapping = tables[slot, position // B] · B + position % B
    table of a row = tables[its slot]                       so that attention reads one array, row by row

Legend: T tokens, R rows, G changed entries, S slots (one more in all tables: the dump), W blocks of a table, B tokens of a
block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256
TABLE_BLOCK = 1024


@triton.jit(do_not_specialize=["count"])
def write_tables_kernel(places_ptr, blocks_ptr, tables_ptr, count, BLOCK: tl.constexpr):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = entry < count
    place = tl.load(places_ptr + entry, mask=there, other=0)
    tl.store(tables_ptr + place, tl.load(blocks_ptr + entry, mask=there, other=0), mask=there)


@triton.jit(do_not_specialize=["count"])
def tokens_kernel(
    ids_ptr,
    positions_ptr,
    slots_ptr,
    last_tokens_ptr,
    tables_ptr,
    out_ids_ptr,
    out_positions_ptr,
    slot_mapping_ptr,
    count,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = token < count
    given = tl.load(ids_ptr + token, mask=there, other=0)
    drawn = tl.load(last_tokens_ptr + (-1 - given), mask=there & (given < 0), other=0)
    tl.store(out_ids_ptr + token, tl.where(given < 0, drawn, given).to(tl.int64), mask=there)
    position = tl.load(positions_ptr + token, mask=there, other=0)
    tl.store(out_positions_ptr + token, position.to(tl.int64), mask=there)
    slot = tl.load(slots_ptr + token, mask=there, other=0).to(tl.int64)
    block = tl.load(tables_ptr + slot * table_stride + position // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
    tl.store(slot_mapping_ptr + token, block * BLOCK_SIZE + position % BLOCK_SIZE, mask=there)


@triton.jit(do_not_specialize=["width"])
def gather_tables_kernel(slots_ptr, tables_ptr, out_ptr, table_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    block = tl.load(tables_ptr + slot * table_stride + column, mask=column < width, other=0)
    tl.store(out_ptr + row * width + column, block, mask=column < width)


def write_tables(places_G: Tensor, blocks_G: Tensor, tables_SW: Tensor) -> None:
    """All int32; places in the flat tables."""
    assert places_G.dtype == blocks_G.dtype == tables_SW.dtype == torch.int32
    assert tables_SW.is_contiguous() and places_G.shape == blocks_G.shape and tables_SW.numel() < 1 << 31
    count = len(places_G)
    if count:
        write_tables_kernel[(triton.cdiv(count, BLOCK),)](places_G, blocks_G, tables_SW, count, BLOCK=BLOCK)


def prepare_tokens(
    ids_T: Tensor, positions_T: Tensor, slots_T: Tensor, last_tokens_S: Tensor, tables_SW: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """All int32, to (ids [T], positions [T], slot mapping [T]) in int64."""
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in (ids_T, positions_T, slots_T, last_tokens_S, tables_SW))
    assert ids_T.shape == positions_T.shape == slots_T.shape
    count = len(ids_T)
    # Three allocations, each of them aligned.
    ids, positions, slot_mapping = (torch.empty(count, dtype=torch.int64, device=ids_T.device) for _ in range(3))
    tokens_kernel[(triton.cdiv(count, BLOCK),)](
        ids_T,
        positions_T,
        slots_T,
        last_tokens_S,
        tables_SW,
        ids,
        positions,
        slot_mapping,
        count,
        tables_SW.shape[1],
        BLOCK_SIZE=block_size,
        BLOCK=BLOCK,
    )
    return ids, positions, slot_mapping


def gather_tables(slots_R: Tensor, tables_SW: Tensor, width: int) -> Tensor:
    """The first `width` columns of these slots' tables, [R, width] int32."""
    assert slots_R.dtype == tables_SW.dtype == torch.int32 and 0 < width <= tables_SW.shape[1]
    out_RW = torch.empty(len(slots_R), width, dtype=torch.int32, device=slots_R.device)
    grid = (len(slots_R), triton.cdiv(width, TABLE_BLOCK))
    gather_tables_kernel[grid](slots_R, tables_SW, out_RW, tables_SW.shape[1], width, BLOCK=TABLE_BLOCK)
    return out_RW
