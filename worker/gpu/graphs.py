"""Decode steps captured once and replayed with one launch each: for each of some sizes, a step of that many rows that compute
a token each and draw the next. A step of fewer rows is filled up with rows of the dump.

Knows sizes and buffers; what a step computes is a function that it is given.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wire.messages import I32
from worker.gpu.inputs import Sizes, StepInputs, cut, put_padded
from worker.gpu.streams import Replay, Streams

log = logging.getLogger(__name__)

Compute = Callable[[StepInputs[Tensor]], Tensor]  # a decode step's numbers on the device -> its tokens [rows] int32


def sizes_up_to(most: int) -> list[int]:
    """1, 2, 4, then in steps that waste at most a tenth or so of the rows; `most` itself too."""
    steps = [(8, 256, 8), (256, 512, 16), (512, 1024, 64), (1024, 1 << 16, 256)]
    sizes = [1, 2, 4, *(size for first, end, step in steps for size in range(first, end, step))]
    return [*(size for size in sizes if size < most), most]


@dataclass(slots=True)
class _Captured:
    replay: Replay
    tokens: Tensor  # [size] int32, where the replay leaves them


class Graphs:
    def __init__(
        self, sizes: Sequence[int], compute: Compute, streams: Streams, device: torch.device, dump: int, table_width: int
    ) -> None:
        """Captures all sizes, the largest first: the memory that it takes serves the others. When memory ends, those that
        are captured so far have to do."""
        self._streams, self._dump, self._table_width = streams, dump, table_width
        self._captured: dict[int, _Captured] = {}
        self._numbers = torch.zeros(Sizes.of_decode(max(sizes)).total, dtype=torch.int32, device=device)
        for size in sorted(sizes, reverse=True):
            try:
                self._captured[size] = self._capture(size, compute)
            except torch.OutOfMemoryError:
                log.warning("no memory to capture the step of %d rows: steps of so many are launched one by one", size)
                torch.cuda.empty_cache()
        self._sizes = sorted(self._captured)

    def __len__(self) -> int:
        return len(self._sizes)

    def size_of(self, num_rows: int, num_writes: int) -> int | None:
        """The smallest that holds a step of so many rows, and of so many new blocks; None: there is none."""
        at = bisect_left(self._sizes, max(num_rows, num_writes))
        return self._sizes[at] if num_rows and at < len(self._sizes) else None

    def run(self, size: int, inputs: StepInputs[I32]) -> Tensor:
        """Launches the step; its tokens [rows] are there once it is done, until the next run."""
        sizes = Sizes.of_decode(size)
        numbers = self._streams.buffer(sizes.total)
        put_padded(inputs, cut(numbers, sizes), self._dump, self._table_width)
        self._streams.upload(numbers, self._numbers)
        captured = self._captured[size]
        captured.replay()
        return captured.tokens[: len(inputs.ids)]

    def _capture(self, size: int, compute: Compute) -> _Captured:
        sizes = Sizes.of_decode(size)
        nothing = StepInputs(*(torch.zeros(0, dtype=torch.int32).numpy() for _ in range(11)))
        nothing.query_start = torch.zeros(1, dtype=torch.int32).numpy()
        numbers = self._streams.buffer(sizes.total)
        put_padded(nothing, cut(numbers, sizes), self._dump, self._table_width)
        self._streams.upload(numbers, self._numbers)
        inputs = cut(self._numbers, sizes)
        tokens = torch.zeros(size, dtype=torch.int32, device=self._numbers.device)

        def launch() -> None:
            tokens.copy_(compute(inputs))

        return _Captured(self._streams.capture(launch), tokens)
