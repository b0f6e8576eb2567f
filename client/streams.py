"""Calls that answer with many messages, to be iterated over. Knows the public protos and grpc."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, Protocol, Self, TypeAlias, TypeVar

import grpc

from carousel.v1 import generation_pb2 as pb
from client.errors import CarouselError, error_of
from client.progress import Progress
from client.result import Collected, Result

MessageT = TypeVar("MessageT")
MessageT_co = TypeVar("MessageT_co", covariant=True)


class Call(Protocol[MessageT_co]):
    """A streaming call, as grpc returns it."""

    def __iter__(self) -> Iterator[MessageT_co]: ...

    def cancel(self) -> bool: ...


Begin: TypeAlias = Callable[[pb.GenerateRequest | pb.ResumeRequest, float | None], Call[pb.GenerateResponse]]


class Stream(Generic[MessageT]):
    """The messages of one streaming call, as they come. Leaving it early (`with`, close, dropping it) cancels the call."""

    def __init__(self, call: Call[MessageT], target: str) -> None:
        self._call = call
        self._messages = iter(call)
        self._target = target
        self._answered = False
        self._closed = threading.Event()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> MessageT:
        """The next message. Raises CarouselError when the call fails."""
        try:
            message = next(self._messages)
        except grpc.RpcError as error:
            if self._closed.is_set():
                raise StopIteration from None
            raise error_of(error, self._target, self._answered) from None
        self._answered = True
        return message

    def close(self) -> None:
        """Cancels the call if it still runs. May be called from another thread; the iteration then ends."""
        self._closed.set()
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class GenerateStream(Stream[pb.GenerateResponse]):
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

    def __next__(self) -> pb.GenerateResponse:
        """The next event. Raises CarouselError when the request fails, or can't go on."""
        while not self._closed.is_set():
            try:
                event = next(self._messages)
            except grpc.RpcError as error:
                if self._progress.summary is not None:  # all of it is here: a connection may break now
                    raise StopIteration from None
                if not self._closed.is_set():
                    self._go_on(error_of(error, self._target, self._progress.answered))
            except StopIteration:
                self._progress.end()
                raise
            else:
                if self._progress.take(event):
                    return event
        raise StopIteration

    def _go_on(self, error: CarouselError) -> None:
        """Calls again, later; or raises the error."""
        delay_s = self._progress.failed(error, time.monotonic(), random.random())
        if not self._closed.wait(delay_s):
            self._call = self._begin(*self._progress.call(time.monotonic()))
            self._messages = iter(self._call)
        if self._closed.is_set():  # meanwhile, by another thread, which may have cancelled the call before this one
            self._call.cancel()

    def close(self) -> None:
        """Cancels the request if it still runs. May be called from another thread; the iteration then ends."""
        if not self._closed.is_set() and self._progress.outlives_its_stream:
            self._left(self.request_id)
        super().close()

    def text(self) -> Iterator[str]:
        """The new text of output 0, piece by piece. Leaving the loop early cancels the request."""
        for output_index, text in self.texts():
            if output_index == 0:
                yield text

    def texts(self) -> Iterator[tuple[int, str]]:
        """(output_index, new text) of all outputs, as they come. Leaving the loop early cancels the request."""
        with self:
            for event in self:
                if event.delta.text:
                    yield event.delta.output_index, event.delta.text

    def result(self) -> Result:
        """Reads to the end: everything that is still to come, put together. Raises CarouselError as `next` does."""
        collected = Collected(self.request_id)
        with self:
            for event in self:
                collected.take(event)
        return collected.result()
