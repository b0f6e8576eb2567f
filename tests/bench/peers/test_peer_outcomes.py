"""What a driver hands back, read as an Outcome; and a driver that fails is a reason to skip, not an error."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.cpu_workload import Request
from bench.peers import driven
from bench.peers.driven import Work, outcome, run
from bench.peers.engines import ENGINES, Engine
from bench.peers.environments import Environment, PeerUnavailableError

VLLM = ENGINES["vllm"]
WORK = Work([Request([5, 6, 7], 2), Request([8, 9], 3)], Request([6, 5], 3), (0, 1), kv_gib=1, limit_s=20)


class Ours(Environment):
    """The interpreter that runs the tests."""

    @property
    def python(self) -> Path:
        return Path(sys.executable)


OURS = Ours(Path("nowhere"))


def result(**changes: Any) -> dict[str, Any]:
    times = {"token_s": [[0.5, 1.0], [0.5, 1.0, 2.0]], "single_token_s": [[0.1, 0.2, 0.3]]}
    return {"ready_at": 110.0, "versions": {"vllm": "1"}} | times | changes


def test_token_times_become_an_outcome() -> None:
    found, versions = outcome(VLLM, WORK, result(), started_at=100.0, peak_bytes=7)
    assert (found.engine, found.requests, found.prompt_tokens, found.output_tokens) == ("vllm", 2, 5, 5)
    assert (found.seconds, found.output_tokens_per_s) == (2.0, 2.5)
    assert found.ready_s == 10.0 and found.peak_bytes == 7 and found.note == VLLM.note
    assert found.single_tokens_per_s == pytest.approx(10.0)
    assert versions == {"vllm": "1"}


@pytest.mark.parametrize("changes", [{"token_s": [[0.5], [0.5, 1.0, 2.0]]}, {"single_token_s": [[0.1, 0.2, 0.3, 0.4]]}])
def test_who_makes_another_number_of_tokens_is_not_compared(changes: dict[str, Any]) -> None:
    with pytest.raises(PeerUnavailableError, match="tokens where it was asked for"):
        outcome(VLLM, WORK, result(**changes), started_at=100.0, peak_bytes=None)


def test_the_job_holds_the_prompts_as_token_ids_and_room_for_the_longest() -> None:
    job = json.loads(json.dumps(WORK.job(ENGINES["openvino-fp32"], OURS, Path("model"))))
    assert job["requests"] == [[[5, 6, 7], 2], [[8, 9], 3]] and job["single"] == [[[6, 5], 3]]
    assert job["max_rows"] == 2 and job["threads"] == 2
    assert job["max_len"] == 10  # of the warm-up
    assert job["options"]["INFERENCE_PRECISION_HINT"] == "f32"


def test_llama_cpp_is_told_where_its_server_is() -> None:
    job = WORK.job(ENGINES["llamacpp-f16"], OURS, Path("model.gguf"))
    assert Path(job["server"]).name == "llama-server"


def driver(monkeypatch: pytest.MonkeyPatch, folder: Path, lines: str) -> Engine:
    """An engine whose driver is that program, with the harness beside it."""
    (folder / "harness.py").write_text((driven.DRIVERS / "harness.py").read_text())
    (folder / "driver.py").write_text(lines)
    monkeypatch.setattr(driven, "DRIVERS", folder)
    return Engine("fake", "fake", "driver.py", "float32", "float")


def test_a_driver_runs_and_its_memory_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = """
import harness
harness.measure(harness.job(), lambda asked: [[0.1 * i for i in range(n)] for _, n in asked], {"fake": "1"})
"""
    found, versions = run(driver(monkeypatch, tmp_path, fake), tmp_path, WORK, OURS)
    assert found.output_tokens == 5 and versions == {"fake": "1"}
    assert found.ready_s is not None and 0 < found.ready_s < 20
    assert found.peak_bytes is None or found.peak_bytes > 1 << 20


def test_a_driver_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(PeerUnavailableError, match=r"exit code 1: ValueError: no such instruction"):
        run(driver(monkeypatch, tmp_path, "raise ValueError('no such instruction')"), tmp_path, WORK, OURS)


def test_a_driver_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    work = Work(WORK.requests, WORK.single, WORK.cores, WORK.kv_gib, limit_s=0.5)
    monkeypatch.setattr(driven, "_STOP_S", 0.2)
    with pytest.raises(PeerUnavailableError, match=r"not done after 0\.5 s"):
        run(driver(monkeypatch, tmp_path, "import time; print('loading', flush=True); time.sleep(600)"), tmp_path, work, OURS)
