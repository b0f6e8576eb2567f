"""Outcomes of several engines as one table, and target C2. Pure: takes outcomes, returns rich tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

from rich import box
from rich.table import Table

from bench.cpu_workload import Outcome, noise
from bench.peers.engines import Class, Engine
from bench.tables import plain, seconds
from bench.targets import Shown

_HEADS = ("dtype", "tok/s", "min–max", "single", "TTFT p50", "E2E p50", "peak", "Carousel ÷", "start-up")
_CAROUSEL: Mapping[Class, str] = {"float": "carousel", "int8": "carousel-int8"}
_NAN = float("nan")
# Whom, who of us, which engines (the fastest of them counts), and the goal of ours ÷ theirs.
_C2 = (
    ("OpenVINO GenAI, both fp32", "carousel", ("openvino-fp32",), 1.2),
    ("OpenVINO GenAI, both int8", "carousel-int8", ("openvino-int8",), 1.8),
    ("vLLM, both fp32", "carousel", ("vllm",), 2.0),
    ("llama.cpp's server, its fastest", "carousel", ("llamacpp-f32", "llamacpp-f16", "llamacpp-q8_0"), 4.0),
)


def median(outcomes: Sequence[Outcome], number: Callable[[Outcome], float | None]) -> float:
    """NaN where a run lacks it."""
    found = noise(outcomes, number)
    return _NAN if found is None else found.median


def advantage(engine: Engine, runs: Mapping[str, Sequence[Outcome]]) -> float:
    """Output tokens a second of Carousel in the same class ÷ this engine's, medians; NaN where Carousel did not run."""
    ours = runs.get(_CAROUSEL[engine.compared])
    if not ours:
        return _NAN
    return _speed(ours) / _speed(runs[engine.name])


def targets(runs: Mapping[str, Sequence[Outcome]]) -> Iterator[Shown]:
    """C2, as far as the engines ran: output tokens a second, the median over the rounds of the ratio in each."""
    for whom, our_name, their_names, goal in _C2:
        ours, theirs = runs.get(our_name), [runs[name] for name in their_names if runs.get(name)]
        if not ours or not theirs:
            continue
        fastest = max(theirs, key=_speed)
        ratios = [one.output_tokens_per_s / other.output_tokens_per_s for one, other in zip(ours, fastest, strict=False)]
        more = {"least": min(ratios), "most": max(ratios), "engine": fastest[0].engine}
        yield Shown("C2", f"{our_name} ÷ {whom}", statistics.median(ratios), goal, more=more)


def target_table(found: Sequence[Shown]) -> Table:
    rows = Table("target", "what", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("value", "min–max", "goal", "holds"):
        rows.add_column(name, justify="right", no_wrap=True)
    for shown in found:
        assert shown.more is not None
        span = f"{plain(shown.more['least'])}–{plain(shown.more['most'])}"
        rows.add_row(shown.target, shown.what, plain(shown.value), span, f"≥ {shown.goal:g}", "yes" if shown.holds else "no")
    return rows


def table(engines: Sequence[Engine], runs: Mapping[str, Sequence[Outcome]]) -> Table:
    """One line for each engine that ran, from all of its rounds. Tokens are output tokens; "Carousel ÷" compares with Carousel
    in float32, or in int8 if the engine's weights are."""
    found = Table("engine", box=box.SIMPLE_HEAD, pad_edge=False)
    for head in _HEADS:
        found.add_column(head, justify="left" if head == "dtype" else "right", no_wrap=True)
    for engine in engines:
        if not (outcomes := runs.get(engine.name)):
            continue
        speed = noise(outcomes, lambda o: o.output_tokens_per_s)
        assert speed is not None
        ratio = advantage(engine, runs)
        found.add_row(
            engine.name,
            engine.dtype,
            plain(speed.median),
            f"{plain(speed.least)}–{plain(speed.most)}",
            plain(median(outcomes, lambda o: o.single_tokens_per_s)),
            seconds(median(outcomes, lambda o: o.ttft_s.p50)),
            seconds(median(outcomes, lambda o: o.e2e_s.p50)),
            _gib(median(outcomes, lambda o: o.peak_bytes)),
            "–" if ratio != ratio else f"{ratio:.2f}",
            seconds(median(outcomes, lambda o: o.ready_s)),
        )
    return found


def _speed(outcomes: Sequence[Outcome]) -> float:
    return median(outcomes, lambda o: o.output_tokens_per_s)


def _gib(size: float) -> str:
    return "–" if size != size else f"{size / 2**30:.2f} GiB"
