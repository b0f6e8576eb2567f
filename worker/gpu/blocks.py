"""Blocks on the move: copied inside the pool, swapped to the host and back. One launch for all layers, and the bus is crossed
on a stream of its own: a swap out runs beside the steps that follow, a swap in beside the step before.

The order that is kept: what leaves is staged before later steps may write its blocks; what comes back is in its blocks before
the step that was planned with it; a host block is read only after what was last swapped to it has arrived.

Legend: n blocks moved, m blocks staged at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from kvcache.storage import STAGE_BYTES, KVStorage, runs
from wire.messages import I32
from worker.gpu.streams import to_device
from worker.kernels.block_copy import BlockMover


class DeviceBlocks:
    """The moves of KVStorage, with the same arguments."""

    def __init__(self, kv: KVStorage) -> None:
        self._host, self._device = kv.host, kv.layers[0].device
        self._mover = BlockMover(kv.layers)
        block = kv.host[:0].shape[1:]
        staged = min(kv.num_host_blocks, max(1, STAGE_BYTES // (block.numel() * kv.host.itemsize)))
        self._leaving, self._coming = (
            torch.empty((staged, *block), dtype=kv.host.dtype, device=self._device) for _ in range(2)
        )
        self._bus = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._left: torch.cuda.Event | None = None  # the last staged blocks have crossed
        self._came: torch.cuda.Event | None = None  # the last blocks that crossed are in their places

    def copy(self, sources: I32, destinations: I32) -> None:
        self._mover.copy(*self._index(sources, destinations))

    def swap_out(self, blocks: I32, host_blocks: I32) -> None:
        for part in self._parts(len(blocks)):
            stage = self._leaving[: len(blocks[part])]
            if self._left is not None:
                self._left.wait()
            self._mover.gather(*self._index(blocks[part]), stage)
            with self._on_bus(after=self._event()):
                for at, first, count in runs(host_blocks[part]):
                    self._host[first - 1 : first - 1 + count].copy_(stage[at : at + count], non_blocking=True)
                self._left = self._event()

    def swap_in(self, host_blocks: I32, blocks: I32) -> None:
        for part in self._parts(len(blocks)):
            stage = self._coming[: len(blocks[part])]
            with self._on_bus():
                if self._came is not None:
                    self._came.wait()
                for at, first, count in runs(host_blocks[part]):
                    stage[at : at + count].copy_(self._host[first - 1 : first - 1 + count], non_blocking=True)
                crossed = self._event()
            if crossed is not None:
                crossed.wait()
            self._mover.scatter(stage, *self._index(blocks[part]))
            self._came = self._event()

    def _parts(self, count: int) -> Iterator[slice]:
        for at in range(0, count, max(1, len(self._leaving))):
            yield slice(at, at + len(self._leaving))

    def _index(self, *ids: I32) -> tuple[Tensor, ...]:
        return tuple(to_device(each.astype(np.int32), self._device) for each in ids)

    @contextlib.contextmanager
    def _on_bus(self, after: torch.cuda.Event | None = None) -> Iterator[None]:
        """Launches on the bus's stream, what it does comes after the event."""
        if self._bus is None:
            yield
            return
        with torch.cuda.stream(self._bus):
            if after is not None:
                after.wait()
            yield

    def _event(self) -> torch.cuda.Event | None:
        """Recorded on the current stream."""
        if self._bus is None:
            return None
        event = torch.cuda.Event()
        event.record()
        return event
