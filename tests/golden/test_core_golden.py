"""The core says today what the recorded traces say, and the same in every process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden.replay import TRACES, replay

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_inputs_give_the_recorded_plans(path: Path) -> None:
    recorded = path.read_text()
    assert replay(recorded) == recorded, "if the change is meant: `python -m tests.golden.replay`, then look at the diff"


def test_both_policies_are_recorded() -> None:
    assert {path.stem.split("_")[0] for path in TRACES} == {"continuous", "static"}


def test_plans_are_the_same_bytes_in_processes_with_different_hash_seeds() -> None:
    digests = set()
    for seed in ("0", "1"):
        command = [sys.executable, "-m", "tests.golden.replay", "--digest"]
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True)
        digests.add(done.stdout.strip())
    assert len(digests) == 1 and len(digests.pop()) == 64
