"""`carousel batch`: a file of prompts in, a file of results out, by a server of its own or one that runs; with its progress."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import click

from client.api import CarouselClient
from client.batch import BatchResult, Run, request_of
from client.batch_files import BatchFileError, Line, Results, count_prompts, open_prompts, read_prompts, read_with, result_line
from client.completion import folders
from client.errors import CarouselError
from client.options import on_a_server
from client.printing import advice, closed_pipe, harmless, say
from client.request_options import request_options
from client.server import OwnServer, ServerFailedError, server_options

if TYPE_CHECKING:  # rich is loaded only where there is a bar
    from rich.progress import Progress, Task
    from rich.text import Text

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
_INTERRUPTED = 130  # 128 + SIGINT
_SAY_EVERY_S = 10.0
_MOST_SAID = 10  # failed lines that are named on stderr
_DEVICES = click.Choice(["auto", "cpu", "cuda", "sim"])


@dataclass(slots=True)
class Counts:
    """total: lines of the input; None: not known."""

    total: int | None
    done: int = 0
    skipped: int = 0  # done before
    failed: int = 0
    failed_before: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    started_s: float = field(default_factory=time.monotonic)

    def skip(self, failed: bool) -> None:
        self.skipped += 1
        self.failed_before += failed

    def add(self, result: BatchResult) -> None:
        self.done += 1
        self.failed += result.error is not None
        if result.summary is not None:
            self.prompt_tokens += result.summary.usage.prompt_tokens
            self.output_tokens += result.summary.usage.output_tokens

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_s

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / max(self.elapsed_s, 1e-9)

    @property
    def left_s(self) -> float | None:
        if self.total is None or not self.done:
            return None
        return self.elapsed_s / self.done * (self.total - self.done - self.skipped)


@click.command(context_settings=_SETTINGS)
@click.argument("prompts", metavar="IN.jsonl", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.argument("results", metavar="OUT.jsonl", type=click.Path(dir_okay=False, allow_dash=True))
@click.option(
    "--model",
    metavar="DIR_OR_HUB_ID",
    shell_complete=folders,
    help="Load this model in a server of this command's own, which ends with it. [default: use the server at --target]",
)
@click.option("--device", type=_DEVICES, help="Where --model runs. [default: auto]")
@on_a_server
@request_options
@click.option(
    "--concurrency",
    type=click.IntRange(1),
    metavar="N",
    help="Most requests at a time. [default: twice the rows of the server's batch]",
)
@click.option("--with-token-ids", is_flag=True, help="Write the outputs' token ids, too.")
@click.option("--retry-failed", is_flag=True, help="Send those again whose result in OUT is an error.")
@click.option("--json", "as_json", is_flag=True, help="The summary at the end as JSON, on stdout (stderr when that is OUT).")
@click.argument("server_arguments", nargs=-1, type=click.UNPROCESSED, metavar="[-- SERVER_OPTIONS]")
@click.pass_context
def batch(
    context: click.Context,
    /,
    prompts: str,
    results: str,
    model: str | None,
    device: str | None,
    client: CarouselClient,
    concurrency: int | None,
    with_token_ids: bool,
    retry_failed: bool,
    as_json: bool,
    server_arguments: tuple[str, ...],
    **parameters: Any,
) -> int:
    """Generate for every line of a file; `-` is standard input or output.

    A line of IN is a JSON object with "prompt" (text or token ids) or "messages" (a conversation, for the model's own chat
    template), and if need be an "id" (else it is the line's number) and parameters of its own, which win over the options here.
    A line of OUT is one with "id", "text", "finish_reason" and "usage", or "error", written as soon as it is done.

    Started again with the same files it goes on where it ended: lines whose id is in OUT are skipped. Exit code 1 when a line
    has failed.

    \b
    Examples:
      carousel batch prompts.jsonl results.jsonl --model ./my-checkpoint --max-tokens 64
      carousel batch prompts.jsonl results.jsonl --target 127.0.0.1:50051 --temperature 0 --retry-failed
      carousel batch in.jsonl out.jsonl --model ./my-checkpoint -- --max-batch-rows 16 --threads 2
      echo '{"prompt": "def fibonacci(n):", "max_tokens": 16}' | carousel batch - -
    """
    _check_usage(context, model, device, server_arguments)
    given = {name: value for name, value in parameters.items() if value not in (None, ())}
    counts, ended = Counts(None), ""
    try:
        with contextlib.closing(Results(results, retry_failed=retry_failed)) as out:
            counts.total = count_prompts(prompts)
            _say_what_is_there(results, out)
            lines = read_with(out, read_prompts(open_prompts(prompts)), counts.skip)
            first = next(lines, None)
            if first is not None:  # else no server is needed
                lines = itertools.chain([first], lines)
                with _served(client, model, device, server_arguments) as (client, check):
                    run = Run(client, lines, functools.partial(_prepare, client, given), concurrency, check)
                    _write_all(run, out, counts, with_token_ids, _progress(counts, results == "-"))
    except BrokenPipeError:
        return closed_pipe()
    except KeyboardInterrupt:
        ended = "interrupted"
    except (BatchFileError, ServerFailedError, CarouselError) as error:
        why = advice(error) if isinstance(error, CarouselError) else str(error)
        if not counts.done:
            raise click.ClickException(why) from None
        say(why)
        ended = "broken off"
    _say_summary(counts, ended, results, as_json)
    return _INTERRUPTED if ended == "interrupted" else int(bool(ended or counts.failed or counts.failed_before))


def _check_usage(context: click.Context, model: str | None, device: str | None, server_arguments: tuple[str, ...]) -> None:
    if model is None:
        if device is not None or server_arguments:
            raise click.UsageError("--device and SERVER_OPTIONS are for a server of its own: give --model, too")
        return
    for name in ("target", "tls_ca", "tls_cert", "tls_key"):
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise click.UsageError(
                f"--{name.replace('_', '-')} is for a server that runs, --model starts one: give one of them"
            )


@contextlib.contextmanager
def _served(
    client: CarouselClient, model: str | None, device: str | None, server_arguments: tuple[str, ...]
) -> Iterator[tuple[CarouselClient, Callable[[], None] | None]]:
    """The client of a server of its own, where there is a model for it; and what raises when that server has ended."""
    if model is None:
        yield client, None
        return
    options = [*server_options({"model": model, "device": device or "auto"}), *server_arguments]
    with OwnServer(options, tell=say) as server, CarouselClient(server.target) as own:
        yield own, server.check


def _write_all(run: Run, out: Results, counts: Counts, with_token_ids: bool, progress: _Shown) -> None:
    counts.started_s = time.monotonic()
    with progress, contextlib.closing(iter(run)) as results:
        for result in results:
            counts.add(result)  # before others can see it: Ctrl-C may come at any moment
            out.write(result_line(result.prompt.id, result, with_token_ids=with_token_ids))
            progress.show(result)


def _prepare(client: CarouselClient, parameters: dict[str, Any], line: Line) -> tuple[Any, dict[str, Any]]:
    try:
        if line.wrong:
            raise ValueError(line.wrong)
        return request_of(client, line.prompt, parameters)
    except ValueError as error:
        raise ValueError(f"line {line.number}: {error}") from None


# ------------------------------------------------------------------------------------------------------------- what is said


def _say_what_is_there(path: str, out: Results) -> None:
    if out.torn:
        say(f"{path}: its last line was incomplete and is taken out")
    if out.done:
        failed = sum(out.done.values())
        also = f" ({failed} of them failed: --retry-failed sends those again)" if failed else ""
        say(f"{path} has {len(out.done)} results already{also}: lines with their ids are skipped")


def _say_failure(result: BatchResult, counts: Counts) -> None:
    line: Line = result.prompt
    if result.error is None or counts.failed > _MOST_SAID:
        return
    message = result.error.message.removeprefix(f"line {line.number}: ")
    said = f"line {line.number} failed: {message} ({result.error.code.name})"
    say(harmless(said) + ("; no more of them are named here" if counts.failed == _MOST_SAID else ""))


def _say_summary(counts: Counts, ended: str, results: str, as_json: bool) -> None:
    if as_json:
        summary = {
            "total": counts.total,
            "done": counts.done,
            "skipped": counts.skipped,
            "failed": counts.failed,
            "failed_before": counts.failed_before,
            "prompt_tokens": counts.prompt_tokens,
            "output_tokens": counts.output_tokens,
            "elapsed_s": round(counts.elapsed_s, 3),
            "complete": not ended,
        }
        print(json.dumps(summary), file=sys.stderr if results == "-" else sys.stdout, flush=True)
        return
    parts = [f"{counts.done} {'line' if counts.done == 1 else 'lines'} done"]
    if counts.failed:
        parts.append(f"{counts.failed} of them failed")
    if counts.skipped:
        before = f" ({counts.failed_before} failed)" if counts.failed_before else ""
        parts.append(f"{counts.skipped} were done before{before}")
    rate = f"{counts.output_tokens} tokens in {counts.elapsed_s:.1f} s ({counts.tokens_per_s:.1f} tokens/s)"
    again = "; the same command goes on from here" if ended and results != "-" else ""
    say(f"{ended + ': ' if ended else ''}{', '.join(parts)}; {rate}{again}")


class _Shown(Protocol):
    """Tells how far it is, while it is entered."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def show(self, result: BatchResult) -> None: ...


def _progress(counts: Counts, to_stdout: bool) -> _Shown:
    return _Bar(counts) if sys.stderr.isatty() and not (to_stdout and sys.stdout.isatty()) else _Lines(counts)


class _Lines:
    """A line each some seconds."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self._next_s = time.monotonic() + _SAY_EVERY_S

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def show(self, result: BatchResult) -> None:
        counts = self._counts
        _say_failure(result, counts)
        now_s = time.monotonic()
        if now_s < self._next_s:
            return
        self._next_s = now_s + _SAY_EVERY_S
        total = f" of {counts.total}" if counts.total is not None else ""
        left = f", {_duration(counts.left_s)} left" if counts.left_s is not None else ""
        say(f"{counts.done + counts.skipped}{total} lines, {counts.tokens_per_s:.1f} tokens/s{left}")


class _Bar:
    """A bar on the terminal."""

    def __init__(self, counts: Counts) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn
        from rich.text import Text

        class Rate(ProgressColumn):
            def render(self, task: Task) -> Text:
                left = f", {_duration(counts.left_s)} left" if counts.left_s is not None else ""
                return Text(f"{counts.tokens_per_s:.1f} tokens/s{left}")

        self._counts = counts
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate())
        self._progress: Progress = Progress(*columns, console=Console(stderr=True), redirect_stdout=False)
        self._task = self._progress.add_task("batch", total=counts.total)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def show(self, result: BatchResult) -> None:
        _say_failure(result, self._counts)
        self._progress.update(self._task, completed=self._counts.done + self._counts.skipped)


def _duration(seconds: float | None) -> str:
    minutes, rest = divmod(round(seconds or 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
