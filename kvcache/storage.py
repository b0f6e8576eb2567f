"""The keys and values themselves: one tensor per layer, how it is laid out, and how blocks move. Only the worker imports this.

Which block belongs to whom is not known here; see manager.py for the numbers. Block ids come as int32 arrays and have been
checked by whoever calls.

Legend: L layers, B blocks of the device, C blocks of the host, K key-value heads, S tokens of a block, D head size, n blocks
moved, m blocks staged at a time.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from wire.messages import I32

_ALIGNMENT = 64  # bytes: a cache line, and the widest load
STAGE_BYTES = 64 << 20  # blocks on their way: enough to keep the bus busy, little beside the pool


class KVStorage:
    """Keys and values of all layers, [2, 1 + B, K, S, D] each; index 0 keys, 1 values.

    A block of one head is contiguous. Block 0 is the dump: padding rows write there, and nothing reads it. In host memory,
    where swapped sequences wait, a block is one piece [L, 2, K, S, D], so that it crosses the bus in one copy; ids are 1..C.
    On a CPU the system gives the memory piece by piece, as blocks are written for the first time: writing gigabytes of zeros
    would be most of the time that a worker takes to start, and most of a pool may never be used.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        num_host_blocks: int = 0,
    ) -> None:
        self.num_blocks, self.block_size, self.num_host_blocks = num_blocks, block_size, num_host_blocks
        block = (num_kv_heads, block_size, head_dim)
        self.layers = [_zeros((2, 1 + num_blocks, *block), dtype, device) for _ in range(num_layers)]
        self.host = _zeros((num_host_blocks, num_layers, 2, *block), dtype, "cpu")
        if num_host_blocks and torch.device(device).type == "cuda":
            self._pin()
        block_bytes = num_layers * 2 * num_kv_heads * block_size * head_dim * dtype.itemsize
        self._staged = min(num_host_blocks, max(1, STAGE_BYTES // block_bytes))  # m

    @cached_property
    def _stage(self) -> Tensor:
        """[m, L, 2, K, S, D]"""
        return torch.empty((self._staged, *self.host.shape[1:]), dtype=self.host.dtype, device=self.layers[0].device)

    def swap_out(self, blocks: I32, host_blocks: I32) -> None:
        """Copies each block to the host block of the same place in the arrays. Does not wait: what is asked for next on the
        device, or of the host blocks through swap_in, comes after it."""
        for part in self._parts(len(blocks)):
            staged, index = self._stage[: len(blocks[part])], self._index(blocks[part])
            for number, layer in enumerate(self.layers):
                staged[:, number] = layer.index_select(1, index).transpose(0, 1)
            for at, first, count in runs(host_blocks[part]):
                self.host[first - 1 : first - 1 + count].copy_(staged[at : at + count], non_blocking=True)

    def swap_in(self, host_blocks: I32, blocks: I32) -> None:
        """Copies each host block back to the block of the same place in the arrays; no block twice. Does not wait either."""
        for part in self._parts(len(blocks)):
            staged, index = self._stage[: len(blocks[part])], self._index(blocks[part])
            for at, first, count in runs(host_blocks[part]):
                staged[at : at + count].copy_(self.host[first - 1 : first - 1 + count], non_blocking=True)
            for number, layer in enumerate(self.layers):
                layer.index_copy_(1, index, staged[:, number].transpose(0, 1))

    def copy(self, sources: I32, destinations: I32) -> None:
        """Copies blocks on the device, whole; no destination twice, and none of them a source."""
        source, destination = self._index(sources), self._index(destinations)
        for layer in self.layers:
            layer.index_copy_(1, destination, layer.index_select(1, source))

    def _parts(self, count: int) -> Iterator[slice]:
        for at in range(0, count, self._staged):
            yield slice(at, at + self._staged)

    def _index(self, blocks: I32) -> Tensor:
        return torch.from_numpy(blocks.astype(np.int64)).to(self.layers[0].device)

    def _pin(self) -> None:
        """Locks the host blocks in memory where they are, for copies that run beside the computation. (Pinned memory made by
        torch comes in powers of two: up to twice of what was asked for.)"""
        runtime, address = cast(Any, torch.cuda).cudart(), self.host.data_ptr()
        torch.cuda.check_error(runtime.cudaHostRegister(address, self.host.nbytes, 0))
        weakref.finalize(self, runtime.cudaHostUnregister, address).atexit = False


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """In main memory: in pages that are zero until they are written, large ones where the system has them (numpy asks)."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    content = np.zeros(size + _ALIGNMENT, np.uint8)
    begin = -content.ctypes.data % _ALIGNMENT
    return torch.from_numpy(content[begin : begin + size]).view(dtype).view(shape)


def runs(ids: I32) -> Iterator[tuple[int, int, int]]:
    """(place in the array, first id, number of ids) of each run of consecutive ids."""
    starts = np.flatnonzero(np.diff(ids, prepend=ids[:1] - 2) != 1)
    lengths = np.diff(starts, append=len(ids))
    yield from zip(starts.tolist(), ids[starts].tolist(), lengths.tolist(), strict=True)
