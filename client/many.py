"""Many requests over one connection. Knows the public protos and grpc.

with client.generate_many() as many:
    ids = [many.submit(prompt, max_tokens=64) for prompt in prompts]
    many.finish()
    for event in many:
        print(event.request_id, event.delta.text)

A connection that breaks ends all of them: nothing is sent again, and nothing resumed.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from types import TracebackType
from typing import Self, TypeAlias, Unpack

import grpc

from carousel.v1 import generation_pb2 as pb
from carousel.v1.generation_pb2_grpc import GenerationStub
from client.errors import error_of
from client.requests import Parameters, make_request

Send: TypeAlias = Callable[[pb.GenerateManyRequest], None]


class Commands:
    """What goes up. send: never waits."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._with_window: set[str] = set()  # request ids

    def submit(self, prompt: str | Sequence[int], window_tokens: int, parameters: Parameters) -> str:
        parameters["request_id"] = parameters.get("request_id") or str(uuid.uuid4())
        request = make_request(prompt, **parameters)
        if window_tokens:
            self._with_window.add(request.request_id)
        self._send(pb.GenerateManyRequest(submit=pb.Submit(request=request, window_tokens=window_tokens)))
        return request.request_id

    def cancel(self, request_id: str) -> None:
        self._send(pb.GenerateManyRequest(cancel=pb.CancelRequest(request_id=request_id)))

    def taken(self, event: pb.RequestEvent) -> None:
        """Credit for what the reader took."""
        if event.request_id not in self._with_window:
            return
        if event.HasField("summary") or event.HasField("failed"):
            self._with_window.discard(event.request_id)
        elif event.delta.token_ids:
            credit = pb.AddCredit(request_id=event.request_id, num_tokens=len(event.delta.token_ids))
            self._send(pb.GenerateManyRequest(credit=credit))


class Many:
    """To be iterated over: the events of all requests, in order for each. Requests may be submitted, cancelled and the end be
    said from any thread. A request that fails is an event; the connection's own failure is raised as CarouselError."""

    def __init__(
        self, stub: GenerationStub, target: str, timeout_s: float | None, metadata: tuple[tuple[str, str], ...] = ()
    ) -> None:
        self._target, self._answered, self._closed = target, False, False
        self._commands: SimpleQueue[pb.GenerateManyRequest | None] = SimpleQueue()
        self._up = Commands(self._commands.put)
        self._call = stub.GenerateMany(iter(self._commands.get, None), timeout=timeout_s, metadata=metadata)

    def submit(self, prompt: str | Sequence[int], *, window_tokens: int = 0, **parameters: Unpack[Parameters]) -> str:
        """Sends a request; returns its id. window_tokens: at most so many are sent before they are taken here; 0: no bound but
        the connection's own. Raises ValueError or TypeError for a value that its field can't hold."""
        return self._up.submit(prompt, window_tokens, parameters)

    def cancel(self, request_id: str) -> None:
        """The request then ends with a Failed event, CANCELLED."""
        self._up.cancel(request_id)

    def finish(self) -> None:
        """No more requests: the iteration ends with the last of them."""
        self._commands.put(None)

    def close(self) -> None:
        """Cancels all that still runs. May be called again, and from another thread."""
        self._closed = True
        self._commands.put(None)
        self._call.cancel()

    def __iter__(self) -> Iterator[pb.RequestEvent]:
        """Raises CarouselError when the connection breaks."""
        try:
            for message in self._call:
                self._answered = True
                for event in message.events:
                    yield event
                    self._up.taken(event)
        except grpc.RpcError as error:
            self._commands.put(None)  # grpc's thread waits for what is to be sent
            if not self._closed:
                raise error_of(error, self._target, self._answered) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
