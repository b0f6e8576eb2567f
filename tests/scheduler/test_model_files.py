"""Where a model's files are: directories, hub ids (a fake hub on loopback), and what is said when there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scheduler.errors import ModelFilesError, ModelNotFoundError
from scheduler.model_files import read_json, resolve
from tests.helpers import tokenizer_files
from tests.helpers.fake_hub import FakeHub

SCRIPT = """
import sys
from scheduler.errors import ModelNotFoundError
from scheduler.model_files import resolve
try:
    print(resolve(sys.argv[1], sys.argv[2] or None))
except ModelNotFoundError as error:
    print("error:", error)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    main = tokenizer_files.save(tokenizer_files.words(), tmp_path_factory.mktemp("main"))
    (main / "model.safetensors").write_bytes(b"weights")
    (main / "modeling.py").write_text("raise SystemExit")
    old = tokenizer_files.save(tokenizer_files.words(), tmp_path_factory.mktemp("old"), config={"old": True})
    empty = tmp_path_factory.mktemp("empty")
    (empty / "README.md").write_text("nothing")
    with FakeHub({"org/tiny": {"main": main, "v1": old}, "org/empty": {"main": empty}}) as hub:
        yield hub


def resolve_in_process(hub: FakeHub, home: Path, model: str, revision: str = "", **environment: str) -> str:
    """The hub's client reads its environment when it is imported, so each try gets a process."""
    command = [sys.executable, "-c", SCRIPT, model, revision]
    variables = os.environ | hub.environment(home) | environment
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    directory = tokenizer_files.save(tokenizer_files.words(), tmp_path / "model")
    assert resolve(str(directory)) == directory


def test_a_directory_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./here", "a/b/c", "-x", "org/name/"])
def test_what_is_neither_directory_nor_hub_id_is_said_in_one_line(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="no directory") as caught:
        resolve(name)
    assert "\n" not in str(caught.value)


def test_a_directory_has_no_revisions(tmp_path: Path) -> None:
    directory = tokenizer_files.save(tokenizer_files.words(), tmp_path / "model")
    with pytest.raises(ModelNotFoundError, match="revision v1"):
        resolve(str(directory), "v1")


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelNotFoundError):
        resolve(str(tmp_path / "model.safetensors"))


def test_a_hub_id_fetches_config_and_tokenizer_but_neither_weights_nor_code(hub: FakeHub, tmp_path: Path) -> None:
    directory = Path(resolve_in_process(hub, tmp_path, "org/tiny"))
    assert directory.is_relative_to(tmp_path)
    assert {file.name for file in directory.iterdir()} == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    assert "old" not in read_json(directory / "tokenizer_config.json")


def test_a_revision_is_fetched_as_such(hub: FakeHub, tmp_path: Path) -> None:
    directory = Path(resolve_in_process(hub, tmp_path, "org/tiny", "v1"))
    assert read_json(directory / "tokenizer_config.json")["old"] is True


def test_a_fetched_model_needs_no_hub_any_more(hub: FakeHub, tmp_path: Path) -> None:
    directory = resolve_in_process(hub, tmp_path, "org/tiny")
    assert resolve_in_process(hub, tmp_path, "org/tiny", HF_HUB_OFFLINE="1") == directory


@pytest.mark.parametrize(
    ("model", "revision", "environment", "said"),
    [
        ("org/unknown", "", {}, "the hub has no such model"),
        ("org/tiny", "v9", {}, "no revision v9"),
        ("org/empty", "", {}, "no config.json"),
        ("org/tiny", "", {"HF_ENDPOINT": "http://127.0.0.1:1"}, "the hub can't be reached"),
        ("org/tiny", "", {"HF_HUB_OFFLINE": "1"}, "not in its cache"),
    ],
)
def test_what_the_hub_can_not_give_is_said_in_one_line(
    hub: FakeHub, tmp_path: Path, model: str, revision: str, environment: dict[str, str], said: str
) -> None:
    answer = resolve_in_process(hub, tmp_path, model, revision, **environment)
    assert answer.startswith("error:") and said in answer and model in answer


def test_malformed_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ModelFilesError, match=r"config\.json can't be read"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelFilesError, match="not a JSON object"):
        read_json(tmp_path / "config.json")
    assert read_json(tmp_path / "absent.json") == {}
