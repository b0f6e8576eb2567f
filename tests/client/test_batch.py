"""Many prompts over one connection, against a real gRPC server with scripted answers."""

from __future__ import annotations

import threading

import grpc
import pytest

import client.batch
from client import Carousel, CarouselError, ServerUnreachableError
from tests.helpers.fake_many import FakeManyServer, done, failed
from tests.helpers.fake_server import WAIT_S, FakeServer, bad_request, retry_after


@pytest.fixture
def server():
    with FakeManyServer() as running:
        yield running


@pytest.fixture
def carousel(server, monkeypatch):
    monkeypatch.setattr(client.batch, "_DELAYS_S", (0.01,) * 10)
    with Carousel(target=server.target) as using:
        yield using


def test_results_come_in_the_prompts_order(carousel):
    results = carousel.generate(f"p{i}" for i in range(50))
    assert [(result.index, result.prompt, result.text) for result in results] == [(i, f"p{i}", f"P{i}") for i in range(50)]
    assert {result.finish_reason for result in results} == {"length"}
    assert results[0].token_ids == [1, 2] and results[0].summary.usage.output_tokens == 2


def test_a_text_token_ids_and_an_object_are_one_prompt_each(server, carousel):
    for prompt in ("text", [7, 8], {"prompt": "text"}):
        assert len(carousel.generate(prompt)) == 1
    assert [request.WhichOneof("prompt") for request in server.seen] == ["text", "token_ids", "text"]
    assert list(server.seen[1].token_ids.ids) == [7, 8]
    assert carousel.generate([]) == []


def test_a_prompts_own_parameters_go_before_those_of_all(server, carousel):
    carousel.generate([{"prompt": "a", "max_tokens": 5, "stop": "x"}, "b"], max_tokens=9, temperature=0)
    by_text = {request.text: request for request in server.seen}
    assert (by_text["a"].stopping.max_tokens, by_text["b"].stopping.max_tokens) == (5, 9)
    assert list(by_text["a"].stopping.stop) == ["x"] and by_text["a"].sampling.HasField("temperature")


def test_a_conversation_goes_through_the_servers_template(server, carousel):
    assert carousel.generate({"messages": [{"role": "user", "content": "hi"}] * 3})[0].error is None
    assert list(server.seen[0].token_ids.ids) == [3]


WRONG = [
    ({"prompt": "x", "max_token": 1}, "max_token: there is no such field; did you mean max_tokens?"),
    ({"prompt": "x", "request_id": "a"}, "request_id: there is no such field"),
    ({"prompt": "x", "max_tokens": "5"}, "max_tokens: '5' is not a whole number from 0 to 4294967295"),
    ({"prompt": "x", "seed": -1}, "seed: -1 is not a whole number"),
    ({"prompt": "x", "stop_token_ids": ["a"]}, "stop_token_ids: ['a'] is not a list of token ids"),
    ({"prompt": "x", "priority": "first"}, "priority: 'first' is not one of batch, normal, interactive"),
    ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias: its keys are token ids"),
    ({"prompt": "x", "logit_bias": {"1": "a"}}, "logit_bias: {1: 'a'} is not a number for each token id"),
    ({"prompt": "x", "tools": []}, "tools: it goes with messages"),
    ({"max_tokens": 5}, "it needs either prompt or messages"),
    ({"prompt": "x", "messages": []}, "it needs either prompt or messages"),
    ({"messages": "hi"}, "messages: it is not a list of objects"),
    ({"messages": [{"content": "hi"}]}, "messages: it is not a list of objects"),
    ({"messages": [{"role": "user", "content": [1]}]}, "messages: "),
    ({"prompt": 5}, "prompt: it is not text, nor a list of token ids"),
    ({"prompt": [1, -1]}, "prompt: -1 is not a token id"),
    ({"prompt": [1, True]}, "prompt: True is not a token id"),
]


def test_every_parameter_has_words_for_what_it_holds():
    for name in client.batch._PARAMETERS:
        assert client.batch._expected(name)


@pytest.mark.parametrize(("prompt", "words"), WRONG)
def test_a_prompt_that_can_not_be_sent_fails_alone_and_says_why(carousel, prompt, words):
    wrong, right = carousel.generate([prompt, "x"])
    assert wrong.error.code is grpc.StatusCode.INVALID_ARGUMENT and wrong.error.message.startswith(words)
    assert right.error is None and right.text == "X"


