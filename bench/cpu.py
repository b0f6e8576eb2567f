"""`python -m bench.cpu`: Carousel and transformers on this machine's CPU, side by side; targets C1, C3, C4 and C5.

Every engine runs in processes of its own, one after the other, in turns: A B A B. Random weights; the workload of
cpu_workload.offline_requests, all requests at once; the machine's limits measured between the rounds. Static batches of 4 take
so long that they get the first requests only; what all would take follows from their pace (cpu_bounds.Pace). The bound of C1 is
defined in bench/cpu_bounds.py.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from bench import cpu_attention, cpu_carousel, cpu_limits, cpu_transformers, provenance, tables
from bench.cpu_bounds import (
    Cost,
    Limits,
    Pace,
    best_seconds,
    decode_share,
    pace,
    prefill_share,
    serial_seconds,
    static_best_seconds,
)
from bench.cpu_carousel import Probed, Probes
from bench.cpu_workload import Noise, Outcome, Request, offline_requests, table
from bench.roofline import SHAPES, Shape
from bench.server import ServerFailedError
from bench.targets import Shown
from client import CarouselError

CAROUSEL, INT8, CONTINUOUS = "carousel", "carousel-int8", "continuous"
STATIC_BATCH = 4  # of target C1
_STATIC = f"static-{STATIC_BATCH}"
_FAILURES = (cpu_transformers.EngineFailedError, ServerFailedError, CarouselError)


@dataclass(frozen=True)
class Size:
    """How much is asked. Lengths in tokens."""

    requests: int
    static_requests: int  # the first of them, in whole batches
    rounds: int = 2
    prompt_len: int = 128
    mean: float = 64
    cap: int = 512
    single: int = 64  # output of the one that decodes alone
    long_prompt: int = 1024
    long_prompts: int = 3
    together: int = 16  # requests of C5
    together_tokens: int = 64


SIZES = {"smollm-135m": Size(64, 16), "llama-3.2-1b": Size(16, 4, single=32, together_tokens=32)}
QUICK = Size(8, 4, rounds=1, mean=12, cap=32, single=16, long_prompt=512, long_prompts=1, together_tokens=16)


@dataclass
class Report:
    """All rounds, as far as they went."""

    shape: Shape
    size: Size
    seed: int
    load: float = field(default_factory=lambda: os.getloadavg()[0])  # before it began: others who use the machine
    limits: list[Limits] = field(default_factory=list)
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    paces: dict[str, list[Pace]] = field(default_factory=dict)  # of static engines
    probes: dict[str, list[Probed]] = field(default_factory=dict)  # of Carousel
    attention: list[dict[str, float]] = field(default_factory=list)  # contiguous ÷ paged, by case
    failed: dict[str, str] = field(default_factory=dict)  # engine → why

    @property
    def requests(self) -> list[Request]:
        size = self.size
        return offline_requests(self.shape.vocab, size.requests, size.prompt_len, size.mean, size.cap, self.seed)

    def asked_of(self, engine: str) -> list[Request]:
        batch = static_batch(engine)
        if batch is None:
            return self.requests
        return self.requests[: -(-min(self.size.static_requests, self.size.requests) // batch) * batch]

    @property
    def single(self) -> Request:
        return self._others(1, self.size.prompt_len, self.size.single, 1)[0]

    @property
    def carousel_probes(self) -> Probes:
        size = self.size
        prompts = self._others(size.long_prompts, size.long_prompt, 1, 2)
        return Probes(prompts, self._others(size.together, size.prompt_len, size.together_tokens, 3))

    def _others(self, count: int, prompt_len: int, max_tokens: int, number: int) -> list[Request]:
        """Equal lengths, prompts that share nothing with the workload's."""
        drawn = offline_requests(self.shape.vocab, count, prompt_len, seed=self.seed + 1000 * number)
        return [replace(request, max_tokens=max_tokens) for request in drawn]

    def cost(self, engine: str) -> Cost:
        return Cost(self.shape, cpu_limits.best(self.limits), int8=engine == INT8)

    def with_limits(self) -> list[list[Outcome]]:
        """By engine, each outcome with its share of what the machine could do; once all rounds are over."""
        return [
            [replace(one, limit_share=best_seconds(self.asked_of(engine), self.cost(engine)) / one.seconds) for one in outcomes]
            for engine, outcomes in self.outcomes.items()
        ]


