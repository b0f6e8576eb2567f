"""Resumed streams, without processes: cut anywhere and resumed as often as one likes, a stream is what it is undisturbed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carousel.v1 import generation_pb2 as pb
from scheduler.errors import InvalidFieldError, OutOfRangeError
from scheduler.frontend.detokenizer import ByteDetokenizer, ByteTable
from scheduler.frontend.output import Output, StoppableOutput
from scheduler.frontend.resumption import ResumeState, check_resume, resumed_stream, skip
from scheduler.frontend.server.running import Running
from scheduler.frontend.stop_strings import StopStrings
from scheduler.frontend.streams import Outlet, ResumedStream, Stream
from scheduler.frontend.validation import Options
from tests.helpers import tokenizer_files
from tests.helpers.resuming import Had, whole
from wire import EndReason, OutputEnded, RequestStats, ResumeHeader, ResumeReply, SamplingSpec

PROMPT = [5, 6, 7]
STOP_TOKEN = 1


def options(**changes: object) -> Options:
    plain = Options(
        request_id="r",
        priority=2,
        tenant="",
        max_time_ns=0,
        partial_at_deadline=False,
        whole_by_deadline=False,
        cache_salt="",
        max_tokens=50,
        num_outputs=1,
        sampling=SamplingSpec(0.5, 3, 0.9, 0.1, 2**64 - 1, stop_token_ids=(STOP_TOKEN,), logit_bias=((3, -1.5),)),
        stop=(),
        include_stop=False,
        text=True,
        echo=False,
        resume_window_ms=1000,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


@dataclass
class TheCore:
    """Gives each output its tokens, one at a time; ends it after the last, or where a stop string was found."""

    tokens: list[list[int]]
    num_given: list[int] = field(default_factory=list)
    ends: list[OutputEnded | None] = field(default_factory=list)
    truncated: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.num_given, self.ends = [0] * len(self.tokens), [None] * len(self.tokens)

    def truncate(self, handle: int, num_output_tokens: int) -> None:
        if self.ends[handle] is None:
            self.tokens[handle] = self.tokens[handle][:num_output_tokens]
            self.num_given[handle] = num_output_tokens
            self.truncated.add(handle)

    def credit(self, handle: int, num_tokens: int) -> None:
        raise AssertionError("nobody has to report so few")

    @property
    def is_over(self) -> bool:
        return all(end is not None for end in self.ends)

    def step(self, index: int, stream: Stream | None) -> None:
        """The next token of an output, or its end, to whoever reads."""
        if self.ends[index] is not None:
            return
        outlet = stream.outlets[index] if stream is not None else None
        if index in self.truncated:
            self.ends[index] = end = self._end(index, EndReason.STOP, -1)
            if outlet is not None:
                outlet.end(end)
            return
        token = self.tokens[index][self.num_given[index]]
        self.num_given[index] += 1
        if self.num_given[index] == len(self.tokens[index]):
            reason = EndReason.STOP if token == STOP_TOKEN else EndReason.LENGTH
            self.ends[index] = self._end(index, reason, token if token == STOP_TOKEN else -1)
        if outlet is not None:
            outlet.token(token, self.ends[index], self)

    def _end(self, index: int, reason: EndReason, stop_token_id: int) -> OutputEnded:
        stats = RequestStats(prompt_tokens=len(PROMPT), output_tokens=self.num_given[index])
        return OutputEnded(index, reason, stats, stop_token_id)

    def reply(self, state: bytes) -> ResumeReply:
        known = [tokens[:count] for tokens, count in zip(self.tokens, self.num_given, strict=True)]
        return ResumeReply(
            ResumeHeader(1, 0, True, state, tuple(self.ends)),
            prompt=np.array(PROMPT, np.int32),
            tokens=np.array([token for tokens in known for token in tokens], np.int32),
            num_tokens=np.array([len(tokens) for tokens in known], np.int32),
        )


def new_outputs(asked: Options) -> list[Output]:
    def output() -> Output:
        detokenizer = ByteDetokenizer(TABLE)
        if asked.stop:
            return StoppableOutput(detokenizer, StopStrings(asked.stop), asked.include_stop)
        return Output(detokenizer if asked.text else None)

    return [output() for _ in range(asked.num_outputs)]


def echo_of(asked: Options) -> pb.Delta | None:
    return pb.Delta(token_ids=PROMPT, text="prompt", is_prompt=True) if asked.echo else None


class Reader:
    """One stream's writer, and whoever reads it."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self.events: list[pb.GenerateResponse] = []

    def take(self) -> None:
        outlets, _ = self.running.stream.inbox.take()
        for outlet in outlets:
            self.running.take(outlet, self._new)
        if self.running.has_ended and outlets:
            self.running.summarize(self._new().summary)

    def _new(self) -> pb.GenerateResponse:
        self.events.append(pb.GenerateResponse())
        return self.events[-1]