def test_parameters_that_no_request_can_have_are_refused_at_once(carousel):
    for wrong in ({"max_token": 5}, {"max_tokens": -1}, {"request_id": "one for all"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            carousel.generate(["x"], **wrong)
    with pytest.raises(ValueError, match="concurrency"):
        carousel.iterate(["x"], concurrency=0)


def test_so_many_requests_run_at_a_time_and_no_more_prompts_are_taken(server, carousel):
    server.hold = 4  # with fewer at a time there would be no answer
    consumed = most_ahead = 0

    def prompts():
        nonlocal most_ahead
        for i in range(200):
            most_ahead = max(most_ahead, i + 1 - consumed)
            yield f"p{i}"

    for _ in carousel.iterate(prompts(), concurrency=4):
        consumed += 1
    assert (consumed, most_ahead) == (200, 4)


def test_without_a_number_there_are_two_requests_for_each_row_of_the_batch(server, carousel):
    server.hold = 8  # the fake server's batch has 4 rows
    assert len(carousel.generate([f"p{i}" for i in range(16)])) == 16


class WithoutFacts(FakeManyServer):
    def GetServerInfo(self, request, context):
        context.abort(grpc.StatusCode.PERMISSION_DENIED, "an admin key is needed")


def test_where_facts_are_for_administrators_requests_run_all_the_same():
    with WithoutFacts() as server, Carousel(target=server.target) as carousel:
        assert carousel.generate("x")[0].text == "X"


def test_results_come_while_the_next_prompt_is_waited_for(carousel):
    heard = threading.Event()

    def prompts():
        yield "first"
        assert heard.wait(WAIT_S)  # the second exists only once the first one's result has come
        yield "second"

    texts = []
    for result in carousel.iterate(prompts()):
        texts.append(result.text)
        heard.set()
    assert texts == ["FIRST", "SECOND"]


def test_a_refusal_is_a_result_with_its_error(server, carousel):
    def answer(request):
        if request.text == "bad":
            return failed(request, grpc.StatusCode.INVALID_ARGUMENT, "too long", bad_request("prompt", "at most 512"))
        return done(request)

    server.answer = answer
    good, bad, other = carousel.generate(["good", "bad", "other"])
    assert (good.text, other.text, bad.outputs) == ("GOOD", "OTHER", [])
    assert bad.error.code is grpc.StatusCode.INVALID_ARGUMENT and bad.error.fields == {"prompt": "at most 512"}
    assert len(server.seen) == 3


def test_what_is_refused_for_the_moment_is_sent_again(server, carousel):
    def answer(request):
        if len(server.seen) <= 5:
            return failed(request, grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", retry_after(0, 1_000_000))
        return done(request)

    server.answer = answer
    assert [result.text for result in carousel.generate(["a", "b"])] == ["A", "B"]
    assert len({request.request_id for request in server.seen}) == len(server.seen)


def test_what_is_always_refused_for_the_moment_ends(server, carousel):
    server.answer = lambda request: failed(request, grpc.StatusCode.UNAVAILABLE, "no worker", retry_after(0, 1_000_000))
    (result,) = carousel.generate(["a"])
    assert result.error.code is grpc.StatusCode.UNAVAILABLE and len(server.seen) == 11


def test_after_a_broken_connection_what_had_not_ended_is_sent_again(server, carousel):
    server.hold, server.breaks = 4, 2
    results = carousel.generate([f"p{i}" for i in range(6)], concurrency=4)
    assert [result.text for result in results] == [f"P{i}" for i in range(6)]
    sent = [request.text for request in server.seen]
    assert server.calls == 2 and [sent.count(f"p{i}") for i in range(4)] == [1, 1, 2, 2]


def test_a_request_that_breaks_every_connection_does_not_take_the_others_along(server, carousel):
    def answer(request):
        if request.text == "poison":
            server.breaks = 1
        return done(request)[: 1 if request.text == "poison" else None]

    server.answer = answer
    results = carousel.generate(["poison", "good"], concurrency=1)
    assert results[0].error.code is grpc.StatusCode.UNAVAILABLE and results[1].text == "GOOD"


def test_nobody_at_the_target_is_an_error_at_once():
    with FakeServer() as server:
        target = server.target
    with Carousel(target=target) as carousel, pytest.raises(ServerUnreachableError):
        carousel.generate(["a", "b"])


def test_when_the_server_is_gone_for_good_no_result_is_lost(carousel, server):
    def answer(request):
        if request.text < "p3":
            return done(request)
        server._server.stop(0)  # does not wait: an answer might still get out
        return []

    server.answer = answer
    results = carousel.generate([f"p{i}" for i in range(6)], concurrency=1)
    assert [result.text for result in results[:3]] == ["P0", "P1", "P2"]
    assert all(isinstance(result.error, CarouselError) for result in results[3:])


def test_an_error_of_the_prompts_iterator_comes_after_the_results_before_it(carousel):
    def prompts():
        yield "a"
        yield "b"
        raise OSError("no more of the file")

    texts = []
    with pytest.raises(OSError, match="no more of the file"):
        for result in carousel.iterate(prompts()):
            texts.append(result.text)
    assert sorted(texts) == ["A", "B"]


def test_leaving_early_cancels_what_runs(server, carousel):
    server.answer = lambda request: done(request) if request.text == "a" else []
    server.hold = 2  # when "a" is answered, "b" has come
    results = carousel.iterate(["a", "b", "c"], concurrency=2)
    assert next(results).text == "A"
    results.close()
    assert 2 <= server.gone.get(timeout=WAIT_S) <= 3
