"""Generation over real gRPC and ZeroMQ, with a core that invents tokens."""

from __future__ import annotations

import asyncio
import itertools
import re
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from carousel.v1 import generation_pb2 as pb
from scheduler.frontend.tokenizer import Tokenizer
from tests.helpers.fake_core import PATIENCE_S, FakeCore, ready_facts, worker_facts
from tests.helpers.frontend import Frontend, running
from tests.helpers.streams import Got, bad_field, collect, details, failure, make, script
from wire import AbortRequest, AddRequest, EndReason, Refused, TruncateRequest

EOS = 1  # of the test model


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.load(model_dir)


def of_text(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text).ids[1:]  # without BOS


# --------------------------------------------------------------------------------------------------------- what comes


def test_a_stream_is_deltas_finished_summary(core: FakeCore, frontend: Frontend, tokenizer: Tokenizer) -> None:
    got = collect(frontend.generation.Generate(make(request_id="mine", seed=77, max_tokens=9)))
    prompt = tokenizer.encode("The quick brown fox").ids
    assert got.tokens == list(itertools.islice(itertools.cycle(prompt), 9))
    assert got.text == tokenizer.decode([prompt[-1], *got.tokens]).removeprefix(tokenizer.decode([prompt[-1]]))
    assert got.reason == pb.FINISH_REASON_LENGTH and not got.finished.HasField("stop_match")
    usage, timing = got.summary.usage, got.summary.timing
    assert got.summary.request_id == "mine"
    assert (usage.prompt_tokens, usage.output_tokens) == (7, 9)
    assert (timing.queued_ns, timing.prefill_ns, timing.decode_ns, timing.time_to_first_token_ns) == (1, 2, 3, 4)
    assert (timing.block_seconds, timing.seed) == (0.5, 77)


def test_the_core_gets_the_request_as_it_was_meant(core: FakeCore, frontend: Frontend, tokenizer: Tokenizer) -> None:
    sampling = dict(temperature=0.5, top_k=10, top_p=0.5, min_p=0.25, seed=2**64 - 1)
    stopping = dict(max_tokens=5, min_tokens=2, stop_token_ids=[9])
    scheduling = dict(priority=pb.PRIORITY_CLASS_INTERACTIVE, tenant="team-é")
    request = make("fox", request_id="whole", num_outputs=3, **scheduling, **sampling, **stopping)
    collect(frontend.generation.Generate(request))
    add = core.wait_for(AddRequest, lambda add: add.header.request_id == "whole")
    assert add.prompt.tolist() == tokenizer.encode("fox").ids
    assert (add.header.max_tokens, add.header.priority, add.header.tenant, add.header.num_outputs) == (5, 3, "team-é", 3)
    assert (add.header.deadline_ns, add.header.partial_at_deadline, add.header.whole_by_deadline) == (0, False, False)
    spec = add.header.sampling
    assert (spec.temperature, spec.top_k, spec.top_p, spec.min_p, spec.seed) == (0.5, 10, 0.5, 0.25, 2**64 - 1)
    assert (spec.min_tokens, spec.stop_token_ids) == (2, (9, EOS))


def test_token_ids_are_used_as_they_are(core: FakeCore, frontend: Frontend) -> None:
    request = make([7, 300, 5], request_id="ids")
    collect(frontend.generation.Generate(request))
    assert core.wait_for(AddRequest, lambda add: add.header.request_id == "ids").prompt.tolist() == [7, 300, 5]


def test_absent_max_tokens_is_left_to_the_core(core: FakeCore, frontend: Frontend) -> None:
    core.script = script(50, EOS)
    request = pb.GenerateRequest(text="fox", request_id="open")
    assert collect(frontend.generation.Generate(request)).reason == pb.FINISH_REASON_STOP
    assert core.wait_for(AddRequest, lambda add: add.header.request_id == "open").header.max_tokens == 0


def test_the_drawn_seed_and_the_made_id_are_told(core: FakeCore, frontend: Frontend) -> None:
    summary = collect(frontend.generation.Generate(make())).summary
    add = core.wait_for(AddRequest, lambda add: add.header.request_id == summary.request_id)
    assert add.header.sampling.seed == summary.timing.seed


def test_characters_are_never_split(core: FakeCore, frontend: Frontend, tokenizer: Tokenizer) -> None:
    text = "naïve 東京 🦊🦊 \U0001f468\u200d\U0001f469\u200d\U0001f467"
    tokens = of_text(tokenizer, text)
    core.script = script(*tokens, EOS)
    core.hold()
    stream = frontend.generation.Generate(make(max_tokens=100))
    core.wait_for(AddRequest)
    got = Got()
    for _ in tokens:
        core.step()
        got.take(next(stream))  # one token a message, complete characters or none
    assert got.num_deltas == len(tokens)
    core.step()
    for message in stream:
        got.take(message)
    assert (got.text, got.tokens) == (text, tokens)