def begin(asked: Options) -> Reader:
    stream = Stream(new_outputs(asked), asked.include_stop, len(PROMPT))
    for outlet in stream.outlets:
        outlet.handle = outlet.index
    return Reader(Running(asked, stream, echo_of(asked), 0))


def resume(core: TheCore, asked: Options, request: pb.ResumeRequest, during: Sequence[int] = ()) -> Reader:
    """during: outputs that bring something while all is replayed."""
    check_resume(request)
    reply = core.reply(ResumeState(asked, 7, "prompt").encode())
    state = ResumeState.decode(reply.header.resume_state)
    stream = resumed_stream(reply, new_outputs(state.options), state.options.include_stop)
    for outlet in stream.outlets:
        outlet.handle = outlet.index

    async def replay() -> None:
        for index in during:
            core.step(index, stream)
        for outlet in stream.outlets:
            await outlet.replay(core)

    asyncio.run(replay())
    echoed = skip(request, stream, state.options.text)
    return Reader(Running(state.options, stream, echo_of(state.options), state.allowed_ns, echoed))


# Of a byte-level vocabulary: letters that stop strings are made of, and the bytes of é and € in pieces.
BACKEND = tokenizer_files.byte_level()
TABLE = ByteTable(BACKEND)
LETTERS = [BACKEND.token_to_id(letter) for letter in "ab"]
PARTS = [token for token in range(BACKEND.get_vocab_size()) if len(TABLE[token]) == 1 and TABLE[token][0] in "é€".encode()]
TOKENS = st.sampled_from(LETTERS * 2 + PARTS)
CUT, STEP, TAKE = "cut", "step", "take"


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_a_stream_cut_anywhere_and_resumed_is_the_undisturbed_one(data: st.DataObject) -> None:
    num_outputs = data.draw(st.integers(1, 2))
    outputs = data.draw(st.lists(st.lists(TOKENS, min_size=1, max_size=12), min_size=num_outputs, max_size=num_outputs))
    for tokens in outputs:
        if data.draw(st.booleans()):
            tokens.append(STOP_TOKEN)
    stop = tuple(data.draw(st.lists(st.text("abé€", min_size=1, max_size=3), max_size=2)))
    asked = options(
        num_outputs=num_outputs,
        stop=stop,
        include_stop=data.draw(st.booleans()),
        text=data.draw(st.booleans()),
        echo=data.draw(st.booleans()),
    )
    undisturbed = begin(asked)
    core = TheCore([list(tokens) for tokens in outputs])
    while not core.is_over:
        for index in range(num_outputs):
            core.step(index, undisturbed.running.stream)
        undisturbed.take()
    expected = Had("r")
    expected.take(undisturbed.events)

    core, reader, had = TheCore([list(tokens) for tokens in outputs]), begin(asked), Had("r")
    indexes = st.integers(0, num_outputs - 1)
    for action in data.draw(st.lists(st.sampled_from([CUT, STEP, STEP, STEP, TAKE]), max_size=40)):
        if action == STEP:
            core.step(data.draw(indexes), reader.running.stream)
        elif action == TAKE:
            reader.take()
        else:
            reader.take()
            had.take(reader.events[: data.draw(st.integers(0, len(reader.events)))])
            for index in data.draw(st.lists(indexes, max_size=6)):  # nobody reads
                core.step(index, None)
            reader = resume(core, asked, had.rest(), data.draw(st.lists(indexes, max_size=3)))
    while not core.is_over:
        for index in range(num_outputs):
            core.step(index, reader.running.stream)
    reader.take()
    had.take(reader.events)
    assert whole(had.got) == whole(expected.got)
    assert had.got.summary is not None and expected.got.summary is not None
    assert had.got.summary.usage == expected.got.summary.usage


