"""The `carousel` command: starts a server, and calls one. Starts other parts as processes and imports none of them.

Exit codes: 0 done, 1 failed, 2 wrong usage; 130 by Ctrl-C, 129 and 143 by other signals, 141 by a closed pipe. Errors are one
line on stderr.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import click

from carousel.v1 import generation_pb2
from client import batch_command, control_commands, health_command, token_command
from client.api import CarouselClient
from client.completion import completion_options, files, folders
from client.errors import CarouselError
from client.options import on_a_server
from client.printing import advice, closed_pipe, harmless, say, to_json
from client.request_options import request_options
from client.server import safe_environment, server_options
from client.streams import GenerateStream
from client.top.command import top

_SIGNALLED = 128  # exit codes of a process that a signal ended start here
_INTERRUPTED = _SIGNALLED + signal.SIGINT
_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CANCEL_S = 2.0  # how long Ctrl-C waits for the server's word
_COUNT = click.IntRange(0)
_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(context_settings=_SETTINGS)
@click.version_option(package_name="carousel-serve", prog_name="carousel")
@completion_options
def carousel() -> None:
    """Carousel serves large language models over gRPC, with continuous batching and a paged KV cache.

    \b
    Start a server in one terminal:      carousel serve --model DIR_OR_HUB_ID
    Stream a continuation in another:    carousel generate --prompt "def fibonacci(n):"
    Or a whole file, with no server:     carousel batch IN.jsonl OUT.jsonl --model DIR_OR_HUB_ID
    """


# ----------------------------------------------------------------------------------------------------------------- serve


@carousel.command(context_settings=_SETTINGS)
@click.option(
    "--config",
    metavar="FILE",
    shell_complete=files,
    help="TOML file of these options, each by its name with _ for -, as in max_batch_rows = 32. A flag goes before a variable"
    " of the environment (CAROUSEL_MAX_BATCH_ROWS), that before the file, and that before the default.",
)
@click.option("--print-config", is_flag=True, help="Print all options, each with where its value comes from, and end.")
@click.option(
    "--model",
    metavar="DIR_OR_HUB_ID",
    shell_complete=folders,
    help="A checkpoint in the Hugging Face format: a folder with config.json, tokenizer.json and *.safetensors, or the id of"
    " one on the hub (downloaded once, into the hub's own cache).",
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub id.")
@click.option("--served-model-name", metavar="NAME", help="What the server calls the model. [default: last part of --model]")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda", "sim"]),
    help="Where the model runs. auto: a GPU when there is one, else the CPU. sim: no model at all, invented tokens with"
    " realistic timing, for trying out clients and policies. [default: auto]",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="Type of weights and activations. auto: float32 on a CPU, the checkpoint's own on a GPU. [default: auto]",
)
@click.option(
    "--quantization",
    type=click.Choice(["none", "int8"]),
    help="int8: weights of 8 bits, on a CPU only; a quarter of the memory and faster, for a small loss of accuracy."
    " [default: none]",
)
@click.option(
    "--deterministic",
    is_flag=True,
    help="A request's tokens are the same, exactly, in any company and after any preemption or crash. On a CPU, slower.",
)
@click.option("--weights", metavar="random:SEED", help="Made up instead of read, for measurements of a model's shape.")
@click.option("--host", metavar="ADDRESS", help="Address to listen on; 0.0.0.0: every one. [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), metavar="N", help="Port to listen on; 0: a free one. [default: 50051]")
@click.option(
    "--tls-cert",
    metavar="FILE",
    shell_complete=files,
    help="PEM certificate of this server: calls are encrypted. Needs --tls-key.",
)
@click.option("--tls-key", metavar="FILE", shell_complete=files, help="Its private key, PEM without a password.")
@click.option(
    "--tls-client-ca",
    metavar="FILE",
    shell_complete=files,
    help="PEM certificates: clients must show one that these vouch for.",
)
@click.option(
    "--tokens",
    metavar="FILE",
    shell_complete=files,
    help="Who may call: hashed keys, a JSON object a line, each with sha256, tenant and, for Control and Inspect, admin;"
    " `carousel token` makes them. Read at the start. [default: everybody may]",
)
@click.option(
    "--policy",
    type=click.Choice(["continuous", "prefill_first", "static"]),
    help="continuous: requests join and leave the batch at every step. Two baselines: static, a batch runs until its last"
    " request has ended; prefill_first, prompts before everybody's next token and blocks reserved for the longest output."
    " [default: continuous]",
)
@click.option(
    "--max-model-len", type=click.IntRange(2), metavar="N", help="Most tokens of prompt + output. [default: the model's]"
)
@click.option("--block-size", type=click.IntRange(16, 128), metavar="N", help="Tokens of one KV-cache block. [default: 16]")
@click.option("--num-blocks", type=click.IntRange(1), metavar="N", help="Blocks of the KV cache. [default: what memory allows]")
@click.option(
    "--kv-memory-gib",
    type=click.FloatRange(0, min_open=True),
    metavar="GIB",
    help="Memory of the KV cache, instead of --num-blocks.",
)
@click.option(
    "--max-batch-rows",
    type=click.IntRange(1, 65535),
    metavar="N",
    help="Most requests in the batch at once. [default: 64; 256 on a GPU]",
)
@click.option(
    "--max-step-tokens",
    type=click.IntRange(1),
    metavar="N",
    help="Most tokens computed in one step; longer prompts are computed in chunks. [default: 512]",
)
@click.option(
    "--max-queue-requests", type=click.IntRange(1), metavar="N", help="Most requests waiting; more are refused. [default: 4096]"
)
@click.option("--max-queue-tokens", type=click.IntRange(1), metavar="N", help="Most prompt tokens waiting. [default: 4000000]")
@click.option("--static-batch-size", type=click.IntRange(0), metavar="N", help="Rows of a static batch. [default: what fits]")
@click.option(
    "--target-itl-ms",
    type=click.FloatRange(0),
    metavar="MS",
    help="Time between two tokens that running requests keep while prompts are computed, if it can be; 0: no target."
    " [default: 100]",
)
@click.option(
    "--max-preemptions",
    type=click.IntRange(0),
    metavar="N",
    help="Times that a request may lose its place to another one; then it comes back only when it can stay to its end. 0: as"
    " often as need be. [default: 3]",
)
@click.option(
    "--max-unread-tokens",
    type=click.IntRange(1),
    metavar="N",
    help="Tokens of an output that its reader has not taken, before it stops being computed. [default: 1024]",
)
@click.option("--no-prefix-caching", is_flag=True, default=None, help="Compute every prompt in whole.")
@click.option(
    "--oldest-every",
    type=click.IntRange(1),
    metavar="N",
    help="One admission in so many goes to whoever has waited longest. [default: 16]",
)
@click.option(
    "--tenant",
    multiple=True,
    metavar="NAME[:LIMIT=N]…",
    help="A tenant's limits: weight, its share against the others'; blocks, its most KV blocks; requests, most at a time; rate,"
    " most a second; as in alice:weight=2:rate=10. *: everybody who is not listed. May be given several times. [default: equal"
    " shares for everybody]",
)
@click.option(
    "--swap-gib", type=click.FloatRange(0), metavar="GIB", help="Host memory for preempted requests. [default: the worker's]"
)
@click.option(
    "--record",
    metavar="FILE",
    shell_complete=files,
    help="Write all that the scheduler is told and plans, for `carousel replay`.",
)
@click.option(
    "--journal",
    metavar="DIR",
    shell_complete=folders,
    help="Keep requests with a resume window and their tokens here: they outlive the scheduler, and go on where they were after"
    " it, or the whole server, was killed. [default: they do not]",
)
@click.option(
    "--journal-fsync",
    metavar="POLICY",
    help="When the journal is forced to the disk, which guards against loss of power, not against a kill: never, interval:MS or"
    " always. [default: never]",
)
@click.option("--journal-limit-mib", type=click.FloatRange(8), metavar="MIB", help="Size of the journal. [default: 128]")
@click.option("--record-limit-mib", type=click.FloatRange(1), metavar="MIB", help="The recording ends at this size.")
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Threads of the CPU worker. [default: one per core]")
@click.option("--frontends", type=click.IntRange(1, 64), metavar="N", help="gRPC processes that share the port. [default: 1]")
@click.option(
    "--workers",
    type=click.IntRange(1, 64),
    metavar="N",
    help="Workers to start here, each with the model and a KV cache of its own. [default: 1]",
)
@click.option(
    "--max-groups",
    type=click.IntRange(1, 64),
    metavar="N",
    help="Workers that compute at a time, those that join from elsewhere too; further ones stand by. [default: --workers]",
)
@click.option(
    "--standby",
    type=click.IntRange(0, 8),
    metavar="N",
    help="More workers that load the model and wait; one takes over at once when the worker is lost. [default: 0]",
)
@click.option(
    "--worker-timeout",
    type=click.FloatRange(1),
    metavar="SECONDS",
    help="Without a heartbeat, or of a step that uses no processor time, before the worker is lost. [default: 2]",
)
@click.option(
    "--step-timeout",
    type=click.FloatRange(0),
    metavar="SECONDS",
    help="How long one step may take before the worker is lost; 0: any time. [default: 0]",
)
@click.option(
    "--inner-address",
    metavar="tcp://HOST:PORT",
    help="Workers on other machines join here, encrypted; none is started on this one. Needs --inner-keys.",
)
@click.option("--inner-keys", metavar="DIR", shell_complete=folders, help="Its keys, as `carousel keys` makes them.")
@click.option(
    "--drain-timeout",
    type=click.FloatRange(0),
    metavar="SECONDS",
    help="How long running requests may go on after Ctrl-C or SIGTERM; a second Ctrl-C ends at once. [default: 30]",
)
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="[default: info]")
@click.option(
    "--log-format", type=click.Choice(["text", "json"]), help="Of the lines on stderr; json: an object a line. [default: text]"
)
@click.option("--no-request-log", is_flag=True, help="No line for each request that ends.")
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65535),
    metavar="N",
    help="Port of http://HOST:PORT/metrics for Prometheus; 0: any free one. [default: none, nothing is measured]",
)
@click.option(
    "--metrics-host",
    metavar="ADDRESS",
    help="Address to serve metrics on. They name tenants, and everybody may read them. [default: 127.0.0.1]",
)
@click.option(
    "--otlp-endpoint",
    metavar="URL",
    help="Send a trace of each request to this OpenTelemetry collector (gRPC), as http://127.0.0.1:4317. Needs the extra"
    " `tracing`. [default: no tracing]",
)
@click.argument("scheduler_options", nargs=-1, type=click.UNPROCESSED, metavar="[-- MORE_OPTIONS]")
def serve(scheduler_options: tuple[str, ...], **options: str | float | tuple[str, ...] | None) -> NoReturn:
    """Serve a model in the foreground, until Ctrl-C.

    Starts the scheduler, its gRPC front end and a worker, and watches them. Whatever stands after `--` is handed on as it is
    (`python -m scheduler --help` lists all that there is).

    \b
    Examples:
      carousel serve --model ./my-checkpoint
      carousel serve --config carousel.toml --print-config
      carousel serve --model some-org/some-model --revision main --port 8001
      carousel serve --model ./my-checkpoint --device cpu --threads 2 --kv-memory-gib 2
    """
    elsewhere = scheduler_options or any(os.environ.get(name) for name in ("CAROUSEL_MODEL", "CAROUSEL_CONFIG"))
    if not (options["model"] or options["config"] or options["print_config"] or elsewhere):
        raise click.UsageError("say what to serve with --model DIR_OR_HUB_ID")
    _become("scheduler", *server_options(options), *scheduler_options)


def _become(module: str, *arguments: str) -> NoReturn:
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], safe_environment())


# ------------------------------------------------------------------------------------------------------------------ keys


@carousel.command(context_settings=_SETTINGS)
@click.argument("folder", metavar="DIR", shell_complete=folders)
def keys(folder: str) -> NoReturn:
    """Make the keys of an encrypted link between a scheduler and workers on other machines.

    DIR then holds core.key, core.key_secret, worker.key and worker.key_secret. The scheduler's machine needs core.key_secret
    and worker.key, a worker's machine worker.key_secret and core.key; nobody else may read the secret ones.

    \b
    Example:
      carousel keys ./keys
      carousel serve --model M --inner-address tcp://10.0.0.1:7000 --inner-keys ./keys
      python -m worker --model M --connect tcp://10.0.0.1:7000 --keys ./keys
    """
    _become("scheduler", "keys", folder)


# ---------------------------------------------------------------------------------------------------------------- replay


@carousel.command(context_settings=_SETTINGS | {"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="FILE [OPTIONS]", shell_complete=files)
def replay(arguments: tuple[str, ...]) -> NoReturn:
    """Run the scheduler's core again on what a server recorded with --record, and compare what it plans.

    `carousel replay --help` lists the options.
    """
    _become("scheduler", "replay", *arguments)


# -------------------------------------------------------------------------------------------------------------- simulate


@carousel.command(context_settings=_SETTINGS | {"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS]")
def simulate(arguments: tuple[str, ...]) -> NoReturn:
    """Run the scheduler's core on a virtual clock: workloads, policies, how much a service can take.

    `carousel simulate --help` lists the options.
    """
    _become("bench.simulate", *arguments)


# ----------------------------------------------------------------------------------------------------------------- bench


@carousel.command(context_settings=_SETTINGS | {"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS]")
def bench(arguments: tuple[str, ...]) -> NoReturn:
    """Load a running server: throughput, latencies, goodput under seeded workloads.

    `carousel bench --help` lists the options.
    """
    _become("bench.load", *arguments)


# ------------------------------------------------------------------------------------------------------------------ draw


@carousel.command(context_settings=_SETTINGS | {"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[RECORDING] [OPTIONS]", shell_complete=files)
def draw(arguments: tuple[str, ...]) -> NoReturn:
    """Draw the batch step by step, three policies side by side, and the KV cache, from a recording or a running server.

    `carousel draw --help` lists the options.
    """
    _become("bench.draw", *arguments)


# -------------------------------------------------------------------------------------------------------------- generate


def _token_ids(context: click.Context, parameter: click.Parameter, value: str | None) -> list[int] | None:
    if value is None:
        return None
    parts = value.replace(",", " ").split()
    if not all(part.isdecimal() and int(part) < 2**32 for part in parts):
        raise click.BadParameter("token ids are whole numbers with commas between, as in 1,2,3")
    return [int(part) for part in parts]


@carousel.command(context_settings=_SETTINGS)
@click.option("--prompt", metavar="TEXT", help="The text to continue.")
@click.option(
    "--file",
    "file",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    metavar="F",
    help="Take the prompt from this file, as it is (its last line end included).",
)
@click.option("--token-ids", callback=_token_ids, metavar="1,2,3", help="Token ids instead of text.")
@click.argument("dash", required=False, metavar="[-]")
@on_a_server
@request_options
@click.option("--timeout", type=click.FloatRange(0, min_open=True), metavar="SECONDS", help="Give up after this time.")
@click.option("--echo", is_flag=True, default=None, help="Print the prompt too.")
@click.option(
    "--logprobs", type=_COUNT, metavar="K", help="With --json: each token's log-probability, and the K likeliest ones; 0 to 20."
)
@click.option("--prompt-logprobs", type=_COUNT, metavar="K", help="The same of the prompt's tokens.")
@click.option("--json", "as_json", is_flag=True, help="Print the stream's events instead, one JSON object a line.")
@click.option("--stats", is_flag=True, help="Say counts and times on stderr at the end.")
def generate(
    prompt: str | None,
    file: str | None,
    token_ids: list[int] | None,
    dash: str | None,
    client: CarouselClient,
    timeout: float | None,
    as_json: bool,
    stats: bool,
    **parameters: Any,
) -> int:
    """Continue a prompt; the text streams to stdout as it is generated. Ctrl-C cancels the request.

    The prompt comes from --prompt, --file, --token-ids, or from standard input when `-` is given. With --num-outputs each line
    carries its output's number.

    \b
    Examples:
      carousel generate --prompt "def fibonacci(n):" --max-tokens 64
      git diff | carousel generate - --temperature 0 --stats
      carousel generate --file prompt.txt --seed 7 --stop return > continued.txt
    """
    sources = [source for source in (prompt, file, token_ids, dash) if source is not None]
    if len(sources) != 1 or dash not in (None, "-"):
        raise click.UsageError(
            "say what to continue with one of --prompt TEXT, --file F, --token-ids 1,2,3, and - for standard input"
        )
    words = token_ids if token_ids is not None else prompt if prompt is not None else _read(file or "-")
    started_s, request_id = time.monotonic(), str(uuid.uuid4())
    several = (parameters["num_outputs"] or 1) > 1
    output = _LabelledOutput() if several and not as_json else _Output(as_json)
    with _CtrlC(lambda: _interrupted(client, request_id, output)):
        stream = _send(client, words, request_id, timeout, parameters)
        try:
            for event in stream:
                output.event(event)
        except BrokenPipeError:
            stream.close()  # whoever read our output has enough: go without a word, as other tools do
            return closed_pipe()
        finally:
            output.end()
    if stats:
        _say_stats(stream, time.monotonic() - started_s)
    return 0


def _send(
    client: CarouselClient, prompt: str | list[int], request_id: str, timeout_s: float | None, parameters: dict[str, Any]
) -> GenerateStream:
    try:
        return client.generate(prompt, request_id=request_id, timeout_s=timeout_s, **parameters)
    except UnicodeEncodeError:
        raise click.UsageError("the prompt and all other text must be UTF-8") from None
    except ValueError as error:  # a number too large for its field
        raise click.UsageError(str(error)) from None


def _read(path: str) -> str:
    """The text of a file, or of standard input for `-`."""
    try:
        return (sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()).decode()
    except UnicodeDecodeError as error:
        name = "standard input" if path == "-" else path
        raise click.ClickException(f"{name} is not UTF-8 text: see byte {error.start}") from None
    except OSError as error:
        raise click.ClickException(f"{path}: {error.strerror}") from None


class _Output:
    """Writes events to stdout, each at once."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._terminal = sys.stdout.isatty()
        self.in_line = False  # the cursor of a terminal stands behind text

    def event(self, event: generation_pb2.GenerateResponse) -> None:
        if self._as_json:
            self._write(to_json(event) + "\n")
        elif event.delta.text:
            self._write(event.delta.text)

    def _write(self, text: str) -> None:
        if self._terminal:
            text = harmless(text)
        sys.stdout.buffer.write(text.encode(sys.stdout.encoding if self._terminal else "utf-8", errors="replace"))
        sys.stdout.buffer.flush()
        self.in_line = self._terminal and not text.endswith("\n")

    def end(self) -> None:
        """On a terminal what follows starts a line of its own; files and pipes get the text and nothing else."""
        if self.in_line:
            self._write("\n")


