"""Every kernel variant compiles for every GPU without one, and takes no more than is agreed on in resources.json."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

triton = pytest.importorskip("triton")

TABLE = msgspec.json.decode(Path(__file__).with_name("resources.json").read_bytes())
SLACK = 1.1  # of registers and shared memory
slow = pytest.mark.slow


def said_by(script: str, *arguments: str) -> Any:
    """In a process of its own: this one has Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", f"tests.worker.kernels.{script}", *arguments]
    root = Path(__file__).parents[3]
    return msgspec.json.decode(subprocess.run(command, env=environment, cwd=root, stdout=subprocess.PIPE, check=True).stdout)


@pytest.mark.skipif(triton.__version__ != TABLE["triton"], reason="the table is another version's")
@pytest.mark.parametrize("target", ["sm_90", *(pytest.param(target, marks=slow) for target in ("sm_80", "sm_100", "gfx942"))])
def test_no_variant_takes_more_than_agreed(target: str) -> None:
    now, agreed = said_by("resources", target)["targets"][target], TABLE["targets"][target]
    assert now.keys() == agreed.keys(), "python -m tests.worker.kernels.resources writes the table anew"
    more = {
        name: (took, agreed[name])
        for name, took in now.items()
        if any(took[what] > agreed[name][what] for what in ("spills", "narrow"))
        or any(took[what] > SLACK * agreed[name][what] for what in ("registers", "shared"))
    }
    assert not more


def test_a_launch_finds_what_was_compiled_offline() -> None:
    """Else a worker would compile when its first requests come."""
    said = said_by("launched")
    assert set(said["launched"]) == said["offline"].keys()


def test_nothing_is_agreed_on_that_spills() -> None:
    spills = {(target, name) for target, rows in TABLE["targets"].items() for name, row in rows.items() if row["spills"]}
    assert not spills


def test_attention_reads_sixteen_bytes_at_a_time() -> None:
    for rows in TABLE["targets"].values():
        assert {row["narrow"] for name, row in rows.items() if name.startswith(("decode", "prefill"))} == {0}


def test_the_table_is_small() -> None:
    assert all(len(rows) <= 40 for rows in TABLE["targets"].values())
