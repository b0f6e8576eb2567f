"""A server's own word on its load, time and again while others load it: KV waste, rows, queue. Knows the client."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from carousel.v1 import control_pb2
from client import CarouselClient, CarouselError

Load = control_pb2.GetLoadResponse


@dataclass(frozen=True)
class Seen:
    """Over all samples in which blocks were held; counts from the first sample to the last."""

    samples: int
    kv_waste: float  # (allocated − used) ÷ allocated token slots
    kv_tokens: float  # used, mean
    held_share: float  # of the pool, mean
    rows: float  # mean
    most_waiting: int
    cached_share: float  # of the prompt tokens admitted
    preemptions: int
    steps: int


class LoadWatch:
    """Watches while it is entered, in a thread of its own. What can't be watched (no admin's token, a server without Control)
    is no error: `seen` is None then, and `why` says it."""

    def __init__(self, client: CarouselClient, interval_s: float = 0.5) -> None:
        self._client, self._interval_s = client, interval_s
        self._samples: list[Load] = []
        self.why = ""

    def __enter__(self) -> Self:
        try:
            self._block_size = self._client.model_info().block_size
            self._samples.append(self._client.load())
            self._stream = self._client.watch_load(self._interval_s)
        except CarouselError as error:
            self.why = str(error)
            return self
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.why:
            return
        self._stream.close()
        self._thread.join()
        try:
            self._samples.append(self._client.load())
        except CarouselError as failed:
            self.why = str(failed)

    def _watch(self) -> None:
        try:
            for message in self._stream:
                self._samples.append(message.load)
        except CarouselError:
            pass  # the server has gone: whoever loads it hears that too

    @property
    def seen(self) -> Seen | None:
        return seen(self._samples, self._block_size) if len(self._samples) > 1 else None


def seen(samples: Sequence[Load], block_size: int) -> Seen:
    """Samples at equal distances weigh alike."""
    busy = [load for load in samples if load.held_blocks]
    first, last = samples[0], samples[-1]
    asked = last.prompt_tokens - first.prompt_tokens
    allocated = sum(load.held_blocks for load in busy) * block_size
    num = max(1, len(busy))
    return Seen(
        samples=len(busy),
        kv_waste=1 - sum((1 - load.kv_waste) * load.held_blocks * block_size for load in busy) / allocated if busy else 0.0,
        kv_tokens=sum(load.kv_tokens for load in busy) / num,
        held_share=sum(load.held_blocks / load.total_blocks for load in busy) / num,
        rows=sum(load.running_requests for load in busy) / num,
        most_waiting=max((load.waiting_requests for load in samples), default=0),
        cached_share=(last.cached_tokens - first.cached_tokens) / asked if asked else 0.0,
        preemptions=last.preemptions - first.preemptions,
        steps=last.steps - first.steps,
    )
