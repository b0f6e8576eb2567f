"""A FakeServer with GenerateMany: what becomes of each request is a function that the test gives."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

import grpc
from google.protobuf import any_pb2

from carousel.v1 import generation_pb2 as pb
from carousel.v1 import tokenization_pb2, tokenization_pb2_grpc
from tests.helpers.fake_server import WAIT_S, FakeServer

Answer = Callable[[pb.GenerateRequest], list[pb.RequestEvent]]


def done(request: pb.GenerateRequest, text: str | None = None) -> list[pb.RequestEvent]:
    """One delta with the prompt in capitals, and an orderly end."""
    said = request.text.upper() if text is None else text
    return [
        pb.RequestEvent(request_id=request.request_id, delta=pb.Delta(token_ids=[1, 2], text=said)),
        pb.RequestEvent(request_id=request.request_id, finished=pb.Finished(reason=pb.FINISH_REASON_LENGTH)),
        pb.RequestEvent(
            request_id=request.request_id,
            summary=pb.Summary(request_id=request.request_id, usage=pb.Usage(prompt_tokens=3, output_tokens=2)),
        ),
    ]


def failed(request: pb.GenerateRequest, code: grpc.StatusCode, message: str, *details: object) -> list[pb.RequestEvent]:
    event = pb.Failed(request_id=request.request_id, code=code.value[0], message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        event.details.append(packed)
    return [pb.RequestEvent(request_id=request.request_id, failed=event)]


class FakeManyServer(FakeServer, tokenization_pb2_grpc.TokenizationServicer):
    """answer: the events of a request. hold: so many requests are collected before any is answered. breaks: after so many
    answers the connection breaks, once. A conversation's prompt is the number of its messages."""

    def __init__(self) -> None:
        super().__init__()
        tokenization_pb2_grpc.add_TokenizationServicer_to_server(self, self._server)
        self.answer: Answer = done
        self.hold = 1
        self.breaks: int | None = None
        self.seen: list[pb.GenerateRequest] = []
        self.calls = 0
        self.gone: queue.Queue[int] = queue.Queue()  # how many had been submitted when a call was cancelled

    def GenerateMany(self, request_iterator, context) -> Iterator[pb.GenerateManyResponse]:
        """Ends, as the real one does, when the caller has closed its side and every request has ended."""
        self.calls += 1
        over, cancelled = threading.Event(), threading.Event()

        def ended() -> None:
            cancelled.set()
            if not over.is_set():
                self.gone.put(len(self.seen))

        context.add_callback(ended)
        held: list[pb.GenerateRequest] = []
        alive: set[str] = set()
        answered = 0
        for command in request_iterator:
            held.append(command.submit.request)
            alive.add(command.submit.request.request_id)
            self.seen.append(command.submit.request)
            if len(held) < self.hold:
                continue
            for request in held:
                events = self.answer(request)
                if any(event.HasField("summary") or event.HasField("failed") for event in events):
                    alive.remove(request.request_id)
                yield pb.GenerateManyResponse(events=events)
                answered += 1
                if answered == self.breaks:
                    self.breaks = None
                    over.set()
                    context.abort(grpc.StatusCode.UNAVAILABLE, "the server is gone")
            held.clear()
        if alive:
            cancelled.wait(WAIT_S)
        else:
            over.set()

    def ApplyChatTemplate(self, request, context):
        return tokenization_pb2.ApplyChatTemplateResponse(token_ids=[len(request.messages)])
