"""num_outputs > 1 over real gRPC and ZeroMQ: each output has its own tokens, text, end; the request has one summary."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from carousel.v1 import generation_pb2 as pb
from scheduler.frontend.tokenizer import Tokenizer
from tests.helpers.fake_core import FakeCore
from tests.helpers.frontend import Frontend
from tests.helpers.streams import Got, collect, failure, make
from wire import AbortRequest, AddRequest, EndReason, RequestStats, TruncateRequest

EOS = 1  # of the test model


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.load(model_dir)


def tokens_of(add: AddRequest, index: int) -> Iterator[int]:
    """Different ones for each output."""
    return itertools.count(50 + 100 * index)


def held(core: FakeCore, frontend: Frontend, request: pb.GenerateRequest) -> tuple[grpc.Call, AddRequest]:
    """A request whose steps the test makes."""
    core.script = lambda add: tokens_of(add, 0)
    core.sibling_script = tokens_of
    core.hold()
    stream = frontend.generation.Generate(request)
    return stream, core.wait_for(AddRequest, lambda add: add.header.request_id == request.request_id)


def test_each_output_has_its_own_deltas_and_end(core: FakeCore, frontend: Frontend, tokenizer: Tokenizer) -> None:
    core.script, core.sibling_script = lambda add: tokens_of(add, 0), tokens_of
    got = collect(frontend.generation.Generate(make("fox", num_outputs=4, max_tokens=9)))
    assert sorted(got.outputs) == [0, 1, 2, 3]
    for index, output in got.outputs.items():
        assert output.tokens == list(range(50 + 100 * index, 59 + 100 * index))
        assert output.text == tokenizer.decode([EOS + 49, *output.tokens]).removeprefix(tokenizer.decode([EOS + 49]))
        assert output.finished is not None and output.finished.reason == pb.FINISH_REASON_LENGTH


def test_the_summary_counts_the_prompt_once_and_the_tokens_of_all(core: FakeCore, frontend: Frontend) -> None:
    core.stats = RequestStats(
        prompt_tokens=7, cached_tokens=5, recomputed_tokens=2, preemptions=1, queued_ns=1, first_token_ns=4, block_ns=10**9
    )
    summary = collect(frontend.generation.Generate(make(num_outputs=3, max_tokens=6, seed=5))).summary
    assert summary is not None
    usage, timing = summary.usage, summary.timing
    assert (usage.prompt_tokens, usage.cached_tokens, usage.output_tokens, usage.recomputed_tokens) == (7, 5, 18, 6)
    assert (timing.preemptions, timing.block_seconds, timing.seed) == (3, 3.0, 5)
    assert (timing.queued_ns, timing.time_to_first_token_ns) == (1, 4), "times are those of output 0"


def test_handles_are_consecutive_and_nobody_elses(core: FakeCore, frontend: Frontend) -> None:
    core.hold()
    streams = [frontend.generation.Generate(make(num_outputs=count, request_id=f"n-{count}")) for count in (3, 1, 64)]
    adds = [core.wait_for(AddRequest, lambda add, n=count: add.header.request_id == f"n-{n}") for count in (3, 1, 64)]
    handles = [add.header.handle + index for add in adds for index in range(add.header.num_outputs)]
    assert len(set(handles)) == 3 + 1 + 64
    core.hold(False)
    assert [len(collect(stream).outputs) for stream in streams] == [3, 1, 64]


@pytest.mark.parametrize("count", [0, 65])
def test_too_many_outputs_are_refused(count: int, core: FakeCore, frontend: Frontend) -> None:
    error = failure(frontend.generation.Generate(make(num_outputs=count)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and "sampling.num_outputs must be 1 to 64" in error.details()


def test_a_stop_string_ends_its_output_only(core: FakeCore, frontend: Frontend, tokenizer: Tokenizer) -> None:
    stop = tokenizer.encode(" END").ids[1:]
    begin, other = tokenizer.encode("one").ids[1:], tokenizer.encode("x").ids[-1]
    core.script = lambda add: itertools.repeat(other)
    core.sibling_script = lambda add, index: itertools.chain(begin, stop, itertools.repeat(other))
    core.hold()
    stream = frontend.generation.Generate(make(num_outputs=2, stop=["END"], max_tokens=50, request_id="stops"))
    add = core.wait_for(AddRequest, lambda add: add.header.request_id == "stops")
    core.step(len(begin) + len(stop))
    truncate = core.wait_for(TruncateRequest)
    assert truncate.handle == add.header.handle + 1
    core.hold(False)
    got = collect(stream)
    assert (got.outputs[1].text, got.outputs[1].finished.stop_match.stop) == ("one ", "END")
    assert (got.text, len(got.tokens), got.reason) == ("x" * 50, 50, pb.FINISH_REASON_LENGTH)
    assert got.summary.usage.output_tokens == 50 + truncate.num_output_tokens


def test_characters_of_two_outputs_do_not_mix(core: FakeCore, frontend: Frontend, tokenizer: Tokenizer) -> None:
    texts = ["東京 🦊", "é🦊🦊"]
    tokens = [[*tokenizer.encode(text).ids[1:], EOS] for text in texts]
    core.script = lambda add: iter(tokens[0])
    core.sibling_script = lambda add, index: iter(tokens[index])
    got = collect(frontend.generation.Generate(make(num_outputs=2, max_tokens=100)))
    assert [got.outputs[index].text for index in (0, 1)] == texts


def test_echo_sends_the_prompt_before_each_output(core: FakeCore, frontend: Frontend) -> None:
    got = collect(frontend.generation.Generate(make("fox", num_outputs=3, echo=True)))
    prompts = [got.outputs[index].prompt for index in range(3)]
    assert all(prompt is not None and prompt.text == "fox" for prompt in prompts)


def test_an_output_that_ends_early_says_so_at_once_and_the_others_go_on(core: FakeCore, frontend: Frontend) -> None:
    stream, add = held(core, frontend, make(num_outputs=3, max_tokens=40, request_id="early"))
    core.step(2)
    core.end(add.header.handle, EndReason.STOP)
    got = Got()
    while 0 not in got.outputs or got.outputs[0].finished is None:
        got.take(next(stream))
    core.hold(False)
    for message in stream:
        got.take(message)
    assert [len(got.outputs[index].tokens) for index in range(3)] == [2, 40, 40]
    assert got.summary is not None and got.summary.usage.output_tokens == 82


def test_a_dropped_stream_aborts_all_by_the_first_handle(core: FakeCore, frontend: Frontend) -> None:
    stream, add = held(core, frontend, make(num_outputs=3, max_tokens=40, request_id="dropped"))
    core.step()
    core.end(add.header.handle, EndReason.STOP)  # the first output is over already
    next(stream)
    stream.cancel()
    assert core.wait_for(AbortRequest).handle == add.header.handle
    assert core.num_requests() == 0


def test_cancel_ends_all_that_live(core: FakeCore, frontend: Frontend) -> None:
    stream, add = held(core, frontend, make(num_outputs=3, max_tokens=40, request_id="cancelled"))
    core.step()
    core.end(add.header.handle + 1, EndReason.STOP)
    outcome = frontend.generation.Cancel(pb.CancelRequest(request_id="cancelled")).outcome
    assert outcome == pb.CANCEL_OUTCOME_CANCELLED
    got = Got()
    assert failure(stream, got).code() is grpc.StatusCode.CANCELLED
    reasons = [got.outputs[index].finished.reason for index in range(3)]
    cancelled = pb.FINISH_REASON_CANCELLED
    assert reasons == [cancelled, pb.FINISH_REASON_STOP, cancelled] and got.summary is None


def test_an_error_of_one_output_is_the_requests(core: FakeCore, frontend: Frontend) -> None:
    stream, add = held(core, frontend, make(num_outputs=2, max_tokens=3, request_id="fails"))
    core.end(add.header.handle + 1, EndReason.ERROR)
    core.hold(False)
    got = Got()
    assert failure(stream, got).code() is grpc.StatusCode.INTERNAL
    assert len(got.tokens) == 3 and got.outputs[1].finished.reason == pb.FINISH_REASON_ERROR
