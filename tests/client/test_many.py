"""Many requests over one connection, by both clients, against a server that answers in its own order."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from carousel.v1 import generation_pb2 as pb
from client import CarouselClient, CarouselError
from tests.helpers.driven import DrivenClient
from tests.helpers.fake_server import WAIT_S, FakeServer

TOKENS = 5


class ManyServer(FakeServer):
    """Answers each request with TOKENS tokens, no more ahead of its reader than it may; "wait" is never answered."""

    def __init__(self) -> None:
        self.commands: queue.Queue[pb.GenerateManyRequest] = queue.Queue()
        self.breaks = False
        super().__init__()

    def GenerateMany(self, request_iterator, context):
        left: dict[str, int] = {}  # tokens of each request that wait for credit
        for command in request_iterator:
            self.commands.put(command)
            match command.WhichOneof("command"):
                case "submit":
                    request = command.submit.request
                    if request.text == "wait":
                        continue
                    first = min(TOKENS, command.submit.window_tokens or TOKENS)
                    left[request.request_id] = TOKENS - first
                    yield self._tokens(request.request_id, 0, first, left)
                case "credit":
                    request_id = command.credit.request_id
                    if not left[request_id]:
                        continue
                    more = min(left[request_id], command.credit.num_tokens)
                    left[request_id] -= more
                    yield self._tokens(request_id, TOKENS - left[request_id] - more, more, left)
                case "cancel":
                    failed = pb.Failed(code=grpc.StatusCode.CANCELLED.value[0], message="cancelled")
                    yield answer(pb.RequestEvent(request_id=command.cancel.request_id, failed=failed))
            if self.breaks:
                context.abort(grpc.StatusCode.UNAVAILABLE, "so it is")

    def _tokens(self, request_id: str, offset: int, count: int, left: dict[str, int]) -> pb.GenerateManyResponse:
        deltas = [pb.Delta(token_offset=i, token_ids=[i], text=str(i)) for i in range(offset, offset + count)]
        events = [pb.RequestEvent(request_id=request_id, delta=delta) for delta in deltas]
        if not left[request_id]:
            events.append(pb.RequestEvent(request_id=request_id, summary=pb.Summary(request_id=request_id)))
        return answer(*events)


def answer(*events: pb.RequestEvent) -> pb.GenerateManyResponse:
    return pb.GenerateManyResponse(events=events)


@pytest.fixture
def server() -> Iterator[ManyServer]:
    with ManyServer() as running:
        yield running


@pytest.fixture(params=[CarouselClient, DrivenClient], ids=["blocking", "asyncio"])
def client(request: pytest.FixtureRequest, server: ManyServer) -> Iterator[Any]:
    with request.param(server.target) as connected:
        yield connected


@pytest.mark.parametrize("window_tokens", [0, 1, 3])
def test_every_request_gets_its_tokens_and_credit_is_given_for_what_was_taken(server, client, window_tokens):
    with client.generate_many() as many:
        ids = [many.submit(f"p{i}", max_tokens=7, window_tokens=window_tokens) for i in range(20)]
        texts: dict[str, str] = dict.fromkeys(ids, "")
        open_ids = set(ids)
        for event in many:
            texts[event.request_id] += event.delta.text
            if event.HasField("summary"):
                open_ids.remove(event.request_id)
            if not open_ids:
                break
        many.finish()
        assert list(many) == []
    assert len(set(ids)) == 20 and set(texts.values()) == {"01234"}
    submitted = [server.commands.get(timeout=WAIT_S) for _ in range(20)]
    sent = {command.submit.request.request_id: command.submit for command in submitted if command.HasField("submit")}
    assert all(each.request.stopping.max_tokens == 7 and each.window_tokens == window_tokens for each in sent.values())
    assert not any(each.request.scheduling.resume_window_ms for each in sent.values()), "the connection's end ends them"


def test_a_request_is_cancelled_and_the_others_go_on(client):
    with client.generate_many() as many:
        many.submit("wait", request_id="slow")
        many.cancel("slow")
        many.submit("p", request_id="quick")
        many.finish()
        events = list(many)
    assert [(event.request_id, event.failed.message) for event in events if event.HasField("failed")] == [("slow", "cancelled")]
    assert sum(event.request_id == "quick" for event in events) == TOKENS + 1


def test_a_broken_connection_is_an_error_and_nothing_is_sent_again(server, client):
    server.breaks = True
    many = client.generate_many()
    many.submit("p")
    with pytest.raises(CarouselError, match="broke: so it is"):
        list(many)
    assert server.commands.qsize() == 1


def test_a_closed_one_ends_without_a_word(client):
    with client.generate_many() as many:
        many.submit("p")
        next(iter(many))
        many.close()
        list(many)


def test_what_no_field_can_hold_is_said_before_anything_is_sent(server, client):
    with client.generate_many() as many:
        with pytest.raises(ValueError):
            many.submit("p", max_tokens=-1)
        with pytest.raises(TypeError):
            many.submit("p", max_token=1)
    assert server.commands.empty()
