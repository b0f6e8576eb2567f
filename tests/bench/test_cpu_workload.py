from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from rich.console import Console

from bench.cpu_workload import Noise, Outcome, Request, Spread, noise, offline_requests, peak_tree_bytes, table, together_rate


def outcome(seconds: float = 2.0, **more: float) -> Outcome:
    requests = [Request([5, 6], 3), Request([7], 1)]
    return Outcome.of("engine", requests, [[0.5, 0.5, seconds], [1.0]], 1 << 30, **more)


def test_requests_are_those_of_the_seed_and_begin_alike_however_many_are_drawn() -> None:
    some, more = offline_requests(4096, 5, seed=3), offline_requests(4096, 20, seed=3)
    assert some == more[:5] and some != offline_requests(4096, 5, seed=4)


def test_lengths_are_exponential_up_to_the_cap() -> None:
    requests = offline_requests(4096, 4000, prompt_len=2, mean=64, cap=512)
    outputs = [request.max_tokens for request in requests]
    assert min(outputs) == 1 and max(outputs) <= 512
    assert sum(outputs) / len(outputs) == pytest.approx(64, rel=0.05)
    ids = {token for request in requests for token in request.prompt_ids}
    assert len(requests[0].prompt_ids) == 2 and min(ids) >= 5 and max(ids) < 4096


def test_an_outcome_counts_tokens_from_the_offer_to_the_last_one() -> None:
    run = outcome()
    assert (run.prompt_tokens, run.output_tokens, run.seconds) == (3, 4, 2.0)
    assert (run.output_tokens_per_s, run.tokens_per_s) == (2.0, 3.5)
    assert run.ttft_s == Spread(0.5, 1.0)
    assert run.itl_s == Spread(0.0, 1.5)
    assert run.e2e_s == Spread(1.0, 2.0)


def test_an_engine_that_makes_too_few_tokens_is_no_outcome() -> None:
    with pytest.raises(AssertionError, match="made"):
        Outcome.of("engine", [Request([5], 2)], [[0.1]], None)


def test_an_outcome_survives_json() -> None:
    run = outcome(single_tokens_per_s=12.5)
    assert Outcome.from_json(json.loads(json.dumps(run.as_json()))) == run


def test_noise_is_known_only_when_every_run_tells_it() -> None:
    runs = [outcome(2.0, ready_s=3.0), outcome(4.0)]
    assert noise(runs, lambda run: run.seconds) == Noise(2.0, 3.0, 4.0)
    assert noise(runs, lambda run: run.ready_s) is None


def test_the_table_has_a_line_for_each_engine() -> None:
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table([[outcome(2.0), outcome(4.0)]]))
    shown = console.export_text().splitlines()
    (line,) = [line for line in shown if "engine " in line and "out" not in line]
    assert "1.5" in line and "1.0–2.0" in line and "1.00 GiB" in line and "–" in line


def test_tokens_count_while_all_decode() -> None:
    assert together_rate([[0.0, 1.0, 2.0, 3.0, 9.0], [1.0, 2.0, 3.0]]) == pytest.approx(2.0)  # four tokens in (1, 3]


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_the_peak_of_a_tree_counts_children_and_memory_given_back() -> None:
    child = "x = bytearray(b'1') * (64 << 20); del x; print(flush=True); input()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        peak = peak_tree_bytes(process.pid)
        process.communicate(b"\n")
    assert peak is not None and peak > 64 << 20
