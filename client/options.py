"""The options of all commands that call a server: which one, and how to reach it. Knows click and the client."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click

from client.api import CarouselClient

ResultT = TypeVar("ResultT")

of_a_group = click.option(
    "--group", type=click.IntRange(0), default=0, show_default=True, metavar="N", help="Worker group, of several."
)


def on_a_server(command: Callable[..., ResultT]) -> Callable[..., ResultT]:
    """The command is given `client`, connected with its first call and closed at the command's end."""

    @click.option("--target", default="127.0.0.1:50051", show_default=True, metavar="HOST:PORT", help="The server.")
    @click.option("--tls-ca", metavar="FILE", help="PEM certificates that vouch for the server's; calls are encrypted then.")
    @click.option("--tls-cert", metavar="FILE", help="PEM certificate to show to a server that wants one.")
    @click.option("--tls-key", metavar="FILE", help="Its private key, PEM.")
    @click.option(
        "--token",
        envvar="CAROUSEL_TOKEN",
        show_envvar=True,
        metavar="TOKEN",
        help="Says who calls, where the server wants to know. Better in the environment: options can be seen in the list of"
        " processes.",
    )
    @click.option(
        "--retries",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        metavar="N",
        help="Try so often again, with growing pauses, where the server can't be reached or is too busy.",
    )
    @functools.wraps(command)
    def run(
        target: str,
        tls_ca: str | None,
        tls_cert: str | None,
        tls_key: str | None,
        token: str | None,
        retries: int,
        **parameters: Any,
    ) -> ResultT:
        try:
            client = CarouselClient(target, tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key, token=token, retries=retries)
        except OSError as error:
            raise click.ClickException(f"{error.filename}: {error.strerror}") from None
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        with client:
            return command(client=client, **parameters)

    return run
