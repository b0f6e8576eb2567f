"""The layout that worker and backends agree on, and blocks on the move: vectors do what a loop over layers and blocks does."""

import numpy as np
import pytest
import torch

from kvcache import storage
from kvcache.storage import KVStorage

NUM_BLOCKS, NUM_HOST_BLOCKS = 20, 12


def filled(seed: int, num_host_blocks: int = NUM_HOST_BLOCKS, dtype: torch.dtype = torch.float32) -> KVStorage:
    """Three layers with a different number in every place."""
    kv = KVStorage(3, NUM_BLOCKS, 2, 4, 8, dtype, "cpu", num_host_blocks)
    torch.manual_seed(seed)
    for layer in kv.layers:
        layer.copy_(torch.randn(layer.shape))
    return kv


def some(choose: np.random.Generator, count: int, highest: int) -> np.ndarray:
    return (choose.permutation(highest)[:count] + 1).astype(np.int32)


class Loops:
    """Twin of KVStorage's moves: one layer and one block after the other."""

    def __init__(self, kv: KVStorage) -> None:
        self.layers = [layer.clone() for layer in kv.layers]
        self.host: dict[tuple[int, int], torch.Tensor] = {}

    def swap_out(self, blocks: np.ndarray, host_blocks: np.ndarray) -> None:
        for number, layer in enumerate(self.layers):
            for block, host in zip(blocks.tolist(), host_blocks.tolist(), strict=True):
                self.host[number, host] = layer[:, block].clone()

    def swap_in(self, host_blocks: np.ndarray, blocks: np.ndarray) -> None:
        for number, layer in enumerate(self.layers):
            for host, block in zip(host_blocks.tolist(), blocks.tolist(), strict=True):
                layer[:, block] = self.host[number, host]

    def copy(self, sources: np.ndarray, destinations: np.ndarray) -> None:
        for layer in self.layers:
            for source, destination in zip(sources.tolist(), destinations.tolist(), strict=True):
                layer[:, destination] = layer[:, source]


def assert_equal(kv: KVStorage, loops: Loops) -> None:
    for mine, theirs in zip(kv.layers, loops.layers, strict=True):
        assert torch.equal(mine, theirs)


def test_a_layer_has_keys_and_values_of_all_blocks_and_of_the_dump() -> None:
    kv = KVStorage(3, 5, 2, 16, 32, torch.bfloat16, "cpu")
    assert [tuple(layer.shape) for layer in kv.layers] == [(2, 1 + 5, 2, 16, 32)] * 3
    assert {layer.dtype for layer in kv.layers} == {torch.bfloat16}
    assert len({layer.data_ptr() for layer in kv.layers}) == 3


def test_a_block_of_one_head_is_contiguous() -> None:
    layer = KVStorage(1, 5, 2, 16, 32, torch.float32, "cpu").layers[0]
    assert layer[1, 3, 1].is_contiguous() and layer.is_contiguous()


@pytest.mark.parametrize("staged_blocks", [1, 3, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_come_back_from_the_host_as_they_went(
    monkeypatch: pytest.MonkeyPatch, staged_blocks: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(storage, "STAGE_BYTES", staged_blocks * 3 * 2 * 2 * 4 * 8 * dtype.itemsize)
    kv, choose = filled(1, dtype=dtype), np.random.default_rng(1)
    loops = Loops(kv)
    for count in (1, 5, 12):
        out, host = some(choose, count, NUM_BLOCKS), some(choose, count, NUM_HOST_BLOCKS)
        for one in (kv, loops):
            one.swap_out(out, host)
        back = choose.permutation(count)
        other_places = some(choose, count, NUM_BLOCKS)
        for one in (kv, loops):
            one.swap_in(host[back], other_places)
        assert_equal(kv, loops)


def test_a_block_may_go_out_twice_and_the_host_keeps_both() -> None:
    kv = filled(2)
    was = [layer[:, 7].clone() for layer in kv.layers]
    kv.swap_out(np.array([7, 7], np.int32), np.array([4, 9], np.int32))
    kv.swap_in(np.array([9, 4], np.int32), np.array([1, 2], np.int32))
    for layer, block in zip(kv.layers, was, strict=True):
        assert torch.equal(layer[:, 1], block) and torch.equal(layer[:, 2], block)


def test_copies_are_whole_blocks_also_several_of_one() -> None:
    kv, choose = filled(3), np.random.default_rng(3)
    loops = Loops(kv)
    places = some(choose, 8, NUM_BLOCKS)
    sources = places[[0, 1, 0, 0, 2]]
    for one in (kv, loops):
        one.copy(sources, places[3:])
    assert_equal(kv, loops)


def test_arrays_as_they_come_from_the_wire_are_taken() -> None:
    kv = filled(4)
    blocks = np.frombuffer(np.array([3, 4], "<i4").tobytes(), "<i4")
    assert not blocks.flags.writeable
    was = kv.layers[0][:, 3].clone()
    kv.swap_out(blocks, blocks)
    kv.layers[0][:, 3] = 0
    kv.swap_in(blocks, blocks)
    kv.copy(blocks[:1], blocks[1:])
    assert torch.equal(kv.layers[0][:, 4], was)


@pytest.mark.parametrize(
    "ids, expected",
    [
        ([], []),
        ([5], [(0, 5, 1)]),
        ([1, 2, 3], [(0, 1, 3)]),
        ([3, 2, 1], [(0, 3, 1), (1, 2, 1), (2, 1, 1)]),
        ([7, 8, 2, 4, 5, 6, 1], [(0, 7, 2), (2, 2, 1), (3, 4, 3), (6, 1, 1)]),
    ],
)
def test_runs_of_consecutive_ids(ids: list[int], expected: list[tuple[int, int, int]]) -> None:
    assert list(storage.runs(np.array(ids, np.int32))) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="host memory is pinned for CUDA only")
def test_on_a_gpu_host_blocks_are_pinned_and_come_back() -> None:
    kv = KVStorage(3, NUM_BLOCKS, 2, 4, 8, torch.float32, "cuda", NUM_HOST_BLOCKS)
    assert kv.host.is_pinned()
    for layer in kv.layers:
        layer.normal_()
    loops, choose = Loops(kv), np.random.default_rng(5)
    out, host, places = some(choose, 12, NUM_BLOCKS), some(choose, 12, NUM_HOST_BLOCKS), some(choose, 12, NUM_BLOCKS)
    for one in (kv, loops):
        one.swap_out(out, host)
        one.swap_in(host, places)
        one.copy(places[:3], places[3:6])
    assert_equal(kv, loops)
