from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner

from bench import anyscale, anyscale_bounds, anyscale_report, workloads
from bench.anyscale import Report, as_json, in_turn, reserve_waste
from bench.anyscale_plots import decades, named, short, ticks
from bench.anyscale_sizes import BLOCK, CPU, FULL, QUICK, SIZES, Size
from bench.anyscale_summary import CONTINUOUS, STATIC, SYSTEMS, TRANSFORMERS_STATIC, summary
from bench.cost_models import Line
from bench.cpu import cached_checkpoint
from bench.cpu_bounds import Limits
from bench.jobs import Job, Part
from bench.pictures.canvas import svg
from bench.roofline import Shape
from bench.workloads import ANYSCALE_CAPS, ANYSCALE_KV_TOKENS
from wire import WorkerFacts

TINY = Shape("tiny", layers=2, hidden=64, heads=4, kv_heads=2, ffn=128, vocab=4096, max_len=512, tied=True)
SIZE = replace(
    QUICK, shape=TINY, divisor=16, requests=8, baseline_requests=4, latency_requests=4, caps=(32, 512), all_kv_tokens=2048
)


# -------------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("cap", ANYSCALE_CAPS)
def test_at_full_scale_it_is_the_posts_workload(cap: int) -> None:
    ours, theirs = (
        list(workload.jobs(math.inf, 1000, 0)) for workload in (FULL.burst(cap), workloads.by_name(f"anyscale-{cap}"))
    )
    assert ours == theirs
    assert {job.prompt_tokens for job in ours} == {512} and FULL.requests == 1000
    assert 0 <= FULL.kv_blocks(cap) * BLOCK / ANYSCALE_KV_TOKENS[cap] - 1 < 0.025


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_memory_holds_just_the_posts_static_batch(size: Size) -> None:
    for cap in size.caps:
        row = -(-(size.prompt + size.cap(cap)) // BLOCK)
        assert size.kv_blocks(cap) // row == size.static_rows(cap)
        assert size.cap(cap) * size.divisor == cap, "the caps are scaled exactly"


@pytest.mark.parametrize(("cap", "mean"), [*zip(ANYSCALE_CAPS, (15.9, 54.3, 122.6, 130.8), strict=True)])
def test_scaled_lengths_have_the_posts_means_scaled(cap: int, mean: float) -> None:
    outputs = np.array([job.output_tokens for job in CPU.burst(cap).jobs(math.inf, 20_000, 5)])
    assert outputs.max() <= CPU.cap(cap)
    up = 0.5 * (1 - 1 / CPU.divisor)  # a length is the next whole number, of shorter ones
    assert outputs.mean() - up == pytest.approx(mean / CPU.divisor, rel=0.06)


def test_a_gpus_model_is_a_configuration_whose_weights_are_made_up(tmp_path: Path) -> None:
    folder = anyscale.checkpoint(
        replace(FULL, shape=replace(FULL.shape, layers=2, hidden=64, heads=4, kv_heads=4, ffn=128)), tmp_path
    )
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["hidden_size"], config["ffn_dim"]) == ("opt", 64, 128)
    assert not (folder / "model.safetensors").exists() and (folder / "tokenizer.json").exists()
    assert FULL.max_len <= FULL.shape.max_len, "its positions hold the largest cap"


def test_another_one_goes_first_in_each_round() -> None:
    assert [in_turn("abc", number)[0] for number in range(4)] == ["a", "b", "c", "a"]
    assert sorted(in_turn("abc", 2)) == ["a", "b", "c"]


def test_reserving_for_the_longest_wastes_what_is_never_used() -> None:
    # 2 steps with 10 and 11 tokens, 1 step with 10: of 3 × 100
    assert reserve_waste([job(10, 2), job(10, 1)], 100) == pytest.approx(1 - 31 / 300)


# ------------------------------------------------------------------------------------------------------------------- bounds


def job(prompt: int, output: int) -> Job:
    return Job(0, (Part(prompt * 1000 + output, prompt),), output)


@dataclass(frozen=True)
class Fixed:
    asked: tuple[Job, ...]
    name: str = "fixed"
    shares_prefixes: bool = False

    def jobs(self, rate: float, count: int, seed: int) -> Iterator[Job]:
        return iter(self.asked[:count])


