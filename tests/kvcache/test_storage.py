"""The layout that worker and backends agree on."""

import torch

from kvcache.storage import KVStorage


def test_a_layer_has_keys_and_values_of_all_blocks_and_of_the_dump() -> None:
    storage = KVStorage(3, 5, 2, 16, 32, torch.bfloat16, "cpu")
    assert [tuple(layer.shape) for layer in storage.layers] == [(2, 1 + 5, 2, 16, 32)] * 3
    assert {layer.dtype for layer in storage.layers} == {torch.bfloat16}
    assert len({layer.data_ptr() for layer in storage.layers}) == 3


def test_a_block_of_one_head_is_contiguous() -> None:
    layer = KVStorage(1, 5, 2, 16, 32, torch.float32, "cpu").layers[0]
    assert layer[1, 3, 1].is_contiguous() and layer.is_contiguous()
