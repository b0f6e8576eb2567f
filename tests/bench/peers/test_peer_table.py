"""The table of all engines, and the comparison that goes on without the ones that fail."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from bench.cpu_workload import Outcome, Request
from bench.peers import driven, run
from bench.peers.driven import Work
from bench.peers.engines import ENGINES, Engine
from bench.peers.environments import Environment, PeerUnavailableError
from bench.peers.run import Comparison, kv_gib
from bench.peers.table import advantage, table, target_table, targets
from bench.roofline import SHAPES

REQUESTS = [Request([5, 6], 4)]
WORK = Work(REQUESTS, Request([7], 2), (0, 1), kv_gib=1, limit_s=1)


def ran(engine: str, last_s: float) -> Outcome:
    return Outcome.of(engine, REQUESTS, [[last_s / 4, last_s / 2, last_s * 0.75, last_s]], 3 << 30, ready_s=2.0)


def engines(*names: str) -> list[Engine]:
    return [ENGINES[name] for name in names]


def test_each_class_is_compared_with_its_own_carousel() -> None:
    speeds = {"carousel": 1.0, "carousel-int8": 0.5, "openvino-fp32": 2.0, "openvino-int8": 2.0, "llamacpp-f16": 4.0}
    runs = {name: [ran(name, seconds)] for name, seconds in speeds.items()}
    found = {name: advantage(ENGINES[name], runs) for name in runs}
    assert found == {"carousel": 1, "carousel-int8": 1, "openvino-fp32": 2, "openvino-int8": 4, "llamacpp-f16": 4}


def test_without_carousel_there_is_no_ratio() -> None:
    assert math.isnan(advantage(ENGINES["vllm"], {"vllm": [ran("vllm", 1.0)], "carousel-int8": [ran("carousel-int8", 1.0)]}))


def test_the_table_has_median_and_range_over_the_rounds() -> None:
    chosen = engines("carousel", "vllm", "llamacpp-f16")
    runs = {"carousel": [ran("carousel", s) for s in (1.0, 2.0, 4.0)], "vllm": [ran("vllm", 4.0)]}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(chosen, runs))
    lines = console.export_text().splitlines()
    (ours,) = [line.split() for line in lines if line.split()[:1] == ["carousel"]]
    (vllm,) = [line.split() for line in lines if line.split()[:1] == ["vllm"]]
    assert ours[:4] == ["carousel", "float32", "2.00", "1.00–4.00"]
    assert vllm[-6:] == ["s", "3.00", "GiB", "2.00", "2.00", "s"]
    assert not any("llamacpp" in line for line in lines)


def test_c2_takes_the_ratio_of_each_round_and_the_fastest_llama_cpp() -> None:
    runs = {
        "carousel": [ran("carousel", 1.0), ran("carousel", 1.0)],
        "openvino-fp32": [ran("openvino-fp32", 1.0), ran("openvino-fp32", 1.5)],
        "llamacpp-f16": [ran("llamacpp-f16", 8.0)] * 2,
        "llamacpp-q8_0": [ran("llamacpp-q8_0", 3.0)] * 2,
        "openvino-int8": [ran("openvino-int8", 1.0)] * 2,  # nothing of ours to compare with
    }
    openvino, llama = targets(runs)
    assert (openvino.value, openvino.goal, openvino.holds) == (1.25, 1.2, True)
    assert openvino.more == {"least": 1.0, "most": 1.5, "engine": "openvino-fp32"}
    assert (llama.value, llama.holds) == (3.0, False) and llama.more is not None and llama.more["engine"] == "llamacpp-q8_0"
    assert target_table([openvino, llama]).row_count == 2


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No installation, no process: vLLM can't be installed, llama.cpp fails in its second run."""
    started: list[str] = []

    def ensure(name: str, cores: int) -> Environment:
        started.append(f"install {name}")
        if name == "vllm":
            raise PeerUnavailableError("can't be installed: no wheel")
        return Environment(Path(name))

    def one(engine: Engine, model: Path, work: Work, environment: Environment) -> tuple[Outcome, dict[str, str]]:
        started.append(engine.name)
        if engine.name == "llamacpp-f16" and started.count(engine.name) == 2:
            raise PeerUnavailableError("ended with exit code 1: out of memory")
        return ran(engine.name, 1.0), {str(engine.peer): "1"}

    def ours(engine: Engine, checkpoint: Path, work: Work) -> Outcome:
        started.append(engine.name)
        return ran(engine.name, 1.0)

    monkeypatch.setattr(run, "ensure", ensure)
    monkeypatch.setattr(driven, "convert", lambda engine, checkpoint, environment: checkpoint)
    monkeypatch.setattr(driven, "run", one)
    monkeypatch.setattr(driven, "run_carousel", ours)
    return started


def test_engines_take_turns_and_those_that_fail_are_left_out_with_a_reason(
    faked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    comparison = Comparison(engines("carousel", "vllm", "vllm-bf16", "openvino-fp32", "llamacpp-f16"), WORK)
    comparison.prepare(Path("checkpoint"))
    for number in (1, 2, 3):
        comparison.round(number)
    assert faked[:3] == ["install vllm", "install openvino", "install llamacpp"]
    turns = ["carousel", "openvino-fp32", "llamacpp-f16"]
    assert faked[3:] == [*turns, *turns, *turns[:2]]
    assert comparison.skipped == {
        "vllm": "can't be installed: no wheel",
        "vllm-bf16": "can't be installed: no wheel",
        "llamacpp-f16": "ended with exit code 1: out of memory (round 2)",
    }
    assert "skipped: vllm: can't be installed: no wheel" in capsys.readouterr().out
    line = comparison.as_json()
    assert {name: len(entry["runs"]) for name, entry in line["engines"].items()} == {
        "carousel": 3,
        "openvino-fp32": 3,
        "llamacpp-f16": 1,
    }
    assert comparison.versions == {"openvino": "1", "llamacpp": "1"}


def test_the_cache_holds_all_requests_at_once() -> None:
    shape = SHAPES["smollm-135m"]
    requests = [Request([5] * 128, 512)] * 64
    assert kv_gib(shape, requests) * 2**30 >= 64 * 640 * 30 * 2 * 3 * 64 * 4
    assert kv_gib(shape, requests[:1]) == 1
