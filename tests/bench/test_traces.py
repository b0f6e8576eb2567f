from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import traces
from bench.jobs import token_ids
from bench.workloads import WorkloadError

ENTRY = {"arrival_s": 0.5, "prompt_tokens": 10, "output_tokens": 4}


def write(path: Path, *entries: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_a_file_is_read_by_arrival_and_begins_at_zero(tmp_path: Path) -> None:
    full = ENTRY | {"arrival_s": 2, "tenant": "a", "priority": "batch", "deadline_ms": 1.5, "num_outputs": 2, "max_tokens": 9}
    trace = traces.read(write(tmp_path / "day.jsonl", full, ENTRY))
    early, late = trace.jobs(0.0, 0, 0)
    assert (early.arrival_ns, early.prompt_tokens, early.output_tokens, early.max_tokens) == (0, 10, 4, 0)
    assert (late.arrival_ns, late.tenant, late.priority) == (1_500_000_000, "a", 1)
    assert (late.deadline_ns, late.num_outputs, late.max_tokens) == (1_500_000, 2, 9)
    assert trace.name == "day.jsonl" and not trace.shares_prefixes


def test_another_rate_stretches_the_times(tmp_path: Path) -> None:
    entries = [ENTRY | {"arrival_s": at} for at in (0, 1, 4)]
    trace = traces.read(write(tmp_path / "t.jsonl", *entries))
    assert trace.own_rate == 0.5
    assert [job.arrival_ns for job in trace.jobs(5.0, 0, 0)] == [0, 100_000_000, 400_000_000]
    assert [job.arrival_ns for job in trace.jobs(float("inf"), 2, 0)] == [0, 0]


def test_prompts_of_one_prefix_begin_alike(tmp_path: Path) -> None:
    entries = [
        ENTRY | {"prefix": "system", "prefix_tokens": 6},
        ENTRY | {"prefix": "system", "prefix_tokens": 8},
        ENTRY | {"prefix": "other"},
        ENTRY,
        ENTRY | {"prefix": "other", "prompt_tokens": 12},
    ]
    trace = traces.read(write(tmp_path / "t.jsonl", *entries))
    assert trace.shares_prefixes
    first, second, third, fourth, fifth = (token_ids(job.prompt, 1 << 30).tolist() for job in trace.jobs(0.0, 0, 0))
    assert first[:6] == second[:6] and first[6:] != second[6:]
    assert third == fifth[:10] and third[:1] != first[:1] and fourth[:1] not in (first[:1], third[:1])


def test_empty_lines_are_passed_over_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(f"\n{json.dumps(ENTRY)}\n\nnonsense\n")
    with pytest.raises(WorkloadError, match=r"t\.jsonl, line 4: no JSON"):
        traces.read(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens must be a whole number from 1"),
        ({"prompt_tokens": 1.5}, "prompt_tokens must be a whole number from 1"),
        ({"prompt_tokens": True}, "prompt_tokens must be a whole number from 1"),
        ({"prompt_tokens": "10"}, "prompt_tokens must be a whole number from 1"),
        ({"prompt_tokens": None}, "prompt_tokens is missing"),
        ({"output_tokens": -3}, "output_tokens must be a whole number from 1"),
        ({"output_tokens": float("inf")}, "output_tokens must be a whole number from 1"),
        ({"arrival_s": "now"}, "arrival_s must be a number of seconds"),
        ({"arrival_s": float("nan")}, "arrival_s must be a number of seconds"),
        ({"priority": "urgent"}, "priority must be one of batch, normal, interactive"),
        ({"priority": ["batch"]}, "priority must be text"),
        ({"tenant": 3}, "tenant must be text"),
        ({"deadline_ms": -1}, "deadline_ms must be a number of milliseconds"),
        ({"prefix_tokens": 5}, "prefix_tokens stands without a prefix"),
        ({"prefix": "p", "prefix_tokens": 11}, "prefix_tokens must be a whole number from 0 to 10"),
        ({"max_tokens": 3}, r"max_tokens \(3\) is less than output_tokens \(4\)"),
        ({"num_outputs": 100}, "num_outputs must be a whole number from 1 to 64"),
        ({"prompt": 5}, "unknown field 'prompt'"),
    ],
)
def test_a_bad_line_is_told_by_number_and_field(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = write(tmp_path / "t.jsonl", ENTRY, ENTRY, ENTRY | change)
    with pytest.raises(WorkloadError, match=rf"t\.jsonl, line 3: {words}"):
        traces.read(path)


def test_what_is_no_workload_at_all_is_told(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="No such file"):
        traces.read(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(WorkloadError, match="holds no requests"):
        traces.read(tmp_path / "empty.jsonl")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    with pytest.raises(WorkloadError, match="line 1: a JSON object was expected"):
        traces.read(tmp_path / "list.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WorkloadError, match="not UTF-8"):
        traces.read(tmp_path / "bytes.jsonl")
