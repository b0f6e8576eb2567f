"""Moves whole blocks of all layers in one launch: inside the pool (copy on write), out of it into a staging buffer, and back.

    copy     layer[:, destination] = layer[:, source]
    gather   stage[i, l] = layer_l[:, blocks[i]]        one piece per block, that crosses the bus in one copy
    scatter  layer_l[:, blocks[i]] = stage[i, l]

As PagedAttention does (arXiv:2309.06180, section 5.1), without a launch per layer. Bytes move as 32-bit words, whatever the
dtype. Layers are found through a table of their addresses, made once.

Legend: L layers, B blocks of the pool, n blocks moved, K key-value heads, S tokens of a block, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_WORDS = 2048  # of one iteration: 4 loads of 16 bytes for each of 128 threads
_MOST_PARTS = 16  # programs of one half of a block in one layer


@triton.jit
def _move(from_ptr, to_ptr, WORDS: tl.constexpr, STEP: tl.constexpr):
    """`WORDS` words, every part's share of them."""
    for at in range(tl.program_id(2) * STEP, WORDS, tl.num_programs(2) * STEP):
        word = at + tl.arange(0, STEP)
        tl.store(to_ptr + word, tl.load(from_ptr + word, mask=word < WORDS), mask=word < WORDS)


@triton.jit
def _half_of_block(layers_ptr, layer, half, block, num_blocks, WORDS: tl.constexpr):
    """Where a block of keys (half 0) or values (1) begins. 64-bit: pools exceed 2^31 words."""
    layer_ptr = tl.load(layers_ptr + layer).to(tl.pointer_type(tl.int32))
    return tl.multiple_of(layer_ptr, 16) + (half.to(tl.int64) * num_blocks + block) * WORDS


@triton.jit(do_not_specialize=["num_blocks"], do_not_specialize_on_alignment=["sources_ptr", "destinations_ptr"])
def copy_blocks_kernel(
    layers_ptr, sources_ptr, destinations_ptr, num_blocks, WORDS: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    i, layer, half = tl.program_id(0), tl.program_id(1) // 2, tl.program_id(1) % 2
    source = _half_of_block(layers_ptr, layer, half, tl.load(sources_ptr + i), num_blocks, WORDS)
    destination = _half_of_block(layers_ptr, layer, half, tl.load(destinations_ptr + i), num_blocks, WORDS)
    _move(source, destination, WORDS, STEP)


@triton.jit(do_not_specialize=["num_blocks"], do_not_specialize_on_alignment=["blocks_ptr"])
def gather_blocks_kernel(layers_ptr, blocks_ptr, stage_ptr, num_blocks, WORDS: tl.constexpr, STEP: tl.constexpr):
    i, layer, half = tl.program_id(0), tl.program_id(1) // 2, tl.program_id(1) % 2
    source = _half_of_block(layers_ptr, layer, half, tl.load(blocks_ptr + i), num_blocks, WORDS)
    piece = i.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    _move(source, stage_ptr + piece * WORDS, WORDS, STEP)


@triton.jit(do_not_specialize=["num_blocks"], do_not_specialize_on_alignment=["blocks_ptr"])
def scatter_blocks_kernel(layers_ptr, blocks_ptr, stage_ptr, num_blocks, WORDS: tl.constexpr, STEP: tl.constexpr):
    i, layer, half = tl.program_id(0), tl.program_id(1) // 2, tl.program_id(1) % 2
    destination = _half_of_block(layers_ptr, layer, half, tl.load(blocks_ptr + i), num_blocks, WORDS)
    piece = i.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    _move(stage_ptr + piece * WORDS, destination, WORDS, STEP)


class BlockMover:
    """For the layers of one pool, [2, 1 + B, K, S, D] each. Ids are int32 tensors on the layers' device, and have been checked
    by whoever calls. Everything runs on the current stream."""

    def __init__(self, layers: Sequence[Tensor]) -> None:
        layer = layers[0]
        assert all(other.shape == layer.shape and other.is_contiguous() for other in layers)
        assert all(other.data_ptr() % 16 == 0 and other.device == layer.device for other in layers)
        block_bytes = layer[0, 0].nbytes
        assert layer.shape[0] == 2 and block_bytes % 16 == 0
        self._layers = list(layers)  # the addresses are theirs
        self._addresses = torch.tensor([other.data_ptr() for other in layers], dtype=torch.int64, device=layer.device)
        self._num_blocks, self._constants = layer.shape[1], move_constants(block_bytes)
        self._stage_shape = (len(layers), 2, *layer.shape[2:])
        self._parts = min(_MOST_PARTS, triton.cdiv(block_bytes // 4, _WORDS))

    def copy(self, sources_n: Tensor, destinations_n: Tensor) -> None:
        """No destination twice, and none of them a source."""
        assert sources_n.shape == destinations_n.shape
        self._check(sources_n)
        self._check(destinations_n)
        if len(sources_n):
            grid = self._grid(sources_n)
            copy_blocks_kernel[grid](self._addresses, sources_n, destinations_n, self._num_blocks, **self._constants)

    def gather(self, blocks_n: Tensor, stage: Tensor) -> None:
        """Into stage [n, L, 2, K, S, D]."""
        words = self._words(blocks_n, stage)
        if len(blocks_n):
            gather_blocks_kernel[self._grid(blocks_n)](self._addresses, blocks_n, words, self._num_blocks, **self._constants)

    def scatter(self, stage: Tensor, blocks_n: Tensor) -> None:
        """From stage [n, L, 2, K, S, D]; no block twice."""
        words = self._words(blocks_n, stage)
        if len(blocks_n):
            scatter_blocks_kernel[self._grid(blocks_n)](self._addresses, blocks_n, words, self._num_blocks, **self._constants)

    def _grid(self, blocks_n: Tensor) -> tuple[int, int, int]:
        return len(blocks_n), 2 * len(self._layers), self._parts

    def _words(self, blocks_n: Tensor, stage: Tensor) -> Tensor:
        self._check(blocks_n)
        layer = self._layers[0]
        assert stage.shape == (len(blocks_n), *self._stage_shape) and stage.is_contiguous()
        assert stage.dtype == layer.dtype and stage.device == layer.device and stage.data_ptr() % 16 == 0
        return stage.view(-1).view(torch.int32)

    def _check(self, blocks_n: Tensor) -> None:
        assert blocks_n.dtype == torch.int32 and blocks_n.dim() == 1 and blocks_n.is_contiguous()
        assert blocks_n.device == self._addresses.device


def move_constants(block_bytes: int) -> dict[str, int]:
    """`block_bytes`: of the keys of a block in one layer."""
    return {"WORDS": block_bytes // 4, "STEP": _WORDS}
