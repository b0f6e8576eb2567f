"""The judgements of `make chaos`: that it can fail, and what its times are."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.chaos import QUICK, Report, Row
from bench.chaos_load import longest_pause
from bench.killable import KillableServer
from bench.witness import Flaws


def report_of(row: Row) -> Report:
    return Report("sim", QUICK, seed=0, rows={"worker": row})


def test_a_report_without_flaws_holds() -> None:
    assert report_of(Row("worker", kills=3, near_ties=2)).holds


@pytest.mark.parametrize(
    "row",
    [
        Row("worker", flaws=Flaws(lost=1)),
        Row("worker", flaws=Flaws(doubled=1)),
        Row("worker", flaws=Flaws(text=1)),
        Row("worker", mismatches=1),
        Row("worker", errors=1),
    ],
)
def test_any_flaw_makes_it_fail(row: Row) -> None:
    assert not report_of(row).holds


def test_a_complaint_of_the_server_makes_it_fail() -> None:
    report = report_of(Row("worker"))
    report.complaints.append("the core's invariants are violated")
    assert not report.holds


def test_the_longest_pause_reaches_into_the_time_after_the_kill() -> None:
    at_s = [0.0, 5.0, 5.1, 5.9, 6.0, 9.0]
    assert longest_pause(at_s, 5.05, 6.5) == pytest.approx(3.0)  # it begins inside
    assert longest_pause(at_s, 5.05, 5.95) == pytest.approx(0.8)
    assert longest_pause(at_s, 4.0, 5.05) == pytest.approx(5.0)  # it ends inside
    assert longest_pause([1.0], 0.0, 2.0) is None


def test_only_new_whole_lines_of_the_log_are_complained_about(tmp_path: Path) -> None:
    server, log = KillableServer([], {}, tmp_path), tmp_path / "server.log"
    log.write_text("all is well\nTraceback (most recent call last):\nthe core's invariants are viol")
    assert server.complaints() == ["Traceback (most recent call last):"]
    with log.open("a") as more:
        more.write("ated\n")
    assert server.complaints() == ["the core's invariants are violated"]
    assert server.complaints() == []
