"""A run of the demo as one JSON line: the figures, and everything that one must know to read them later."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from carousel.v1 import control_pb2
from demo.figures import Figures

_PACKAGES = ("carousel-serve", "torch", "numpy", "grpcio", "pyzmq")


def record(
    server: control_pb2.GetServerInfoResponse,
    model: control_pb2.GetModelInfoResponse,
    workload: dict[str, Any],
    continuous: Figures,
    static: Figures,
    same_tokens: int,
) -> dict[str, Any]:
    """workload: what was asked for, with its seed; same_tokens: requests that got the same tokens under both policies."""
    return {
        "what": "demo",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0)), "worker": [w.description for w in server.workers]},
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "model": {"name": model.served_model_name, "parameters": model.num_parameters, "dtype": model.dtype},
        "workload": workload | {"max_batch_rows": server.max_batch_rows, "block_size": model.block_size},
        "continuous": _figures(continuous),
        "static": _figures(static),
        "throughput_ratio": round(continuous.tokens_per_s / static.tokens_per_s, 6),
        "e2e_p50_ratio": round(static.e2e_p50_s / continuous.e2e_p50_s, 6),
        "same_tokens": same_tokens,
    }


def append(path: str, line: dict[str, Any]) -> None:
    """Adds it to a .jsonl file, whose folder is made if need be."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.write(json.dumps(line, ensure_ascii=False) + "\n")


def _figures(figures: Figures) -> dict[str, float]:
    numbers = dataclasses.asdict(figures) | {"tokens_per_s": figures.tokens_per_s}
    return {name: round(value, 6) for name, value in numbers.items()}


def _commit() -> str | None:
    """The checkout's commit, with + behind it when files differ from it; None outside of one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if dirty else "")


def _cpu() -> str:
    """The processor's name, as Linux gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
