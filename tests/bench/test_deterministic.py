"""What --deterministic costs: how it is added up. (The tool itself runs a server for minutes.)"""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from bench import deterministic
from bench.cpu_carousel import Probed
from bench.cpu_workload import Outcome, Request
from bench.deterministic import DETERMINISTIC, USUAL, Size, Speeds, main, table
from bench.server import ServerFailedError


def outcome(seconds: float) -> Outcome:
    request = Request([1, 2, 3], 4)
    return Outcome.of("x", [request], [[seconds / 4 * i for i in range(1, 5)]], None, single_tokens_per_s=10 / seconds)


def speeds(seconds: float) -> Speeds:
    found = Speeds()
    for _ in range(3):
        found.add(outcome(seconds), Probed([seconds, seconds, 99.0], 32 / seconds), long_prompt=1000)
    found.add(outcome(1000.0), Probed([1000.0], 0.1), long_prompt=1000)  # a round that somebody disturbed
    return found


def test_speeds_are_tokens_a_second_and_medians_of_the_rounds() -> None:
    assert speeds(2.0).medians() == [pytest.approx(speed) for speed in (2, 5, 16, 500)]


def test_the_table_tells_the_share_that_is_left() -> None:
    text = StringIO()
    shown = table("m", {USUAL: speeds(2.0), DETERMINISTIC: speeds(2.5)}, Size())
    Console(file=text, width=200).print(shown)
    assert text.getvalue().count("80.0%") == 4 and "500" in text.getvalue() and "400" in text.getvalue()


def test_both_ways_are_served_in_turns_and_a_failure_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[bool] = []

    def run(model: Path, vocab_size: int, size: Size, options: tuple[str, ...]) -> tuple[Outcome, Probed]:
        asked.append("--deterministic" in options)
        if len(asked) == 5:
            raise ServerFailedError("it does not serve")
        return outcome(2.0), Probed([1.0], 1.0)

    monkeypatch.setattr(deterministic, "run", run)
    out = tmp_path / "out.jsonl"
    done = CliRunner().invoke(main, ["--model", "demo", "--rounds", "2", "--json", str(out)])
    assert done.exit_code == 0 and asked == [False, True, False, True] and out.read_text().count("\n") == 1
    failed = CliRunner().invoke(main, ["--model", "demo", "--rounds", "2"])
    assert failed.exit_code == 1 and "it does not serve" in failed.output
