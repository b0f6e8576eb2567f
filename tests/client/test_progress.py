"""What a client knows of a running request, and what it does after a failure: values in, values out, no connection."""

from __future__ import annotations

import random

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carousel.v1 import generation_pb2 as pb
from client import CarouselError, ServerUnreachableError
from client.progress import Progress
from client.requests import make_request, make_resume
from client.result import Collected
from client.retries import Attempts
from tests.helpers.fake_server_breaks import events_of

GONE = ServerUnreachableError(grpc.StatusCode.UNAVAILABLE, "gone")
BROKEN = CarouselError(grpc.StatusCode.UNAVAILABLE, "broke off")
EXISTS = CarouselError(grpc.StatusCode.ALREADY_EXISTS, "it is alive")


def begin(window_ms: int = 30_000, retries: int = 100, until_s: float | None = None, own_id: bool = True) -> Progress:
    return Progress(make_request("p", request_id="r"), window_ms, Attempts(retries, until_s), own_id=own_id)


def delta(token_offset: int, num_tokens: int, text_offset: int, text: str, index: int = 0) -> pb.GenerateResponse:
    token_ids = range(token_offset, token_offset + num_tokens)
    logprobs = [pb.TokenLogprobs(logprob=-token_id) for token_id in token_ids]
    made = pb.Delta(output_index=index, token_offset=token_offset, token_ids=token_ids, text_offset=text_offset, text=text)
    made.logprobs.extend(logprobs)
    return pb.GenerateResponse(delta=made)


def asked(progress: Progress) -> list[tuple[int, int, int]]:
    """What Resume is called with."""
    request, _ = progress.call(0.0)
    assert isinstance(request, pb.ResumeRequest) and request.request_id == "r"
    return [(each.output_index, each.token_offset, each.text_offset) for each in request.outputs]


def test_before_anything_came_the_request_itself_is_sent_again() -> None:
    progress = begin()
    first, _ = progress.call(0.0)
    assert progress.failed(GONE, 0.0, 0.0) == 0.05
    assert progress.call(0.0)[0] is first and isinstance(first, pb.GenerateRequest)


def test_after_something_came_it_is_resumed_with_tokens_and_bytes_of_each_output() -> None:
    progress = begin()
    for event in (delta(0, 2, 0, "né"), delta(2, 3, 3, "轮x"), delta(0, 1, 0, "", index=1)):
        assert progress.take(event)
    assert progress.answered
    progress.failed(BROKEN, 0.0, 0.5)
    assert not progress.answered
    assert asked(progress) == [(0, 5, 7), (1, 1, 0)]


def test_an_echoed_prompt_counts_as_come_and_its_tokens_do_not_count() -> None:
    progress = begin()
    echo = pb.GenerateResponse(delta=pb.Delta(token_ids=[1, 2, 3], text="abc", is_prompt=True))
    assert progress.take(echo)
    progress.failed(BROKEN, 0.0, 0.5)
    assert asked(progress) == [(0, 0, 0)]
    assert not progress.take(echo), "not a second time"
    assert progress.take(delta(0, 1, 0, "d"))


def resumed(progress: Progress) -> Progress:
    progress.failed(BROKEN, 0.0, 0.5)
    return progress


def test_an_overlap_is_cut_by_tokens_and_by_bytes() -> None:
    progress = begin()
    progress.take(delta(0, 3, 0, "né"))
    resumed(progress)
    again = delta(1, 4, 1, "é轮x")
    assert progress.take(again)
    assert list(again.delta.token_ids) == [3, 4] and again.delta.token_offset == 3
    assert [each.logprob for each in again.delta.logprobs] == [-3, -4]
    assert (again.delta.text, again.delta.text_offset) == ("轮x", 3)


def test_text_straddles_tokens_and_each_goes_on_at_its_own_offset() -> None:
    progress = begin()
    progress.take(delta(0, 3, 0, "a"))  # the text of two tokens is held back
    resumed(progress)
    late = delta(3, 1, 1, "bcd")
    assert progress.take(late) and late.delta.text == "bcd" and list(late.delta.token_ids) == [3]
    resumed(progress)
    only_text = delta(4, 0, 4, "e")
    assert progress.take(only_text) and only_text.delta.text == "e"


def test_what_has_come_whole_is_not_given_again() -> None:
    progress = begin()
    finished = pb.GenerateResponse(finished=pb.Finished(reason=pb.FINISH_REASON_LENGTH))
    assert progress.take(delta(0, 2, 0, "ab")) and progress.take(finished)
    resumed(progress)
    assert not progress.take(delta(0, 2, 0, "ab"))
    assert not progress.take(finished)
    assert progress.take(pb.GenerateResponse(summary=pb.Summary(request_id="r")))
    assert progress.summary is not None and not progress.outlives_its_stream


