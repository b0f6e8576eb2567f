"""The check for GPUs, as far as it can be tried without one: every part runs with a few tokens in Triton's interpreter; what a
part says is heard, kept and judged, whatever becomes of the part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bench import gpu_check
from bench.gpu.check import Check, Figure, Limits, Problem, heard, say
from bench.gpu_check import PARTS, Part, Report

ROOT = Path(__file__).parents[2]
TARGETS = {"G1", "G2", "G3", "G4", "G5", "G6", "G8", "G9", "G10", "G11", "G14", "G15", "G16", "parity"}


def check(seconds: float = 60.0) -> Check:
    return Check("cpu", tiny=False, quick=False, limits=Limits(4e12, 8e14), deadline=time.monotonic() + seconds)


def options(*arguments: str) -> gpu_check.argparse.Namespace:
    return gpu_check._options(["--device", "cpu", "--tiny", *arguments])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_part_runs_and_every_target_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    path = tmp_path / "gpu.jsonl"
    command = [sys.executable, "-m", "bench.gpu_check", "--device", "cpu", "--tiny", "--minutes", "14", "--json", str(path)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=880)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["what"] + ": " + line["problem"] for line in lines if "problem" in line] == []
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line["target"] for line in lines} - {""} == TARGETS
    assert {line["part"] for line in lines} == {part.name for part in PARTS}
    assert all(line["tiny"] and line["versions"]["torch"] and line["commit"] is not None for line in lines)
    assert all(line["what"] in done.stdout for line in lines)


def test_a_figure_holds_on_the_right_side_of_its_goal() -> None:
    assert Figure("G8", "x", 0.85, goal=0.85).holds is True
    assert Figure("G8", "x", 0.84, goal=0.85).holds is False
    assert Figure("G14", "x", 0.02, goal=0.02, at_most=True).holds is True
    assert Figure("G14", "x", 0.021, goal=0.02, at_most=True).holds is False
    assert Figure("", "x", 1).holds is None
    assert Figure("G8", "x", float("nan"), goal=0.85).holds is False


def test_what_is_said_is_heard_and_other_lines_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    said = [Figure("G9", "größer", 1.5, "s", "≤ 2", 2.0, True, "note", {"a": [1]}), Problem("x", "why")]
    for each in said:
        say(each)
    assert [heard(line) for line in capsys.readouterr().out.splitlines()] == said
    assert heard("a warning of some library\n") is None


def test_a_failure_is_said_in_one_line_and_the_next_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    def fails():  # type: ignore[no-untyped-def]
        yield Figure("", "before", 1)
        raise ValueError("a\nb")

    assert not check().attempt("first", fails, 1)
    assert check().attempt("second", lambda: iter([Figure("", "after", 2)]), 1)
    got = [heard(line) for line in capsys.readouterr().out.splitlines()]
    assert got == [Figure("", "before", 1), Problem("first", "ValueError: a b"), Figure("", "after", 2)]


def test_nothing_is_begun_that_time_does_not_allow(capsys: pytest.CaptureFixture[str]) -> None:
    assert not check(seconds=5).attempt("long", lambda: iter([Figure("", "x", 1)]), 6)
    assert heard(capsys.readouterr().out) == Problem("long", "not run: no time left")


def part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str) -> Report:
    """The report of a part whose process runs this."""
    script = tmp_path / "part.py"
    script.write_text(f"import sys, time\nfrom bench.gpu.check import Figure, say\n{body}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(gpu_check, "_command", lambda *_: [sys.executable, str(script)])
    report = Report(tmp_path / "out.jsonl", options())
    gpu_check._one_process(Part("x", "none", "run", 60, "a test"), options(), report, 1.0)
    return report


def test_a_part_that_dies_is_reported_with_its_last_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report = part(monkeypatch, tmp_path, "say(Figure('', 'one', 1))\nprint('the GPU is lost', file=sys.stderr)\nsys.exit(3)")
    assert [said for _, said in report.said] == [
        Figure("", "one", 1),
        Problem("the rest of x (a test)", "ended with status 3: the GPU is lost"),
    ]
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line.get("problem") for line in lines] == [None, "ended with status 3: the GPU is lost"]


def test_a_part_that_hangs_is_stopped_and_what_it_said_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_check, "_GRACE_S", 2.0)
    report = part(monkeypatch, tmp_path, "say(Figure('', 'one', 1))\ntime.sleep(100)")
    assert [said for _, said in report.said] == [
        Figure("", "one", 1),
        Problem("the rest of x (a test)", "stopped after 3 s"),
    ]


def test_limits_that_were_measured_are_used_by_the_parts_that_follow() -> None:
    report = Report(None, options())
    assert report.limits == gpu_check._H200
    report.add("environment", Figure("", "copy", 3e12, "B/s"))
    report.add("environment", Figure("", "product", 6e14, "FLOP/s"))
    assert report.limits == Limits(3e12, 6e14)


def test_missing_packages_are_named_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "missing", lambda: ["msgspec"])
    assert gpu_check.main(["--device", "cpu", "--tiny"]) == 2
    said = capsys.readouterr().err
    assert "missing here: msgspec" in said and "--wheels DIR" in said and "pip download" in said


def test_options_that_cannot_be_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--parts", "kernels,nothing"], "no nothing; there are environment"),
        (["--device", "cpu"], "add --tiny"),
    ):
        with pytest.raises(SystemExit):
            gpu_check.main(arguments)
        assert words in capsys.readouterr().err


def test_the_check_begins_without_any_installed_package() -> None:
    """It says what is missing: it may not need it."""
    code = "import sys; sys.path.insert(0, '.'); import bench.gpu_check; sys.exit(bench.gpu_check.main([]))"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "these packages are missing here: msgspec, numpy, torch" in done.stderr


def test_gaps_between_tokens_are_told_apart_by_the_long_prompts() -> None:
    pytest.importorskip("torch")
    from bench.gpu.serving import _gaps

    times = [[1.0, 2.0, 3.0, 5.0, 6.0], [2.0, 3.0, 5.5, 6.0]]
    during, otherwise = _gaps(times, [(3.5, 4.5)])
    assert (sorted(during), sorted(otherwise)) == ([2.0, 2.5], [0.5, 1.0, 1.0, 1.0])


def test_demand_counts_what_requests_need() -> None:
    pytest.importorskip("msgspec")
    from bench.gpu.engine import Request, demand

    needed = demand([Request(np.zeros(4, np.int32), 3), Request(np.zeros(2, np.int32), 1)])
    assert (needed.prompt_tokens, needed.output_tokens, needed.pairs) == (6, 2, 10 + 3)
    assert (needed.context, needed.longest_output) == (5 + 6, 2)
