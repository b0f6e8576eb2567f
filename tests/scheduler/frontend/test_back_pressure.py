"""A reader that stops reading: the core hears what he took, no more than it allows gathers here, and nothing is lost.

The transport takes some on top: 100 KB a stream when the reader's side keeps its window, about 5 MB when it widens it (gRPC's
default). So the texts here are far longer: a token has 200 characters.
"""

from __future__ import annotations

import itertools
import resource
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from tokenizers import AddedToken

from carousel.v1 import generation_pb2 as pb
from carousel.v1 import generation_pb2_grpc
from scheduler.frontend.output import Output
from scheduler.frontend.streams import Stream
from scheduler.frontend.tokenizer import Tokenizer
from tests.helpers import tokenizer_files
from tests.helpers.fake_core import FakeCore, ready_facts, worker_facts
from tests.helpers.frontend import Frontend, running
from tests.helpers.streams import Got, collect, make
from wire import AddRequest, Credit, EndReason, OutputEnded, RequestStats

MAX_UNREAD = 64
NUM_TOKENS = 12_000  # 2.4 MB of text
WORDS = [chr(ord("a") + i) * 200 for i in range(16)]


@pytest.fixture(scope="module")
def long_words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose last tokens are WORDS."""
    backend = tokenizer_files.byte_level(vocab_size=300)
    backend.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    return tokenizer_files.save(backend, tmp_path_factory.mktemp("long"))


@pytest.fixture(scope="module")
def tokens(long_words: Path) -> list[int]:
    tokenizer = Tokenizer.load(long_words)
    return [tokenizer.encode(word).ids[0] for word in WORDS]


@pytest.fixture
def slow_core() -> Iterator[FakeCore]:
    with FakeCore(ready_facts(worker_facts(max_model_len=10**6), max_unread_tokens=MAX_UNREAD)) as core:
        yield core


@pytest.fixture
def frontend(slow_core: FakeCore, long_words: Path) -> Iterator[Frontend]:
    with running(long_words, slow_core.endpoint) as frontend:
        frontend.wait_serving()
        yield frontend


@pytest.fixture
def generation(frontend: Frontend) -> Iterator[generation_pb2_grpc.GenerationStub]:
    """By a connection that keeps its windows."""
    with grpc.insecure_channel(frontend.target, [("grpc.http2.bdp_probe", 0)]) as channel:
        yield generation_pb2_grpc.GenerationStub(channel)


def wait_stalled(core: FakeCore, frontend: Frontend) -> int:
    """Until no output gets a token any more; returns how many were made. Whoever still takes some shows it meanwhile: each
    question is answered after all that came before it."""
    made = -1
    while True:
        core.wait_until(core.is_stalled)
        for _ in range(20):
            frontend.hear_core()
        if (now := core.call(core.num_tokens)) == made:
            return made
        made = now


@pytest.mark.parametrize("num_outputs", [1, 2])
def test_a_reader_that_stops_is_waited_for_and_gets_every_byte_once(
    num_outputs: int,
    slow_core: FakeCore,
    frontend: Frontend,
    generation: generation_pb2_grpc.GenerationStub,
    tokens: list[int],
) -> None:
    slow_core.script = lambda add: itertools.cycle(tokens)
    slow_core.sibling_script = lambda add, index: itertools.cycle(reversed(tokens))
    stream = generation.Generate(make("x", max_tokens=NUM_TOKENS // num_outputs, num_outputs=num_outputs))
    got = Got()
    got.take(next(stream))
    made = wait_stalled(slow_core, frontend)
    assert made < NUM_TOKENS // 2, "the core has stopped long before the end"
    for message in itertools.islice(stream, 3):
        got.take(message)
    assert not slow_core.call(slow_core.is_idle)
    for message in stream:
        got.take(message)
    for index, order in enumerate((WORDS, WORDS[::-1])[:num_outputs]):
        expected = "".join(itertools.islice(itertools.cycle(order), NUM_TOKENS // num_outputs))
        assert got.outputs[index].text == expected
    assert sum(len(output.text) for output in got.outputs.values()) > 2_000_000


def test_others_go_on_while_one_does_not_read(
    slow_core: FakeCore, frontend: Frontend, generation: generation_pb2_grpc.GenerationStub, tokens: list[int]
) -> None:
    slow_core.script = lambda add: itertools.cycle(tokens)
    stuck = generation.Generate(make("x", max_tokens=NUM_TOKENS))
    next(stuck)
    wait_stalled(slow_core, frontend)
    for _ in range(3):
        assert len(collect(generation.Generate(make("x", max_tokens=5 * MAX_UNREAD))).tokens) == 5 * MAX_UNREAD
    stuck.cancel()
    slow_core.wait_until(slow_core.is_idle)


def test_memory_does_not_grow_with_readers_that_stop(slow_core: FakeCore, frontend: Frontend, tokens: list[int]) -> None:
    """Eight streams of 180 MB: what gathers for each is what the transport takes and 64 tokens."""
    slow_core.script = lambda add: itertools.cycle(tokens)
    before = resident_bytes(frontend)
    streams = [frontend.generation.Generate(make("x", max_tokens=900_000)) for _ in range(8)]
    for stream in streams:
        next(stream)
    wait_stalled(slow_core, frontend)
    assert resident_bytes(frontend) - before < 100 << 20
    for stream in streams:
        stream.cancel()


def resident_bytes(frontend: Frontend) -> int:
    return int(Path(f"/proc/{frontend.process.pid}/statm").read_text().split()[1]) * resource.getpagesize()


def test_what_is_held_back_for_a_stop_string_does_not_stall_the_output(
    slow_core: FakeCore, frontend: Frontend, tokens: list[int]
) -> None:
    """Text-free tokens wait for the next one with text, far more of them than may be unread."""
    silent = 2  # <pad>
    slow_core.script = lambda add: itertools.chain(itertools.repeat(silent, 10 * MAX_UNREAD), itertools.repeat(tokens[0]))
    got = collect(frontend.generation.Generate(make("x", stop=["END"], max_tokens=10 * MAX_UNREAD + 1)))
    assert (len(got.tokens), got.text) == (10 * MAX_UNREAD + 1, WORDS[0])


def test_short_outputs_cost_no_message(slow_core: FakeCore, frontend: Frontend) -> None:
    collect(frontend.generation.Generate(make("x", max_tokens=MAX_UNREAD // 4, num_outputs=8)))
    add = slow_core.wait_for(AddRequest)
    collect(frontend.generation.Generate(make("x", max_tokens=2 * MAX_UNREAD)))
    credit = slow_core.wait_for(Credit)
    first = range(add.header.handle, add.header.handle + 8)
    assert not set(credit.handles.tolist()) & set(first) and credit.num_tokens.min() >= MAX_UNREAD // 4


def test_without_a_bound_nothing_is_reported(slow_core: FakeCore, frontend: Frontend) -> None:
    slow_core.tell(ready_facts(worker_facts(max_model_len=10**6), max_unread_tokens=0))
    frontend.hear_core()
    collect(frontend.generation.Generate(make("x", max_tokens=3000)))
    slow_core.wait_for(AddRequest)
    slow_core.tell(slow_core.facts)
    frontend.hear_core()
    assert not any(isinstance(message, Credit) for message in slow_core.all_heard())


# --------------------------------------------------------------------------------------------------- the counts alone


class Told:
    """What a stream tells its core."""

    def __init__(self) -> None:
        self.credits: list[tuple[int, int]] = []

    def truncate(self, handle: int, num_output_tokens: int) -> None:
        raise AssertionError

    def credit(self, handle: int, num_tokens: int) -> None:
        self.credits.append((handle, num_tokens))


def test_tokens_are_reported_once_there_are_enough_of_them() -> None:
    told, stream = Told(), Stream([Output(None)], include_stop=False)
    [outlet] = stream.outlets
    outlet.handle = 7
    for i in range(1, 11):
        outlet.token(i, None, told)
        outlet.accepted(outlet.num_received, 4, told)
    assert told.credits == [(7, 4), (7, 4)]
    outlet.accepted(outlet.num_received, 4, told)
    assert told.credits == [(7, 4), (7, 4)], "nothing twice"


def test_an_output_that_has_ended_is_not_reported() -> None:
    told, stream = Told(), Stream([Output(None)], include_stop=False)
    [outlet] = stream.outlets
    for i in range(9):
        outlet.token(i, None, told)
    outlet.token(9, OutputEnded(0, EndReason.LENGTH, RequestStats()), told)
    outlet.accepted(10, 4, told)
    assert told.credits == []


@pytest.mark.parametrize("max_unread", [1, 2, 3, 4, 5, 7, 8, 64, 1024])
def test_a_reader_that_takes_everything_never_stalls_the_core(max_unread: int, long_words: Path) -> None:
    """The smallest bounds, too: what is not reported is always less than what may be unread."""
    facts = ready_facts(worker_facts(max_model_len=10**6), max_unread_tokens=max_unread)
    with FakeCore(facts) as core, running(long_words, core.endpoint) as frontend:
        frontend.wait_serving()
        got = collect(frontend.generation.Generate(make("x", max_tokens=3 * max_unread + 5)))
    assert len(got.tokens) == 3 * max_unread + 5 and got.reason == pb.FINISH_REASON_LENGTH
