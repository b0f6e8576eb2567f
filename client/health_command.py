"""`carousel health`: the standard health check as a command, for containers and scripts. Knows the client's call."""

from __future__ import annotations

import click

from client.api import CarouselClient
from client.options import on_a_server
from client.printing import write_line

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.command(context_settings=_SETTINGS)
@on_a_server
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=3.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for it.",
)
def health(client: CarouselClient, timeout: float) -> None:
    """Wait until the server takes requests: exit code 0 once it does, 1 when it does not within the time.

    \b
    Example:
      carousel health --target HOST:50051 --timeout 60 && carousel generate --target HOST:50051 --prompt "def f("
    """
    client.wait_ready(timeout)
    write_line(f"{client.target} takes requests")