def resumed_at(outputs: list[list[int]], request: pb.ResumeRequest, **changes: object) -> Reader:
    asked = options(num_outputs=len(outputs), **changes)
    core = TheCore([*outputs])
    for index, tokens in enumerate(outputs):
        for _ in tokens[:-1]:
            core.step(index, None)
    return resume(core, asked, request)


def offset(index: int = 0, tokens: int = 0, text: int = 0) -> pb.OutputOffset:
    return pb.OutputOffset(output_index=index, token_offset=tokens, text_offset=text)


EURO = [token for byte in "€".encode() for token in PARTS if TABLE[token] == bytes([byte])]


@pytest.mark.parametrize(
    ("offsets", "field"),
    [
        ([offset(tokens=5)], "outputs[0].token_offset"),
        ([offset(tokens=2**32 - 1)], "outputs[0].token_offset"),
        ([offset(text=6)], "outputs[0].text_offset"),
        ([offset(1), offset(0, 4, 3)], "outputs[1].text_offset"),
    ],
)
def test_an_offset_that_was_never_reached_is_out_of_range_by_name(offsets: list[pb.OutputOffset], field: str) -> None:
    """Four tokens and five bytes of text are there: a, and a character of three bytes and its one token more."""
    outputs = [[LETTERS[0], *EURO, LETTERS[0]], [LETTERS[0], LETTERS[0]]]
    with pytest.raises(OutOfRangeError) as caught:
        resumed_at(outputs, pb.ResumeRequest(request_id="r", outputs=offsets))
    assert (caught.value.status, caught.value.field) == ("OUT_OF_RANGE", field)


def test_text_that_is_not_sent_has_no_offset() -> None:
    with pytest.raises(OutOfRangeError) as caught:
        resumed_at([[LETTERS[0]] * 4], pb.ResumeRequest(request_id="r", outputs=[offset(0, 1, 1)]), text=False)
    assert caught.value.field == "outputs[0].text_offset"


def test_text_that_is_held_back_was_never_sent() -> None:
    request = pb.ResumeRequest(request_id="r", outputs=[offset(0, 0, 1)])
    with pytest.raises(OutOfRangeError):
        resumed_at([[LETTERS[0]] * 2], request, stop=("ab",))
    resumed_at([[LETTERS[0]] * 3], request, stop=("ab",))


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.ResumeRequest(), "request_id"),
        (pb.ResumeRequest(request_id="r" * 129), "request_id"),
        (pb.ResumeRequest(request_id="r", outputs=[offset(0), offset(0)]), "outputs[1].output_index"),
        (pb.ResumeRequest(request_id="r", outputs=[offset(0), offset(1)]), "outputs[1].output_index"),
    ],
)
def test_a_request_that_can_not_be_is_refused_by_name(request_: pb.ResumeRequest, field: str) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        resumed_at([[LETTERS[0]] * 4], request_)
    assert caught.value.field == field


def test_a_state_comes_back_whole_and_carries_the_prompt_only_to_echo_it() -> None:
    for echo, text in ((True, "prompt"), (False, "")):
        state = ResumeState(options(stop=("é", "b"), echo=echo), 9, "prompt")
        assert ResumeState.decode(state.encode()) == ResumeState(state.options, 9, text)


def test_what_comes_during_a_replay_comes_after_it() -> None:
    """More tokens than are replayed at once, and an end behind them."""
    reply = TheCore([[LETTERS[0]] * 3000]).reply(b"")
    reply.tokens = np.array([LETTERS[0]] * 1600, np.int32)
    reply.num_tokens = np.array([1600], np.int32)
    stream: ResumedStream = resumed_stream(reply, [Output(None)], False)
    [outlet] = stream.outlets
    core = TheCore([[]])

    async def both() -> None:
        replaying = asyncio.create_task(outlet.replay(core))
        await asyncio.sleep(0)
        for _ in range(4):
            assert isinstance(outlet, Outlet) and outlet.ended is None
            outlet.token(LETTERS[1], None, core)
        outlet.end(OutputEnded(0, EndReason.CANCELLED, RequestStats()))
        await replaying

    asyncio.run(both())
    piece = outlet.output.take()
    assert piece is not None and piece.tokens == [LETTERS[0]] * 1600 + [LETTERS[1]] * 4
    assert outlet.ended is not None and outlet.ended.reason is EndReason.CANCELLED
