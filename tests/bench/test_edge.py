from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench import edge, processes
from bench.edge import LoadFailedError, Report, Size, as_json, measure, offer, show, targets
from bench.edge_load import GENERATE, MANY, Load, most_at_once
from bench.server import Server
from bench.tables import console

MODEL = Path(__file__).parents[2] / "demo" / "model"
TINY = Size(
    frontends=(1,),
    rounds=1,
    streams=6,
    stream_tokens=20,
    many_calls=2,
    many_waves=2,
    many_tokens=20,
    crowd=40,
    crowd_tokens=4,
    singles=5,
)


def test_all_targets_are_measured_beside_the_bare_server(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(TINY, seed=1)
    measure(report, MODEL, lambda text: None)
    assert [(rate.kind, rate.text) for rate in report.rates] == [
        (kind, text) for kind in (GENERATE, MANY) for text in (True, False)
    ]
    for rate in report.rates:
        tokens = {GENERATE: 6 * 20, MANY: 2 * 6 * 20}[rate.kind]
        assert rate.tokens_per_s * rate.seconds == pytest.approx(tokens)
        assert rate.tokens_per_message * rate.messages_per_s == pytest.approx(rate.tokens_per_s)
        assert set(rate.cpu_s) == {"core", "frontend", "worker", "load"} and rate.bare_messages_per_s > 0
    crowd = report.crowd
    assert crowd is not None
    assert (crowd.served, crowd.statuses, crowd.most_heard, crowd.bare_served) == (40, {"0": 40}, 40, 40)
    assert [shown.target for shown in targets(report)] == ["S4"] * 4 + ["S5", "S6"]
    assert json.loads(json.dumps(as_json(report, quick=True)))["crowd"]["served"] == 40
    show(report, console())
    shown = capsys.readouterr().out
    assert "Generate, ids only" in shown and "40 at once" in shown


def test_a_load_that_is_refused_is_no_figure() -> None:
    with Server(["--model", str(MODEL), "--device", "sim"]) as server:
        for kind in (GENERATE, MANY):
            load = Load(kind=kind, port=server.port, calls=2, tokens=5000)  # longer than the model can
            with pytest.raises(LoadFailedError, match="not all was served: 0 of"):
                offer(load)
            assert offer(replace(load, tokens=5)).tokens == 10


def test_most_at_once_counts_overlaps() -> None:
    assert most_at_once([(0, 10), (2, 5), (4, 6), (5, 7), (11, 12)]) == 3
    assert most_at_once([]) == 0


def test_a_servers_processes_are_told_apart() -> None:
    with Server(["--model", str(MODEL), "--device", "sim", "--frontends", "2"]) as server:
        before = processes.of_server(server.pid)
        after = processes.of_server(server.pid)
    assert set(before) == {processes.SUPERVISOR, processes.CORE, processes.FRONTEND, processes.WORKER}
    assert before[processes.FRONTEND].resident_bytes > 1.5 * before[processes.CORE].resident_bytes, "two of them together"
    assert all(spent >= 0 for spent in processes.cpu_between(before, after).values())
    assert processes.of_server(os.getpid())[processes.SUPERVISOR].resident_bytes > 1 << 24


def test_numbers_of_front_ends_are_checked() -> None:
    done = CliRunner().invoke(edge.main, ["--frontends", "1,x"])
    assert done.exit_code == 2 and "whole numbers" in done.output
