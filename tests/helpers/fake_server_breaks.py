"""A server whose streams break where the test wants it, and a cable to it that can be cut: real gRPC, real connections."""

from __future__ import annotations

import contextlib
import queue
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Self

import grpc

from carousel.v1 import generation_pb2 as pb
from tests.helpers.fake_server import WAIT_S, FakeServer, Script, finished, summary


def events_of(
    request: pb.GenerateRequest, texts: Sequence[Sequence[str]], tokens_each: int = 1
) -> Iterator[pb.GenerateResponse]:
    """texts: the pieces of each output's text, tokens_each tokens each. The prompt first where wanted; outputs in turns."""
    if request.output.echo:
        for index in range(len(texts)):
            prompt = pb.Delta(output_index=index, token_ids=[7, 8], text=request.text, is_prompt=True)
            yield pb.GenerateResponse(delta=prompt)
    offsets = [0] * len(texts)
    for turn in range(max(map(len, texts))):
        for index, pieces in enumerate(texts):
            if turn < len(pieces):
                first = turn * tokens_each
                token_ids = range(first + 1, first + 1 + tokens_each)
                logprobs = [pb.TokenLogprobs(logprob=-float(token_id)) for token_id in token_ids]
                delta = pb.Delta(output_index=index, token_offset=first, token_ids=token_ids, logprobs=logprobs)
                delta.text, delta.text_offset = pieces[turn], offsets[index]
                offsets[index] += len(pieces[turn].encode())
                yield pb.GenerateResponse(delta=delta)
            if turn == len(pieces) - 1:
                yield finished(index)
    yield summary(request, sum(map(len, texts)) * tokens_each)


class BreakingServer(FakeServer):
    """Keeps every request, as a server does within the resume window."""

    def __init__(self, texts: Sequence[Sequence[str]], tokens_each: int = 1) -> None:
        self.texts, self.tokens_each = texts, tokens_each
        self.stops: deque[int] = deque()  # each call in its turn sends so many events and then nothing; none left: all events
        self.refusals: deque[Script | None] = deque()  # of each call of Generate in its turn; None: not refused
        self.resume_refusals: deque[Script] = deque()
        self.resumes: queue.Queue[pb.ResumeRequest] = queue.Queue()
        self.deadlines_s: queue.Queue[float | None] = queue.Queue()  # time left of each call of Generate and Resume
        self.repeats = False  # Resume sends again what came before the offsets
        self.skips = False  # Resume leaves out the first events
        self.kept: dict[str, pb.GenerateRequest] = {}
        super().__init__()

    def Generate(self, request, context):
        self.requests.put(request)
        self.deadlines_s.put(context.time_remaining())
        refusal = self.refusals.popleft() if self.refusals else None
        if refusal is not None:
            yield from refusal(request, context)
        if request.request_id in self.kept:
            context.abort(grpc.StatusCode.ALREADY_EXISTS, "a request with this id is alive")
        self.kept[request.request_id] = request
        yield from self._send(list(events_of(request, self.texts, self.tokens_each)), context)

    def Resume(self, request, context):
        self.resumes.put(request)
        self.deadlines_s.put(context.time_remaining())
        if self.resume_refusals:
            yield from self.resume_refusals.popleft()(request, context)
        if request.request_id not in self.kept:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such request is kept")
        known = {each.output_index: each for each in request.outputs}
        events = list(events_of(self.kept[request.request_id], self.texts, self.tokens_each))
        if not self.repeats:
            events = [event for event in events if self._is_new(event, known)]
        yield from self._send(events[2:] if self.skips else events, context)

    def _is_new(self, event: pb.GenerateResponse, known: dict[int, pb.OutputOffset]) -> bool:
        if not event.HasField("delta") or event.delta.output_index not in known:
            return True
        return not event.delta.is_prompt and event.delta.token_offset >= known[event.delta.output_index].token_offset

    def _send(self, events: list[pb.GenerateResponse], context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        if not self.stops:
            yield from events
            return
        yield from events[: self.stops.popleft()]
        gone = threading.Event()
        if context.add_callback(gone.set):
            gone.wait(WAIT_S)


class Cable:
    """Passes connections on to a port of loopback until they are cut."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._wires: list[_Wire] = []
        self._lock = threading.Lock()
        self.num_connections = 0
        self.refuse_next = 0  # so many connections are dropped as soon as they come

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def cut(self, *, reset: bool = True) -> None:
        """Ends all connections. reset: TCP's, what is under way is lost; else by their end of data."""
        with self._lock:
            wires, self._wires = self._wires, []
        for wire in wires:
            wire.cut(reset)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                with self._lock:
                    self.num_connections += 1
                    refused = self.refuse_next > 0
                    self.refuse_next -= refused
                    if not refused:
                        self._wires.append(_Wire(near, socket.create_connection(("127.0.0.1", self._port))))
                if refused:
                    near.close()


class _Wire:
    """One connection: from its client to the server and back."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self._ends, self._is_cut = (near, far), False
        self._threads = [threading.Thread(target=self._pump, args=ends, daemon=True) for ends in ((near, far), (far, near))]
        for thread in self._threads:
            thread.start()

    def cut(self, reset: bool) -> None:
        self._is_cut = reset
        for end in self._ends:
            if reset:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with contextlib.suppress(OSError):  # the other side was faster
                end.shutdown(socket.SHUT_RD)  # wakes the thread that reads: while it does, `close` ends nothing
        for thread in self._threads:
            thread.join(WAIT_S)
        for end in self._ends:
            end.close()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RD if self._is_cut else socket.SHUT_RDWR)  # a reset is said by `close` alone
