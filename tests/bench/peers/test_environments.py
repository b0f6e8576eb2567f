"""Environments of the peers: made once, and a reason where they can't be. Nothing is downloaded here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.peers import environments
from bench.peers.engines import ENGINES, surroundings, tcmalloc
from bench.peers.environments import RECIPES, Environment, PeerUnavailableError, Recipe, ensure, last_error

TOUCH = Recipe(commands=(("sh", "-c", "echo {cores} >> {folder}/made"),), disk_gb=0)


@pytest.fixture(autouse=True)
def no_venv(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real commands but for the interpreter's environment, which takes seconds."""
    exit_code = environments._exit_code
    monkeypatch.setattr(environments, "_exit_code", lambda command, log: 0 if "venv" in command else exit_code(command, log))


def made(root: Path) -> str:
    return (root / "peer" / "made").read_text()


def test_an_environment_is_made_once(tmp_path: Path) -> None:
    for _ in range(2):
        found = ensure("peer", 2, tmp_path, {"peer": TOUCH})
        assert found.folder == tmp_path / "peer"
    assert made(tmp_path) == "2\n"


def test_another_recipe_makes_it_again(tmp_path: Path) -> None:
    ensure("peer", 2, tmp_path, {"peer": TOUCH})
    ensure("peer", 2, tmp_path, {"peer": replace(TOUCH, disk_gb=0.001)})
    assert made(tmp_path) == "2\n2\n"


def test_a_failed_step_is_a_reason_and_is_tried_again(tmp_path: Path) -> None:
    failing = Recipe(commands=(("sh", "-c", "echo ERROR: No matching distribution; echo hint: look; exit 1"),), disk_gb=0)
    for _ in range(2):
        with pytest.raises(PeerUnavailableError, match=r"can't be installed: ERROR: No matching distribution$"):
            ensure("peer", 2, tmp_path, {"peer": failing})


def test_a_step_that_may_fail_does_not_matter(tmp_path: Path) -> None:
    ensure("peer", 2, tmp_path, {"peer": replace(TOUCH, optional=(("false",), ("sh", "-c", "echo no >> {folder}/made")))})
    assert made(tmp_path) == "2\n"


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (replace(TOUCH, machines=("pdp11",)), "is made for pdp11"),
        (replace(TOUCH, tools=(("no-such-compiler", "nor-this"),)), "needs no-such-compiler or nor-this"),
        (replace(TOUCH, disk_gb=1e9), r"takes 1e\+09 GB, and .* are free"),
    ],
)
def test_what_can_be_known_before_is_said_before(tmp_path: Path, recipe: Recipe, reason: str) -> None:
    with pytest.raises(PeerUnavailableError, match=reason):
        ensure("peer", 2, tmp_path, {"peer": recipe})
    assert not (tmp_path / "peer").exists()


def test_the_line_that_tells_why_is_found() -> None:
    assert last_error("Traceback\nValueError: bad\nnote: an error of the package\n\nBye\n") == "ValueError: bad"
    assert last_error("one\ntwo\n") == "two"
    assert last_error(" \n") == "it said nothing"


def test_every_peer_has_a_recipe_and_every_pin_file_is_used() -> None:
    assert {engine.peer for engine in ENGINES.values()} - {None} == set(RECIPES)
    text = repr(RECIPES)
    for path in (environments.HERE / "requirements").glob("*.txt"):
        assert path.name in text


def test_vllm_gets_every_core_and_what_it_wants_preloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = Environment(tmp_path)
    for name in ("tcmalloc/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4", "venv/lib/libiomp5.so"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = surroundings(ENGINES["vllm"], environment, (0, 1), 2)
    assert found["VLLM_CPU_OMP_THREADS_BIND"] == "0,1" and found["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert "libtcmalloc_minimal" in found["LD_PRELOAD"] and "libiomp5" in found["LD_PRELOAD"]
    assert tcmalloc(tmp_path, system=()) == tmp_path / "tcmalloc/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4"
    assert "LD_PRELOAD" not in surroundings(ENGINES["llamacpp-f16"], environment, (0, 1), 2)


def test_the_drivers_import_nothing_of_ours() -> None:
    ours = ("bench", "client", "wire", "worker", "scheduler", "kvcache", "carousel")
    for path in (environments.HERE / "drivers").glob("*.py"):
        words = [
            line.split()[1].split(".")[0] for line in path.read_text().splitlines() if line.startswith(("import ", "from "))
        ]
        assert not set(words) & set(ours), path.name
