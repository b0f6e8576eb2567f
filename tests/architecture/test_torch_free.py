"""Scheduler, client and simulated worker run where there is no torch, nor transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest

MODULES = [
    "scheduler",
    "scheduler.main",
    "scheduler.supervisor",
    "scheduler.engine",
    "scheduler.frontend.main",
    "scheduler.exporter",
    "scheduler.model_files",
    "huggingface_hub",
    "client.cli",
    "kvcache.manager",
    "worker.link",
    "worker.sim_executor",
    "bench.simulate",
    "bench.targets",
]
SCRIPT = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ImportError(f"{name} must not be imported here")

sys.meta_path.insert(0, Refuse())
try:
    import torch
except ImportError:
    __import__(sys.argv[1])
else:
    raise SystemExit("torch could be imported")
"""


@pytest.mark.parametrize("module", MODULES)
def test_imports_without_torch(module: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, module], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
