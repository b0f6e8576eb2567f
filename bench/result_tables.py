"""Results as tables of Markdown, each made from one or two files of bench/results alone. The newest line of its kind counts.

A function takes the folder and returns the table. Raises OSError, anyscale_report.ReportError.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from bench.anyscale_report import (
    Rows,
    latency_rows,
    markdown,
    newest,
    ratio_rows,
    read,
    throughput_rows,
    waste_rows,
)
from bench.anyscale_summary import Summary, summary
from bench.tables import number, seconds, share

Line = dict[str, Any]


def _lines(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def _last(results: Path, name: str) -> Line:
    return _lines(results / f"{name}.jsonl")[-1]


def _anyscale(rows: Callable[[Summary], Rows]) -> Callable[[Path], str]:
    def table(results: Path) -> str:
        line, _ = newest(read(results / "anyscale.jsonl"))
        return markdown(rows(summary(line)))

    return table


def _simulated(results: Path) -> str:
    """`make bench-scheduler`: the newest line of each workload and policy, in the order in which they first came."""
    found: dict[tuple[str, str], Line] = {}
    for line in _lines(results / "simulate.jsonl"):
        if line["what"] == "simulate":
            found[line["workload"]["name"], line["policy"]] = line["figures"]
    rows: Rows = [("workload", "policy", "output tokens/s", "TTFT p50", "ITL p99", "E2E p99", "KV waste")]
    for (workload, policy), told in found.items():
        times = (told["ttft"]["p50"], told["itl"]["p99"], told["e2e"]["p99"])
        pace = f"{told['output_tokens_per_s']:,.0f}"
        rows = [*rows, (workload, policy, pace, *map(seconds, times), share(told["kv_waste"]))]
    return markdown(rows, words=2)


def _demo(results: Path) -> str:
    line = _last(results, "demo")
    kinds: list[tuple[str, str, Callable[[float], str]]] = [
        ("tokens/s", "tokens_per_s", number),
        ("TTFT p50", "ttft_p50_s", seconds),
        ("E2E p50", "e2e_p50_s", seconds),
        ("batch occupancy", "occupancy", share),
        ("KV waste", "kv_waste", share),
        ("steps", "num_steps", number),
    ]
    rows: Rows = [("", "continuous", "static", "ratio")]
    for name, key, write in kinds:
        ours, theirs = line["continuous"][key], line["static"][key]
        rows = [*rows, (name, write(ours), write(theirs), f"{ours / theirs:.2f}")]
    return markdown(rows)


_ENGINES = {
    "carousel": "Carousel, float32",
    "carousel-int8": "Carousel, int8",
    "openvino-fp32": "OpenVINO GenAI, float32",
    "openvino-fp32-kv32": "OpenVINO GenAI, float32, keys and values too",
    "openvino-int8": "OpenVINO GenAI, int8",
    "vllm": "vLLM on CPU, float32",
    "llamacpp-f16": "llama.cpp server, f16",
    "llamacpp-q8_0": "llama.cpp server, q8_0",
    "continuous": "transformers, continuous batching, float32",
    "static-4": "transformers, static batches of 4, float32",
}


def _peers(results: Path) -> str:
    """`make bench-peers`, and transformers from `make bench-cpu`: each engine from the newest line that has it, medians of its
    runs."""
    found: dict[str, tuple[list[Line], str]] = {}
    for line in [*_lines(results / "cpu.jsonl"), *_lines(results / "peers.jsonl")]:
        for name, told in line["engines"].items():
            runs = told if isinstance(told, list) else told["runs"]
            if line["shape"] == "smollm-135m" and runs:
                found[name] = runs, line["date"][:16].replace("T", " ")
    rows: Rows = [("engine", "measured", "output tokens/s", "one stream, tokens/s", "TTFT p50", "ready after")]
    for name in [*(name for name in _ENGINES if name in found), *(name for name in found if name not in _ENGINES)]:
        runs, date = found[name]

        def middle(of: Callable[[Line], float], runs: list[Line] = runs) -> float:
            return median(of(run) for run in runs)

        rows = [
            *rows,
            (
                _ENGINES.get(name, name),
                date,
                number(middle(lambda run: run["output_tokens_per_s"])),
                number(middle(lambda run: run["single_tokens_per_s"])),
                seconds(middle(lambda run: run["ttft_s"]["p50"])),
                seconds(middle(lambda run: run["ready_s"])),
            ),
        ]
    return markdown(rows, words=2)


def _core(results: Path) -> str:
    rows: Rows = [("sequences in a step", "waiting", "median", "mean", "p99")]
    for step in _last(results, "core")["steps"]:
        times = (f"{step[name]:,.0f} µs" for name in ("median", "mean", "p99"))
        rows = [*rows, (f"{step['rows']:,}", f"{step['waiting']:,}", *times)]
    return markdown(rows, words=0)


def _targets(name: str) -> Callable[[Path], str]:
    def table(results: Path) -> str:
        rows: Rows = [("what", "measured", "goal", "holds")]
        for told in _last(results, name)["targets"]:
            what = told["what"] if told["target"] == name else f"{told['target']}: {told['what']}"
            goal = f"{'≤' if told['at_most'] else '≥'} {number(told['goal'])}"
            rows = [*rows, (what, number(told["value"]), goal, "yes" if told["holds"] else "no")]
        return markdown(rows)

    return table


def _chaos(results: Path) -> str:
    """Pauses of all streams together, around a kill."""
    rows: Rows = [("killed", "times", "streams", "tokens lost", "doubled", "others", "errors", "pause p50", "pause p99")]
    for told in _last(results, "chaos")["rows"].values():
        flaws = told["flaws"]
        counts = (told["kills"], told["requests"], flaws["lost"], flaws["doubled"], told["mismatches"], told["errors"])
        pauses = told["any_pauses_s"]
        rows = [*rows, (told["title"], *map(number, counts), seconds(pauses["p50"]), seconds(pauses["p99"]))]
    return markdown(rows)


def _soak(results: Path) -> str:
    line = _last(results, "soak")
    tally, flaws = line["tally"], line["tally"]["flaws"]
    most = max(after / before for before, after in (role["resident_bytes"] for role in line["growth"]))
    rows: Rows = [
        ("", ""),
        ("requests", number(line["asked"]["requests"])),
        ("… whole, cancelled, late, cut", ", ".join(f"{tally['ended'].get(how, 0):,}" for how in _ENDS)),
        ("tokens, each compared", number(tally["tokens"])),
        ("tokens lost, doubled, wrong", f"{flaws['lost']}, {flaws['doubled']}, {flaws['wrong']}"),
        ("kills", f"{sum(line['kills'].values())}: " + ", ".join(f"{who} {n}" for who, n in sorted(line["kills"].items()))),
        ("resumes", number(tally["resumes"])),
        ("most growth of a process in the calm last quarter", share(most - 1)),
        ("time", seconds(line["seconds"])),
        ("violations", number(tally["num_violations"] + len(line["wrongs"]))),
    ]
    return markdown(rows)


_ENDS = ("whole", "cancelled", "late", "cut")


def _journal(results: Path) -> str:
    rows: Rows = [("fsync", "sequences in a step", "median", "mean", "p99", "bytes a token")]
    for step in _last(results, "journal")["steps"]:
        times = (f"{step[name]:,.0f} µs" for name in ("median", "mean", "p99"))
        rows = [*rows, (step["fsync"], f"{step['rows']:,}", *times, f"{step['bytes_per_token']:.1f}")]
    return markdown(rows)


TABLES: dict[str, Callable[[Path], str]] = {
    "anyscale-throughput": _anyscale(throughput_rows),
    "anyscale-ratios": _anyscale(ratio_rows),
    "anyscale-latency": _anyscale(latency_rows),
    "anyscale-kv-waste": _anyscale(waste_rows),
    "simulate": _simulated,
    "demo": _demo,
    "peers": _peers,
    "core": _core,
    "edge": _targets("edge"),
    "overload": _targets("overload"),
    "chaos": _chaos,
    "soak": _soak,
    "journal": _journal,
}
