"""`carousel simulate`: what it prints, what it writes, and what it says to wrong usage."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from bench import tables
from bench.cost_models import Roofline
from bench.figures import Slo
from bench.roofline import MACHINES, SHAPES
from bench.scenario import Limits, Outcome, Scenario, core_config, roofline_facts, run, setup_of
from bench.simulate import simulate_command
from bench.workloads import by_name
from scheduler.recording import Recording

SMALL = ("--requests", "60", "--batch-rows", "16", "--step-tokens", "512")


def simulate(*arguments: str) -> Result:
    return CliRunner().invoke(simulate_command, [str(argument) for argument in arguments])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def row(output: str, name: str) -> list[str]:
    """The cells of a table's line, without what it is."""
    found = next(line for line in output.splitlines() if line.strip().startswith(name))
    return [cell.strip() for cell in found.strip()[len(name) :].split("  ") if cell.strip()]


def test_policies_stand_side_by_side_and_go_to_the_file(tmp_path: Path) -> None:
    out = tmp_path / "results" / "sim.jsonl"
    done = simulate("--rate", "8", "--policy", "continuous,static", *SMALL, "--json", out)
    assert done.exit_code == 0, done.output
    assert "llama-3-8b on h200" in done.output and "60 requests at 8 a second, seed 0" in done.output
    assert row(done.output, "requests")[:2] == ["60", "60"]
    new, old = lines(out)
    assert (new["policy"], old["policy"]) == ("continuous", "static")
    assert new["what"] == "simulate" and {"commit", "machine", "versions", "date"} <= set(new)
    assert new["seed"] == 0 and new["workload"] == {"name": "azure-conv-like", "requests": 60, "rate": 8.0}
    assert new["figures"]["requests"] == 60 and new["figures"]["ttft"]["p99"] < old["figures"]["ttft"]["p99"]
    assert 0 < new["bound"]["share"] < 1 and new["costs"]["machine"]["name"] == "h200" and new["complete"]


def test_the_same_seed_prints_the_same_and_another_one_does_not() -> None:
    first, second, other = (simulate("--rate", "8", *SMALL, "--seed", seed).stdout for seed in ("1", "1", "2"))
    assert first == second != other


def test_several_workloads_come_in_one_table() -> None:
    done = simulate(
        "--workload", "azure-conv-like,azure-code-like,conversations", "--policy", "continuous,prefill_first", *SMALL
    )
    assert done.exit_code == 0, done.output
    for name in ("azure-conv-like", "azure-code-like", "conversations"):
        assert done.output.count(name) == 1
    assert done.output.count("continuous") == done.output.count("prefill_first") == 3


def test_anyscale_is_its_four_caps_with_the_posts_budgets(tmp_path: Path) -> None:
    out = tmp_path / "sim.jsonl"
    usage = ("--workload", "anyscale", "--model", "opt-13b", "--gpu", "a100-40g", "--requests", "30", "--json", str(out))
    assert simulate(*usage).exit_code == 0
    found = lines(out)
    assert [line["workload"]["name"] for line in found] == [f"anyscale-{cap}" for cap in (32, 128, 512, 1536)]
    assert [line["setup"]["num_blocks"] * 16 for line in found] == [8_688, 7_488, 8_096, 8_096]
    assert [line["setup"]["static_batch_size"] for line in found] == [16, 12, 8, 4]
    assert {line["workload"]["rate"] for line in found} == {"all at once"}
    assert simulate(*usage, "--kv-tokens", "0", "--static-batch-size", "0").exit_code == 0
    assert lines(out)[-1]["setup"]["num_blocks"] * 16 > 15_000 and lines(out)[-1]["setup"]["static_batch_size"] == 0


def test_the_load_is_a_share_of_what_can_be_served(tmp_path: Path) -> None:
    out = tmp_path / "sim.jsonl"
    assert simulate("--load", "0.5", *SMALL, "--json", out).exit_code == 0
    assert simulate("--load", "1", *SMALL, "--json", out).exit_code == 0
    half, whole = (line["workload"]["rate"] for line in lines(out))
    assert whole == pytest.approx(2 * half, rel=1e-3)


def test_a_file_comes_as_it_says_or_at_a_rate(tmp_path: Path) -> None:
    trace = tmp_path / "day.jsonl"
    entry = {"prompt_tokens": 50, "output_tokens": 5}
    trace.write_text("".join(json.dumps(entry | {"arrival_s": at}) + "\n" for at in range(10)))
    out = tmp_path / "sim.jsonl"
    done = simulate("--workload", str(trace), "--json", out)
    assert done.exit_code == 0 and "day.jsonl: 10 requests as they came" in done.output
    assert simulate("--workload", str(trace), "--rate", "10", "--requests", "5", "--json", out).exit_code == 0
    as_it_was, faster = lines(out)
    assert as_it_was["figures"]["elapsed_s"] == pytest.approx(9, abs=0.2)
    assert faster["figures"]["requests"] == 5 and faster["figures"]["elapsed_s"] == pytest.approx(0.4, abs=0.2)


