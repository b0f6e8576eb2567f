from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

import bench.runs
from bench.runs import Gaps, RunLog
from wire import EndReason, OutputEnded, RequestStats


@pytest.mark.parametrize("compact", [1, 7, 1 << 20])
def test_gaps_are_those_between_the_tokens_of_each_output(monkeypatch: pytest.MonkeyPatch, compact: int) -> None:
    monkeypatch.setattr(bench.runs, "_COMPACT", compact)
    random = np.random.default_rng(0)
    gaps, last, expected = Gaps(), {}, Counter[int]()
    for step in range(200):
        now = step * 1000 + int(random.integers(3))
        handles = np.flatnonzero(random.random(9000) < 0.002).astype(np.uint32)
        gaps.heard(handles, now)
        for handle in handles.tolist():
            if handle in last:
                expected[now - last[handle]] += 1
            last[handle] = now
    values, counts = gaps.counted()
    assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == expected
    assert (np.diff(values) > 0).all()
    assert gaps.counted()[1].sum() == sum(expected.values()), "counting twice changes nothing"


def test_a_log_knows_of_every_output_what_became_of_it() -> None:
    log = RunLog()
    handles = [log.added(now, 10 + now, 2, deadline) for now, deadline in ((5, 0), (6, 70), (7, 0))]
    assert handles == [0, 1, 2]
    log.was_refused(1, "RESOURCE_EXHAUSTED", 6)
    stats = RequestStats(prompt_tokens=15, cached_tokens=4, output_tokens=3, preemptions=1, queued_ns=9, first_token_ns=20)
    log.ended(OutputEnded(0, EndReason.LENGTH, stats), 100)
    columns = log.columns()
    assert log.num_ended == 2
    assert columns.reason == ["length", "refused", ""]
    assert columns.arrival_ns.tolist() == [5, 6, 7] and columns.prompt_tokens.tolist() == [15, 16, 17]
    assert columns.end_ns.tolist() == [100, 6, -1] and columns.output_tokens.tolist() == [3, -1, -1]
    assert columns.first_ns.tolist() == [20, -1, -1] and columns.cached_tokens.tolist() == [4, -1, -1]
    assert columns.deadline_ns.tolist() == [0, 70, 0] and log.refused == {"RESOURCE_EXHAUSTED": 1}


def test_an_output_that_ended_without_a_token_has_no_first_one() -> None:
    log = RunLog()
    log.added(0, 1, 2, 0)
    log.ended(OutputEnded(0, EndReason.CANCELLED, RequestStats()), 5)
    assert log.columns().first_ns.tolist() == [-1]


def test_a_log_without_anything_has_empty_columns() -> None:
    log = RunLog()
    assert len(log.columns().arrival_ns) == len(log.steps().rows) == 0
