"""What a caller may ask of the scheduler, on a live server with a simulated worker: several outputs, deadlines, another policy,
why a request waits; and a reader that stops reading."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from tokenizers import AddedToken

from carousel.v1 import control_pb2, inspect_pb2
from carousel.v1 import generation_pb2 as pb
from client.api import CarouselClient
from client.errors import CarouselError
from tests.helpers import tokenizer_files
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.server import Server, eventually, running
from tests.helpers.streams import Got, collect, make

BLOCK = 16
ENDLESS = 1_000_000  # tokens: no test waits for the last one
MAX_UNREAD = 200
NUM_ROWS = 8


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token in five has 4,000 characters, so that a megabyte of text is soon made."""
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder, "llama", vocab_size=384, max_position_embeddings=2 * ENDLESS)
    backend = tokenizer_files.byte_level(vocab_size=300)
    backend.add_tokens([AddedToken(f"{i:04}" * 1000, normalized=False) for i in range(84)])
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def server(model_dir: Path) -> Iterator[Server]:
    options = ("--device", "sim", "--num-blocks", "200000", "--max-batch-rows", str(NUM_ROWS))
    with running("--model", str(model_dir), *options, "--max-unread-tokens", str(MAX_UNREAD)) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[CarouselClient]:
    with CarouselClient(server.target) as client:
        yield client
        assert eventually(lambda: client.load().held_blocks == 0 and client.load().running_requests == 0)
        states = set(client.block_tables().states)
        assert states <= {inspect_pb2.BLOCK_STATE_FREE, inspect_pb2.BLOCK_STATE_CACHED}


def endless(**options: object) -> pb.GenerateRequest:
    return make("x = 1", max_tokens=ENDLESS, ignore_eos=True, **options)


def test_several_outputs_are_those_of_the_seed_and_share_the_prompt(client: CarouselClient) -> None:
    prompt = [7 + i % 250 for i in range(60 * BLOCK + 5)]
    with client.stream(make(prompt, num_outputs=4, ignore_eos=True, max_tokens=ENDLESS, request_id="four")) as stream:
        started: set[int] = set()
        while len(started) < 4:
            started.add(next(stream).delta.output_index)
        told = client.block_tables()
        tables = [table for table in told.tables if table.request_id == "four"]
        assert sorted(table.output_index for table in tables) == [0, 1, 2, 3]
        assert len({tuple(table.blocks[:60]) for table in tables}) == 1, "all hold the same blocks of the prompt"
        assert all(told.ref_counts[block - 1] == 4 for block in tables[0].blocks[:60])
        assert len({table.blocks[60] for table in tables}) == 4, "each has written to a block of its own"
    assert eventually(lambda: client.load().held_blocks == 0)
    got = collect(client.stream(make(prompt, num_outputs=4, ignore_eos=True, max_tokens=40, seed=3)))
    assert len({tuple(output.tokens) for output in got.outputs.values()}) == 4
    assert all(len(output.tokens) == 40 for output in got.outputs.values())
    usage = got.summary.usage
    assert (usage.prompt_tokens, usage.output_tokens) == (len(prompt), 160)
    assert usage.cached_tokens == 60 * BLOCK, "the request before has left the prompt's blocks"
    again = collect(client.stream(make(prompt, ignore_eos=True, max_tokens=40, seed=3)))
    assert again.tokens == got.tokens, "output 0 is what it is alone"


def test_a_stream_dropped_after_its_first_output_ended_is_forgotten(client: CarouselClient) -> None:
    """The first handle is over then; the abort names it all the same."""
    alone = collect(client.stream(make("y", num_outputs=2, ignore_eos=True, max_tokens=300, seed=11)))
    first, second = alone.outputs[0].text, alone.outputs[1].text
    stop = next(first[i : i + 8] for i in range(len(first)) if first[i : i + 8] not in second)
    with client.stream(make("y", num_outputs=2, ignore_eos=True, max_tokens=ENDLESS, seed=11, stop=[stop])) as stream:
        while 0 not in stream.finished:
            next(stream)
        assert 1 not in stream.finished
    assert eventually(lambda: client.load().running_requests == 0)


def test_a_cache_salt_keeps_to_itself(client: CarouselClient) -> None:
    prompt = [9 + i % 200 for i in range(20 * BLOCK + 1)]

    def cached(salt: str | None) -> int:
        stream = client.generate(prompt, max_tokens=2, ignore_eos=True, cache_salt=salt)
        return collect(stream).summary.usage.cached_tokens

    assert [cached("a"), cached("a"), cached("b"), cached(None), cached("a")] == [0, 20 * BLOCK, 0, 0, 20 * BLOCK]


def test_time_that_is_over_returns_what_there_is(client: CarouselClient) -> None:
    request = endless(max_time_ms=400, on_timeout=pb.ON_TIMEOUT_RETURN_PARTIAL, num_outputs=2)
    got = collect(client.stream(request))
    assert {output.finished.reason for output in got.outputs.values()} == {pb.FINISH_REASON_DEADLINE}
    assert got.tokens and got.summary.usage.output_tokens >= 2


