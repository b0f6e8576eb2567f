"""Blocks move whole, in all layers, and nothing else changes; as torch's indexing moves them."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kvcache.storage import KVStorage
from worker.kernels.block_copy import BlockMover

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NO_RESERVE = 0x4000  # mmap.MAP_NORESERVE, which Python has since 3.13
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random_layers(dtype: torch.dtype, *, num_kv_heads: int = 2, block_size: int = 16, head_dim: int = 48) -> list[Tensor]:
    layers = KVStorage(3, 9, num_kv_heads, block_size, head_dim, dtype, DEVICE).layers
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        layer.copy_(torch.randn(layer.shape, generator=generator))
    layers[0][0, 2, 0, 0, 0] = torch.nan  # bytes are moved, not numbers
    return layers


def ids(*blocks: int) -> Tensor:
    return torch.tensor(blocks, dtype=torch.int32, device=DEVICE)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_kv_heads", "block_size", "head_dim"), [(1, 16, 32), (2, 16, 80), (5, 32, 64)])
def test_copies_of_blocks_equal_their_sources(dtype: torch.dtype, num_kv_heads: int, block_size: int, head_dim: int) -> None:
    """Blocks of less words than one iteration takes, of a number that isn't a multiple of it, and of several parts."""
    layers = random_layers(dtype, num_kv_heads=num_kv_heads, block_size=block_size, head_dim=head_dim)
    expected = [layer.clone() for layer in layers]
    for layer in expected:
        layer[:, [7, 1, 9]] = layer[:, [2, 3, 2]]
    BlockMover(layers).copy(ids(2, 3, 2), ids(7, 1, 9))
    assert all(same(layer, other) for layer, other in zip(layers, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_are_gathered_in_order_and_come_back_elsewhere(dtype: torch.dtype) -> None:
    layers = random_layers(dtype)
    mover, before = BlockMover(layers), [layer.clone() for layer in layers]
    stage = torch.zeros(3, 3, 2, *layers[0].shape[2:], dtype=dtype, device=DEVICE)
    mover.gather(ids(9, 2, 4), stage)
    assert same(stage, torch.stack([layer[:, [9, 2, 4]].transpose(0, 1) for layer in before], 1).contiguous())
    assert all(same(layer, other) for layer, other in zip(layers, before, strict=True))
    mover.scatter(stage, ids(1, 9, 5))
    for layer in before:
        layer[:, [1, 9, 5]] = layer[:, [9, 2, 4]]
    assert all(same(layer, other) for layer, other in zip(layers, before, strict=True))


def test_no_blocks_are_moved_by_no_ids() -> None:
    layers = random_layers(torch.float16)
    mover, before = BlockMover(layers), [layer.clone() for layer in layers]
    mover.copy(ids(), ids())
    stage = torch.zeros(0, 3, 2, *layers[0].shape[2:], dtype=torch.float16, device=DEVICE)
    mover.gather(ids(), stage)
    mover.scatter(stage, ids())
    assert all(same(layer, other) for layer, other in zip(layers, before, strict=True))


@pytest.mark.skipif(DEVICE != "cpu", reason="by addresses of main memory")
def test_blocks_far_out_in_a_large_pool_move_too() -> None:
    """Past 2^31 words. The pool is address space: only the pages of a few blocks are ever touched."""
    near, block_bytes = torch.empty(2, 3, 1, 16, 32, dtype=torch.float16), 1024
    far_block = (1 << 33) // block_bytes + 1
    space = mmap.mmap(-1, (far_block + 9) * block_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    layer = torch.frombuffer(space, dtype=torch.float16, count=near.numel()).view(near.shape)
    layer.copy_(torch.randn(near.shape))
    BlockMover([layer]).copy(ids(1), ids(far_block))
    far = torch.frombuffer(space, dtype=torch.float16, count=4 * 512, offset=far_block * block_bytes).view(4, 16, 32)
    assert same(far[0], layer[0, 1, 0]) and same(far[3], layer[1, 1, 0])  # values lie three blocks behind
