"""Where an option's value comes from: flag > environment > file > default. The options of the command are the one schema; what
a variable or a key of the file may be called, and which values it takes, is derived from them.

Knows click, TOML and the environment; nothing of what the options mean.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from scheduler.command import OneLineCommand

PREFIX = "CAROUSEL_"
_CLOSE = 0.75  # of difflib's ratio: a variable that is less like any of ours is somebody else's
_FILE_LINES = "carousel.file_lines"  # in the context: key → "path:line"
_DEFAULT_IN_HELP = re.compile(r"\[default: (.*)\]$")
_ACTIONS = ("help", "print_config")  # options that are no setting
_KEY = re.compile(r"\s*[\"']?([A-Za-z0-9_-]+)[\"']?\s*=")


class ConfiguredCommand(OneLineCommand):
    """Its options may also be set by CAROUSEL_… variables and by a TOML file (`config_option`)."""

    def __init__(self, *args: Any, **extra: Any) -> None:
        super().__init__(*args, **extra)
        for key, option in keys(self).items():
            option.envvar = variable(key)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for name in check_environment(keys(self), os.environ):
            print(f"carousel: {name} in the environment is no option, and is left alone", file=sys.stderr)
        try:
            return super().parse_args(ctx, args)
        except click.BadParameter as error:
            source = ctx.get_parameter_source(error.param.name) if error.param is not None and error.param.name else None
            if source is not ParameterSource.ENVIRONMENT:
                raise
            assert isinstance(error.param, click.Option) and isinstance(error.param.envvar, str)
            said = f"{error.param.envvar} in the environment: {error.message.rstrip('.')}"
            raise click.UsageError(said + _hint(error.param.envvar), ctx) from None


def _hint(name: str) -> str:
    by_kubernetes = os.environ.get(name, "").startswith("tcp://")
    return ". Kubernetes sets it for a service of this name; enableServiceLinks: false ends that" if by_kubernetes else ""


def keys(command: click.Command) -> dict[str, click.Option]:
    """The options by their key in a file, the flag's name with _ for -; --config itself too, which a variable may set."""
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    return {_key(option): option for option in options if option.name not in _ACTIONS}


def _key(option: click.Option) -> str:
    return max(option.opts, key=len).removeprefix("--").replace("-", "_")


def variable(key: str) -> str:
    return PREFIX + key.upper()


def nearest(word: str, words: Iterable[str], cutoff: float = 0.6) -> str:
    """Empty: none is near."""
    return next(iter(difflib.get_close_matches(word, list(words), 1, cutoff)), "")


# ----------------------------------------------------------------------------------------------------------- environment


def check_environment(known: Iterable[str], environment: Mapping[str, str]) -> list[str]:
    """Raises UsageError for a variable that was meant for an option and hits none. Returns those with our prefix that are like
    none of ours: something else may want them, but whoever set one should know."""
    ours, strange = [key.upper() for key in known], []
    for name in sorted(environment):
        if not name.startswith(PREFIX) or name in _OTHERS or _BY_KUBERNETES.match(name):
            continue
        key = name.removeprefix(PREFIX)
        if key not in ours:
            if meant := nearest(key, ours, _CLOSE):
                raise click.UsageError(f"{name} in the environment is no option: did you mean {PREFIX}{meant}?")
            strange.append(name)
    return strange


# Of other parts: `carousel token` and the client, the supervisor's own word to its children, the shell completion.
_OTHERS = ("CAROUSEL_TOKEN", "CAROUSEL_SUPERVISOR_PID", "CAROUSEL_LIFELINE_FD", "CAROUSEL_COMPLETE")
# In every container of a namespace with services whose names begin so.
_BY_KUBERNETES = re.compile(r"CAROUSEL_(\w+_)?(SERVICE_(HOST|PORT\w*)|PORT_\d+_\w+)$")


# ------------------------------------------------------------------------------------------------------------------ file


