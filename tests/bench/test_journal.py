from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from bench import journal
from bench.journal import filesystem


def test_each_policy_is_measured_at_each_number_of_rows(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    few = ["--rows", "1", "--rows", "3", "--steps", "4", "--pause-ms", "0"]
    done = CliRunner().invoke(journal.main, [*few, "--folder", str(tmp_path), "--json", str(out)])
    assert done.exit_code == 0, done.output
    line = json.loads(out.read_text())
    assert [(each["fsync"], each["rows"]) for each in line["steps"]] == [
        (fsync, rows) for fsync in ("never", "interval:100", "interval:10", "always") for rows in (1, 3)
    ]
    assert all(each["median"] > 0 and each["bytes_per_token"] > 4 for each in line["steps"])
    assert line["read_tokens"] == 3 * 4 and line["read_s"] > 0
    assert "12 tokens in" in done.output and not list(tmp_path.glob("carousel-journal-*")), "it cleans up"


def test_a_folder_that_is_not_there_is_wrong_usage() -> None:
    done = CliRunner().invoke(journal.main, ["--folder", "/nowhere"])
    assert done.exit_code == 2 and "/nowhere" in done.output


def test_the_file_system_of_a_folder_is_that_of_the_nearest_mount() -> None:
    assert filesystem(Path("/proc/self")) == "proc"
