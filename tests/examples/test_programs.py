"""The programs of examples/, each with its language's own gRPC: the Python client's text, and all ways that a call can end."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest

from carousel.v1 import generation_pb2 as pb
from client import CarouselClient
from tests.helpers import example_programs
from tests.helpers.example_programs import EXAMPLES, run, start
from tests.helpers.fake_core import FakeCore
from tests.helpers.frontend import Frontend
from tests.helpers.server import Server
from tests.helpers.streams import collect
from wire import AbortRequest, AddRequest

PROMPT = 'def naïve(text):\n    """→ 文字'
NUM_TOKENS, SEED = 40, (1 << 63) + 1  # a seed that no double holds


@pytest.fixture(
    scope="module", params=[pytest.param("python", marks=pytest.mark.slow), "node", pytest.param("cpp", marks=pytest.mark.slow)]
)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """How it is called."""
    match request.param:
        case "python":
            interpreter = request.getfixturevalue("python_with_stubs")
            return [str(interpreter), str(EXAMPLES / "python" / "generate.py")]
        case "node":
            return example_programs.node(Path(request.config.cache.mkdir("example-node")))
        case _:
            return example_programs.cpp(tmp_path_factory.mktemp("cpp"))


def test_its_text_is_that_of_the_python_client(program: list[str], server: Server) -> None:
    with CarouselClient(server.target) as client:
        wanted = collect(client.generate(PROMPT, max_tokens=NUM_TOKENS, seed=SEED))
    assert wanted.summary is not None
    options = ["--target", server.target, "--max-tokens", str(NUM_TOKENS), "--seed", str(SEED)]
    done = run(program, PROMPT, *options)
    assert (done.returncode, done.stdout) == (0, wanted.text + "\n")
    usage = wanted.summary.usage
    assert done.stderr.splitlines() == [
        f"finish reason: {pb.FinishReason.Name(wanted.reason).removeprefix('FINISH_REASON_')}",
        f"usage: {usage.prompt_tokens} prompt tokens, {usage.output_tokens} output tokens",
    ]


def test_text_comes_while_it_is_made_and_an_interrupt_cancels(program: list[str], core: FakeCore, frontend: Frontend) -> None:
    core.hold()
    process = start(program, "Some words", "--target", frontend.target, "--timeout", "100")
    header = core.wait_for(AddRequest).header
    assert 0 < header.deadline_ns - header.arrival_ns <= 100e9, "its deadline came along"
    core.step(4)
    assert process.stdout is not None and process.stdout.read(1), "before the output has ended"
    process.send_signal(signal.SIGINT)
    core.wait_for(AbortRequest)
    _, said = process.communicate(timeout=20)
    assert (process.returncode, said) == (130, "\ncancelled\n")


def test_a_refusal_is_one_line_and_exit_code_1(program: list[str], core: FakeCore, frontend: Frontend) -> None:
    done = run(program, "Some words", "--target", frontend.target, "--max-tokens", "0")
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(f"{frontend.target}: INVALID_ARGUMENT: ") and "max_tokens" in line


def test_its_deadline_ends_the_call(program: list[str], core: FakeCore, frontend: Frontend) -> None:
    core.hold()
    done = run(program, "Some words", "--target", frontend.target, "--timeout", "1")
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(f"{frontend.target}: DEADLINE_EXCEEDED: ")


def test_no_server_is_one_line_and_exit_code_1(program: list[str]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        done = run(program, "Some words", "--target", f"127.0.0.1:{closed.getsockname()[1]}")
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert "UNAVAILABLE" in line


def test_a_wrong_option_is_exit_code_2(program: list[str]) -> None:
    done = run(program, "--no-such-option")
    assert done.returncode == 2 and "usage:" in done.stderr
