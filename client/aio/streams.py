"""Calls that answer with many messages, to be iterated over by `async for`. Knows the public protos and grpc.aio."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from types import TracebackType
from typing import Generic, Protocol, Self, TypeAlias, TypeVar

import grpc.aio

from carousel.v1 import generation_pb2 as pb
from client.errors import CarouselError, error_of
from client.progress import Progress
from client.result import Collected, Result

MessageT = TypeVar("MessageT")
MessageT_co = TypeVar("MessageT_co", covariant=True)


class Call(Protocol[MessageT_co]):
    """A streaming call, as grpc.aio returns it."""

    def __aiter__(self) -> AsyncIterator[MessageT_co]: ...

    def cancel(self) -> bool: ...


Begin: TypeAlias = Callable[[pb.GenerateRequest | pb.ResumeRequest, float | None], Call[pb.GenerateResponse]]


class AsyncStream(Generic[MessageT]):
    """The messages of one streaming call, as they come. Leaving it early (`async with`, close, dropping it) cancels the call,
    and so does cancelling the task that waits for a message. Read by one task at a time."""

    def __init__(self, call: Call[MessageT], target: str) -> None:
        self._call = call
        self._messages = aiter(call)
        self._target = target
        self._answered = False
        self._closed = asyncio.Event()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> MessageT:
        """The next message. Raises CarouselError when the call fails."""
        try:
            message = await anext(self._messages)
        except grpc.aio.AioRpcError as error:
            raise error_of(error, self._target, self._answered) from None
        except asyncio.CancelledError:
            if not self._was_closed():
                raise
            raise StopAsyncIteration from None
        self._answered = True
        return message

    def _was_closed(self) -> bool:
        """grpc.aio says by CancelledError both that the task was cancelled, which has to go on, and that the stream was closed,
        which only ends the iteration."""
        task = asyncio.current_task()
        return self._closed.is_set() and not (task is not None and task.cancelling())

    async def close(self) -> None:
        """Cancels the call if it still runs. May be called by another task; the iteration then ends."""
        self._leave()

    def _leave(self) -> None:
        self._closed.set()
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def __del__(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed, and the connection with it
            self._leave()


class AsyncGenerateStream(AsyncStream[pb.GenerateResponse]):
    """The events of one request: deltas, one Finished per output, one Summary at the end.

    Goes on by itself after a failure that may be tried again, and after a broken connection: without a gap, without a repeat.
    request_id: the request's. finished: by output_index, once they have come. summary: once it has come.
    """

    def __init__(
        self,
        call: Call[pb.GenerateResponse],
        target: str,
        progress: Progress,
        begin: Begin,
        left: Callable[[str], None],
    ) -> None:
        """call: what the progress asked for first. begin: makes the later ones. left: is told the id of a request that nobody
        wants any more though it outlives its stream."""
        self._progress, self._begin, self._left = progress, begin, left
        super().__init__(call, target)

    @property
    def request_id(self) -> str:
        return self._progress.request_id

    @property
    def finished(self) -> dict[int, pb.Finished]:
        return self._progress.finished

    @property
    def summary(self) -> pb.Summary | None:
        return self._progress.summary

    async def __anext__(self) -> pb.GenerateResponse:
        """The next event. Raises CarouselError when the request fails, or can't go on."""
        while not self._closed.is_set():
            try:
                event = await anext(self._messages)
            except grpc.aio.AioRpcError as error:
                if self._progress.summary is not None:  # all of it is here: a connection may break now
                    raise StopAsyncIteration from None
                await self._go_on(error_of(error, self._target, self._progress.answered))
            except StopAsyncIteration:
                self._progress.end()
                raise
            except asyncio.CancelledError:
                if not self._was_closed():
                    self._leave()  # grpc.aio has cancelled the call: nothing more can come of it
                    raise
            else:
                if self._progress.take(event):
                    return event
        raise StopAsyncIteration

    async def _go_on(self, error: CarouselError) -> None:
        """Calls again, later; or raises the error."""
        delay_s = self._progress.failed(error, time.monotonic(), random.random())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closed.wait(), delay_s)
        if not self._closed.is_set():
            self._call = self._begin(*self._progress.call(time.monotonic()))
            self._messages = aiter(self._call)

    def _leave(self) -> None:
        if not self._closed.is_set() and self._progress.outlives_its_stream:
            self._left(self.request_id)
        super()._leave()

    async def text(self) -> AsyncGenerator[str, None]:
        """The new text of output 0, piece by piece. Leaving the loop early cancels the request."""
        async with contextlib.aclosing(self.texts()) as texts:
            async for output_index, text in texts:
                if output_index == 0:
                    yield text

    async def texts(self) -> AsyncGenerator[tuple[int, str], None]:
        """(output_index, new text) of all outputs, as they come. Leaving the loop early cancels the request."""
        async with self:
            async for event in self:
                if event.delta.text:
                    yield event.delta.output_index, event.delta.text

    async def result(self) -> Result:
        """Reads to the end: everything that is still to come, put together. Raises CarouselError as `anext` does."""
        collected = Collected(self.request_id)
        async with self:
            async for event in self:
                collected.take(event)
        return collected.result()
