"""A whole server with a journal: its scheduler core killed at any moment, every stream goes on to the tokens of an undisturbed
run, none lost, none twice."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import grpc
import pytest

from client import CarouselClient, CarouselError
from client.result import Result
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.journalled import (
    LONG,
    PATIENCE_S,
    asked,
    connected,
    kill_core,
    nothing_is_held,
    options_of,
    resumed,
    undisturbed,
)
from tests.helpers.resuming import Had, whole
from tests.helpers.server import Server, eventually, kill, running
from tests.helpers.streams import collect, failure


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama", tokenizer=True, max_position_embeddings=2048)


@pytest.fixture(scope="module")
def shared(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(*options_of(model_dir, tmp_path_factory.mktemp("a") / "journal")) as server:
        yield server


@pytest.fixture
def server(shared: Server) -> Iterator[Server]:
    """Ready again after what the test before has done to it, and idle. Its log is shown when the test fails."""
    assert eventually(lambda: nothing_is_held(shared), PATIENCE_S), shared.log()
    with CarouselClient(shared.target) as client:
        client.wait_ready(PATIENCE_S)
    yield shared
    print(shared.log())


class Load:
    """Requests of the Python client, each in a thread of its own."""

    def __init__(self, client: CarouselClient, count: int, max_tokens: int = LONG) -> None:
        self._client, self._max_tokens = client, max_tokens
        self.results: dict[int, Result | CarouselError] = {}
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(count)]
        for thread in self._threads:
            thread.start()

    def wait(self) -> dict[int, list[tuple[list[int], str]]]:
        """Tokens and text of each request's outputs. Raises what a request failed with."""
        for thread in self._threads:
            thread.join(5 * PATIENCE_S)
        failures = [result for result in self.results.values() if isinstance(result, CarouselError)]
        if failures:
            raise failures[0]
        return {
            number: [(list(output.token_ids), output.text) for output in result.outputs]
            for number, result in self.results.items()
            if isinstance(result, Result)
        }

    def _run(self, number: int) -> None:
        try:
            self.results[number] = self._client.generate(
                f"def function_{number}(",
                max_tokens=self._max_tokens,
                temperature=0.9 if number % 2 else 0.0,
                seed=number,
                num_outputs=2 if number % 5 == 0 else 1,
                stop=["zz", "the end"] if number % 3 == 0 else [],
                ignore_eos=True,
            ).result()
        except CarouselError as error:
            self.results[number] = error


def test_all_streams_of_the_client_go_on_after_the_core_was_killed(server: Server) -> None:
    with CarouselClient(server.target) as client:
        expected = Load(client, 24).wait()
        load = Load(client, 24)
        assert eventually(lambda: server.load().running_requests > 8)
        kill_core(server)
        assert load.wait() == expected
    assert "requests that go on" in server.log()
    assert eventually(lambda: nothing_is_held(server), PATIENCE_S), server.load()


@pytest.mark.slow
def test_ten_deaths_in_a_row_change_no_token(server: Server) -> None:
    with CarouselClient(server.target, resume_window_ms=300_000, retries=50) as client:
        expected = Load(client, 30, max_tokens=1900).wait()
        load = Load(client, 30, max_tokens=1900)
        for _ in range(10):
            assert eventually(lambda: is_computing(server), PATIENCE_S), server.log()
            kill_core(server)
        assert load.wait() == expected
    assert eventually(lambda: nothing_is_held(server), PATIENCE_S), server.load()


def is_computing(server: Server) -> bool:
    with contextlib.suppress(grpc.RpcError):
        return server.load().output_tokens > 0
    return False


def test_a_caller_gets_exactly_the_rest_at_its_offsets(server: Server) -> None:
    expected, had = undisturbed(server, num_outputs=2, echo=True), Had("rest")
    with connected(server.target) as generation:
        stream = generation.Generate(asked("rest", num_outputs=2, echo=True))
        had.take(islice(stream, 9))
        kill_core(server)
        with contextlib.suppress(grpc.RpcError):
            had.take(stream)
        for num_messages in (3, 50):
            had.take(islice(resumed(generation, had), num_messages))
        kill_core(server)
        had.take(resumed(generation, had))
    assert whole(had.got) == whole(expected)


def test_what_had_ended_can_still_be_fetched(server: Server) -> None:
    expected = undisturbed(server, max_tokens=20)
    with connected(server.target) as generation:
        assert whole(collect(generation.Generate(asked("ended", max_tokens=20)))) == whole(expected)
        kill_core(server)
        had = Had("ended")
        had.take(resumed(generation, had))
    assert whole(had.got) == whole(expected)


def test_a_front_end_that_dies_with_the_core_changes_nothing(server: Server) -> None:
    expected, had = undisturbed(server), Had("both")
    frontends = server.children()["frontend"]
    with connected(server.target) as generation:
        stream = generation.Generate(asked("both"))
        had.take(islice(stream, 5))
        for frontend in frontends:
            kill(frontend)
        kill_core(server)
        with contextlib.suppress(grpc.RpcError):
            had.take(stream)
    assert eventually(lambda: len(set(server.children().get("frontend", [])) - set(frontends)) == 1, PATIENCE_S)
    with connected(server.target) as generation:
        had.take(resumed(generation, had))
    assert whole(had.got) == whole(expected)


def test_without_a_window_a_request_ends_with_the_core(server: Server) -> None:
    with connected(server.target) as generation:
        stream = generation.Generate(asked())
        first = next(stream)
        kill_core(server)
        assert failure(itertools.chain([first], stream)).code() is grpc.StatusCode.UNAVAILABLE
    assert eventually(lambda: nothing_is_held(server), PATIENCE_S)


@pytest.mark.parametrize("what", ["engine", "frontend"])
def test_what_nobody_claims_within_its_window_ends(server: Server, what: str) -> None:
    """Its reader's side has died with it, and no reader comes again."""
    with connected(server.target) as generation:
        stream = generation.Generate(asked(f"unclaimed-{what}", window_ms=500, max_tokens=1900))
        next(stream)
        pids = server.children()[what]
        for pid in pids:
            kill(pid)
        with contextlib.suppress(grpc.RpcError):
            list(stream)
    assert eventually(lambda: not set(server.children().get(what, pids)) & set(pids), PATIENCE_S)
    assert eventually(lambda: nothing_is_held(server), PATIENCE_S), server.log()
    with connected(server.target) as generation:
        had = Had(f"unclaimed-{what}")
        error = failure(generation.Resume(had.rest(), wait_for_ready=True, timeout=PATIENCE_S))
        assert error.code() is grpc.StatusCode.NOT_FOUND
