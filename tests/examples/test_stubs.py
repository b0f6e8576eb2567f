"""`pip install ./protos`: the typed stubs and the .proto files, and nothing else; enough to call a server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.example_programs import PROTOS, build, fetch

pytestmark = pytest.mark.slow

LIST_FILES = """
import json
from importlib import metadata
print(json.dumps([str(file) for file in metadata.files("carousel-protos")]))
"""
USE = """
import importlib.resources
import pathlib
import sys
from carousel.v1 import control_pb2_grpc, generation_pb2, inspect_pb2_grpc, tokenization_pb2_grpc
assert pathlib.Path(generation_pb2.__file__).is_relative_to(sys.prefix)
assert "rpc Generate(" in importlib.resources.files("carousel.v1").joinpath("generation.proto").read_text()
for name in ("wire", "client", "scheduler", "worker", "kvcache", "bench", "carousel.inference"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} is there")
"""
TYPED = """
import grpc
from carousel.v1 import generation_pb2 as pb
from carousel.v1.generation_pb2_grpc import GenerationStub

with grpc.insecure_channel("127.0.0.1:1") as channel:
    for response in GenerationStub(channel).Generate(pb.GenerateRequest(text="a")):
        tokens: list[int] = list(response.delta.token_ids)
"""
MISTYPED = TYPED.replace('text="a"', "text=1") + "    response.delta.no_such_field\n"


def test_it_holds_the_stubs_and_the_protos_and_nothing_else(python_with_stubs: Path) -> None:
    done = subprocess.run([python_with_stubs, "-c", LIST_FILES], capture_output=True, text=True, timeout=30, check=True)
    files = {file for file in json.loads(done.stdout) if ".dist-info/" not in file and "__pycache__" not in file}
    stems = ("control", "generation", "inspect", "tokenization")
    endings = (".proto", "_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")
    wanted = {"carousel/__init__.py", "carousel/py.typed", "carousel/v1/__init__.py"}
    assert files == wanted | {f"carousel/v1/{stem}{ending}" for stem in stems for ending in endings}


def test_what_it_asks_for_is_enough_and_nothing_of_ours_comes_along(python_with_stubs: Path, tmp_path: Path) -> None:
    build(python_with_stubs, "-m", "pip", "check")
    build(python_with_stubs, "-c", USE, cwd=tmp_path)


def test_it_leaves_nothing_behind_in_the_tree(python_with_stubs: Path) -> None:
    left = [path.name for path in PROTOS.iterdir() if path.name in ("build", "dist") or path.suffix == ".egg-info"]
    assert not left


def test_a_type_checker_knows_its_calls_and_messages(tmp_path: Path) -> None:
    """With the extra `types`, in an environment of its own."""
    interpreter = tmp_path / "environment" / "bin" / "python"
    build(sys.executable, "-m", "venv", tmp_path / "environment")
    fetch(interpreter, "-m", "pip", "install", "--no-input", f"{PROTOS}[types]")
    for name, code, num_errors in (("typed", TYPED, 0), ("mistyped", MISTYPED, 2)):
        (tmp_path / f"{name}.py").write_text(code)
        mypy = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(interpreter), f"{name}.py"]
        done = subprocess.run(mypy, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert done.stdout.count(" error: ") == num_errors, done.stdout + done.stderr