def test_an_incomplete_character_at_the_end_becomes_a_replacement(
    core: FakeCore, frontend: Frontend, tokenizer: Tokenizer
) -> None:
    tokens = of_text(tokenizer, "\N{SPOUTING WHALE}")
    core.script = script(*tokens)
    got = collect(frontend.generation.Generate(make(max_tokens=len(tokens) - 1)))
    assert (got.text, got.tokens) == ("\N{REPLACEMENT CHARACTER}", tokens[:-1])


def test_no_text_when_none_is_wanted(core: FakeCore, frontend: Frontend) -> None:
    request = make([9, 10, 11], max_tokens=6)
    request.output.text = False
    got = collect(frontend.generation.Generate(request))
    assert (got.tokens, got.text) == ([9, 10, 11, 9, 10, 11], "")


@pytest.mark.parametrize("with_text", [True, False])
@pytest.mark.parametrize("prompt", ["The quick brown fox", [300, 50, 51]])
def test_echo_sends_the_prompt_first(
    prompt: str | list[int], with_text: bool, core: FakeCore, frontend: Frontend, tokenizer: Tokenizer
) -> None:
    request = make(prompt, echo=True)
    request.output.text = with_text
    got = collect(frontend.generation.Generate(request))
    token_ids = tokenizer.encode(prompt).ids if isinstance(prompt, str) else prompt
    text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
    assert got.prompt is not None
    assert (list(got.prompt.token_ids), got.prompt.text) == (token_ids, text if with_text else "")
    assert len(got.tokens) == 12


def test_without_echo_there_is_no_prompt(core: FakeCore, frontend: Frontend) -> None:
    assert collect(frontend.generation.Generate(make())).prompt is None


# ------------------------------------------------------------------------------------------------------------ stopping


def test_an_end_token_is_left_out(core: FakeCore, frontend: Frontend) -> None:
    core.script = script(50, 51, EOS)
    got = collect(frontend.generation.Generate(make()))
    assert got.tokens == [50, 51]
    assert got.reason == pb.FINISH_REASON_STOP and got.finished.stop_match.token_id == EOS
    assert got.summary.usage.output_tokens == 3, "the end token was computed"


def test_include_stop_leaves_the_stop_token_in(core: FakeCore, frontend: Frontend, tokenizer: Tokenizer) -> None:
    core.script = script(50, 51, 52)
    got = collect(frontend.generation.Generate(make(stop_token_ids=[52], include_stop=True)))
    assert (got.tokens, got.text) == ([50, 51, 52], tokenizer.decode([50, 51, 52]))
    assert got.finished.stop_match.token_id == 52


def test_ignore_eos_goes_on_after_the_end_token(core: FakeCore, frontend: Frontend) -> None:
    core.script = script(50, EOS, 51)
    got = collect(frontend.generation.Generate(make(ignore_eos=True, max_tokens=4)))
    assert got.tokens == [50, EOS, 51, 51] and got.reason == pb.FINISH_REASON_LENGTH


@pytest.mark.parametrize("include_stop", [False, True])
@pytest.mark.parametrize("with_text", [False, True])
def test_a_stop_string_across_tokens_ends_the_output(
    include_stop: bool, with_text: bool, core: FakeCore, frontend: Frontend, tokenizer: Tokenizer
) -> None:
    pieces = [of_text(tokenizer, text) for text in ("one ", "two", " EN", "D and", " on")]
    tokens = [token for piece in pieces for token in piece]
    core.script = script(*tokens)
    core.hold()
    request = make(stop=["never", "END"], include_stop=include_stop, max_tokens=100, request_id=f"s{include_stop}{with_text}")
    request.output.text = with_text
    stream = frontend.generation.Generate(request)
    add = core.wait_for(AddRequest, lambda add: add.header.request_id == request.request_id)
    core.step(len(tokens))
    got = collect(stream)
    kept = "one two END" if include_stop else "one two "
    whole = next(n for n in range(len(tokens) + 1) if "END" in tokenizer.decode(tokens[:n]))
    assert got.text == (kept if with_text else "")
    assert got.tokens == tokens[: len(got.tokens)]
    decoded = tokenizer.decode(got.tokens)
    assert len(tokenizer.decode(got.tokens[:-1])) < len(kept) <= len(decoded), "the last token is the last with kept text"
    assert got.reason == pb.FINISH_REASON_STOP and got.finished.stop_match.stop == "END"
    assert got.summary.usage.output_tokens == whole
    truncate = core.wait_for(TruncateRequest)
    assert (truncate.handle, truncate.num_output_tokens) == (add.header.handle, whole)


