"""Shell completion of the `carousel` command: click makes the scripts, here they are shown and put in place."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem, get_completion_class

CommandT = TypeVar("CommandT", bound=Callable[..., Any])

_SHELLS = ("bash", "zsh", "fish")
_OURS = "by the shell that runs"  # no shell was named
_COMPLETE = "_CAROUSEL_COMPLETE"  # what the scripts call the command with


def folders(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The shell completes a folder's name."""
    return [CompletionItem(incomplete, type="dir")]


def files(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The shell completes a file's name."""
    return [CompletionItem(incomplete, type="file")]


def completion_options(command: CommandT) -> CommandT:
    """--show-completion and --install-completion, each with the name of a shell or for the one that runs."""
    for name, act, text in (
        ("--install-completion", _install, "Put it in place, for new shells."),
        ("--show-completion", _show, "Print the script that completes this command's words."),
    ):
        command = click.option(
            name,
            type=click.Choice([*_SHELLS, _OURS]),
            is_flag=False,
            flag_value=_OURS,
            is_eager=True,
            expose_value=False,
            callback=_for_a_shell(act),
            metavar="[bash|zsh|fish]",
            help=text,
        )(command)
    return command


def _for_a_shell(act: Callable[[str, str], None]) -> Callable[[click.Context, click.Parameter, str | None], None]:
    def call(context: click.Context, parameter: click.Parameter, shell: str | None) -> None:
        if shell is None or context.resilient_parsing:
            return
        if shell == _OURS:
            shell = Path(os.environ.get("SHELL", "")).name
            if shell not in _SHELLS:
                raise click.UsageError(f"{parameter.opts[0]}: say for which shell: {', '.join(_SHELLS)}")
        act(shell, _script(shell))
        context.exit()

    return call


def _script(shell: str) -> str:
    kind = get_completion_class(shell)
    assert kind is not None
    try:
        return kind(click.Group(), {}, "carousel", _COMPLETE).source()
    except RuntimeError as error:  # a bash that is too old
        raise click.ClickException(str(error)) from None


def _show(shell: str, script: str) -> None:
    click.echo(script)


def _install(shell: str, script: str) -> None:
    """The script gets a file of its own; bash and zsh are told of it by a line in their start file, once."""
    home = Path.home()
    if shell == "fish":
        file = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "fish" / "completions" / "carousel.fish"
        start = None
    else:
        file = Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share") / "carousel" / f"completion.{shell}"
        start = home / ".bashrc" if shell == "bash" else Path(os.environ.get("ZDOTDIR") or home) / ".zshrc"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{script.strip()}\n")
        if start is not None:
            _add_line(start, f"[ -f '{file}' ] && . '{file}'")
    except OSError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror}") from None
    click.echo(f"{file} completes `carousel` in every {shell} that starts from now on")


def _add_line(file: Path, line: str) -> None:
    """At the end, unless it is there."""
    text = file.read_text() if file.exists() else ""
    if line not in text.splitlines():
        file.write_text(f"{text}{'' if text.endswith(chr(10)) or not text else chr(10)}{line}\n")
