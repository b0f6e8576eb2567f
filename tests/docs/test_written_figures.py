"""Figures in README and docs that come from bench/results are those that stand there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import written
from bench.written import RESULTS, ROOT, WrittenError, filled


@pytest.mark.parametrize("path", written.files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_marked_tables_are_those_of_the_committed_results(path: Path) -> None:
    text = path.read_text()
    assert filled(text, RESULTS) == text, "run `python -m bench.written`"


def test_a_table_is_written_between_its_marks_and_nothing_else_changes(tmp_path: Path) -> None:
    figures = {"output_tokens_per_s": 1234.5, "kv_waste": 0.0312}
    figures |= {name: {"p50": 0.5, "p99": 2.0} for name in ("ttft", "itl", "e2e")}
    older = {"what": "simulate", "workload": {"name": "chat"}, "policy": "static", "figures": figures | {"kv_waste": 0.9}}
    lines = [older, older | {"figures": figures}, {"what": "simulate sweep"}]
    (tmp_path / "simulate.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    text = "before\n<!-- figures: simulate -->\nold\n<!-- end of figures -->\nafter\n"
    assert filled(text, tmp_path).splitlines() == [
        "before",
        "<!-- figures: simulate -->",
        "| workload | policy | output tokens/s | TTFT p50 | ITL p99 | E2E p99 | KV waste |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        "| chat | static | 1,234 | 500 ms | 2.00 s | 2.00 s | 3.1% |",
        "<!-- end of figures -->",
        "after",
    ]
    assert filled(filled(text, tmp_path), tmp_path) == filled(text, tmp_path)


def test_a_mark_that_means_nothing_is_an_error(tmp_path: Path) -> None:
    for text, words in (
        ("<!-- figures: nothing -->\n<!-- end of figures -->", "no figures 'nothing'"),
        ("<!-- figures: simulate -->\n", "has no"),
        ("<!-- figures: simulate -->\n<!-- end of figures -->", "No such file"),
        ("<!-- figures: anyscale-ratios -->\n<!-- end of figures -->", "No such file"),
    ):
        with pytest.raises(WrittenError, match=words):
            filled(text, tmp_path)