def facts(**more: Any) -> WorkerFacts:
    sizes = dict(max_model_len=512, block_size=16, num_blocks=1000, max_batch_rows=2, max_step_tokens=1000) | more
    return WorkerFacts(
        device="virtual",
        pid=0,
        description="",
        architecture="",
        dtype="",
        vocab_size=1000,
        kv_bytes_per_token=1,
        num_parameters=1,
        **sizes,
    )


def bound(asked: list[Job], costs: Line, **more: Any) -> anyscale_bounds.Bound:
    return anyscale_bounds.bound(Fixed(tuple(asked)), asked, 0, costs, facts(**more))


STEPS = Line(base=1e6, per_token=0.0, per_row=0.0, per_pair=0.0, about={})


def test_the_bound_counts_the_steps_that_static_batches_wait() -> None:
    found = bound([job(8, 10), job(8, 1), job(8, 10), job(8, 1)], STEPS)
    assert found.static_s == pytest.approx(0.020), "two batches of ten steps"
    assert found.best_s == pytest.approx(0.011), "22 tokens, two rows a step"
    assert found.ratio == pytest.approx(20 / 11)


def test_equal_lengths_leave_nothing_to_gain() -> None:
    assert bound([job(8, 10)] * 4, STEPS).ratio == pytest.approx(1.0)


def test_the_best_is_held_back_by_the_longest_and_by_the_memory() -> None:
    assert bound([job(8, 50), job(8, 1)], STEPS).best_s == pytest.approx(0.050)
    # 20 rows of 33 … 64 tokens each, in 128 tokens: Σ context ÷ pool steps
    asked = [job(32, 32)] * 20
    context = 20 * sum(32 + step for step in range(32))
    tight = bound(asked, STEPS, num_blocks=8, max_batch_rows=20)
    assert tight.best_s == pytest.approx(context / 128 / 1000)
    assert tight.static_s > tight.best_s


def test_every_token_row_and_pair_is_paid_once() -> None:
    costs = Line(base=0.0, per_token=1e3, per_row=1e4, per_pair=10.0, about={})
    found = bound([job(8, 3), job(4, 1)], costs)
    tokens, rows, pairs = 8 + 4 + 2, 2 + 2, 36 + 10 + (9 + 10)
    assert found.best_s == pytest.approx((tokens * 1e3 + rows * 1e4 + pairs * 10) / 1e9)


# ---------------------------------------------------------------------------------------------------------------- smoke run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached_checkpoint(TINY, tmp_path_factory.mktemp("checkpoints"))


def limits() -> Limits:
    return Limits(fp32=1e11, int8=2e11, bandwidth=1e10)


def measured(checkpoint: Path, systems: list[str], size: Size) -> dict[str, Any]:
    report = Report(size, seed=0)
    anyscale.measure(anyscale.Run(report, checkpoint, systems, lambda: False, lambda text: None, limits))
    assert not report.failed and report.finished
    line: dict[str, Any] = json.loads(json.dumps(as_json(report, "quick")))
    return line


@pytest.mark.slow
def test_our_policies_are_measured_on_one_server(checkpoint: Path) -> None:
    line = measured(checkpoint, [CONTINUOUS, STATIC], replace(SIZE, caps=(512,)))
    (cap,) = line["caps"]
    assert set(cap["runs"]) == {CONTINUOUS, STATIC}
    for runs in cap["runs"].values():
        (run,) = runs
        assert run["tokens_per_s"] * run["seconds"] == pytest.approx(cap["prompt_tokens"] + cap["output_tokens"])
    assert cap["bounds"]["post"][0]["ratio"] > 0 and cap["limit_seconds"] > 0
    assert [len(load["e2e_s"][STATIC][0]) for load in line["latency"]["loads"]] == [4, 4]
    found = summary(line | {"load before": 0.0})
    assert found.caps[0].ratio_a is not None and found.loads[0].every_percentile_below_static is not None


