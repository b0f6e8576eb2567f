"""A short `make chaos` and a short `make soak`: processes killed under load, and no token lost, doubled or another."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from bench import chaos, near_ties
from bench.chaos import KINDS, Report, Size
from bench.chaos_load import Job, Stream, all_once, connected
from bench.killable import KillableServer, serving

DEMO = Path(__file__).parents[2] / "demo" / "model"
SMALL = Size(rounds=1, lanes=8, jobs=8, connections=4)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path, as sockets are made below it."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as path:
        yield Path(path)


def killed(kinds: Sequence[str], folder: Path, device: str = "sim", size: Size = SMALL) -> Report:
    report = Report(device, size, seed=5)
    asyncio.run(chaos.measure(report, DEMO, kinds, folder, lambda text: None))
    return report


def assert_nothing_was_noticed(report: Report, kinds: Sequence[str], kills: int) -> None:
    assert report.holds, report
    assert report.undisturbed_tokens > 0
    for name in kinds:
        row = report.rows[name]
        assert row.kills == kills and row.requests > 0 and row.stream_pauses_s, row


def test_one_death_of_each_process_changes_no_token(folder: Path) -> None:
    kinds = ["worker", "frontend", "core", "replace"]
    assert_nothing_was_noticed(killed(kinds, folder), kinds, 1)


def test_a_token_that_differs_from_the_undisturbed_run_makes_it_fail(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def one_wrong(target: str, jobs: Sequence[Job]) -> list[Stream]:
        streams = await all_once(target, jobs)
        streams[0].witness.tokens()[-1] ^= 1
        return streams

    monkeypatch.setattr(chaos, "all_once", one_wrong)
    report = killed(["none"], folder, size=Size(rounds=1, lanes=4, jobs=1))
    assert not report.holds and report.rows["none"].mismatches > 0


def soaked(tmp_path: Path, requests: int, *options: str) -> dict[str, object]:
    command = [
        sys.executable,
        "-m",
        "bench.soak",
        "--requests",
        str(requests),
        "--json",
        str(tmp_path / "soak.jsonl"),
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    told: dict[str, object] = json.loads((tmp_path / "soak.jsonl").read_text())
    return told


def test_a_short_soak_loses_nothing(tmp_path: Path) -> None:
    told = soaked(tmp_path, 1000, "--leg", "500", "--lanes", "48", "--kill-every", "2", "--seed", "3")
    assert told["holds"] and told["kills"] and told["tally"]["rests"] == 2


@pytest.mark.slow
def test_a_soak_that_is_not_done_in_time_fails(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.soak", "--requests", "100000", "--minutes", "0.02"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "of 100,000 requests were done after" in done.stdout


@pytest.mark.slow
def test_two_deaths_of_every_kind_change_no_token(folder: Path) -> None:
    size = Size(rounds=2, lanes=16, jobs=12)
    assert_nothing_was_noticed(killed(list(KINDS), folder, size=size), list(KINDS), 2)


@pytest.mark.slow
def test_the_demo_model_gives_the_same_tokens_whatever_is_killed(folder: Path) -> None:
    kinds = ["worker", "frontend", "core"]
    assert_nothing_was_noticed(killed(kinds, folder, device="cpu"), kinds, 1)


@pytest.mark.slow
def test_a_longer_soak_loses_nothing(tmp_path: Path) -> None:
    told = soaked(tmp_path, 10_000, "--leg", "2500", "--kill-every", "4", "--seed", "7")
    assert told["holds"] and told["tally"]["counters"]["preemptions"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_changed_token_is_no_near_tie(temperature: float, folder: Path) -> None:
    async def verdict() -> near_ties.Verdict:
        job = Job((11, 12, 13, 14), 24, seed=3, temperature=temperature)
        [stream] = await all_once(server.target, [job])
        expected = stream.witness.tokens()
        changed = [*expected[:9], (expected[9] + 1) % 4096, *expected[10:]]
        async with connected(server.target) as client:
            assert await near_ties.judge(client, job, expected, expected) == near_ties.Verdict(())
            for at in (0, 5, 23):  # what was drawn has the best score of all
                others = [token for token in range(40, 4096, 800) if token != expected[at]]
                mine, *theirs = await near_ties.scores_of(client, job, expected[:at], (expected[at], *others))
                assert mine > max(theirs)
            return await near_ties.judge(client, job, changed, expected)

    options = ["--model", str(DEMO), "--device", "cpu", "--dtype", "float32", "--threads", "1"]
    with KillableServer(options, serving(1, 0), folder) as server:
        found = asyncio.run(verdict())
    assert found.ties == () and found.why.startswith("token 9 is ")
    gap = float(found.why.rpartition(" ")[2])
    assert near_ties.NEAR_TIE < gap < 100
