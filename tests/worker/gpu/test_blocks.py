"""Blocks move on the device as KVStorage moves them: what leaves comes back, in parts too."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvcache.storage import KVStorage
from worker.gpu import blocks
from worker.gpu.blocks import DeviceBlocks

NUM_BLOCKS, NUM_HOST_BLOCKS = 14, 9
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pair() -> tuple[KVStorage, KVStorage]:
    """Two pools with the same content."""
    fast, slow = (KVStorage(2, NUM_BLOCKS, 2, 16, 32, torch.bfloat16, DEVICE, NUM_HOST_BLOCKS) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    for one, other in zip(fast.layers, slow.layers, strict=True):
        other.copy_(one.copy_(torch.randn(one.shape, generator=generator)))
    return fast, slow


def assert_equal(fast: KVStorage, slow: KVStorage) -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    assert all(one.equal(other) for one, other in zip(fast.layers, slow.layers, strict=True))
    assert fast.host.equal(slow.host)


@pytest.mark.parametrize("staged_blocks", [1, 2, 1000])
def test_swaps_and_copies_in_any_order(monkeypatch: pytest.MonkeyPatch, staged_blocks: int) -> None:
    monkeypatch.setattr(blocks, "STAGE_BYTES", staged_blocks * 2 * 2 * 2 * 16 * 32 * 2)
    fast, slow = pair()
    moves, choose = DeviceBlocks(fast), np.random.default_rng(2)
    for _ in range(4):
        out, host = choose.permutation(NUM_BLOCKS)[:5] + 1, choose.permutation(NUM_HOST_BLOCKS)[:5] + 1
        back, order = choose.permutation(NUM_BLOCKS)[:5] + 1, choose.permutation(5)
        copied = choose.permutation(NUM_BLOCKS)[:6] + 1
        for one in (moves, slow):
            one.swap_out(out.astype(np.int32), host.astype(np.int32))
            one.copy(copied[:3].astype(np.int32), copied[3:].astype(np.int32))
            one.swap_in(host[order].astype(np.int32), back.astype(np.int32))
        assert_equal(fast, slow)


def test_a_pool_without_host_blocks_copies_only() -> None:
    fast = KVStorage(1, 4, 1, 16, 32, torch.float32, DEVICE)
    fast.layers[0].normal_()
    was = fast.layers[0][:, 2].clone()
    moves, none = DeviceBlocks(fast), np.empty(0, np.int32)
    moves.swap_out(none, none)
    moves.copy(np.array([2], np.int32), np.array([4], np.int32))
    assert fast.layers[0][:, 4].equal(was)
