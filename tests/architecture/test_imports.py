"""Imports go downward only, and the core imports nothing that could make it anything but a function of its inputs."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = sorted((ROOT / "scheduler" / "core").rglob("*.py"))
CORE_MAY_IMPORT = {
    "__future__",
    "bisect",
    "collections",
    "dataclasses",
    "enum",
    "heapq",
    "itertools",
    "typing",
    "numpy",
    "kvcache",
    "scheduler",
    "wire",
}
LINTER = Path(sys.executable).with_name("lint-imports")


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """import-linter on the tree in `folder`, with the contracts in its pyproject.toml."""
    environment = os.environ | {"PYTHONPATH": f"{folder}:{folder / 'protos'}"}
    command = [str(LINTER), "--no-cache"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of our packages, to spoil."""
    for package in ("bench", "client", "kvcache", "scheduler", "worker", "protos"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", ".envs"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_contracts_are_kept() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("scheduler/core/queue.py", "import zmq", "The core thinks, and does nothing else"),
        ("scheduler/core/policies/static.py", "import time", "The core thinks, and does nothing else"),
        ("scheduler/core/core.py", "from scheduler import engine", "The core thinks, and does nothing else"),
        ("kvcache/manager.py", "import scheduler.core", "Imports go downward only"),
        ("worker/executor.py", "import scheduler.core", "Imports go downward only"),
        ("scheduler/core/core.py", "import bench.workloads", "Imports go downward only"),
        ("bench/simulator.py", "import torch", "No torch in the scheduler"),
        ("client/cli.py", "import torch", "No torch in the scheduler"),
        ("worker/link.py", "import grpc", "grpc lives in the front end"),
        ("scheduler/main.py", "import kvcache.storage", "Only the worker imports the KV tensors"),
    ],
)
def test_a_forbidden_import_is_detected(tree: Path, module: str, line: str, contract: str) -> None:
    path = tree / module
    path.write_text(f"{path.read_text()}\n{line}\n")
    done = lint(tree)
    broken = [row for row in done.stdout.splitlines() if row.endswith(" BROKEN")]
    assert done.returncode == 1 and any(row.startswith(contract) for row in broken), done.stdout + done.stderr


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_names_no_other_module_than_these(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None
            names = [node.module]
        assert {name.split(".")[0] for name in names} <= CORE_MAY_IMPORT, f"line {getattr(node, 'lineno', 0)}"
        for name in names:
            assert not name.startswith("scheduler.") or name.startswith("scheduler.core"), name
            assert not name.startswith("numpy.random"), name


def test_importing_the_core_brings_no_socket_rpc_or_tensor_library_along() -> None:
    code = "import sys, scheduler.core; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not set(done.stdout.split()) & {"zmq", "grpc", "torch", "asyncio", "google", "carousel", "worker", "client"}
