"""The two ways between host and device: one step's numbers go up, what it drew comes down beside the next step. CudaStreams
does it on a GPU; HostStreams is its twin where device and host are one, for tests.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from wire.messages import I32

Replay = Callable[[], None]

_UPLOADS = 4  # steps whose numbers may be on their way: two are, in a pipeline of depth two


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy that nobody waits for: from pageable memory, torch would wait until the device has done all that was launched."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.clone()


def is_of_memory(error: Exception) -> bool:
    """Whether it ended; the driver's own words come as another type than the allocator's."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


class Fetched(Protocol):
    def wait(self) -> tuple[I32, int]:
        """Blocks until the step is done: its tokens, and the nanoseconds that the device took for it. From any thread."""


class Streams(Protocol):
    def buffer(self, count: int) -> I32:
        """Host memory for the next upload; it is the caller's until then."""

    def upload(self, numbers: I32, target: Tensor) -> None:
        """Copies the front of the last buffer() to the front of `target`, before whatever is launched next."""

    def begin(self) -> None:
        """A step begins."""

    def fetch(self, tokens_N: Tensor) -> Fetched:
        """The step that was begun ends with these tokens; they may be overwritten by what is launched next."""

    def beside(self) -> AbstractContextManager[object]:
        """For what is done with a step that is over, while the next one runs."""

    def capture(self, launch: Callable[[], None]) -> Replay:
        """What `launch` does on the device, as one launch. It must read and write the same memory each time."""

    def synchronize(self) -> None: ...


class CudaStreams:
    """Work is launched on the current stream; tokens are fetched on another."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)
        self._capturing = torch.cuda.Stream(device)  # one for all: libraries keep a workspace for each stream that they saw
        self._uploads: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._next: tuple[Tensor, torch.cuda.Event] | None = None
        self._began: torch.cuda.Event | None = None
        self._pool: object | None = None  # memory that all captured launches share: only one runs at a time

    def buffer(self, count: int) -> I32:
        pinned, event = self._uploads.popleft() if len(self._uploads) == _UPLOADS else (torch.empty(0), torch.cuda.Event())
        event.synchronize()  # its last copy is long done
        if len(pinned) < count:
            pinned = torch.empty(max(count, 4096), dtype=torch.int32, pin_memory=True)
        self._next = pinned, event
        numbers: I32 = pinned.numpy()[:count]
        return numbers

    def upload(self, numbers: I32, target: Tensor) -> None:
        assert self._next is not None
        pinned, event = self._next
        target[: len(numbers)].copy_(pinned[: len(numbers)], non_blocking=True)
        event.record()
        self._uploads.append(self._next)
        self._next = None

    def begin(self) -> None:
        self._began = torch.cuda.Event(enable_timing=True)
        self._began.record()

    def fetch(self, tokens_N: Tensor) -> Fetched:
        assert self._began is not None
        kept = tokens_N.clone()  # the next replay writes to the same place
        ended = torch.cuda.Event(enable_timing=True)
        ended.record()
        self._side.wait_event(ended)
        with torch.cuda.stream(self._side):
            pinned = torch.empty(len(kept), dtype=torch.int32, pin_memory=True)
            pinned.copy_(kept, non_blocking=True)
            arrived = torch.cuda.Event(blocking=True)  # whoever waits for it sleeps
            arrived.record()
        kept.record_stream(self._side)
        return _CudaFetched(pinned, self._began, ended, arrived)

    def beside(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._side)

    def capture(self, launch: Callable[[], None]) -> Replay:
        self._capturing.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._capturing):
            launch()  # libraries make their workspaces, kernels are loaded
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._capturing):
                launch()
            graph.replay()  # the first one brings it to the device
        except torch.AcceleratorError as error:
            torch.cuda.set_stream(stream)  # where instantiating fails, torch leaves the other one
            if is_of_memory(error):
                raise torch.OutOfMemoryError(str(error)) from None
            raise
        self._pool = self._pool or graph.pool()
        return graph.replay

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)


class _CudaFetched:
    def __init__(self, tokens: Tensor, began: torch.cuda.Event, ended: torch.cuda.Event, arrived: torch.cuda.Event) -> None:
        self._tokens, self._began, self._ended, self._arrived = tokens, began, ended, arrived

    def wait(self) -> tuple[I32, int]:
        self._arrived.synchronize()
        tokens = self._tokens.numpy().copy()  # pinned memory goes back to where the next step gets its own
        return tokens, int(1e6 * self._began.elapsed_time(self._ended))


class HostStreams:
    """Everything is done when the call returns."""

    def __init__(self) -> None:
        self._began_ns = 0

    def buffer(self, count: int) -> I32:
        return np.empty(count, np.int32)

    def upload(self, numbers: I32, target: Tensor) -> None:
        target[: len(numbers)] = torch.from_numpy(numbers)

    def begin(self) -> None:
        self._began_ns = time.perf_counter_ns()

    def fetch(self, tokens_N: Tensor) -> Fetched:
        return _HostFetched(tokens_N.clone().numpy(), time.perf_counter_ns() - self._began_ns)

    def beside(self) -> AbstractContextManager[object]:
        return nullcontext()

    def capture(self, launch: Callable[[], None]) -> Replay:
        launch()
        return launch

    def synchronize(self) -> None:
        pass


class _HostFetched:
    def __init__(self, tokens: I32, duration_ns: int) -> None:
        self._tokens, self._duration_ns = tokens, duration_ns

    def wait(self) -> tuple[I32, int]:
        return self._tokens, self._duration_ns
