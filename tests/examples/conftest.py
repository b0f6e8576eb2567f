"""A whole server of the bundled model, and a front end with a fake core, for the example programs to call."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import example_programs, tokenizer_files
from tests.helpers.fake_core import FakeCore
from tests.helpers.frontend import Frontend
from tests.helpers.frontend import running as running_frontend
from tests.helpers.server import Server
from tests.helpers.server import running as running_server

BUNDLED_MODEL = Path(__file__).parents[2] / "demo" / "model"


@pytest.fixture(scope="session")
def python_with_stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has the stubs' package and nothing else of ours."""
    return example_programs.python_with_stubs(tmp_path_factory.mktemp("stubs"))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server("--model", str(BUNDLED_MODEL), "--device", "cpu", "--kv-memory-gib", "0.1") as server:
        yield server


@pytest.fixture(scope="module")
def shared_core() -> Iterator[FakeCore]:
    with FakeCore() as core:
        yield core


@pytest.fixture(scope="module")
def frontend(shared_core: FakeCore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Frontend]:
    tokenizer = tokenizer_files.with_bos(tokenizer_files.byte_level())
    model_dir = tokenizer_files.save(tokenizer, tmp_path_factory.mktemp("model"))
    with running_frontend(model_dir, shared_core.endpoint) as frontend:
        frontend.wait_serving()
        yield frontend


@pytest.fixture
def core(shared_core: FakeCore, frontend: Frontend) -> Iterator[FakeCore]:
    """It steps by itself until the test holds it."""
    shared_core.forget()
    yield shared_core
    shared_core.hold(False)
