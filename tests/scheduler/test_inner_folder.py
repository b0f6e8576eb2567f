from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scheduler.errors import StartError
from scheduler.inner_folder import InnerFolder, remove_left_ones


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_it_is_private_and_goes_when_it_is_told(temporary: Path) -> None:
    folder = InnerFolder()
    assert folder.path.parent == temporary and folder.path.stat().st_mode & 0o777 == 0o700
    folder.remove()
    folder.remove()
    assert not list(temporary.iterdir())


def test_one_in_use_stays() -> None:
    folder, other = InnerFolder(), InnerFolder()
    remove_left_ones()
    assert folder.path.exists() and other.path.exists()


def test_what_a_killed_server_has_left_goes_with_the_next_one(temporary: Path) -> None:
    program = (
        "import os, tempfile; tempfile.tempdir = os.getcwd(); from scheduler.inner_folder import InnerFolder;"
        " folder = InnerFolder(); (folder.path / 'metrics').mkdir(); os.kill(os.getpid(), 9)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=temporary, env={"PYTHONPATH": f"{root}:{root / 'protos'}"})
    assert done.returncode == -9
    [left] = temporary.iterdir()
    folder = InnerFolder()
    assert list(temporary.iterdir()) == [folder.path] != [left]


def test_folders_of_others_by_that_name_stay(temporary: Path) -> None:
    """Without a lock nobody knows whose they are: a server may be making it."""
    (temporary / "carousel-inner-being-made").mkdir()
    remove_left_ones()
    assert (temporary / "carousel-inner-being-made").exists()


def test_a_path_that_no_socket_may_have_is_said(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = temporary / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with pytest.raises(StartError, match="too long a path for sockets: set TMPDIR to a shorter one"):
        InnerFolder()
    assert not list(deep.iterdir())
