"""Calls that answer with many messages, to be iterated over. Knows the public protos and grpc."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

import grpc

from carousel.v1 import generation_pb2
from client.errors import error_of

MessageT = TypeVar("MessageT")
MessageT_co = TypeVar("MessageT_co", covariant=True)


class _Call(Protocol[MessageT_co]):
    """A streaming call, as grpc returns it."""

    def __iter__(self) -> Iterator[MessageT_co]: ...

    def cancel(self) -> bool: ...


class Stream(Generic[MessageT]):
    """The messages of one streaming call, as they come. Leaving it early (`with`, close, dropping it) cancels the call."""

    def __init__(self, call: _Call[MessageT], target: str) -> None:
        self._call = call
        self._messages = iter(call)
        self._target = target
        self._answered = False
        self._closed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> MessageT:
        """The next message. Raises CarouselError when the call fails."""
        try:
            message = next(self._messages)
        except grpc.RpcError as error:
            if self._closed:
                raise StopIteration from None
            raise error_of(error, self._target, self._answered) from None
        self._answered = True
        return message

    def close(self) -> None:
        """Cancels the call if it still runs. May be called from another thread; the iteration then ends."""
        self._closed = True
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class GenerateStream(Stream[generation_pb2.GenerateResponse]):
    """The events of one request: deltas, one Finished per output, one Summary at the end."""

    def __init__(self, call: _Call[generation_pb2.GenerateResponse], target: str, request_id: str) -> None:
        super().__init__(call, target)
        self.request_id = request_id
        self.finished: dict[int, generation_pb2.Finished] = {}  # by output_index, once they have come
        self.summary: generation_pb2.Summary | None = None  # once it has come

    def __next__(self) -> generation_pb2.GenerateResponse:
        event = super().__next__()
        match event.WhichOneof("event"):
            case "finished":
                self.finished[event.finished.output_index] = event.finished
            case "summary":
                self.summary = event.summary
        return event

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
