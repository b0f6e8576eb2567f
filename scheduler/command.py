"""A command whose errors are one line on stderr: `carousel: …`. Exit codes: 1 failed, 2 wrong usage, 130 interrupted."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

INTERRUPTED = 130  # 128 + SIGINT


class OneLineCommand(click.Command):
    """For programs that `carousel` becomes: they say what is wrong as it does."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        try:
            result = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
            sys.exit(result if isinstance(result, int) else 0)
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx is not None else prog_name or self.name
            _say(f"{error.format_message().rstrip('.')}; see `{command} --help`")
            sys.exit(error.exit_code)
        except click.ClickException as error:
            _say(error.format_message())
            sys.exit(error.exit_code)
        except click.Abort:
            _say("interrupted")
            sys.exit(INTERRUPTED)


def _say(text: str) -> None:
    print(f"carousel: {' '.join(text.split())}", file=sys.stderr, flush=True)