def test_refused_requests_are_shown_with_the_reason(tmp_path: Path) -> None:
    trace = tmp_path / "long.jsonl"
    trace.write_text('{"arrival_s": 0, "prompt_tokens": 9000, "output_tokens": 5}\n')
    done = simulate("--workload", str(trace))
    assert done.exit_code == 0 and row(done.output, "refused")[0] == "1"
    assert "1 requests refused, longer than 8,192 tokens with their output" in done.output
    assert "--model llama-3.1-8b takes 131,072" in done.output
    assert "raise --max-model-len" in simulate("--workload", str(trace), "--max-model-len", "4000").output
    assert "raise --kv-tokens" in simulate("--workload", str(trace), "--kv-tokens", "4000").output
    assert "refused" not in simulate("--workload", str(trace), "--model", "llama-3.1-8b").output


FOUR = "azure-conv-like,azure-code-like,mooncake-like,anyscale-512"


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    """What the main exhibit shows, with few requests."""
    shape, machine = SHAPES["llama-3.1-8b"], MACHINES["h200"]
    facts = roofline_facts(shape, machine, Limits(kv_tokens=20_000, max_model_len=15_000))
    found = []
    for name in FOUR.split(","):
        for policy in ("continuous", "prefill_first", "static"):
            setup = setup_of(facts, Roofline(shape, machine), core_config(facts, policy=policy))
            found.append(
                run(
                    Scenario(
                        found[-1].scenario.workload if policy != "continuous" else by_name(name), math.inf, 40, 0, setup, Slo()
                    )
                )
            )
    return found


@pytest.mark.parametrize(("width", "columns"), [(500, 15), (120, 15), (100, 11), (80, 9)])
def test_the_table_of_many_cuts_no_number(outcomes: list[Outcome], width: int, columns: int) -> None:
    console = Console(width=width, highlight=False, file=io.StringIO())
    table = tables.overview(outcomes, width)
    assert table is not None and len(table.columns) >= columns
    with console.capture() as captured:
        console.print(table)
    text = captured.get()
    assert "…" not in text and max(len(line.rstrip()) for line in text.splitlines()) <= min(width, 120)
    assert len([line for line in text.splitlines() if line.strip() and "─" not in line]) == 2 + len(outcomes)
    assert tables.overview(outcomes, 50) is None


def test_what_is_piped_is_not_cut() -> None:
    done = simulate("--workload", FOUR, "--policy", "continuous,static", "--rate", "inf", *SMALL)
    assert done.exit_code == 0 and "…" not in done.stdout
    assert {"TTFT", "waste", "limit", "E2E"} <= set(done.stdout.split())
    assert "KV cache of 838,816 tokens in blocks of 16; SLO 1000 ms to the first token, 100 ms between tokens\n" in done.stdout


def test_how_fast_it_was_leaves_out_what_finds_the_rate(tmp_path: Path) -> None:
    out = tmp_path / "sim.jsonl"
    at_rate, at_load = (simulate(*rate, *SMALL, "--json", out) for rate in (("--rate", "8"), ("--load", "0.5")))
    assert "60 requests simulated in " in at_rate.stderr and " a minute" in at_rate.stderr and "more" not in at_rate.stderr
    assert "60 requests simulated in " in at_load.stderr and "s more to find what can be served" in at_load.stderr
    assert [line["calibration_s"] > 0 for line in lines(out)] == [False, True]
    assert simulate("--rate", "8", *SMALL, "--quiet").stderr == ""


@pytest.mark.parametrize(
    ("slo", "words"),
    [
        (["--slo-ttft-ms", "1"], "100% have no first token within 1 ms"),
        (["--slo-ttft-ms", "1"], "raise --slo-ttft-ms"),
        (["--slo-itl-ms", "0.1"], "take more than 0.1 ms a token"),
        (["--slo-itl-ms", "0.1"], "raise --slo-itl-ms"),
        (["--slo-ttft-ms", "1", "--criterion", "ttft"], "not 1: raise --slo-ttft-ms"),
        (["--workload", "mooncake-like"], "longer than 8,192 tokens with their output: llama-3-8b takes no more"),
    ],
)
def test_a_sweep_that_finds_no_rate_says_why(slo: list[str], words: str) -> None:
    done = simulate("--sweep", *SMALL, *slo)
    assert done.exit_code == 0 and "no rate keeps the SLO; at 0." in done.output and words in done.output, done.output


@pytest.mark.parametrize("more", [[], ["--sweep"], ["--policy", "static"]])
def test_a_cache_that_no_request_fits_is_told(more: list[str]) -> None:
    done = simulate("--kv-tokens", "100", "--requests", "50", *more)
    assert done.exit_code == 2 and "no request of azure-conv-like fits 96 tokens" in done.output, done.output
    assert "raise --kv-tokens" in done.output
    assert "--kv-tokens 10 is less than one block of 16 tokens" in simulate("--kv-tokens", "10").output