def static_batch(engine: str) -> int | None:
    """Of static-N."""
    return int(engine.removeprefix("static-")) if engine.startswith("static-") else None


# ----------------------------------------------------------------------------------------------------------------- runs


def measure(report: Report, model: Path, engines: Sequence[str], say: Callable[[str], None]) -> None:
    """All rounds, in turns. An engine that fails is left out from then on."""
    for number in range(1, report.size.rounds + 1):
        report.limits.append(cpu_limits.measured())
        for engine in engines:
            if engine in report.failed:
                continue
            say(f"round {number} of {report.size.rounds}: {engine}, {len(report.asked_of(engine))} requests")
            began = time.monotonic()
            try:
                _run(report, model, engine)
            except _FAILURES as error:
                report.failed[engine] = str(error)
                say(f"{engine} failed: {error}")
            else:
                speed = report.outcomes[engine][-1].output_tokens_per_s
                say(f"  {speed:.1f} output tokens a second; {time.monotonic() - began:.0f} s with its start")
        if CAROUSEL in report.outcomes:
            report.attention.append(cpu_attention.measured())
    report.limits.append(cpu_limits.measured())


def _run(report: Report, model: Path, engine: str) -> None:
    """One run of one engine, added to the report. Raises one of _FAILURES."""
    asked, batch = report.asked_of(engine), static_batch(engine)
    if engine in (CAROUSEL, INT8):
        options = [*cpu_carousel.OPTIONS, *(["--quantization", "int8"] if engine == INT8 else [])]
        probes = report.carousel_probes
        outcome, probed = cpu_carousel.run(
            engine, model, asked, report.single, options, lambda client: cpu_carousel.probed(client, probes)
        )
        report.probes.setdefault(engine, []).append(probed)
    else:
        outcome, token_s = cpu_transformers.run(engine, model, asked, report.single)
        if batch is not None:
            report.paces.setdefault(engine, []).append(pace(asked, token_s, batch))
            if len(asked) < report.size.requests:
                outcome = replace(outcome, note=f"the first {len(asked)} of {report.size.requests} requests")
    report.outcomes.setdefault(engine, []).append(outcome)


# -------------------------------------------------------------------------------------------------------------- targets


def targets(report: Report) -> Iterator[Shown]:
    """Those that the engines of this run allow: the median over the rounds."""
    if report.outcomes.get(CAROUSEL) and report.paces.get(_STATIC):
        yield from _c1(report)
    if report.probes.get(CAROUSEL):
        yield from _c3(report)
        for case in report.attention[0] if report.attention else ():
            yield _shown("C4", f"contiguous ÷ paged attention, {case}", [seen[case] for seen in report.attention], 0.9, {})
        if report.probes.get(INT8):
            fp32, int8 = ([probed.together_tokens_per_s for probed in report.probes[name]] for name in (CAROUSEL, INT8))
            ratios = [high / low for low, high in zip(fp32, int8, strict=False)]
            what = f"int8 ÷ fp32, {report.size.together} requests decoding together"
            yield _shown("C5", what, ratios, 2.5, {"fp32 tokens/s": fp32, "int8 tokens/s": int8})


