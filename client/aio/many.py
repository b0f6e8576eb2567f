"""Many requests over one connection, for asyncio. Knows the public protos and grpc.aio.

async with client.generate_many() as many:
    ids = [many.submit(prompt, max_tokens=64) for prompt in prompts]
    many.finish()
    async for event in many:
        print(event.request_id, event.delta.text)

A connection that breaks ends all of them: nothing is sent again, and nothing resumed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack

import grpc.aio

from carousel.v1 import generation_pb2 as pb
from client.errors import error_of
from client.many import Commands
from client.requests import Parameters

if TYPE_CHECKING:
    from carousel.v1.generation_pb2_grpc import GenerationAsyncStub


class AsyncMany:
    """To be iterated over by `async for`: the events of all requests, in order for each. submit, cancel and finish do not wait;
    they are called in the event loop's thread. A request that fails is an event; the connection's own failure is raised as
    CarouselError."""

    def __init__(
        self, stub: GenerationAsyncStub, target: str, timeout_s: float | None, metadata: tuple[tuple[str, str], ...] = ()
    ) -> None:
        self._target, self._answered, self._closed = target, False, False
        self._commands: asyncio.Queue[pb.GenerateManyRequest | None] = asyncio.Queue()
        self._up = Commands(self._commands.put_nowait)
        self._call = stub.GenerateMany(_until_none(self._commands), timeout=timeout_s, metadata=metadata)

    def submit(self, prompt: str | Sequence[int], *, window_tokens: int = 0, **parameters: Unpack[Parameters]) -> str:
        """Sends a request; returns its id. window_tokens: at most so many are sent before they are taken here; 0: no bound but
        the connection's own. Raises ValueError or TypeError for a value that its field can't hold."""
        return self._up.submit(prompt, window_tokens, parameters)

    def cancel(self, request_id: str) -> None:
        """The request then ends with a Failed event, CANCELLED."""
        self._up.cancel(request_id)

    def finish(self) -> None:
        """No more requests: the iteration ends with the last of them."""
        self._commands.put_nowait(None)

    async def close(self) -> None:
        """Cancels all that still runs. May be called again, and by another task."""
        self._closed = True
        self._commands.put_nowait(None)
        self._call.cancel()

    async def __aiter__(self) -> AsyncIterator[pb.RequestEvent]:
        """Raises CarouselError when the connection breaks."""
        try:
            async for message in self._call:
                self._answered = True
                for event in message.events:
                    yield event
                    self._up.taken(event)
        except grpc.aio.AioRpcError as error:
            self._commands.put_nowait(None)  # grpc's task waits for what is to be sent
            raise error_of(error, self._target, self._answered) from None
        except asyncio.CancelledError:  # the task was cancelled, or the call by `close`
            task = asyncio.current_task()
            if not self._closed or (task is not None and task.cancelling()):
                raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def _until_none(commands: asyncio.Queue[pb.GenerateManyRequest | None]) -> AsyncIterator[pb.GenerateManyRequest]:
    while (command := await commands.get()) is not None:
        yield command