def test_time_that_is_over_is_a_failure_after_the_tokens(client: CarouselClient) -> None:
    got = Got()
    with pytest.raises(CarouselError) as caught:
        for message in client.stream(endless(max_time_ms=300, whole_by_deadline=False)):
            got.take(message)
    error = caught.value
    assert (error.code, error.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE")
    assert error.metadata["allowed_ms"] == "300" and int(error.metadata["output_tokens"]) >= len(got.tokens) > 0


def test_a_whole_length_that_can_not_come_in_time_is_refused_with_the_estimate(client: CarouselClient) -> None:
    collect(client.stream(make("warm up", max_tokens=200, ignore_eos=True)))  # so that there are step costs
    with pytest.raises(CarouselError) as caught:
        list(client.stream(endless(max_time_ms=500)))
    error = caught.value
    assert (error.code, error.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE")
    assert int(error.metadata["estimate_ms"]) > 500


def test_the_policy_changes_under_running_requests(client: CarouselClient) -> None:
    """All of them are read all the time: a static batch waits for a reader who does not."""
    got = [Got() for _ in range(12)]

    def read(i: int) -> None:
        for message in client.stream(make(f"{i}", max_tokens=500, ignore_eos=True, seed=i)):
            got[i].take(message)

    readers = [threading.Thread(target=read, args=(i,)) for i in range(len(got))]
    for reader in readers:
        reader.start()
    for number, policy in enumerate(("static", "prefill_first", "continuous", "static", "continuous"), 1):
        assert eventually(lambda: sum(len(taken.tokens) for taken in got) > 300 * number)  # noqa: B023
        assert client.set_policy(policy) == policy == client.server_info().policy
    for reader in readers:
        reader.join(60)
    assert [len(taken.tokens) for taken in got] == [500] * len(got)
    with pytest.raises(CarouselError) as caught:
        client.set_policy("fifo")
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT and "continuous" in caught.value.message
    assert client.server_info().policy == "continuous"


def test_waiting_requests_are_listed_and_explained(client: CarouselClient) -> None:
    """All rows are taken by requests that go on; whoever comes then waits."""
    running = [client.stream(endless(request_id=f"runs-{i}", tenant="a")) for i in range(NUM_ROWS)]
    for stream in running:
        next(stream)
    waiting = [client.stream(endless(request_id=f"waits-{i}", tenant="b", num_outputs=2)) for i in range(3)]
    assert eventually(lambda: client.load().waiting_requests >= 3)
    assert eventually(lambda: client.list_requests().total_requests == NUM_ROWS + 3)
    page = client.list_requests(4)
    listed = list(page.requests)
    while page.next_page_token:
        page = client.list_requests(4, page.next_page_token)
        listed += page.requests
    assert {request.request_id for request in listed[:NUM_ROWS]} == {f"runs-{i}" for i in range(NUM_ROWS)}
    assert all(request.state == control_pb2.REQUEST_STATE_RUNNING for request in listed[:NUM_ROWS])
    assert {request.request_id for request in listed[NUM_ROWS:]} == {f"waits-{i}" for i in range(3)}
    last = listed[-1]
    assert (last.state, last.tenant, last.num_outputs) == (control_pb2.REQUEST_STATE_WAITING, "b", 2)
    told = client.explain("waits-2")
    assert told.state == control_pb2.REQUEST_STATE_WAITING and told.text
    assert told.hindrance in (control_pb2.HINDRANCE_ORDER, control_pb2.HINDRANCE_ROWS, control_pb2.HINDRANCE_SIBLING)
    assert client.explain("runs-0").state in (control_pb2.REQUEST_STATE_RUNNING, control_pb2.REQUEST_STATE_PREEMPTED)
    for stream in running + waiting:
        stream.close()
    assert eventually(lambda: client.list_requests().total_requests == 0)
    ended = client.explain("runs-0")
    assert ended.state == control_pb2.REQUEST_STATE_ENDED and ended.finish_reason == pb.FINISH_REASON_CANCELLED
    with pytest.raises(CarouselError) as caught:
        client.explain("never heard of")
    assert caught.value.code is grpc.StatusCode.NOT_FOUND


def test_a_reader_that_stops_is_waited_for_and_gets_every_byte_once(client: CarouselClient) -> None:
    num_tokens = 2_000  # 1.7 MB

    def request(request_id: str) -> pb.GenerateRequest:
        return make("slow", max_tokens=num_tokens, ignore_eos=True, seed=5, request_id=request_id)

    got = Got()
    stream = client.stream(request("stopped"))
    got.take(next(stream))
    assert eventually(lambda: client.explain("stopped").hindrance == control_pb2.HINDRANCE_READER)
    undisturbed = collect(client.stream(request("other")))
    told = client.explain("stopped")
    assert told.usage.output_tokens < num_tokens // 2, "it is not computed for nobody"
    assert told.hindrance == control_pb2.HINDRANCE_READER, "the other one has gone on alone"
    for message in stream:
        got.take(message)
    assert got.text == undisturbed.text and got.tokens == undisturbed.tokens
    assert len(got.text) > 1 << 20 and len(got.tokens) == num_tokens
