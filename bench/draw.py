"""`carousel draw`, which is also `python -m bench.draw`: three pictures of a recording, or of a server that runs.

Reads options, writes files. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from bench import live
from bench.observed import Observed, Workload, recorded, simulated, workload_of
from bench.pictures.canvas import NoMatplotlibError, Picture, png, svg
from bench.pictures.memory import memory_picture
from bench.pictures.timeline import MOST_ROWS, Panel, timeline
from bench.shadow import ShadowError
from bench.shadow import read as read_recording
from client import CarouselClient, CarouselError
from client.completion import files, folders
from client.options import of_a_group, on_a_server
from client.printing import advice
from scheduler.command import OneLineCommand

TIMELINE, POLICIES, MEMORY = "timeline", "policies", "memory"
PICTURES = (TIMELINE, POLICIES, MEMORY)
POLICY_NAMES = {"static": "static batching", "prefill_first": "prefill first", "continuous": "continuous batching"}
_FORMATS = ("svg", "png")
_STEPS, _REQUESTS, _ROWS = 160, 24, 8  # that a picture of a README's width can tell apart


class _Some(click.ParamType):  # type: ignore[type-arg]
    """Some of these words, with commas between."""

    name = "list"

    def __init__(self, words: Sequence[str]) -> None:
        self._words = words

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        named = [word.strip() for word in str(value).split(",")] if isinstance(value, str) else value
        assert isinstance(named, list)
        for word in named:
            if word not in self._words:
                self.fail(f"{word!r} is none of {', '.join(self._words)}", param, ctx)
        return named


def _span(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """A-B, both included; steps count from 0."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d{1,12})-(\d{1,12})", value)
    if found is None or int(found[2]) < int(found[1]):
        raise click.BadParameter("it is FIRST-LAST, as in 0-99")
    return int(found[1]), int(found[2])


@click.command(cls=OneLineCommand, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("recording", required=False, type=click.Path(path_type=Path), shell_complete=files)
@click.option(
    "--seconds",
    type=click.FloatRange(0.1, 3600),
    default=10.0,
    show_default=True,
    metavar="N",
    help="How long a server is watched.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("."),
    metavar="DIR",
    shell_complete=folders,
    help="Where the files go; it is made. [default: here]",
)
@click.option(
    "--only",
    type=_Some(PICTURES),
    default=list(PICTURES),
    metavar="NAME[,NAME]",
    help=f"Some of {', '.join(PICTURES)}. [default: all]",
)
@click.option(
    "--format", "formats", type=_Some(_FORMATS), default=["svg"], metavar="svg,png", help="svg, png or both. [default: svg]"
)
@click.option(
    "--theme",
    type=click.Choice(["auto", "light", "dark"]),
    default="auto",
    show_default=True,
    help="Ground of the pictures. auto: an SVG follows its reader's setting, a PNG is light.",
)
@click.option("--steps", callback=_span, metavar="FIRST-LAST", help=f"Steps of the timeline. [default: the first {_STEPS}]")
@click.option(
    "--requests",
    type=click.IntRange(0),
    default=_REQUESTS,
    show_default=True,
    metavar="N",
    help="The first so many are run under the three policies; 0: all.",
)
@click.option(
    "--rows",
    type=click.IntRange(1, MOST_ROWS),
    metavar="N",
    help=f"Rows of the batch that they are run on. [default: {_ROWS}, or fewer as recorded]",
)
@of_a_group
@on_a_server
def draw_command(
    recording: Path | None,
    client: CarouselClient,
    seconds: float,
    out: Path,
    only: list[str],
    formats: list[str],
    theme: str,
    steps: tuple[int, int] | None,
    requests: int,
    rows: int | None,
    group: int,
) -> None:
    """Draw what the batch and the KV cache did: the batch step by step, the same requests under three policies, and the blocks
    of the KV cache over time.

    From what a server recorded with --record, or without RECORDING from a running server that is watched for a while.

    \b
    Examples:
      carousel serve --model ./my-checkpoint --record run.crec
      carousel draw run.crec --out pictures
      carousel draw --target 127.0.0.1:50051 --seconds 5 --only timeline,memory
      carousel draw run.crec --only policies --requests 40 --rows 16 --format svg,png
    """
    try:
        if recording is not None:
            pictures = of_recording(recording, only, steps, requests, rows)
        else:
            pictures = of_server(client, seconds, group, only, steps, requests, rows)
        for name, picture in pictures:
            for path in write(picture, out / name, formats, theme):
                click.echo(path)
    except CarouselError as error:
        raise click.ClickException(advice(error)) from None
    except (ShadowError, NoMatplotlibError) as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror}") from None