def test_what_may_become_a_stop_string_is_held_back(core: FakeCore, frontend: Frontend, tokenizer: Tokenizer) -> None:
    tokens = [*of_text(tokenizer, "E"), *of_text(tokenizer, "N"), *of_text(tokenizer, "x")]
    core.script = script(*tokens)
    got = collect(frontend.generation.Generate(make(stop=["END"], max_tokens=3)))
    assert (got.text, got.tokens, got.num_deltas) == ("ENx", tokens, 1)
    assert got.reason == pb.FINISH_REASON_LENGTH


def test_held_back_text_comes_at_the_end(core: FakeCore, frontend: Frontend, tokenizer: Tokenizer) -> None:
    core.script = script(*of_text(tokenizer, "E"), *of_text(tokenizer, "N"))
    got = collect(frontend.generation.Generate(make(stop=["END"], max_tokens=2)))
    assert got.text == "EN" and len(got.tokens) == 2


def test_a_stop_string_in_the_last_token_is_a_stop(core: FakeCore, frontend: Frontend, tokenizer: Tokenizer) -> None:
    core.script = script(*of_text(tokenizer, "x"), *of_text(tokenizer, "!"))
    got = collect(frontend.generation.Generate(make(stop=["!"], max_tokens=2)))
    assert (got.text, got.reason, got.finished.stop_match.stop) == ("x", pb.FINISH_REASON_STOP, "!")


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.GenerateRequest(), "prompt"),
        (make(""), "prompt"),
        (make([]), "prompt"),
        (make([600]), "prompt.token_ids"),
        (make([5] * 256), "prompt"),
        (make([5] * 250, max_tokens=7), "stopping.max_tokens"),
        (make("fox " * 300), "prompt"),
        (make("fox", max_tokens=256), "stopping.max_tokens"),
        (make(top_p=1.5), "sampling.top_p"),
        (make(temperature=float("nan")), "sampling.temperature"),
        (make(priority=9), "scheduling.priority"),
        (make(request_id="x" * 129), "request_id"),
        (make(stop=["x"] * 17), "stopping.stop"),
    ],
)
def test_bad_requests_name_the_field(request_: pb.GenerateRequest, field: str, core: FakeCore, frontend: Frontend) -> None:
    error = failure(frontend.generation.Generate(request_))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert bad_field(error) == field
    assert error.details()


def test_what_is_not_supported_is_said_by_name(core: FakeCore, frontend: Frontend) -> None:
    error = failure(frontend.generation.Generate(make(logprobs=0)))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert bad_field(error) == "output.logprobs" and "output.logprobs" in error.details()


@pytest.mark.parametrize("num_outputs", [1, 3])
@pytest.mark.parametrize(("code", "reason"), [("RESOURCE_EXHAUSTED", "QUEUE_FULL"), ("UNAVAILABLE", "NOT_READY")])
def test_the_cores_refusal_says_when_to_come_again(
    code: str, reason: str, num_outputs: int, core: FakeCore, frontend: Frontend
) -> None:
    numbers = {"waiting_requests": "7"}
    core.refuse = lambda add: Refused(add.header.handle, code, "much to do", "", 1_500_000_000, numbers)
    error = failure(frontend.generation.Generate(make(echo=True, num_outputs=num_outputs)))
    assert (error.code().name, error.details()) == (code, "much to do")
    delay = details(error)["RetryInfo"].retry_delay
    assert (delay.seconds, delay.nanos) == (1, 500_000_000)
    info = details(error)["ErrorInfo"]
    assert (info.domain, info.reason, dict(info.metadata)) == ("carousel.v1", reason, numbers)