@pytest.mark.parametrize("event", [delta(4, 1, 2, "x"), delta(3, 1, 5, "x")])
def test_a_gap_is_a_loss_of_data(event: pb.GenerateResponse) -> None:
    progress = begin()
    progress.take(delta(0, 3, 0, "ab"))
    with pytest.raises(CarouselError) as raised:
        resumed(progress).take(event)
    assert raised.value.code is grpc.StatusCode.DATA_LOSS


def test_that_it_lives_already_is_the_answer_to_a_broken_attempt() -> None:
    progress = begin()
    progress.failed(GONE, 0.0, 0.5)
    assert progress.failed(EXISTS, 0.0, 0.5) == 0.0
    assert asked(progress) == []


@pytest.mark.parametrize("own_id", [True, False])
def test_that_an_id_is_taken_is_an_error_where_the_attempt_can_not_have_got_through(own_id: bool) -> None:
    """An id that the caller chose may be another request's: its stream is not taken away."""
    progress = begin(own_id=own_id)
    if not own_id:
        progress.failed(GONE, 0.0, 0.5)
    with pytest.raises(CarouselError) as raised:
        progress.failed(EXISTS, 0.0, 0.5)
    assert raised.value is EXISTS


def test_without_a_window_the_dropped_attempt_is_waited_out() -> None:
    progress = begin(window_ms=0)
    progress.failed(GONE, 0.0, 0.5)
    assert progress.failed(EXISTS, 0.0, 0.0) == 0.1
    assert isinstance(progress.call(0.0)[0], pb.GenerateRequest)


def test_a_part_of_the_server_that_died_with_the_request_is_asked_for_it() -> None:
    """It may have kept it: for as long as it is kept, not only for as many attempts as a beginning gets."""
    progress, lost = begin(), CarouselError(grpc.StatusCode.UNAVAILABLE, "gone", retry_after_s=0.2, reason="CORE_LOST")
    assert progress.failed(lost, 0.0, 0.0) == 0.25
    assert asked(progress) == []
    for _ in range(20):
        progress.failed(lost, 1.0, 0.0)
    progress.take(delta(0, 1, 0, "a"))
    assert progress.answered


def test_what_it_did_not_keep_begins_again() -> None:
    progress, lost = begin(), CarouselError(grpc.StatusCode.UNAVAILABLE, "gone", retry_after_s=0.2, reason="CORE_LOST")
    progress.failed(lost, 0.0, 0.0)
    progress.failed(CarouselError(grpc.StatusCode.NOT_FOUND, "not kept"), 0.0, 0.0)
    assert isinstance(progress.call(0.0)[0], pb.GenerateRequest)


def test_an_id_of_the_callers_own_is_not_asked_for() -> None:
    progress = begin(own_id=False)
    progress.failed(CarouselError(grpc.StatusCode.UNAVAILABLE, "gone", retry_after_s=0.2, reason="CORE_LOST"), 0.0, 0.0)
    assert isinstance(progress.call(0.0)[0], pb.GenerateRequest)


def test_a_refusal_in_words_is_no_sign_that_the_attempt_got_through() -> None:
    progress = begin()
    progress.failed(CarouselError(grpc.StatusCode.UNAVAILABLE, "draining", retry_after_s=1.0), 0.0, 0.5)
    with pytest.raises(CarouselError) as raised:
        progress.failed(EXISTS, 0.0, 0.5)
    assert raised.value is EXISTS


@pytest.mark.parametrize("window_ms", [0, 30_000])
@pytest.mark.parametrize("code", ["INTERNAL", "CANCELLED", "ABORTED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"])
def test_only_a_broken_connection_is_resumed(window_ms: int, code: str) -> None:
    """ABORTED: somebody else attached to it. Two that take it from one another would never end."""
    progress = begin(window_ms)
    progress.take(delta(0, 1, 0, "a"))
    error = CarouselError(grpc.StatusCode[code], "so", retry_after_s=1.0)
    with pytest.raises(CarouselError) as raised:
        progress.failed(error, 0.0, 0.5)
    assert raised.value is error and not progress.outlives_its_stream


def test_without_a_window_a_broken_stream_is_the_callers() -> None:
    progress = begin(window_ms=0)
    progress.take(delta(0, 1, 0, "a"))
    with pytest.raises(CarouselError) as raised:
        progress.failed(BROKEN, 0.0, 0.5)
    assert raised.value is BROKEN


@pytest.mark.parametrize("code", ["NOT_FOUND", "OUT_OF_RANGE", "UNIMPLEMENTED"])
def test_what_can_not_be_resumed_ends_with_the_first_error_and_says_why(code: str) -> None:
    progress = begin()
    progress.take(delta(0, 1, 0, "a"))
    resumed(progress)
    with pytest.raises(CarouselError) as raised:
        progress.failed(CarouselError(grpc.StatusCode[code], "not kept"), 1.0, 0.5)
    error = raised.value
    assert error.code is grpc.StatusCode.UNAVAILABLE
    assert error.message == "broke off; it could not be resumed: not kept"


