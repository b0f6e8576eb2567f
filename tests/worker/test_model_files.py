"""Directories, and hub ids served by a fake hub on loopback: a model loads from there, and what can't be is one line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.fake_hub import FakeHub
from worker.model_files import _UNWANTED, _WANTED, ModelNotFoundError, resolve

SCRIPT = """
import sys
from worker.model_config import ModelError
from worker.model_files import resolve
try:
    folder = resolve(sys.argv[1], sys.argv[2] or None)
    import torch
    from worker.models import load_model
    model, config = load_model(folder, torch.float32, "cpu", None)
    print(folder, config.architecture, model.num_parameters)
except ModelError as error:
    print("error:", error)
"""
PARAMETERS = {"llama": 215_520, "opt": 235_968}


class GatedHub(FakeHub):
    def _answer(self, handler: BaseHTTPRequestHandler, with_body: bool) -> None:
        self._refuse(handler, "GatedRepo")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    main = make_checkpoint(tmp_path_factory.mktemp("main"), "llama", max_shard_size="400KB", tokenizer=True)
    for unwanted in ("modeling.py", "pytorch_model.bin", "consolidated.safetensors"):
        (main / unwanted).write_bytes(b"not to be fetched")
    old = make_checkpoint(tmp_path_factory.mktemp("old"), "opt")
    pickled = tmp_path_factory.mktemp("pickled")
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"")
    with FakeHub({"org/tiny": {"main": main, "v1": old}, "org/pickled": {"main": pickled}}) as hub:
        yield hub


def load(hub: FakeHub, home: Path, model: str, revision: str = "", **environment: str) -> str:
    """The hub's client reads its environment when it is imported, so each try gets a process."""
    command = [sys.executable, "-c", SCRIPT, model, revision]
    variables = os.environ | hub.environment(home) | environment
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere/at/all", "no such directory, and no hub id"),
        ("./here/it/is", "no such directory, and no hub id"),
        ("-x", "no such directory, and no hub id"),
        (__file__, "is a file; a checkpoint is a directory"),
    ],
)
def test_what_is_neither_directory_nor_hub_id_is_said_in_one_line(name: str, message: str) -> None:
    with pytest.raises(ModelNotFoundError, match=message) as error:
        resolve(name)
    assert "\n" not in str(error.value)


def test_a_directory_has_no_revisions(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="only a hub id has revisions"):
        resolve(str(tmp_path), "v1")


def test_a_hub_id_loads_and_loads_again_without_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    online = load(hub, tmp_path, "org/tiny")
    folder, architecture, parameters = online.split()
    assert (architecture, int(parameters)) == ("LlamaForCausalLM", PARAMETERS["llama"])
    assert Path(folder).is_relative_to(tmp_path)
    names = {file.name for file in Path(folder).iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"} < names
    assert not names & {"modeling.py", "pytorch_model.bin", "consolidated.safetensors"}
    asked = len(hub.requests)
    assert load(hub, tmp_path, "org/tiny", HF_HUB_OFFLINE="1") == online
    assert len(hub.requests) == asked
    assert load(hub, tmp_path, "org/tiny", HF_ENDPOINT="http://127.0.0.1:1") == online  # not reachable: from the cache


def test_a_revision_is_fetched_as_such(hub: FakeHub, tmp_path: Path) -> None:
    _, architecture, parameters = load(hub, tmp_path, "org/tiny", "v1").split()
    assert (architecture, int(parameters)) == ("OPTForCausalLM", PARAMETERS["opt"])


@pytest.mark.parametrize(
    ("model", "revision", "environment", "message"),
    [
        ("org/unknown", "", {}, "no such directory, and no model of http://127.0.0.1"),
        ("org/tiny", "v9", {}, "has no revision v9"),
        ("org/pickled", "", {}, "has no safetensors files"),
        ("org/tiny", "", {"HF_ENDPOINT": "http://127.0.0.1:1"}, "http://127.0.0.1:1 can't be reached"),
        ("org/tiny", "v1", {"HF_HUB_OFFLINE": "1"}, "at revision v1: no such directory, not (whole) in "),
    ],
)
def test_what_the_hub_can_not_give_is_said_in_one_line(
    hub: FakeHub, tmp_path: Path, model: str, revision: str, environment: dict[str, str], message: str
) -> None:
    answer = load(hub, tmp_path, model, revision, **environment)
    assert answer.startswith(f"error: {model}") and message in answer


def test_a_gated_model_says_what_to_do(tmp_path: Path) -> None:
    with GatedHub({}) as hub:
        assert "accept its terms on http://127.0.0.1" in load(hub, tmp_path, "org/gated")


def test_files_of_the_root_are_wanted_and_other_formats_are_not() -> None:
    wanted = ["config.json", "model-00001-of-00002.safetensors", "chat_template.jinja", "tokenizer.model", "merges.txt"]
    others = ["original/params.json", "onnx/model.safetensors", "consolidated.00.safetensors", "model.py", "pytorch_model.bin"]
    assert list(filter_repo_objects(wanted + others, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)) == wanted