@pytest.mark.slow
def test_all_systems_from_the_command_to_the_report(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "quick", SIZE)
    out, page = tmp_path / "results" / "a.jsonl", tmp_path / "docs" / "a.html"
    arguments = ["--quick", "--checkpoints", str(checkpoint.parent), "--json", str(out), "--html", str(page)]
    done = CliRunner().invoke(anyscale.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (line,) = anyscale_report.read(out)
    assert all(set(cap["runs"]) == set(SYSTEMS) for cap in line["caps"]) and len(line["caps"]) == 2
    assert set(line["latency"]["loads"][0]["e2e_s"]) == set(SYSTEMS) - {"static-all", "continuous-all"}
    assert page.read_text().count("<svg") == 3


@pytest.mark.slow
def test_a_system_that_fails_is_left_out_and_said(tmp_path: Path) -> None:
    report = Report(replace(SIZE, caps=(32,)), seed=0)
    said: list[str] = []
    anyscale.measure(anyscale.Run(report, tmp_path / "nothing", [TRANSFORMERS_STATIC], lambda: False, said.append, limits))
    assert list(report.failed) == [TRANSFORMERS_STATIC] and not report.finished
    assert any("failed" in text for text in said)


def test_what_was_done_before_ctrl_c_is_kept(checkpoint: Path) -> None:
    report = Report(replace(SIZE, caps=(32,)), seed=0)
    anyscale.measure(
        anyscale.Run(report, checkpoint, [CONTINUOUS, STATIC], lambda: bool(report.bursts), lambda text: None, limits)
    )
    assert list(report.bursts) == [32] and list(report.bursts[32]) == [CONTINUOUS]
    assert not report.finished and not report.failed


# ------------------------------------------------------------------------------------------------------------------- report


def fixed(seed: int = 0, **more: Any) -> dict[str, Any]:
    """A line of results in which static takes `cap` times as long as continuous, give or take."""

    def runs(speed: float, waste: float | None = None) -> list[dict[str, Any]]:
        return [{"seconds": 1.0, "tokens_per_s": speed * noise, "kv_waste": waste} for noise in (0.9, 1.0, 1.2)]

    caps = [
        {
            "post_cap": post,
            "cap": post // 4,
            "prompt": 128,
            "prompt_tokens": 10_000,
            "output_tokens": 2000,
            "mean_output": post / 10,
            "longest_output": post // 4,
            "static_rows": 4,
            "kv_tokens": 2048,
            "published_kv_tokens": 2025.0,
            "reserve_max_waste": 0.72,
            "runs": {
                system: runs(1000.0 * at, 0.04 * at if system in ("continuous", "static", "prefill_first") else None)
                for at, system in enumerate(SYSTEMS, 1 + number)
            },
            "bounds": {
                name: [{"static_s": 3.0, "best_s": 1.0, "fit_error": 0.05, "ratio": ratio}]
                for name, ratio in (("post", 1.7), ("all", 1.2))
            },
            "limit_seconds": 0.5,
        }
        for number, post in enumerate(ANYSCALE_CAPS)
    ]
    e2e = {
        system: [[0.1 * at * (1 + value) for value in range(10)]] * 2
        for at, system in zip((9, 5, 4, 2, 1), SYSTEMS, strict=False)
    }
    return {
        "what": "anyscale",
        "date": "2026-01-01T00:00:00+00:00",
        "commit": "abc",
        "machine": {"cpu": "<a CPU>", "cores": 2},
        "versions": {"python": "3.11", "torch": None},
        "size": "cpu",
        "shape": "llama-30m",
        "scaling": CPU.scaling,
        "divisor": 4,
        "requests": 128,
        "rounds": 3,
        "device": "cpu",
        "dtype": "float32",
        "max_rows": 64,
        "seed": seed,
        "finished": True,
        "load before": 0.1,
        "limits": {"fp32": 1e11, "int8": 1e11, "bandwidth": 1e10},
        "caps": caps,
        "latency": {
            "requests": 10,
            "static capacity": 8.0,
            "loads": [{"load": 0.5, "rate": 4.0, "e2e_s": e2e}, {"load": 2.0, "rate": 16.0, "e2e_s": e2e}],
        },
        "failed": {},
    } | more


def test_the_summary_compares_round_by_round() -> None:
    line = fixed()
    line["caps"][0]["runs"][STATIC] = [{"tokens_per_s": speed, "kv_waste": 0.5} for speed in (4500.0, 2500.0, 6000.0)]
    cap = summary(line).caps[0]
    assert cap.ratio_a is not None and cap.ratio_a.share is not None
    assert (cap.ratio_a.value.least, cap.ratio_a.value.median, cap.ratio_a.value.most) == pytest.approx((1.0, 1.0, 2.0))
    assert cap.ratio_a.share == pytest.approx(1.0 / 1.7)
    assert cap.ratio_b_all is not None and cap.ratio_b_all.bound == pytest.approx(12_000 / 0.5 / 1000)


def test_conclusions_are_drawn_from_the_figures() -> None:
    holds = list(summary(fixed()).holds.values())
    assert holds == [False, False, True], "1.67 of 1.7 at the first cap, 8 ÷ 6 at the last; latency is below"
    worse = fixed()
    worse["latency"]["loads"][0]["e2e_s"][CONTINUOUS][0][9] = 100.0
    assert list(summary(worse).holds.values())[2] is False, "one percentile above static's"
    assert list(summary(fixed(latency=None)).holds.values())[2] is None


def test_the_page_needs_nothing_else_and_has_all_parts() -> None:
    page = anyscale_report.html([fixed(), fixed(seed=1)])
    assert not re.search(r"(src|href)=|url\(|@import|https?://(?!www\.w3\.org/2000/svg)", page)
    for picture in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(picture)
    assert page.count("<svg") == 3 and page.count("<table>") == 5
    for text in ("Throughput", "Latency", "KV memory", "seed 1", "holds", "&lt;a CPU&gt;", "<td>1.67</td>", "1.70; 98%"):
        assert text in page, text


def test_a_busy_machine_an_unfinished_run_and_a_failure_are_said() -> None:
    page = anyscale_report.html([fixed(**{"load before": 3.0, "finished": False, "failed": {STATIC: "it broke"}})])
    assert "The machine was busy: a load average of 3.0" in page and "Not finished" in page and "it broke" in page
    assert "machine was busy" not in anyscale_report.html([fixed()])


def test_parts_that_are_missing_are_dashes() -> None:
    line = fixed(latency=None)
    for cap in line["caps"]:
        cap["runs"] = {CONTINUOUS: cap["runs"][CONTINUOUS]}
        cap["bounds"] = {}
    page = anyscale_report.html([line])
    assert "Too little was measured" in page and "–" in page and page.count("<svg") == 2


def test_the_largest_finished_run_is_reported_and_other_seeds_stand_beside_it() -> None:
    lines = [
        fixed(),
        fixed(seed=1),
        fixed(size="quick"),
        fixed(seed=2, finished=False),
        fixed(seed=3, shape="other"),
        fixed(date="later"),
    ]
    best, others = anyscale_report.newest(lines)
    assert best["date"] == "later" and [line["seed"] for line in others] == [1]


def test_bars_are_as_high_as_their_figures() -> None:
    found = summary(fixed())
    for make in anyscale_report.pictures(found).values():
        ElementTree.fromstring(svg(make))
    heights = [
        shape.height
        for shape in anyscale_report.pictures(found)["throughput"].shapes
        if getattr(shape, "role", "") == "series-5"
    ]
    speeds = [cap.tokens_per_s[CONTINUOUS].median for cap in found.caps]
    assert np.array(heights[1:]) / heights[1] == pytest.approx(np.array(speeds) / speeds[0]), "the first one is the legend's"


def test_an_axis_without_room_names_the_powers_of_ten() -> None:
    marks = decades(0.05, 400)
    assert named(marks, 20) == marks and named(marks, 8) == pytest.approx([0.1, 1, 10, 100])


def test_scales_are_round_and_hold_everything() -> None:
    assert ticks(9.3) == [0, 2, 4, 6, 8, 10] and ticks(1.0, 4) == [0, 0.25, 0.5, 0.75, 1.0]
    assert decades(0.013, 1.9) == pytest.approx([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2])
    assert [short(value) for value in (7.4, 812, 1234, 49_471)] == ["7", "812", "1.2k", "49k"]


def test_a_file_without_results_is_one_line(tmp_path: Path) -> None:
    for text in ("", "{}\n", "no json\n", json.dumps(fixed() | {"what": "other"})):
        (tmp_path / "a.jsonl").write_text(text)
        done = CliRunner().invoke(anyscale_report.main, ["--json", str(tmp_path / "a.jsonl")])
        assert done.exit_code == 1 and "holds no results" in done.output and done.output.count("\n") == 1


def test_the_same_results_give_the_same_report(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(fixed()) + "\n")
    for name in ("a", "b"):
        done = CliRunner().invoke(
            anyscale_report.main, ["--json", str(tmp_path / "a.jsonl"), "--html", str(tmp_path / f"{name}.html")]
        )
        assert done.exit_code == 0, done.output
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    changed = copy.deepcopy(fixed())
    changed["caps"][0]["runs"][CONTINUOUS][1]["tokens_per_s"] = 5500.0
    assert anyscale_report.html([changed]) != anyscale_report.html([fixed()])