@pytest.mark.parametrize("code", ["CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL"])
@pytest.mark.parametrize("goes_on_first", [False, True])
def test_a_request_ends_after_a_break_as_it_would_have_without(code: str, goes_on_first: bool) -> None:
    progress = begin()
    progress.take(delta(0, 1, 0, "a"))
    resumed(progress)
    if goes_on_first:
        progress.take(delta(1, 1, 1, "b"))
    its_end = CarouselError(grpc.StatusCode[code], "its time was over")
    with pytest.raises(CarouselError) as raised:
        progress.failed(its_end, 1.0, 0.5)
    assert raised.value is its_end


def test_the_server_is_looked_for_as_long_as_it_keeps_the_request() -> None:
    """As often as it takes, whatever `retries` says, and no longer than the window from the break on."""
    progress = begin(window_ms=10_000, retries=0)
    progress.take(delta(0, 1, 0, "a"))
    now_s, tries = 100.0 + progress.failed(BROKEN, 100.0, 0.9), 1
    with pytest.raises(CarouselError, match="it could not be resumed: gone"):
        while True:
            now_s, tries = now_s + progress.failed(GONE, now_s, 0.9), tries + 1
    assert 105.0 < now_s < 110.0 and tries > 5
    progress = begin(window_ms=10_000, until_s=103.0)
    progress.take(delta(0, 1, 0, "a"))
    with pytest.raises(CarouselError):
        now_s = 100.0 + progress.failed(BROKEN, 100.0, 0.9)
        while True:
            now_s += progress.failed(GONE, now_s, 0.9)
    assert now_s < 103.0, "the caller's own time counts, too"


def test_each_call_gets_what_is_left_of_the_callers_time() -> None:
    progress = begin(until_s=110.0)
    assert progress.call(100.0)[1] == 10.0
    progress.take(delta(0, 1, 0, "a"))
    progress.failed(BROKEN, 104.0, 0.5)
    assert progress.call(104.5)[1] == 5.5
    assert begin().call(100.0)[1] is None


def test_each_break_has_a_window_of_its_own() -> None:
    progress = begin(window_ms=10_000)
    for i in range(5):
        progress.take(delta(i, 1, i, "a"))
        assert progress.failed(BROKEN, 9.0 * i, 0.0) == 0.05


def test_what_is_attached_to_is_resumed_from_the_first_call_on() -> None:
    progress = Progress(make_resume("r", {1: (4, 9)}), 30_000, Attempts(2, None))
    assert asked(progress) == [(1, 4, 9)]
    assert progress.failed(GONE, 0.0, 0.0) == 0.05
    late = delta(3, 2, 8, "ab", index=1)
    assert progress.take(late) and list(late.delta.token_ids) == [4] and late.delta.text == "b"
    unknown = CarouselError(grpc.StatusCode.NOT_FOUND, "no")
    with pytest.raises(CarouselError) as raised:
        Progress(make_resume("r", None), 30_000, Attempts(2, None)).failed(unknown, 0.0, 0.5)
    assert raised.value is unknown


def some_server(request: pb.ResumeRequest, events: list[pb.GenerateResponse], draw: random.Random) -> list[pb.GenerateResponse]:
    """What comes after the offsets, and some of what came before them."""
    start = {each.output_index: max(0, each.token_offset - draw.randrange(4)) for each in request.outputs}
    return [
        event
        for event in events
        if not event.HasField("delta")
        or event.delta.token_offset + (not event.delta.is_prompt) * len(event.delta.token_ids)
        >= start.get(event.delta.output_index, 0)
    ]


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_breaks_and_overlaps_anywhere_leave_the_answer_as_it_is(seed: int, outputs: int, each: int, echo: bool) -> None:
    draw = random.Random(seed)
    texts = [
        ["".join(draw.choices("aé轮🎠", k=draw.randrange(4))) for _ in range(draw.randrange(1, 6))] for _ in range(outputs)
    ]
    request = make_request("the prompt", request_id="r", echo=echo)
    whole = Collected("r")
    for event in events_of(request, texts, each):
        whole.take(event)
    progress, got = begin(), Collected("r")
    while progress.summary is None:
        call, _ = progress.call(0.0)
        events = list(events_of(request, texts, each))
        for event in some_server(call, events, draw) if isinstance(call, pb.ResumeRequest) else events:
            if draw.random() < 0.2:
                progress.failed(BROKEN if progress.answered else GONE, 0.0, 0.0)
                break
            if progress.take(event):
                got.take(event)
    assert got.result() == whole.result()