def write(picture: Picture, path: Path, formats: Sequence[str], theme: str) -> Iterator[Path]:
    """path: without its suffix. Raises OSError, NoMatplotlibError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in formats:
        file = path.with_name(f"{path.name}.{suffix}")
        if suffix == "svg":
            file.write_text(svg(picture, theme), encoding="utf-8")
        else:
            file.write_bytes(png(picture, "light" if theme == "auto" else theme))
        yield file


# ---------------------------------------------------------------------------------------------------------------- sources

Named = tuple[str, Picture]


def of_recording(
    path: Path, only: Sequence[str], steps: tuple[int, int] | None, requests: int, rows: int | None
) -> Iterator[Named]:
    """Raises ShadowError."""
    if TIMELINE in only or MEMORY in only:
        yield from _as_it_was(recorded(path), only, steps)
    if POLICIES in only:
        shadow = read_recording(path)
        workload = workload_of(shadow, requests, rows or min(_ROWS, shadow.config.max_batch_rows))
        yield POLICIES, policies_picture(workload, len(shadow.requests), shadow.name)


def of_server(
    client: CarouselClient,
    seconds: float,
    group: int,
    only: Sequence[str],
    steps: tuple[int, int] | None,
    requests: int,
    rows: int | None,
) -> Iterator[Named]:
    """Raises CarouselError, ShadowError."""
    if sys.stderr.isatty():
        click.echo(f"watching {client.target} for {seconds:g} s; Ctrl-C draws what was seen so far", err=True)
    seen = live.watch(client, seconds, group)
    if not seen.steps:
        raise ShadowError(f"{client.target} computed no step in {seconds:g} s: send it requests while it is watched")
    yield from _as_it_was(live.observed(seen), only, steps)
    if POLICIES in only:
        workload = live.workload(seen, requests, rows or min(_ROWS, seen.server.max_batch_rows))
        if workload is None:
            raise ShadowError(
                f"{seconds:g} s are too few to run the requests under other policies: give --seconds, or --only timeline,memory"
            )
        yield POLICIES, policies_picture(workload, len(workload.jobs), seen.target)


def _as_it_was(seen: Observed, only: Sequence[str], steps: tuple[int, int] | None) -> Iterator[Named]:
    if TIMELINE in only:
        yield TIMELINE, timeline_picture(seen, steps)
    if MEMORY in only:
        yield MEMORY, memory_picture(f"KV cache over time: {seen.name}", seen.steps, seen.notes)


# --------------------------------------------------------------------------------------------------------------- pictures


def timeline_picture(seen: Observed, span: tuple[int, int] | None) -> Picture:
    """Raises ShadowError when there are no such steps."""
    first, last = span or (0, _STEPS - 1)
    chosen = seen.steps[first : last + 1]
    if not chosen:
        raise ShadowError(f"{seen.name} has {len(seen.steps)} steps, none of {first}-{last}")
    policy = POLICY_NAMES.get(chosen[0].policy, chosen[0].policy)
    title = policy
    if len(chosen) < len(seen.steps):
        title += f", steps {first} to {first + len(chosen) - 1} of {len(seen.steps):,}"
    notes = list(seen.notes)
    if seen.num_rows > MOST_ROWS:
        notes.append(f"the first {MOST_ROWS} of {seen.num_rows} slots")
    return timeline(f"Iteration by iteration: {seen.name}", [Panel(title, chosen, seen.num_rows)], notes)


def policies_picture(workload: Workload, requests: int, name: str) -> Picture:
    """The same requests under each policy. requests: that there were."""
    runs = [simulated(workload, policy) for policy in POLICY_NAMES]
    rows = runs[0].num_rows
    panels = [Panel(title, run.steps, rows) for title, run in zip(POLICY_NAMES.values(), runs, strict=True)]
    static, continuous = panels[0].span_ns, panels[-1].span_ns
    shown = (
        f"the first {len(workload.jobs)} of {requests:,} requests"
        if len(workload.jobs) < requests
        else f"{requests:,} requests"
    )
    sooner = f"; continuous batching is done {static / continuous:.2f}× sooner than static" if continuous else ""
    note = f"{name}: {shown} on {rows} slots, simulated with the step times of this server{sooner}"
    return timeline("The same requests under three policies", panels, [note])


if __name__ == "__main__":
    draw_command(prog_name="carousel draw")
