"""A server with a journal that is ended, killed as a whole, or has no room left: what is in the journal goes on, and no process
remains."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import grpc
import pytest

from scheduler.journal_files import segment_path, segments
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.journalled import (
    PATIENCE_S,
    asked,
    connected,
    core,
    kill_core,
    options_of,
    resumed,
    undisturbed,
)
from tests.helpers.resuming import Had, whole
from tests.helpers.server import CAROUSEL, Server, eventually, is_alive, kill
from tests.helpers.streams import collect, details, failure, make

Start = Callable[..., Server]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama", tokenizer=True, max_position_embeddings=2048)


@pytest.fixture
def start(model_dir: Path) -> Iterator[Start]:
    servers: list[Server] = []

    def started(journal: Path, *more: str) -> Server:
        servers.append(Server(*options_of(model_dir, journal), *more))
        servers[-1].wait_ready()
        return servers[-1]

    yield started
    for server in servers:
        with contextlib.suppress(AssertionError):
            server.stop()


def test_a_full_disk_refuses_new_requests_with_a_window_and_serves_the_old_ones(start: Start, tmp_path: Path) -> None:
    server = start(tmp_path / "journal")
    expected = undisturbed(server)
    with connected(server.target) as generation:
        old = generation.Generate(asked("old"))
        first = next(old)
        folder, pid = tmp_path / "journal", core(server)
        limit = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (100, limit[1]))
        error = failure(generation.Generate(asked("new")))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "the journal can't be written" in error.details()
        assert {"RetryInfo", "ErrorInfo"} <= set(details(error))
        assert collect(generation.Generate(asked(max_tokens=5))).tokens == expected.tokens[:5], "it needs no journal"
        had = Had("old")
        had.take([first, *old])
        assert whole(had.got) == whole(expected)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limit)
        assert eventually(lambda: "can be written again" in server.log(), PATIENCE_S)
        assert whole(collect(generation.Generate(asked("later")))) == whole(expected)
    assert server.log().count("can't be written") == 1
    assert sum(segment_path(folder, number).stat().st_size for number in segments(folder)) > 0


def test_requests_outlive_a_supervisor_that_was_killed(start: Start, tmp_path: Path) -> None:
    server, had = start(tmp_path / "journal"), Had("outlives")
    expected = undisturbed(server)
    pids = [pid for pids in server.children().values() for pid in pids]
    with connected(server.target) as generation:
        stream = generation.Generate(asked("outlives"))
        had.take(islice(stream, 5))
        kill(server.process.pid)
        with contextlib.suppress(grpc.RpcError):
            had.take(stream)
    assert eventually(lambda: not any(is_alive(pid) for pid in pids)), "an orphan"
    server = start(tmp_path / "journal")
    with connected(server.target) as generation:
        had.take(resumed(generation, had))
    assert whole(had.got) == whole(expected)


@pytest.mark.slow
def test_what_a_drain_cuts_short_is_handed_to_the_next_server(start: Start, tmp_path: Path) -> None:
    server, had = start(tmp_path / "journal", "--drain-timeout", "0"), Had("handed")
    expected = undisturbed(server)
    with connected(server.target) as generation:
        stream = generation.Generate(asked("handed"))
        had.take(islice(stream, 5))
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as ended:
            had.take(stream)
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    assert server.process.wait(PATIENCE_S) == 0
    server = start(tmp_path / "journal")
    with connected(server.target) as generation:
        had.take(resumed(generation, had))
    assert whole(had.got) == whole(expected)


def test_a_second_signal_ends_at_once_and_leaves_no_process(start: Start, tmp_path: Path) -> None:
    server = start(tmp_path / "journal", "--drain-timeout", "3600")
    pids = [pid for pids in server.children().values() for pid in pids]
    with connected(server.target) as generation:
        stream = generation.Generate(asked("kept", max_tokens=2000))
        next(stream)
        os.kill(core(server), signal.SIGSTOP)  # it will not finish
        server.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: "draining for at most" in server.log())
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(PATIENCE_S)
    assert not any(is_alive(pid) for pid in pids)


@pytest.mark.slow
def test_no_orphan_remains_when_a_supervisor_is_killed_that_drains(start: Start, tmp_path: Path) -> None:
    server = start(tmp_path / "journal", "--drain-timeout", "3600")
    pids = [pid for pids in server.children().values() for pid in pids]
    with connected(server.target) as generation:
        stream = generation.Generate(asked("kept", max_tokens=2000))
        next(stream)
        os.kill(server.children()["worker"][0], signal.SIGSTOP)
        server.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: "draining for at most" in server.log())
        kill(server.process.pid)
        assert eventually(lambda: not any(is_alive(pid) for pid in pids))


@pytest.mark.slow
def test_a_request_that_lives_longer_than_the_files_that_it_began_in_is_restored(start: Start, tmp_path: Path) -> None:
    journal, had = tmp_path / "journal", Had("long")
    server = start(journal, "--journal-limit-mib", "8")
    expected = undisturbed(server, num_outputs=2)

    def one(number: int) -> None:
        prompt = [number % 200 + 1] * 1900
        collect(generation.Generate(make(prompt, max_tokens=1, request_id=f"short-{number}", resume_window_ms=100)))

    with connected(server.target) as generation, ThreadPoolExecutor(8) as pool:
        stream = generation.Generate(asked("long", num_outputs=2))
        had.take(islice(stream, 3))  # it is not read on, and waits
        list(pool.map(one, range(1500)))
        assert segments(journal)[0] > 1 and sum(path.stat().st_size for path in journal.iterdir()) < 10 << 20
        kill_core(server)
        with contextlib.suppress(grpc.RpcError):
            had.take(stream)
        had.take(resumed(generation, had))
    assert whole(had.got) == whole(expected)
    assert "Traceback" not in server.log()


@pytest.mark.slow
def test_each_core_writes_a_recording_of_its_own_that_replays(start: Start, tmp_path: Path) -> None:
    record = tmp_path / "r.rec"
    server = start(tmp_path / "journal", "--record", str(record))
    expected, had = undisturbed(server), Had("recorded")
    with connected(server.target) as generation:
        stream = generation.Generate(asked("recorded"))
        had.take(islice(stream, 5))
        kill_core(server)
        with contextlib.suppress(grpc.RpcError):
            had.take(stream)
        had.take(resumed(generation, had))
    assert whole(had.got) == whole(expected)
    assert server.stop() == 0
    second = tmp_path / "r.rec.2"
    done = subprocess.run([CAROUSEL, "replay", str(second)], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_journal_that_can_not_be_used_is_named_before_anything_starts(start: Start, model_dir: Path, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    start(journal)
    assert said(model_dir, journal) == f"carousel: --journal {journal} is in use by another server"
    other = make_checkpoint(tmp_path / "other", "llama", tokenizer=True, vocab_size=500)
    left = tmp_path / "left"
    first = start(left)
    kill(first.process.pid)
    first.process.wait()
    line = said(other, left)
    assert "is of requests to the model" in line and line.count("\n") == 0
    left.chmod(0o755)
    assert said(model_dir, left).endswith(f"chmod 700 {left}")


def said(model_dir: Path, journal: Path) -> str:
    """By a server that does not start."""
    command = [CAROUSEL, "serve", "--port", "0", "--log-level", "error", *options_of(model_dir, journal)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1
    return done.stderr.strip()
