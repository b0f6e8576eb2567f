"""The load of `make chaos`: the same requests again and again through the async client, and when each token of each came.

Knows the client; nothing of processes.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Self

from bench.witness import Witness
from carousel.v1 import generation_pb2 as pb
from client import CarouselError
from client.aio.api import AsyncCarouselClient
from client.requests import make_request

_WINDOW_MS = 300_000  # longer than any recovery
_RETRIES = 50  # of calls that have not begun
_LEAST_S, _MOST_S = 0.0, 0.2  # before a lane's first request: they are not to go in step


@dataclass(frozen=True)
class Job:
    """A request that is made many times. Greedy without a temperature."""

    prompt: tuple[int, ...]
    count: int  # tokens
    seed: int
    temperature: float

    def request(self) -> pb.GenerateRequest:
        """Filters are off, so that a draw is logits and noise alone."""
        return make_request(
            self.prompt,
            max_tokens=self.count,
            temperature=self.temperature,
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            seed=self.seed,
            ignore_eos=True,
            resume_window_ms=_WINDOW_MS,
        )


@dataclass(eq=False)
class Stream:
    """One of a job's. Times: CLOCK_MONOTONIC seconds."""

    job: Job
    witness: Witness = field(default_factory=Witness)
    at_s: list[float] = field(default_factory=list)  # of each message with tokens
    ended_s: float | None = None
    error: str = ""
    kind: str = ""  # of the last kill while it ran


async def follow(client: AsyncCarouselClient, stream: Stream) -> None:
    """To its end, through whatever happens to the server."""
    try:
        async for event in client.stream(stream.job.request()):
            stream.witness.take(event)
            if event.delta.token_ids:
                stream.at_s.append(time.monotonic())
    except CarouselError as error:
        stream.error = str(error)
    stream.ended_s = time.monotonic()


class Load:
    """`lanes` requests at a time while it is entered, over as many connections as it takes to reach every front end."""

    def __init__(
        self, target: str, jobs: Sequence[Job], lanes: int, connections: int, seed: int, ended: Callable[[Stream], None]
    ) -> None:
        self._target, self._jobs, self._lanes, self._connections = target, jobs, lanes, connections
        self._random, self._ended = random.Random(seed), ended
        self._stopping = False
        self.alive: set[Stream] = set()

    async def __aenter__(self) -> Self:
        self._stack = AsyncExitStack()
        clients = [await self._stack.enter_async_context(connected(self._target)) for _ in range(self._connections)]
        self._tasks = [asyncio.create_task(self._lane(clients[i % len(clients)])) for i in range(self._lanes)]
        return self

    async def finish(self) -> None:
        """What runs runs to its end, and nothing new begins."""
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stack.aclose()

    async def _lane(self, client: AsyncCarouselClient) -> None:
        await asyncio.sleep(self._random.uniform(_LEAST_S, _MOST_S))
        while not self._stopping:
            stream = Stream(self._random.choice(self._jobs))
            self.alive.add(stream)
            try:
                await follow(client, stream)
            finally:
                self.alive.discard(stream)
            self._ended(stream)


def connected(target: str) -> AsyncCarouselClient:
    return AsyncCarouselClient(target, retries=_RETRIES, resume_window_ms=_WINDOW_MS)


async def all_once(target: str, jobs: Sequence[Job]) -> list[Stream]:
    """Every job once, together."""
    streams = [Stream(job) for job in jobs]
    async with connected(target) as client:
        await asyncio.gather(*(follow(client, stream) for stream in streams))
    return streams


def longest_pause(at_s: Iterable[float], begin_s: float, end_s: float) -> float | None:
    """The longest time between two of these moments, in their order, that reaches into the time from begin_s to end_s. None:
    fewer than two do."""
    return max((later - sooner for sooner, later in pairwise(at_s) if later > begin_s and sooner < end_s), default=None)
