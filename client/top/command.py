"""`carousel top`: options, the screen, the keyboard. What is shown comes from picture.py, what is known from watching.py."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

import click

from client.api import CarouselClient
from client.options import of_a_group, on_a_server
from client.printing import closed_pipe

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from client.top.picture import Glyphs
    from client.top.watching import Watcher

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
_SIGNALLED = 128  # exit codes of a process that a signal ended start here
_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LOOK_S = 0.1  # how soon a key, a signal or another size of the terminal is noticed
_LOOK_ONCE_S = 1.0  # what --once sees of the work
_STILL_WIDTH = 100  # of a still that goes into a file or pipe


@click.command(context_settings=_SETTINGS)
@click.option(
    "--interval",
    type=click.FloatRange(0.2, 60),
    default=1.0,
    show_default=True,
    metavar="S",
    help="Seconds between two pictures.",
)
@click.option("--once", is_flag=True, help="Look for a second, print one picture, and end.")
@click.option("--json", "as_json", is_flag=True, help="With --once: what was seen, as one JSON object.")
@click.option("--ascii", "plain", is_flag=True, help="No characters but those of ASCII.")
@of_a_group
@on_a_server
def top(interval: float, once: bool, as_json: bool, plain: bool, group: int, client: CarouselClient) -> int:
    """Watch the batch of a running server: its rows, queue, token budget, KV blocks and pace. q or Ctrl-C ends it.

    Rows: yellow is the prompt as far as it is computed, the colour of the row its output. Letters and colours of the block map
    are those of the rows.

    \b
    Examples:
      carousel top
      carousel top --target gpu-7:50051 --interval 0.5
      carousel top --once > batch.txt
      carousel top --once --json | jq .tokens_per_s
    """
    if as_json and not once:
        raise click.UsageError("--json is for --once: give both; `carousel load --watch --json` goes on and on")
    if not once and not sys.stdout.isatty():
        raise click.UsageError("there is no terminal to draw on: give --once for one picture, in plain text")
    from client.top.watching import Watcher  # with rich, not before it is needed: the other commands start faster

    with Watcher(client, min(interval, _LOOK_ONCE_S / 2) if once else interval, group) as watcher:
        try:
            return _still(watcher, as_json, plain) if once else _live(watcher, interval, plain)
        except BrokenPipeError:
            return closed_pipe()


def _still(watcher: Watcher, as_json: bool, plain: bool) -> int:
    from rich.console import Console

    from client.top.picture import picture
    from client.top.seen import as_json as in_json

    with _signals() as signals:
        until_s = time.monotonic() + _LOOK_ONCE_S
        while time.monotonic() < until_s and not signals and watcher.failure is None:
            time.sleep(_LOOK_S)
    if signals:
        return _SIGNALLED + signals[0]
    _raise_failure(watcher)
    seen = watcher.snapshot()
    if as_json:
        sys.stdout.write(json.dumps(in_json(seen), ensure_ascii=False) + "\n")
    elif sys.stdout.isatty():
        console = Console(highlight=False)
        for line in picture(seen, console.width, 0, _glyphs(plain)):
            console.print(line, no_wrap=True, overflow="crop")
    else:
        for line in picture(seen, _STILL_WIDTH, 0, _glyphs(plain)):
            sys.stdout.write(line.plain.rstrip() + "\n")
    sys.stdout.flush()
    return 0


def _live(watcher: Watcher, interval_s: float, plain: bool) -> int:
    """Until q, Ctrl-C, or a server that is gone for good."""
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    with _signals() as signals, _keys() as keys, _no_errors(), Live(console=console, screen=True, auto_refresh=False) as live:
        due_s, size = 0.0, console.size
        while not signals and watcher.failure is None:
            now_s = time.monotonic()
            if now_s >= due_s or console.size != size:
                size, due_s = console.size, now_s + interval_s
                live.update(_screen(watcher, console, plain), refresh=True)
            if _pressed(keys) in ("q", "Q"):
                return 0
    if signals:
        return _SIGNALLED + signals[0]
    _raise_failure(watcher)
    return 0


def _screen(watcher: Watcher, console: Console, plain: bool) -> Text:
    from rich.text import Text

    from client.top.picture import picture

    lines = picture(watcher.snapshot(), console.width, console.height, _glyphs(plain))
    return Text("\n", no_wrap=True, overflow="crop", end="").join(lines)


def _raise_failure(watcher: Watcher) -> None:
    if watcher.failure is not None:
        raise watcher.failure


def _glyphs(plain: bool) -> Glyphs:
    from client.top.picture import ASCII, UNICODE

    return ASCII if plain or "utf" not in (sys.stdout.encoding or "").lower() else UNICODE


# -------------------------------------------------------------------------------------------------------------- keyboard


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The numbers of those that came. Not by an exception: in the middle of grpc's work or of the terminal's it would leave
    either in disorder."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before = {number: signal.signal(number, note) for number in _ENDINGS}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _no_errors() -> Iterator[None]:
    """Nobody writes to standard error: grpc tells of broken connections there, in the middle of the picture."""
    before, nowhere = os.dup(sys.stderr.fileno()), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stderr.fileno())
    try:
        yield
    finally:
        os.dup2(before, sys.stderr.fileno())
        os.close(before)
        os.close(nowhere)


@contextlib.contextmanager
def _keys() -> Iterator[int]:
    """Standard input, which gives each key at once and shows none; -1 where that is no terminal."""
    if not sys.stdin.isatty():
        yield -1
        return
    import termios
    import tty

    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    tty.setcbreak(keyboard)
    try:
        yield keyboard
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def _pressed(keyboard: int) -> str:
    """What was typed within a moment."""
    if keyboard < 0:
        time.sleep(_LOOK_S)
        return ""
    ready, _, _ = select.select([keyboard], [], [], _LOOK_S)
    return os.read(keyboard, 64).decode(errors="replace")[:1] if ready else ""
