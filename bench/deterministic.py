"""`python -m bench.deterministic`: what `--deterministic` costs on this machine's CPU. The same server with and without it, in
turns, under the workload of bench.cpu: all requests at once, one alone, long prompts alone, some that decode together.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.table import Table

from bench import cpu_carousel, provenance, tables
from bench.cpu import cache, cached_checkpoint
from bench.cpu_carousel import Probed, Probes
from bench.cpu_workload import Outcome, Request, offline_requests
from bench.roofline import SHAPES
from bench.server import ServerFailedError
from client import CarouselError

USUAL, DETERMINISTIC = "default", "deterministic"
DEMO, DEMO_FOLDER = "demo", Path(__file__).parents[1] / "demo" / "model"
_WAYS: dict[str, tuple[str, ...]] = {USUAL: (), DETERMINISTIC: ("--deterministic",)}


@dataclass(frozen=True)
class Size:
    """How much is asked. Lengths in tokens."""

    requests: int = 64
    cap: int = 512  # of an output; 64 on average
    alone: int = 64  # output of the one that decodes alone
    long_prompt: int = 1024
    long_prompts: int = 3
    together: int = 16
    together_tokens: int = 64


QUICK = Size(requests=8, cap=32, alone=16, long_prompt=256, long_prompts=1, together=4, together_tokens=8)


@dataclass
class Speeds:
    """Of one way to serve, by round; tokens a second."""

    burst: list[float] = field(default_factory=list)  # output tokens of all requests
    alone: list[float] = field(default_factory=list)
    together: list[float] = field(default_factory=list)  # of all of them
    prompt: list[float] = field(default_factory=list)  # prompt tokens of the long ones

    def add(self, outcome: Outcome, probed: Probed, long_prompt: int) -> None:
        assert outcome.single_tokens_per_s is not None
        self.burst.append(outcome.output_tokens_per_s)
        self.alone.append(outcome.single_tokens_per_s)
        self.together.append(probed.together_tokens_per_s)
        self.prompt.append(long_prompt / statistics.median(probed.prefill_s))

    def medians(self) -> list[float]:
        return [statistics.median(rounds) for rounds in (self.burst, self.alone, self.together, self.prompt)]


def run(model: Path, vocab_size: int, size: Size, options: Sequence[str]) -> tuple[Outcome, Probed]:
    """One server, from its start to its end. Raises ServerFailedError and CarouselError."""

    def asked(count: int, prompt_len: int, max_tokens: int, seed: int) -> list[Request]:
        return [replace(each, max_tokens=max_tokens) for each in offline_requests(vocab_size, count, prompt_len, seed=seed)]

    burst = offline_requests(vocab_size, size.requests, cap=size.cap)
    probes = Probes(asked(size.long_prompts, size.long_prompt, 1, 2), asked(size.together, 128, size.together_tokens, 3))
    [alone] = asked(1, 128, size.alone, 1)
    return cpu_carousel.run(
        "carousel",
        model,
        burst,
        alone,
        (*cpu_carousel.OPTIONS, *options),
        lambda client: cpu_carousel.probed(client, probes),
    )


def table(name: str, speeds: dict[str, Speeds], size: Size) -> Table:
    shown = Table(
        f"{name}, tokens/s",
        f"out, {size.requests} at once",
        "out, one alone",
        f"out, {size.together} together",
        f"prompt of {size.long_prompt}",
        box=box.SIMPLE_HEAD,
    )
    for column in shown.columns[1:]:
        column.justify = "right"
    for way, measured in speeds.items():
        shown.add_row(way, *map(tables.number, measured.medians()))
    usual, other = (speeds[way].medians() for way in (USUAL, DETERMINISTIC))
    shown.add_row("share of the default", *(tables.share(mine / theirs) for mine, theirs in zip(other, usual, strict=True)))
    return shown


def _model(name: str, checkpoints: Path) -> tuple[Path, int]:
    """Its folder and vocabulary. Raises OSError."""
    folder = DEMO_FOLDER if name == DEMO else cached_checkpoint(SHAPES[name], checkpoints)
    return folder, json.loads((folder / "config.json").read_text())["vocab_size"]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--model",
    "models",
    multiple=True,
    type=click.Choice(["smollm-135m", DEMO, "llama-3.2-1b"]),
    default=["smollm-135m", DEMO],
    help="May be given several times.",
)
@click.option("--quantization", type=click.Choice(["none", "int8"]), default="none")
@click.option("--rounds", type=click.IntRange(1), default=3, help="Turns of each of the two.")
@click.option("--quick", is_flag=True, help="Fewer and shorter requests, one round: to see that it works, not for figures.")
@click.option("--checkpoints", type=click.Path(path_type=Path, file_okay=False), help="[default: in the user's cache]")
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Append a line for each model.")
def main(
    models: tuple[str, ...], quantization: str, rounds: int, quick: bool, checkpoints: Path | None, json_file: Path | None
) -> None:
    """Measure what --deterministic costs. Leave the machine alone meanwhile."""
    size, started = QUICK if quick else Size(), time.monotonic()
    for name in models:
        speeds = {way: Speeds() for way in _WAYS}
        try:
            folder, vocab_size = _model(name, checkpoints or cache())
            for number in range(1 if quick else rounds):
                for way, options in _WAYS.items():
                    print(f"{time.monotonic() - started:5.0f} s  {name}, round {number + 1}: {way}", file=sys.stderr)
                    outcome, probed = run(folder, vocab_size, size, ("--quantization", quantization, *options))
                    speeds[way].add(outcome, probed, size.long_prompt)
        except (OSError, ServerFailedError, CarouselError) as error:
            raise click.ClickException(str(error)) from None
        tables.console().print(table(name, speeds, size))
        if json_file is not None:
            line: dict[str, Any] = {"model": name, "quantization": quantization, "quick": quick, "size": asdict(size)}
            told = {way: asdict(measured) for way, measured in speeds.items()}
            provenance.append(json_file, provenance.provenance("what --deterministic costs") | line | {"tokens/s": told})


if __name__ == "__main__":
    main()
