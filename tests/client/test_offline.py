"""A server of one's own: started, used, and ended, however its owner ends. With the bundled model's files and no model."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from client import Carousel, ServerFailedError
from client.server import OwnServer, server_options
from scheduler.process import LIFELINE_FD
from tests.helpers.fake_server import WAIT_S
from tests.helpers.server import eventually, is_alive

REPO = Path(__file__).parents[2]
MODEL = str(REPO / "demo" / "model")


def family(pid: int) -> list[int]:
    """The process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *map(int, children)]


def test_prompts_of_all_kinds_are_answered_in_order_and_the_server_ends_with_the_block():
    with Carousel(MODEL, device="sim", max_batch_rows=4) as carousel:
        prompts = ["def f(", [1, 2, 3], {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}] * 5
        results = carousel.generate(prompts, max_tokens=4)
        assert [len(result.token_ids) for result in results] == [4, 4, 2] * 5 and not any(r.error for r in results)
        assert {result.index for result in carousel.iterate(("a", "b"), max_tokens=1)} == {0, 1}
        assert carousel.client.server_info().max_batch_rows == 4
        assert carousel._server is not None
        processes = family(carousel._server.pid)
        assert len(processes) == 4  # supervisor, core, front end, worker
    assert not any(map(is_alive, processes))
    carousel.close()  # may be called again


OWNER = """
import sys, client
carousel = client.Carousel(sys.argv[1], device="sim")
print(carousel._server.pid, flush=True)
{then}
"""


@contextlib.contextmanager
def owner(then: str):
    """A program with a server of its own, and the server's processes once it serves."""
    command = [sys.executable, "-c", OWNER.format(then=then), MODEL]
    with subprocess.Popen(command, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process, family(int(process.stdout.readline()))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_server_ends_when_its_owner_is_killed(number):
    with owner("sys.stdin.read()") as (process, processes):
        process.send_signal(number)
        process.wait(WAIT_S)
    assert eventually(lambda: not any(map(is_alive, processes)))


def test_the_server_ends_with_a_program_that_forgot_it_and_not_with_a_fork_of_it():
    fork = "import os\nif os.fork() == 0: sys.exit()\nos.wait()\n"
    with owner(fork + "print(len(carousel.generate('x', max_tokens=1)), flush=True)") as (process, processes):
        assert process.stdout.readline() == b"1\n"
        assert process.wait(WAIT_S) == 0
    assert eventually(lambda: not any(map(is_alive, processes)))


REASONS = [
    ({"model": "/no/such/folder"}, "no directory /no/such/folder"),
    ({"model": MODEL, "no_such_option": 5}, "No such option '--no-such-option'"),
    ({"model": MODEL, "device": "tpu"}, "'tpu' is not one of"),
]


@pytest.mark.parametrize(("options", "words"), REASONS)
def test_why_it_does_not_start_is_said_in_its_own_words(options, words):
    with pytest.raises(ServerFailedError) as raised:
        Carousel(**options)
    assert words in str(raised.value) and "exit code" in str(raised.value)


def test_a_server_that_ended_is_told_from_one_that_is_slow(monkeypatch):
    with Carousel(MODEL, device="sim") as carousel:
        assert carousel._server is not None
        os.kill(carousel._server.pid, signal.SIGKILL)
        eventually(lambda: not is_alive(carousel._server.pid))
        with pytest.raises(ServerFailedError, match="was killed by signal 9"):
            carousel._server.check()


def test_while_it_is_waited_for_its_last_word_is_told(monkeypatch, tmp_path):
    (tmp_path / "slow_server.py").write_text(
        "import time\nprint('12:00:00 worker[1] INFO loading', flush=True)\ntime.sleep(60)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("client.server._TELL_EVERY_S", 0.5)
    told: list[str] = []
    server = OwnServer([], module="slow_server", ready_s=3, tell=told.append)
    with pytest.raises(ServerFailedError, match=r"not ready after 3 s: 12:00:00 worker\[1\] INFO loading"):
        server.start()
    assert any(line.endswith("it said last: worker[1] INFO loading") for line in told)
    assert not is_alive(server.pid)


WRONG = [
    ({}, "either"),
    ({"model": "m", "target": "127.0.0.1:1"}, "either"),
    ({"model": "m", "port": 1}, "port"),
    ({"model": "m", "token": "t"}, "token"),
    ({"target": "127.0.0.1:1", "device": "cpu"}, "device"),
    ({"target": "127.0.0.1:1", "max_batch_rows": 1}, "max_batch_rows"),
]


@pytest.mark.parametrize(("options", "words"), WRONG)
def test_options_that_do_not_go_together_are_refused(options, words):
    with pytest.raises(TypeError, match=words):
        Carousel(**options)


def test_keyword_arguments_are_the_command_lines_options():
    options = {"max_batch_rows": 4, "no_prefix_caching": True, "tenant": ["a", "b"], "record": None, "swap_gib": 0}
    line = "--max-batch-rows 4 --no-prefix-caching --tenant a --tenant b --swap-gib 0"
    assert server_options(options) == line.split()


def test_the_lifeline_has_one_name():
    assert __import__("client.server").server._LIFELINE_FD == LIFELINE_FD
