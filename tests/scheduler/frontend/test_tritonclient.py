"""The unmodified tritonclient from the package index, against a front end: all its calls, and the example program.

It wants an older protobuf than the server, so it has an environment of its own, made on first use in pytest's cache folder.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto

from tests.helpers.fake_core import FakeCore
from tests.helpers.frontend import Frontend
from tests.helpers.kserve import declarations
from tests.helpers.streams import collect, make
from wire import AbortRequest, AddRequest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
VERSION = "2.73.0"
PROMPT = "The quick brown fox"
INSTALL_S, CALLS_S = 240, 60


@pytest.fixture(scope="module")
def python(request: pytest.FixtureRequest) -> Path:
    """An interpreter that has it."""
    folder = Path(request.config.cache.mkdir(f"tritonclient-{VERSION}-python{sys.version_info[0]}.{sys.version_info[1]}"))
    interpreter, is_installed = folder / "bin" / "python", folder / "is_installed"
    if not is_installed.exists():
        install(folder, interpreter)
        is_installed.touch()
    return interpreter


def install(folder: Path, interpreter: Path) -> None:
    pip = [str(interpreter), "-m", "pip", "install", "--no-input", f"tritonclient[grpc]=={VERSION}"]
    for command in ([sys.executable, "-m", "venv", "--clear", str(folder)], pip):
        environment = os.environ | {"PIP_USER": "0"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, check=False, env=environment)
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip().splitlines()
            pytest.skip(f"tritonclient can't be installed: {said[-1] if said else done.returncode}")


@pytest.fixture(scope="module")
def found(python: Path, frontend: Frontend) -> dict[str, Any]:
    """What came of its calls."""
    frontend.wait_serving()
    program = ROOT / "tests" / "helpers" / "tritonclient_calls.py"
    command = [str(python), str(program), frontend.target, "tiny", PROMPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=CALLS_S, check=False)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout)
    assert results["version"] == VERSION
    return results


@pytest.fixture
def text(core: FakeCore, frontend: Frontend) -> str:
    """What Generate gives for the same request."""
    return collect(frontend.generation.Generate(make(PROMPT))).text


def test_it_finds_server_and_model(found: dict[str, Any]) -> None:
    facts = found["facts"]
    assert [facts[name] for name in ("live", "ready", "model_ready", "other_ready")] == [True, True, True, False]
    assert (facts["server"]["name"], facts["server"]["version"]) == ("carousel", "0.0.test")
    tensors = {tensor["name"]: (tensor["datatype"], tensor["shape"]) for tensor in facts["metadata"]["inputs"]}
    assert tensors == {
        "text_input": ("BYTES", ["1"]),
        "stream": ("BOOL", ["1"]),
        "sampling_parameters": ("BYTES", ["1"]),
        "exclude_input_in_output": ("BOOL", ["1"]),
    }
    config = facts["config"]["config"]
    assert [each["data_type"] for each in config["input"]] == ["TYPE_STRING", "TYPE_BOOL", "TYPE_STRING", "TYPE_BOOL"]
    assert config["model_transaction_policy"] == {"decoupled": True}
    assert facts["index"] == {"models": [{"name": "tiny", "version": "1", "state": "READY"}]}
    assert facts["other_metadata"]["status"] == "StatusCode.NOT_FOUND"


def test_infer_gives_the_whole_text(found: dict[str, Any], text: str) -> None:
    infer = found["infer"]
    assert infer["text"] == infer["as_parameters"] == infer["of_a_sequence"] == text != ""
    assert infer["with_prompt"] == PROMPT + text
    assert infer["at_once"] == [text] * 3 and infer["id"] == "whole"


def test_what_infer_is_refused_is_a_status(found: dict[str, Any]) -> None:
    refused, streaming = found["infer"]["refused"], found["infer"]["streaming"]
    assert refused["status"] == "StatusCode.UNIMPLEMENTED" and "sampling_parameters.best_of" in refused["message"]
    assert streaming["status"] == "StatusCode.INVALID_ARGUMENT" and "inputs.stream" in streaming["message"]


def test_a_stream_gives_pieces_and_marks_the_last(found: dict[str, Any], text: str) -> None:
    got: dict[str, list[tuple[str | None, bool]]] = {}
    errors = [each["error"] for each in found["stream"] if "error" in each]
    for each in found["stream"]:
        if "error" not in each:
            got.setdefault(each["id"], []).append((each["text"], each["final"]))
    assert set(got) == {"pieces", "whole", "empty"}
    for pieces in got.values():
        assert "".join(piece or "" for piece, _ in pieces) == text
        assert [final for _, final in pieces] == [False] * (len(pieces) - 1) + [True]
    assert len(got["whole"]) == 1
    assert got["empty"][-1] == (None, True) and got["pieces"][-1][0] is not None
    assert len(errors) == 1 and "sampling_parameters.best_of" in errors[0]


def test_the_asyncio_client_streams_too(found: dict[str, Any], text: str) -> None:
    assert "".join(each["text"] for each in found["aio"]) == text
    assert [each["final"] for each in found["aio"]] == [False] * (len(found["aio"]) - 1) + [True]


def test_the_example_streams_a_completion(python: Path, frontend: Frontend, text: str) -> None:
    command = [str(python), str(ROOT / "examples" / "tritonclient_generate.py"), PROMPT]
    options = ["--target", frontend.target, "--max-tokens", "12"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=CALLS_S, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, text + "\n", "")
    options[-1] = "0"
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=CALLS_S, check=False)
    assert done.returncode == 1 and done.stdout == "" and "stopping.max_tokens" in done.stderr.splitlines()[-1]


def test_the_example_cancels_when_it_is_interrupted(python: Path, core: FakeCore, frontend: Frontend) -> None:
    core.hold()
    command = [str(python), str(ROOT / "examples" / "tritonclient_generate.py"), PROMPT, "--target", frontend.target]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    core.wait_for(AddRequest)
    core.step(4)
    assert process.stdout is not None and process.stdout.read(1), "text comes while it is made"
    process.send_signal(signal.SIGINT)
    core.wait_for(AbortRequest)
    _, said = process.communicate(timeout=CALLS_S)
    assert (process.returncode, said) == (130, "\ncancelled\n")


def test_the_example_ends_at_its_deadline(python: Path, core: FakeCore, frontend: Frontend) -> None:
    core.hold()
    command = [str(python), str(ROOT / "examples" / "tritonclient_generate.py"), PROMPT, "--target", frontend.target]
    done = subprocess.run([*command, "--timeout", "1"], capture_output=True, text=True, timeout=CALLS_S, check=False)
    assert (done.returncode, done.stdout) == (1, "") and "DEADLINE_EXCEEDED" in done.stderr


def test_the_recorded_protocol_is_its_own(found: dict[str, Any]) -> None:
    its: dict[str, str] = {}
    for file in found["files"]:
        its |= declarations(FileDescriptorProto.FromString(base64.b64decode(file)))
    recorded: dict[str, str] = json.loads((ROOT / "tests" / "golden" / "kserve.json").read_text())
    assert recorded == {name: its.get(name) for name in recorded}