@pytest.mark.parametrize(
    ("code", "field", "reason"),
    [
        ("FAILED_PRECONDITION", "", "TOO_LARGE"),
        ("PERMISSION_DENIED", "scheduling.tenant", "UNKNOWN_TENANT"),
        ("DEADLINE_EXCEEDED", "", "DEADLINE"),
        ("INVALID_ARGUMENT", "prompt", ""),
    ],
)
def test_the_cores_refusal_is_passed_on(code: str, field: str, reason: str, core: FakeCore, frontend: Frontend) -> None:
    numbers = {"needed_blocks": "99", "total_blocks": "64"}
    core.refuse = lambda add: Refused(add.header.handle, code, "needs 99 blocks of 64", field, 0, numbers)
    error = failure(frontend.generation.Generate(make()))
    assert (error.code().name, error.details()) == (code, "needs 99 blocks of 64")
    assert "RetryInfo" not in details(error), "to come again is of no use"
    assert not field or bad_field(error) == field
    if reason:
        assert (details(error)["ErrorInfo"].reason, dict(details(error)["ErrorInfo"].metadata)) == (reason, numbers)


def test_an_id_that_is_alive_is_refused(core: FakeCore, frontend: Frontend) -> None:
    core.hold()
    first = frontend.generation.Generate(make(request_id="twice"))
    core.wait_for(AddRequest, lambda add: add.header.request_id == "twice")
    second = frontend.generation.Generate(make(request_id="twice"))
    assert failure(second).code() is grpc.StatusCode.ALREADY_EXISTS
    core.hold(False)
    assert len(collect(first).tokens) == 12


def test_our_own_fault_is_an_id_that_stands_in_the_log(core: FakeCore, frontend: Frontend) -> None:
    core.hold()
    stream = frontend.generation.Generate(make(request_id="unlucky"))
    core.wait_for(AddRequest, lambda add: add.header.request_id == "unlucky")
    core.step()
    core.end_all(EndReason.ERROR, "the worker failed 3 times while it ran")
    got = Got()
    error = failure(stream, got)
    assert error.code() is grpc.StatusCode.INTERNAL and len(got.tokens) == 1
    assert got.reason == pb.FINISH_REASON_ERROR
    found = re.fullmatch(r"internal error ([0-9a-f]{12}); the server's log says more", error.details())
    assert found
    [line] = [line for line in frontend.log().splitlines() if found[1] in line]
    assert "unlucky" in line and "the worker failed 3 times" in line


def test_prompts_are_not_in_the_log(core: FakeCore, frontend: Frontend) -> None:
    collect(frontend.generation.Generate(make("a very secret prompt")))
    failure(frontend.generation.Generate(make("a very secret prompt", top_p=2.0)))
    assert "secret" not in frontend.log()


# -------------------------------------------------------------------------------------------------- leaving and cancelling


def first_delta(core: FakeCore, frontend: Frontend, request_id: str, timeout: float | None = None) -> tuple[Any, AddRequest]:
    """A stream whose first token has come, and whose core does nothing more by itself."""
    core.hold()
    stream = frontend.generation.Generate(make(request_id=request_id, max_tokens=200), timeout=timeout)
    add = core.wait_for(AddRequest, lambda add: add.header.request_id == request_id)
    core.step()
    next(stream)
    return stream, add


def test_a_cancelled_call_aborts_its_request(core: FakeCore, frontend: Frontend) -> None:
    stream, add = first_delta(core, frontend, "left")
    stream.cancel()
    core.wait_for(AbortRequest, lambda abort: abort.handle == add.header.handle)
    assert core.num_requests() == 0


