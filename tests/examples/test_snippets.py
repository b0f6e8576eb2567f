"""The Go and Java of examples/README.md, compiled with Debian's packages by the commands that stand beside them, and run."""

from __future__ import annotations

import pytest

from tests.helpers import example_programs
from tests.helpers.example_programs import run
from tests.helpers.fake_core import FakeCore
from tests.helpers.frontend import Frontend
from tests.helpers.streams import collect, make

pytestmark = pytest.mark.slow
PROMPT = "The quick brown fox"
NUM_TOKENS = 64  # that both ask for


@pytest.fixture(scope="module", params=["go", "java"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """How it is called."""
    folder = tmp_path_factory.mktemp(request.param)
    return example_programs.go(folder) if request.param == "go" else example_programs.java(folder)


def test_it_prints_text_finish_reason_and_usage(program: list[str], core: FakeCore, frontend: Frontend) -> None:
    wanted = collect(frontend.generation.Generate(make(PROMPT, max_tokens=NUM_TOKENS)))
    assert wanted.summary is not None
    done = run(program, frontend.target, PROMPT)
    assert (done.returncode, done.stdout) == (0, wanted.text), done.stderr
    usage = wanted.summary.usage
    assert done.stderr.split("\n")[-3:] == [
        "finish reason: FINISH_REASON_LENGTH",
        f"usage: {usage.prompt_tokens} prompt tokens, {usage.output_tokens} output tokens",
        "",
    ]


def test_a_refusal_is_one_line_and_exit_code_1(program: list[str], core: FakeCore, frontend: Frontend) -> None:
    done = run(program, frontend.target, "")
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(frontend.target) and "prompt must not be empty" in line