def test_a_sweep_compares_capacities(tmp_path: Path) -> None:
    out = tmp_path / "sim.jsonl"
    done = simulate("--sweep", "--policy", "continuous,static", "--workload", "anyscale-latency", *SMALL, "--json", out)
    assert done.exit_code == 0, done.output
    new, old = lines(out)
    assert new["capacity"] > old["capacity"] and new["at_capacity"]["figures"]["good_share"] >= 0.9
    assert [rate for rate, _ in new["tried"]] == sorted(rate for rate, _ in new["tried"])
    assert "1.00" in done.output and f"{old['capacity'] / new['capacity']:.2f}" in done.output


def test_what_it_records_can_be_simulated_under_another_policy(tmp_path: Path) -> None:
    recording, out = tmp_path / "run.rec", tmp_path / "sim.jsonl"
    assert simulate("--rate", "8", *SMALL, "--record", recording, "--json", out).exit_code == 0
    assert Recording(recording).header.core.policy == "continuous"
    done = simulate("--shadow", recording, "--policy", "continuous,static", "--json", out)
    assert done.exit_code == 0, done.output
    assert "recorded" in done.output and "simulated continuous" in done.output and "simulated static" in done.output
    first, again, static = lines(out)
    assert again["recorded"]["output_tokens"] == first["figures"]["output_tokens"] == static["figures"]["output_tokens"]
    assert again["figures"]["e2e"]["p50"] == pytest.approx(first["figures"]["e2e"]["p50"], rel=0.1)
    assert static["figures"]["ttft"]["p50"] > again["figures"]["ttft"]["p50"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workload", "nothing"], "unknown workload 'nothing': choose one of azure-conv-like"),
        (["--workload", "azure-conv-like,"], "empty place"),
        (["--workload", "no/file.jsonl"], "no/file.jsonl: No such file"),
        (["--rate", "0"], "rate must be above 0"),
        (["--rate", "-3"], "rate must be above 0"),
        (["--rate", "nan"], "rate must be above 0"),
        (["--rate", "fast"], "not a valid float"),
        (["--policy", "best"], "unknown policy 'best'"),
        (["--policy", "static,static"], "names something twice"),
        (["--rate", "3", "--load", "0.5"], "give one of them"),
        (["--sweep", "--rate", "3"], "leave out --rate"),
        (["--model", "llama-3.1-70b"], "does not fit h200"),
        (["--gpu", "abacus"], "is not one of"),
        (["--costs", "none.json"], "none.json: No such file"),
        (["--costs", "none.json", "--gpu", "h200"], "give it alone"),
        (["--shadow", "none.rec"], "none.rec: No such file"),
        (["--shadow", "none.rec", "--workers", "2"], "--workers makes no sense with --shadow"),
        (["--shadow", "none.rec", "--workload", "conversations"], "--workload makes no sense with --shadow"),
        (["--batch-rows", "10", "--step-tokens", "4"], "--batch-rows 10 is more than --step-tokens 4"),
        (["--policy", "static", "--rate", "3", "--static-batch-size", "-1"], "not in the range"),
        (["--record", "x.rec", "--policy", "static,continuous"], "takes down one run"),
        (["--rate", "3", "--requests", "3", "--json", "/proc/none/x.jsonl"], "/proc/none/x.jsonl: "),
        (["--rate", "3", "--requests", "3", "--record", "/proc/none.rec"], "/proc/none.rec: "),
    ],
)
def test_wrong_usage_is_told_in_words(arguments: list[str], words: str) -> None:
    done = simulate(*arguments)
    of_files = any(part in words for part in ("No such file", "/proc/none"))
    assert done.exit_code == (1 if of_files else 2) and words in done.output, done.output
    assert done.stderr.startswith("carousel: ") and done.stderr.count("\n") == 1
    assert of_files or done.stderr.endswith("--help`\n")


def test_one_limit_alone_holds() -> None:
    assert "3 rows, 3 tokens a step" in simulate("--step-tokens", "3", "--requests", "2", "--rate", "1").output
    assert "4000 rows, 4,000 tokens a step" in simulate("--batch-rows", "4000", "--requests", "2", "--rate", "1").output


def test_ctrl_c_prints_what_was_done() -> None:
    command = [sys.executable, "-m", "bench.simulate", "--rate", "1", "--requests", "100000000", "--quiet"]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2], env=dict(os.environ)
    )
    try:
        assert child.stdout is not None
        assert "llama-3-8b" in child.stdout.readline(), "it has begun"
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130 and "interrupted" in err and "Traceback" not in err
    assert "requests/s" in out and "TTFT p50" in out


def test_the_carousel_command_starts_it(tmp_path: Path) -> None:
    """From anywhere, and not a package of the same name that happens to stand there."""
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").write_text("raise SystemExit('the wrong bench')")
    carousel = Path(sys.executable).with_name("carousel")
    done = subprocess.run([carousel, "simulate", "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Usage: carousel simulate" in done.stdout, done.stderr
