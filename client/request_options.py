"""The options of the commands that send requests: how to draw tokens, when to end, who goes first. Knows click."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from client.requests import ON_TIMEOUT, PRIORITIES

CommandT = TypeVar("CommandT", bound=Callable[..., Any])

MOST_OUTPUTS = 64  # of one request; the server's limit too
_COUNT = click.IntRange(0)


def _logit_bias(_: click.Context, __: click.Parameter, value: str | None) -> dict[int, float] | None:
    if value is None:
        return None
    try:
        return {int(token): float(bias) for token, bias in (part.split(":") for part in value.split(","))}
    except ValueError:
        raise click.BadParameter("give token ids with what to add to their logits, as in 11:-100,42:5") from None


_OPTIONS = (
    click.option(
        "--max-tokens",
        type=click.IntRange(1),
        metavar="N",
        help="Most tokens to generate. [default: as many as the model allows]",
    ),
    click.option(
        "--temperature",
        type=float,
        metavar="T",
        help="0: always the likeliest token; higher: more varied. [default for this and the next three: the model's own]",
    ),
    click.option("--top-k", type=_COUNT, metavar="K", help="Draw from the K likeliest tokens; 0: from all."),
    click.option("--top-p", type=float, metavar="P", help="Draw from the likeliest tokens that make up this probability."),
    click.option("--min-p", type=float, metavar="P", help="Leave out tokens less likely than this share of the likeliest."),
    click.option(
        "--repetition-penalty", type=float, metavar="X", help="Above 1: what prompt and output hold becomes less likely."
    ),
    click.option("--presence-penalty", type=float, metavar="X", help="Taken from the logits of all that the output holds."),
    click.option("--frequency-penalty", type=float, metavar="X", help="The same, times how often it holds it."),
    click.option(
        "--logit-bias",
        callback=_logit_bias,
        metavar="ID:X,…",
        help="Added to the logits of these token ids, -100 (never) to 100 (always).",
    ),
    click.option("--seed", type=_COUNT, metavar="N", help="The same seed draws the same. [default: random]"),
    click.option(
        "--num-outputs", type=click.IntRange(1, MOST_OUTPUTS), metavar="N", help=f"So many continuations, 1 to {MOST_OUTPUTS}."
    ),
    click.option("--stop", multiple=True, metavar="TEXT", help="End where this text appears. May be given several times."),
    click.option("--ignore-eos", is_flag=True, default=None, help="Go on after the model's own end token, up to --max-tokens."),
    click.option("--priority", type=click.Choice([*PRIORITIES]), help="Who goes first when requests wait. [default: normal]"),
    click.option("--tenant", metavar="NAME", help="Whose share of the server this counts against."),
    click.option(
        "--max-time-ms", type=_COUNT, metavar="MS", help="Refuse what can't begin within this time, end what takes longer."
    ),
    click.option(
        "--on-timeout",
        type=click.Choice([*ON_TIMEOUT]),
        help="What a request is whose time is over: partial, an answer cut short; fail, an error. [default: fail]",
    ),
    click.option("--cache-salt", metavar="TEXT", help="Share cached prompts only with requests of the same salt."),
)


def request_options(command: CommandT) -> CommandT:
    """The command is given them by their names in Parameters; None where one was not given."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