def _c1(report: Report) -> Iterator[Shown]:
    requests, cost = report.requests, report.cost(CAROUSEL)
    tokens = sum(len(request.prompt_ids) + request.max_tokens for request in requests)
    carousel = [outcome.seconds for outcome in report.outcomes[CAROUSEL]]
    static = [measured.seconds(requests, STATIC_BATCH) for measured in report.paces[_STATIC]]
    best, static_best = best_seconds(requests, cost), static_best_seconds(requests, STATIC_BATCH, cost)
    ratios = [slow / fast for fast, slow in zip(carousel, static, strict=False)]
    measured = len(report.asked_of(_STATIC))
    yield _shown(
        "C1",
        f"in + out tokens/s ÷ static batches of {STATIC_BATCH}",
        ratios,
        23,
        {
            "carousel tokens/s": [tokens / seconds for seconds in carousel],
            "static tokens/s": [tokens / seconds for seconds in static],
            "static requests measured": measured,
            "static paces": [asdict(one) for one in report.paces[_STATIC]],
            "bound of the ratio": statistics.median(static) / best,
            "of it by scheduling alone": static_best / best,  # both at the machine's limits
        },
    )
    yield _shown(
        "C1",
        "share of the bound of that ratio",
        [best / seconds for seconds in carousel],
        0.8,
        {"best seconds": best, "serial seconds": serial_seconds(requests, cost), "seconds": carousel},
    )


def _c3(report: Report) -> Iterator[Shown]:
    cost, tokens = report.cost(CAROUSEL), report.size.long_prompt
    alone = [outcome.single_tokens_per_s or 0.0 for outcome in report.outcomes[CAROUSEL]]
    decode = [decode_share(rate, cost) for rate in alone]
    yield _shown("C3", "decode at batch 1, share of read bandwidth", decode, 0.8, {"tokens/s": alone})
    seconds = [statistics.median(probed.prefill_s) for probed in report.probes[CAROUSEL]]
    shares = [prefill_share(tokens, one, cost) for one in seconds]
    what = f"prefill of {tokens} tokens, share of the matrix peak"
    yield _shown("C3", what, shares, 0.8, {"tokens/s": [tokens / one for one in seconds]})


def _shown(target: str, what: str, values: Sequence[float], goal: float, more: dict[str, Any]) -> Shown:
    noise = Noise.of(values)
    return Shown(target, what, noise.median, goal, more={"least": noise.least, "most": noise.most} | more)


# --------------------------------------------------------------------------------------------------------------- output


def as_json(report: Report, quick: bool) -> dict[str, Any]:
    asked = report.requests
    return {
        "shape": report.shape.name,
        "quick": quick,
        "seed": report.seed,
        "size": asdict(report.size),
        "prompt_tokens": sum(len(request.prompt_ids) for request in asked),
        "output_tokens": sum(request.max_tokens for request in asked),
        "limits": asdict(cpu_limits.best(report.limits)),
        "limits each time": [asdict(limits) for limits in report.limits],
        "load before": report.load,
        "engines": {outcomes[0].engine: [one.as_json() for one in outcomes] for outcomes in report.with_limits()},
        "probes": {engine: [asdict(one) for one in probed] for engine, probed in report.probes.items()},
        "targets": [asdict(shown) | {"holds": shown.holds} for shown in targets(report)],
        "failed": report.failed,
    }


def show(report: Report, console: Console) -> None:
    asked, limits = report.requests, cpu_limits.best(report.limits)
    outputs = [request.max_tokens for request in asked]
    console.print(
        f"{report.shape.name}: {len(asked)} requests of {report.size.prompt_len} random prompt tokens, all at once;"
        f" {sum(outputs)} output tokens, the longest {max(outputs)}; median of {report.size.rounds} round(s)"
    )
    fp32, int8, bandwidth = (getattr(limits, name) / 1e9 for name in Limits.__dataclass_fields__)
    console.print(
        f"limits: {fp32:.0f} GFLOP/s fp32, {int8:.0f} GOP/s int8, {bandwidth:.1f} GB/s read; load before: {report.load:.1f}"
    )
    runs = report.with_limits()
    console.print(table(runs))
    for outcomes in runs:
        if outcomes[0].note:
            console.print(f"{outcomes[0].engine}: {outcomes[0].note}")
    for engine, why in report.failed.items():
        console.print(f"{engine} failed: {why.splitlines()[-1] if why else ''}", style="red")
    rows = Table("target", "what", box=box.SIMPLE_HEAD)
    for name in ("value", "min–max", "goal", "holds"):
        rows.add_column(name, justify="right")
    for shown in targets(report):
        assert shown.more is not None
        number = tables.share if shown.goal < 1 else tables.number
        span = f"{number(shown.more['least'])}–{number(shown.more['most'])}"
        holds = "yes" if shown.holds else "no"
        rows.add_row(shown.target, shown.what, number(shown.value), span, f"≥ {number(shown.goal)}", holds)
        if "bound of the ratio" in shown.more:
            bound, alone = (number(shown.more[name]) for name in ("bound of the ratio", "of it by scheduling alone"))
            rows.add_row("", f"its bound: {bound}; {alone} of it by scheduling alone, both at the limits", "", "", "", "")
    if rows.row_count:
        console.print(rows)


