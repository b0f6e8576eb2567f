from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from bench import cpu
from bench.cpu import Report, Size, as_json, cached_checkpoint, measure, show, targets
from bench.roofline import Shape
from bench.tables import console

TINY = Shape("tiny", layers=2, hidden=64, heads=4, kv_heads=2, ffn=128, vocab=4096, max_len=512, tied=True)
SIZE = Size(
    requests=6,
    static_requests=4,
    rounds=1,
    prompt_len=24,
    mean=8,
    cap=24,
    single=8,
    long_prompt=64,
    long_prompts=1,
    together=4,
    together_tokens=64,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached_checkpoint(TINY, tmp_path_factory.mktemp("checkpoints"))


def test_weights_are_made_once(checkpoint: Path) -> None:
    written = (checkpoint / "model.safetensors").stat().st_mtime_ns
    assert cached_checkpoint(TINY, checkpoint.parent) == checkpoint
    assert (checkpoint / "model.safetensors").stat().st_mtime_ns == written
    assert [entry.name for entry in checkpoint.parent.iterdir()] == [checkpoint.name]


@pytest.mark.slow
def test_carousel_and_static_batches_side_by_side(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(TINY, SIZE, seed=0)
    measure(report, checkpoint, ["carousel", "static-4"], lambda text: None)
    assert not report.failed
    line = as_json(report, quick=True)
    carousel, static = (line["engines"][name][0] for name in ("carousel", "static-4"))
    assert (carousel["requests"], carousel["output_tokens"]) == (6, line["output_tokens"])
    assert (static["requests"], static["note"]) == (4, "the first 4 of 6 requests")
    assert all(run["limit_share"] > 0 and run["peak_bytes"] > 1 << 26 for run in (carousel, static))
    assert [shown.target for shown in targets(report)] == ["C1", "C1", "C3", "C3", *["C4"] * 4]
    show(report, console())
    shown = capsys.readouterr().out
    assert "of limit" in shown and "its bound" in shown and "the first 4 of 6 requests" in shown


@pytest.mark.slow
def test_continuous_batches_of_transformers(checkpoint: Path) -> None:
    report = Report(TINY, SIZE, seed=0)
    measure(report, checkpoint, ["continuous"], lambda text: None)
    assert not report.failed and report.outcomes["continuous"][0].requests == 6


@pytest.mark.slow
def test_an_engine_that_fails_is_left_out_and_said(checkpoint: Path, tmp_path: Path) -> None:
    report = Report(TINY, SIZE, seed=0)
    said: list[str] = []
    measure(report, tmp_path / "nothing", ["static-4"], said.append)
    assert list(report.failed) == ["static-4"] and not report.outcomes
    assert any("static-4 failed" in text for text in said)


def test_static_batches_get_the_first_requests_in_whole_batches() -> None:
    report = Report(TINY, Size(requests=30, static_requests=10), seed=0)
    assert report.asked_of("static-4") == report.requests[:12]
    assert report.asked_of("static-16") == report.requests[:16]
    assert report.asked_of("carousel") == report.requests


def test_no_probe_shares_a_prefix_with_the_workload() -> None:
    report = Report(TINY, SIZE, seed=0)
    probes = report.carousel_probes
    starts = [tuple(r.prompt_ids[:4]) for r in (*report.requests, report.single, *probes.prompts, *probes.together)]
    assert len(set(starts)) == len(starts)


@pytest.mark.parametrize("name", ["vllm", "static-0", "static-x", ""])
def test_an_unknown_engine_is_refused(name: str) -> None:
    done = CliRunner().invoke(cpu.main, ["--engines", f"carousel,{name}"])
    assert done.exit_code == 2 and "one of carousel, carousel-int8, static" in done.output
