from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.cost_models import CostError, Curve, Line, StepWork, Table, read_table


def test_a_curve_is_straight_between_points_level_before_and_goes_on_beyond() -> None:
    curve = Curve((2.0, 4.0, 8.0), (10.0, 20.0, 100.0))
    assert [curve(x) for x in (1, 2, 3, 4, 6, 8, 10)] == [10, 10, 15, 20, 60, 100, 140]
    assert Curve((5.0,), (7.0,))(1) == Curve((5.0,), (7.0,))(9) == 7


def test_a_tables_step_is_the_sum_of_its_parts() -> None:
    table = Table(Curve((1.0, 11.0), (100.0, 200.0)), Curve((1.0,), (5.0,)), Curve((1.0,), (2.0,)), 0.5, {}, {})
    assert table.step_ns(StepWork(decodes=1, decode_context=10, sampled=1)) == 100 + 5 + 20
    work = StepWork(decodes=1, decode_context=10, chunks=1, chunk_tokens=10, chunk_pairs=40, sampled=1)
    assert table.step_ns(work) == 200 + 5 + 20 + 20
    assert table.step_ns(StepWork(0, 0, 1, 1)) == 100, "no head for a chunk that samples nothing"


def test_a_line_counts_tokens_rows_and_pairs() -> None:
    line = Line(1000.0, 10.0, 100.0, 1.0, {})
    work = StepWork(decodes=2, decode_context=30, chunks=1, chunk_tokens=5, chunk_pairs=15)
    assert line.step_ns(work) == 1000 + 7 * 10 + 3 * 100 + 45


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense", "holds no step costs"),
        ("{}", "holds no step costs: KeyError"),
        ("[]", "holds no step costs"),
        (
            json.dumps(
                {"facts": {}, "ns": {"tokens": [[2, 1], [1, 1]], "sampled": [[1, 1]], "context": [[1, 1]], "chunk_pair": 0}}
            ),
            "points are not in order",
        ),
    ],
)
def test_a_file_that_holds_no_costs_is_told(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text)
    with pytest.raises(CostError, match=rf"costs\.json .*{words}"):
        read_table(path)
    with pytest.raises(CostError, match="No such file"):
        read_table(tmp_path / "none.json")