# -------------------------------------------------------------------------------------------------------------- command


def cached_checkpoint(shape: Shape, folder: Path) -> Path:
    """Random weights in float32, made once; in a process of its own, whose memory goes with it. Raises OSError."""
    found = folder / f"{shape.name}-random-0"
    if (found / "config.json").exists():
        return found
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{found.name}.{os.getpid()}"
    maker = multiprocessing.get_context("spawn").Process(target=_write_checkpoint, args=(shape, unfinished))
    maker.start()
    maker.join()
    if maker.exitcode:
        raise OSError(f"the checkpoint could not be written to {unfinished}")
    return unfinished.rename(found)


def _write_checkpoint(shape: Shape, folder: Path) -> None:
    from bench.random_checkpoint import write

    write(shape, folder)


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "carousel" / "bench"


def _engines(context: click.Context, parameter: click.Parameter, text: str) -> list[str]:
    found = [_STATIC if name == "static" else name for name in text.split(",")]
    for name in found:
        batch = name.removeprefix("static-") if name.startswith("static-") else ""
        if name not in (CAROUSEL, INT8, CONTINUOUS) and not (batch.isdigit() and int(batch)):
            raise click.BadParameter(f"{name}: one of {CAROUSEL}, {INT8}, static, static-8 (any size), {CONTINUOUS}")
    return found


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--shape", type=click.Choice([*SIZES]), default="smollm-135m")
@click.option("--engines", default=f"{CAROUSEL},{INT8},static,{CONTINUOUS}", callback=_engines, metavar="NAME,…")
@click.option("--requests", type=click.IntRange(1), help="[default: 64 of the 135M shape, 16 of the 1B shape]")
@click.option("--static-requests", type=click.IntRange(1), help="The first ones, for static batches. [default: 16; 4 of 1B]")
@click.option("--rounds", type=click.IntRange(1), help="Turns of every engine. [default: 2; quick: 1]")
@click.option("--seed", type=int, default=0)
@click.option("--quick", is_flag=True, help="Fewer and shorter requests, two minutes: to see that it works, not for figures.")
@click.option("--checkpoints", type=click.Path(path_type=Path, file_okay=False), help="[default: in the user's cache]")
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Append a line to this file.")
def main(
    shape: str,
    engines: list[str],
    seed: int,
    quick: bool,
    checkpoints: Path | None,
    json_file: Path | None,
    **sizes: int | None,
) -> None:
    """Measure Carousel against transformers on this CPU. Leave the machine alone meanwhile."""
    size = replace(QUICK if quick else SIZES[shape], **{name: value for name, value in sizes.items() if value is not None})
    report = Report(SHAPES[shape], size, seed)
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:5.0f} s  {text}", file=sys.stderr, flush=True)

    try:
        model = cached_checkpoint(report.shape, checkpoints or cache())
    except OSError as error:
        raise click.ClickException(str(error)) from None
    measure(report, model, engines, say)
    show(report, tables.console())
    if json_file is not None:
        about = provenance.provenance("CPU: engines side by side")
        about["versions"]["transformers"] = version("transformers")
        provenance.append(json_file, about | as_json(report, quick))
    missed = not quick and any(not shown.holds for shown in targets(report))
    sys.exit(1 if report.failed or missed else 0)


if __name__ == "__main__":
    main()