def load_file(ctx: click.Context, option: click.Parameter, path: str | None) -> str | None:
    """Callback of --config, which comes before all others: the file's values become defaults. Raises UsageError."""
    if path is None:
        return None
    options = {key: option for key, option in keys(ctx.command).items() if key != "config"}
    values, lines = _read(path)
    defaults: dict[str, Any] = {}
    for written, value in values.items():
        key, where = written.replace("-", "_"), f"{path}:{lines.get(written, 1)}"
        if key not in options:
            near = nearest(key, options)
            raise click.UsageError(f"{where}: {written} is no option{f': did you mean {near}?' if near else ''}", ctx)
        if options[key].name in defaults:
            raise click.UsageError(f"{where}: {written} is given twice", ctx)
        _check_value(ctx, options[key], value, f"{where}: {written}")
        name = options[key].name
        assert name is not None
        defaults[name] = value
        ctx.meta.setdefault(_FILE_LINES, {})[key] = where
    ctx.default_map = defaults
    return path


def _read(path: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The values, and each key's line. Raises UsageError."""
    try:
        text = Path(path).read_bytes().decode()
        values = tomllib.loads(text)
    except OSError as error:
        raise click.UsageError(f"--config {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise click.UsageError(f"--config {path} is not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise click.UsageError(f"--config {path} is not TOML: {error}") from None
    found = ((number, _KEY.match(line)) for number, line in enumerate(text.splitlines(), 1))
    lines: dict[str, int] = {}
    for number, match in found:
        if match:
            lines.setdefault(match[1], number)
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip().startswith("["):  # a table: its name is no option, and what stands in it has none
            lines.setdefault(line.strip().strip("[]").split(".")[0].strip(), number)
    return values, lines


def _check_value(ctx: click.Context, option: click.Option, value: Any, what: str) -> None:
    """The TOML type first: click itself would take text for a number, and true for 1. Raises UsageError."""
    wanted, accepted = _toml_type(option)
    values = value if option.multiple and isinstance(value, list) else [value]
    for each in values:
        is_list = option.multiple == isinstance(value, list)
        if not is_list or isinstance(each, bool) != (accepted is bool) or not isinstance(each, accepted):
            raise click.UsageError(f"{what} must be {'a list, each ' if option.multiple else ''}{wanted}, not {each!r}", ctx)
        try:
            option.type.convert(each, option, ctx)
        except click.BadParameter as error:
            raise click.UsageError(f"{what}: {error.message}", ctx) from None


def _toml_type(option: click.Option) -> tuple[str, type | tuple[type, ...]]:
    if option.is_flag:
        return "true or false", bool
    if isinstance(option.type, click.types.IntParamType):
        return "a whole number", int
    if isinstance(option.type, click.types.FloatParamType):
        return "a number", (int, float)
    return "a text", str


# ----------------------------------------------------------------------------------------------------------------- telling


def sources(ctx: click.Context) -> dict[str, str]:
    """By key, of every option that is not left at its default: `--flag`, `CAROUSEL_…`, or `path:line`."""
    lines, told = ctx.meta.get(_FILE_LINES, {}), {}
    for key, option in keys(ctx.command).items():
        match ctx.get_parameter_source(option.name or ""):
            case ParameterSource.COMMANDLINE:
                told[key] = max(option.opts, key=len)
            case ParameterSource.ENVIRONMENT:
                told[key] = variable(key)
            case ParameterSource.DEFAULT_MAP:
                told[key] = lines[key]
    return told


def printed(ctx: click.Context) -> Iterator[str]:
    """All options as a file that --config takes, each with where its value comes from."""
    came_from = sources(ctx)
    yield "# flag > environment (CAROUSEL_…) > --config FILE > default"
    for key, option in keys(ctx.command).items():
        if key == "config":
            continue
        value, source = ctx.params.get(option.name or ""), came_from.get(key, "default")
        if value is None or value == ():
            otherwise = _DEFAULT_IN_HELP.search(option.help or "")
            yield f"# {key} =  # default: {otherwise[1] if otherwise else 'none'}"
        else:
            yield f"{key} = {_toml(value)}  # {source}"


def _toml(value: Any) -> str:
    """JSON's numbers, booleans, lists and texts are TOML's; but for DEL."""
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False).replace("\x7f", "\\u007f")
