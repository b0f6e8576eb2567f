"""One front end with a fake core for the tests of a module, and a model directory for all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import tokenizer_files
from tests.helpers.fake_core import CHANGEABLE, FakeCore
from tests.helpers.frontend import Frontend, running


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level, with BOS; token 1 is its end token."""
    tokenizer = tokenizer_files.with_bos(tokenizer_files.byte_level())
    return tokenizer_files.save(tokenizer, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shared_core() -> Iterator[FakeCore]:
    with FakeCore() as core:
        yield core


@pytest.fixture(scope="module")
def frontend(shared_core: FakeCore, model_dir: Path) -> Iterator[Frontend]:
    with running(model_dir, shared_core.endpoint) as frontend:
        frontend.wait_serving()
        yield frontend
        assert "Traceback" not in frontend.log() and "Error" not in frontend.log(), frontend.log()


@pytest.fixture
def core(shared_core: FakeCore, frontend: Frontend) -> Iterator[FakeCore]:
    """The module's fake core, as it was at first."""
    kept = {name: getattr(shared_core, name) for name in CHANGEABLE}
    shared_core.forget()
    yield shared_core
    for name, value in kept.items():
        setattr(shared_core, name, value)
    shared_core.tell(shared_core.facts)
    shared_core.hold(False)
    frontend.wait_serving()
