"""Which variant of the attention kernels runs for which shape, and how a step is cut into tiles and splits: plain rules from
numbers to numbers, nothing measured at run time. No tensors, no triton.

The rules follow from offline compilation (tests/worker/kernels/resources.json) and from limits; not measured on a GPU. An H200
reads 33 bytes a nanosecond for each of its SMs, some 800 ns after they were asked for: 30 KB and more must be on their way to
an SM at any time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

I32 = NDArray[np.int32]

MAX_SPLITS = 64  # merge_splits.py holds all of a head's partial results in registers: 64 x 128 float32 are 64 of a thread


@dataclass(frozen=True)
class Gpu:
    """What the rules need to know of it."""

    backend: str  # "cuda" or "hip"
    capability: int  # 90: compute capability 9.0; for hip without meaning
    num_sms: int

    @property
    def has_wide_products(self) -> bool:
        """Matrix products of a warp group, which read shared memory and keep no operand in registers: Hopper's wgmma,
        datacentre Blackwell's tcgen05 (consumer Blackwell, 12.x, has neither)."""
        return self.backend == "cuda" and 90 <= self.capability < 120


@dataclass(frozen=True)
class AttentionConfig:
    block_m: int  # rows of the matrix product: queries x heads of a group
    block_q: int  # queries of a tile
    tile: int  # tokens of keys and values taken at a time
    mask_all: bool  # one masked loop; False: a loop without masks before it
    num_warps: int
    num_stages: int

    def constants(
        self, num_kv_heads: int, group: int, head_dim: int, block_size: int, *, windowed: bool, partial: bool
    ) -> dict[str, int | bool]:
        """Of paged_attention_kernel."""
        return {
            "NUM_KV_HEADS": num_kv_heads,
            "GROUP": group,
            "HEAD_DIM": head_dim,
            "HEAD_PAD": power_of_two(head_dim),
            "BLOCK_SIZE": block_size,
            "BLOCK_M": self.block_m,
            "TILE": self.tile,
            "MASK_ALL": self.mask_all or windowed,
            "WINDOWED": windowed,
            "PARTIAL": partial,
        }


def decode_config(group: int, head_dim: int, itemsize: int, gpu: Gpu) -> AttentionConfig:
    """For rows of a few queries: bound by memory.

    Tiles of 64 tokens take a third fewer instructions per token than 32, and 128 registers a thread: with three stages (two
    tiles on their way, 64 KB at head size 128) three programs live on an SM. One masked loop: a second one would start its
    pipeline anew for the last tile, and wait a whole memory latency for it. AMD has 64 KB of shared memory: two stages.
    """
    assert 1 <= group <= 16
    if itemsize == 4:  # exact products, without matrix units: the operands are in registers
        return AttentionConfig(16, 16 // group, 16, True, num_warps=4, num_stages=2)
    tile = 64 if head_dim <= 128 else 32
    num_stages = 3 if gpu.backend == "cuda" else 2
    return AttentionConfig(16, 16 // group, tile, True, num_warps=4, num_stages=num_stages)


def prefill_config(group: int, head_dim: int, itemsize: int, gpu: Gpu, *, few: bool) -> AttentionConfig:
    """For rows of many queries: bound by arithmetic, then by the L2 cache.

    128 rows: 64 would read a tile of 32 KB for 2.1 MFLOP, 67 bytes a cycle and SM at the full rate of Hopper's tensor cores,
    more than L2 gives. `few`: less programs than SMs; 64 rows then, twice the programs.
    """
    assert 1 <= group <= 16
    if itemsize == 4:
        return decode_config(group, head_dim, itemsize, gpu)
    if gpu.has_wide_products:
        if head_dim > 128:  # 128 rows of sums are 128 registers a thread
            return _prefill(64 if few else 128, group, tile=32, num_warps=8, num_stages=3)
        # Few: two programs on an SM, one's softmax beside the other's products; two stages, so that both fit.
        return _prefill(64, group, 64, 4, 2) if few else _prefill(128, group, 64, 8, 3)
    # Operands pass through registers: 64 tokens spill. 48 KB of shared memory, of AMD's 64 KB and Ada's 99 KB.
    if head_dim > 128:
        return _prefill(64, group, tile=16, num_warps=8, num_stages=2)
    return _prefill(64, group, 32, 4, 2) if few else _prefill(128, group, 32, 8, 2)


def _prefill(block_m: int, group: int, tile: int, num_warps: int, num_stages: int) -> AttentionConfig:
    return AttentionConfig(block_m, block_m // group, tile, False, num_warps, num_stages)


def num_splits(num_tiles: int, num_kv_heads: int, max_context: int, tile: int, gpu: Gpu) -> int:
    """Into how many parts each row's context is divided, so that few rows fill the GPU: the least number whose last wave of
    programs is filled nearly as well as it can be (FlashAttention's rule, arXiv:2307.08691, flash_api.cpp). A part is worth
    its partial result from about four tiles on. `max_context`: an upper bound of the rows' contexts, in tokens."""
    slots = 2 * gpu.num_sms
    programs = num_tiles * num_kv_heads
    if programs == 0 or programs >= 0.8 * slots:
        return 1

    def filled(splits: int) -> float:
        waves = programs * splits / slots
        return waves / math.ceil(waves)

    candidates = range(1, max(1, min(MAX_SPLITS, max_context // (4 * tile))) + 1)
    best = max(filled(splits) for splits in candidates)
    return next(splits for splits in candidates if filled(splits) >= 0.85 * best)


def query_tiles(rows: I32, query_lens: I32, context_lens: I32, block_q: int) -> tuple[I32, I32]:
    """The row and the first query of each tile of at most block_q queries of these rows, those that see most first: what
    starts last should be short."""
    count = -(-query_lens[rows] // block_q)
    row = np.repeat(rows, count)
    nth = np.arange(len(row), dtype=np.int32) - np.repeat(np.cumsum(count) - count, count)
    first = (nth * block_q).astype(np.int32)
    seen = context_lens[row] - query_lens[row] + np.minimum(first + block_q, query_lens[row])
    order = np.argsort(-seen, kind="stable")
    return row[order].astype(np.int32), first[order]


def power_of_two(number: int) -> int:
    """The least one that is not smaller."""
    return 1 << (number - 1).bit_length()
