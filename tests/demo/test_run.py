"""The whole demo as a process, with a server in place of `carousel serve` that has a batch and no model."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
DRIVER = (
    "import sys; from demo.run import main; sys.exit(main(sys.argv[1:], [sys.executable, '-m', 'tests.helpers.fake_serve']))"
)
WAIT_S = 60


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", DRIVER, *arguments]
    return subprocess.Popen(command, cwd=REPO, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(*arguments: str) -> tuple[int, str, str]:
    with start(*arguments) as process:
        out, err = process.communicate(timeout=WAIT_S)
    return process.returncode, out, err


def ports(out: str) -> list[int]:
    return [int(port) for port in re.findall(r"--port (\d+)", out)]


def is_served(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def figures_file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("figures") / "results" / "demo.jsonl"


@pytest.fixture(scope="module")
def shown(figures_file) -> str:
    code, out, err = run("--model", "fake", "--json", str(figures_file))
    assert (code, err) == (0, "")
    return out


def test_every_request_streams_its_text_and_ends_under_both_policies(shown):
    for label in "ABCDEFGHIJKLMNOPQRSTUVWX":
        assert re.search(rf"^\[{label}\] .* t\d+", shown, re.M)
        assert len(re.findall(rf"^\[{label}\] = \d+ tokens in ", shown, re.M)) == 2


def test_prompts_are_shown_before_their_continuation(shown):
    assert "[D] > def read_lines(path):\n" in shown
    assert re.search(r"^\[E\]   for line in  t\d+ t\d+", shown, re.M)  # a prompt that ends within a line


def test_the_opener_has_the_first_row_to_itself(shown):
    charts = re.findall(r"^row 0   \|(\S+)$", shown, re.M)
    assert len(charts) == 2 and all(chart.startswith("a") for chart in charts)


def test_only_static_batching_has_padding(shown):
    continuous, static = shown.split("continuous: ")[1].split("\nstatic: ")
    rows = [line for line in continuous.splitlines() if line.startswith("row ")]
    assert len(rows) == 8 and "-" not in "".join(rows)
    assert "-" in "".join(line for line in static.splitlines() if line.startswith("row "))


def test_the_table_the_ratio_and_the_equal_tokens_are_there(shown):
    for name in ("tokens/s", "TTFT p50", "TTFT p99", "E2E p50", "batch occupancy", "KV waste"):
        assert re.search(rf"^ {re.escape(name)} +\d", shown, re.M), name
    assert "Tokens: 24 of 24 requests got exactly the same tokens from both." in shown
    assert re.search(r"Continuous ÷ static on the same requests: \d+\.\d\dx the throughput", shown)


def test_the_figures_are_written_as_one_json_line(shown, figures_file):
    (line,) = figures_file.read_text().splitlines()
    figures = json.loads(line)
    assert figures["workload"] == {
        "seed": 0, "requests": 24, "mean_tokens": 64, "max_tokens": 256, "max_batch_rows": 8, "block_size": 16,
    }  # fmt: skip
    assert figures["same_tokens"] == 24
    assert f"{figures['throughput_ratio']:.2f}x the throughput" in shown
    assert figures["continuous"]["output_tokens"] == figures["static"]["output_tokens"] > 1000
    assert {"commit", "date", "machine", "versions", "model"} <= figures.keys()


def test_both_servers_are_gone_afterwards(shown):
    assert len(ports(shown)) == 2 and not any(map(is_served, ports(shown)))


def test_no_line_is_wider_than_a_plain_page(shown):
    assert max(map(len, shown.splitlines())) <= 130


def test_a_server_that_does_not_start_is_shown_and_fails_the_demo():
    code, out, err = run("--model", "broken")
    assert code == 1
    assert "the worker exited with code 1" in out
    assert err == "demo: the server ended with exit code 3 before it was ready, see above\n"


def test_a_request_that_is_refused_fails_the_demo_with_the_servers_words():
    code, out, err = run("--model", "full")
    assert (code, err) == (1, "demo: request warm-up 0 failed: RESOURCE_EXHAUSTED: the queue is full\n")
    assert out.count("full is served on") == 2  # when it was ready, and as the last that it said
    assert not any(map(is_served, ports(out)))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_demo_and_its_server(number, code):
    with start("--model", "fake") as process:
        out = ""
        while not out.endswith("\n[A] > import os\n"):  # in the middle of the first run
            line = process.stdout.readline()
            assert line, process.stderr.read()
            out += line
        process.send_signal(number)
        out += process.communicate(timeout=WAIT_S)[0]
    assert process.returncode == code
    assert not any(map(is_served, ports(out)))