def test_a_closed_connection_aborts_its_requests(core: FakeCore, frontend: Frontend) -> None:
    core.hold()
    with grpc.insecure_channel(frontend.target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        generate = channel.unary_stream(
            "/carousel.v1.Generation/Generate",
            request_serializer=pb.GenerateRequest.SerializeToString,
            response_deserializer=pb.GenerateResponse.FromString,
        )
        streams = [generate(make(request_id=f"gone-{i}")) for i in range(3)]
        handles = {core.wait_for(AddRequest).header.handle for _ in streams}
    assert {core.wait_for(AbortRequest).handle for _ in handles} == handles
    assert core.num_requests() == 0


def test_a_reader_that_leaves_while_it_is_written_to_aborts_its_request(core: FakeCore, frontend: Frontend) -> None:
    core.tell(ready_facts(worker_facts(max_model_len=10**9), max_unread_tokens=0))
    frontend.hear_core()
    stream = frontend.generation.Generate(make([51], request_id="stuck", max_tokens=10**8))
    add = core.wait_for(AddRequest, lambda add: add.header.request_id == "stuck")
    core.wait_until(lambda: core.num_tokens() > 100_000)  # far more than the transport takes from a reader that does not read
    stream.cancel()
    core.wait_for(AbortRequest, lambda abort: abort.handle == add.header.handle)


def test_a_passed_deadline_aborts_the_request(core: FakeCore, frontend: Frontend) -> None:
    stream, add = first_delta(core, frontend, "late", timeout=0.5)
    assert failure(stream).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    core.wait_for(AbortRequest, lambda abort: abort.handle == add.header.handle)


def test_a_finished_stream_aborts_nothing(core: FakeCore, frontend: Frontend) -> None:
    collect(frontend.generation.Generate(make(request_id="done")))
    add = core.wait_for(AddRequest, lambda add: add.header.request_id == "done")
    stream, other = first_delta(core, frontend, "left too")
    stream.cancel()
    abort = core.wait_for(AbortRequest, lambda abort: abort.handle in (add.header.handle, other.header.handle))
    assert abort.handle == other.header.handle


def cancel(frontend: Frontend, request_id: str) -> int:
    return frontend.generation.Cancel(pb.CancelRequest(request_id=request_id), timeout=PATIENCE_S).outcome


def test_cancel_ends_the_stream_and_is_idempotent(core: FakeCore, frontend: Frontend) -> None:
    stream, _ = first_delta(core, frontend, "cancel me")
    assert cancel(frontend, "cancel me") == pb.CANCEL_OUTCOME_CANCELLED
    messages = []
    with pytest.raises(grpc.RpcError) as caught:
        messages.extend(stream)
    assert caught.value.code() is grpc.StatusCode.CANCELLED
    assert messages[-1].finished.reason == pb.FINISH_REASON_CANCELLED
    assert cancel(frontend, "cancel me") == pb.CANCEL_OUTCOME_ALREADY_FINISHED


def test_cancel_of_the_unknown(core: FakeCore, frontend: Frontend) -> None:
    assert cancel(frontend, "who?") == pb.CANCEL_OUTCOME_NOT_FOUND
    with pytest.raises(grpc.RpcError) as caught:
        cancel(frontend, "")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT and bad_field(caught.value) == "request_id"


# ---------------------------------------------------------------------------------------------------------- many and big


def test_a_slow_reader_gets_merged_deltas_with_the_same_content(model_dir: Path) -> None:
    num_tokens = 40_000
    facts = ready_facts(worker_facts(max_model_len=100_000), max_unread_tokens=0)
    with FakeCore(facts) as core, running(model_dir, core.endpoint) as frontend:
        frontend.wait_serving()
        stream = frontend.generation.Generate(make([50, 51, 52], max_tokens=num_tokens))
        core.wait_for(AddRequest)
        core.wait_until(core.is_idle)  # all tokens have been sent before the first is read
        got = collect(stream)
    assert got.tokens == list(itertools.islice(itertools.cycle([50, 51, 52]), num_tokens))
    assert got.num_deltas < num_tokens


def test_a_10_mb_prompt_is_refused_at_once_and_disturbs_nobody(
    core: FakeCore, frontend: Frontend, tokenizer: Tokenizer
) -> None:
    stream, _ = first_delta(core, frontend, "beside it")
    error = failure(frontend.generation.Generate(make("x " * 5_000_000)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and bad_field(error) == "prompt"
    assert "10000000 characters" in error.details()
    error = failure(frontend.generation.Generate(make([5] * 3_000_000)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and "3000000 tokens" in error.details()
    core.hold(False)
    assert len(list(stream)) > 1


def test_a_prompt_too_long_for_inline_tokenizing_is_served(core: FakeCore, frontend: Frontend, tokenizer: Tokenizer) -> None:
    text = "def fibonacci(n):\n" * 120
    core.tell(ready_facts(worker_facts(max_model_len=5000)))
    frontend.hear_core()
    collect(frontend.generation.Generate(make(text, request_id="long", max_tokens=3)))
    add = core.wait_for(AddRequest, lambda add: add.header.request_id == "long")
    assert add.prompt.tolist() == tokenizer.encode(text).ids and len(text) > 2000


def test_a_burst_of_2000_calls_is_served(core: FakeCore, frontend: Frontend) -> None:
    """They arrive faster than they are taken up; the library's default would shed half of them."""
    core.tell(ready_facts(worker_facts(max_model_len=5000)))
    frontend.hear_core()
    raw = make("def fibonacci(n): " * 100, max_tokens=2).SerializeToString()

    async def burst() -> list[int]:
        async with grpc.aio.insecure_channel(frontend.target) as channel:
            generate = channel.unary_stream("/carousel.v1.Generation/Generate")

            async def count_messages() -> int:
                return len([message async for message in generate(raw)])

            return await asyncio.gather(*[count_messages() for _ in range(2000)])

    counts = asyncio.run(burst())
    assert len(counts) == 2000 and min(counts) >= 3  # at least a delta, finished, summary
