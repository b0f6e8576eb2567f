from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from bench.load import bench_command
from bench.server import Server
from client import CarouselClient

MODEL = Path(__file__).parents[2] / "demo" / "model"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(["--model", str(MODEL), "--device", "sim", "--max-batch-rows", "8"]) as running:
        yield running


def bench(server: Server, *options: str) -> Result:
    return CliRunner().invoke(bench_command, ["--target", server.target, *options])


def trace(folder: Path, count: int, output: int = 4) -> str:
    lines = [{"arrival_s": number / 100, "prompt_tokens": 10, "output_tokens": output} for number in range(count)]
    (folder / "trace.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return str(folder / "trace.jsonl")


def test_an_open_loop_over_a_file_gives_figures_and_a_line_of_json(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "out" / "load.jsonl"
    done = bench(server, "--workload", trace(tmp_path, 20), "--json", str(out), "--seed", "3")
    assert done.exit_code == 0, done.output
    for text in ("20   that ended by themselves", "TTFT p50 / p90 / p99", "goodput", "generator"):
        assert text in done.output
    line = json.loads(out.read_text())
    assert line["what"] == "load over gRPC" and line["seed"] == 3 and line["machine"]["cores"] > 0
    assert (line["figures"]["requests"], line["figures"]["output_tokens"], line["figures"]["errors"]) == (20, 80, {})
    assert line["server"]["policy"] == "continuous" and line["workload"]["requests"] == 20
    assert line["KV cache"]["steps"] > 0


@pytest.mark.slow
def test_sessions_in_a_closed_loop(server: Server) -> None:
    done = bench(server, "--workload", "conversations", "--concurrency", "8", "--requests", "2", "--no-text")
    assert done.exit_code == 0 and "8 at once" in done.output, done.output


def test_requests_that_the_model_cannot_take_are_left_out_and_said(server: Server, tmp_path: Path) -> None:
    path = trace(tmp_path, 3)
    with open(path, "a") as more:
        more.write('{"arrival_s": 0, "prompt_tokens": 5000, "output_tokens": 1}\n')
    done = bench(server, "--workload", path)
    assert done.exit_code == 0 and "1 requests left out" in done.output and "3   that ended" in done.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rate", "1", "--concurrency", "2"], "choose one of them"),
        (["--rate", "-1"], "above 0"),
        (["--workload", "nothing"], "unknown workload"),
        (["--target", "nowhere"], "HOST:PORT"),
        (["--tls-ca", "/nowhere.pem"], "/nowhere.pem: No such file"),
    ],
)
def test_what_is_wrong_is_one_line(server: Server, options: list[str], words: str) -> None:
    done = bench(server, *options)
    assert done.exit_code in (1, 2) and words in done.output and done.output.count("\n") == 1


def test_no_server_is_one_line() -> None:
    done = CliRunner().invoke(bench_command, ["--target", "127.0.0.1:1"])
    assert done.exit_code == 1 and done.output.count("\n") == 1


def test_ctrl_c_keeps_what_was_measured(server: Server, tmp_path: Path) -> None:
    """Two hundred requests at ten a second, stopped in the midst."""
    out = tmp_path / "load.jsonl"
    path = trace(tmp_path, 200)
    command = [sys.executable, "-m", "bench.load", "--target", server.target, "--workload", path, "--rate", "10"]
    with subprocess.Popen([*command, "--json", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        with CarouselClient(server.target) as client:
            before, deadline = client.load().finished_requests, time.monotonic() + 60
            while client.load().finished_requests < before + 10 and time.monotonic() < deadline:
                time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        said, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in errors
    figures = json.loads(out.read_text())["figures"]
    assert 0 < figures["requests"] < 200 and figures["requests"] + figures["unfinished"] + figures["unsent"] == 200
    assert "not ended, not sent" in said