class _LabelledOutput(_Output):
    """Several outputs: their lines as they are complete, each with its output's number."""

    def __init__(self) -> None:
        super().__init__(as_json=False)
        self._lines: dict[int, str] = {}  # the incomplete line of each output

    def event(self, event: generation_pb2.GenerateResponse) -> None:
        if event.WhichOneof("event") == "finished":
            self._flush(event.finished.output_index)
        elif event.delta.text:
            index = event.delta.output_index
            *complete, rest = (self._lines.get(index, "") + event.delta.text).split("\n")
            self._lines[index] = rest
            if complete:
                self._write("".join(f"[{index}] {line}\n" for line in complete))

    def end(self) -> None:
        """What was incomplete when the stream broke."""
        for index in sorted(self._lines):
            self._flush(index)

    def _flush(self, index: int) -> None:
        line = self._lines.pop(index, "")
        if line:
            self._write(f"[{index}] {line}\n")


class _CtrlC:
    """While it is entered, Ctrl-C runs `leave` in a thread of its own, then ends the process; once more ends it at once. So do
    SIGTERM and a closed terminal: the server would go on with the request, in case that it is resumed.

    Not by KeyboardInterrupt: in the middle of grpc's own work that exception leaves a channel that never closes, and it would
    have to wait for whoever reads our output.
    """

    def __init__(self, leave: Callable[[], None]) -> None:
        self._leave = leave
        self._presses: queue.SimpleQueue[int] = queue.SimpleQueue()  # the signal; 0: not needed any more
        self._pressed = False
        self._before: dict[signal.Signals, Any] = {}
        self._thread = threading.Thread(target=self._wait, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()
        for number in _ENDINGS:
            before = signal.getsignal(number)
            if before is not signal.SIG_IGN:  # whoever started us wants none of it
                self._before[number] = before
                signal.signal(number, self._press)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._presses.put(0)
        self._thread.join()  # for ever, if it was pressed: the thread ends the process
        for number, before in self._before.items():
            signal.signal(number, before)

    def _press(self, number: int, frame: object) -> None:
        if self._pressed:
            os._exit(_SIGNALLED + number)
        self._pressed = True
        self._presses.put(number)  # the only thing that may be done in the middle of anything

    def _wait(self) -> None:
        if number := self._presses.get():
            try:
                self._leave()
            finally:
                os._exit(_SIGNALLED + number)


def _interrupted(client: CarouselClient, request_id: str, output: _Output) -> None:
    """Cancels by the request's id, so that the answer says that the server has heard of it."""
    try:
        client.cancel(request_id, timeout_s=_CANCEL_S)
        said = "interrupted: the request is cancelled"
    except CarouselError:
        said = "interrupted: the server has not confirmed the cancel"
    if output.in_line and sys.stderr.isatty():
        print(file=sys.stderr)
    say(said)


def _say_stats(stream: GenerateStream, elapsed_s: float) -> None:
    summary = stream.summary
    if summary is None:
        return
    usage, timing = summary.usage, summary.timing
    reasons = [generation_pb2.FinishReason.Name(stream.finished[index].reason) for index in sorted(stream.finished)]
    reason = ", ".join(name.removeprefix("FINISH_REASON_").lower() for name in reasons)
    rate = usage.output_tokens / elapsed_s
    say(
        f"{usage.output_tokens} tokens in {elapsed_s:.2f} s ({rate:.1f} tokens/s), ended by {reason};"
        f" first token after {timing.time_to_first_token_ns / 1e6:.0f} ms ({timing.queued_ns / 1e6:.0f} ms of it in the queue);"
        f" prompt {usage.prompt_tokens} tokens ({usage.cached_tokens} cached); seed {timing.seed}; request {summary.request_id}"
    )


for _command in (batch_command.batch, *control_commands.COMMANDS, health_command.health, token_command.token, top):
    carousel.add_command(_command)


# ---------------------------------------------------------------------------------------------------------------- errors


def main(args: Sequence[str] | None = None) -> int:
    """The console script. args: without the program's name; None: the process's own. Returns the exit code."""
    try:
        result = carousel.main(args=args, prog_name="carousel", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx is not None else "carousel"
        say(f"{error.format_message().rstrip('.')}; see `{command} --help`")
        return error.exit_code
    except click.ClickException as error:
        say(error.format_message())
    except CarouselError as error:
        say(advice(error))
    except click.Abort:
        say("interrupted")
        return _INTERRUPTED
    return 1
