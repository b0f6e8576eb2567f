"""`python -m worker`: options, the executor that they ask for, the link; and what a process owes its supervisor.

A start that fails says so in one line on stderr and exits 1 before any hello. torch is imported only when a model is.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from dataclasses import fields
from datetime import UTC, datetime
from typing import NoReturn

import zmq

from kvcache.sizing import SizingError
from worker import curve, model_files, openmp
from worker.config import DEVICES, DTYPES, QUANTIZATIONS, STORED, ConfigError, SimConfig, WorkerConfig
from worker.executor import Executor, one_line
from worker.link import Link
from worker.model_config import ModelError

log = logging.getLogger(__name__)

_ENDS = {int(signal.SIGTERM): 0, int(signal.SIGINT): 130}  # exit status
SUPERVISOR_PID = "CAROUSEL_SUPERVISOR_PID"  # in the environment of a worker that the scheduler's supervisor starts
_PR_SET_PDEATHSIG = 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"worker: {message} (--help lists the options)\n")


def parse(arguments: Sequence[str]) -> tuple[WorkerConfig, str, str]:
    """The configuration, and the level and format of the log. Exits 2 on wrong usage."""
    parser = _Parser(prog="python -m worker", description="A worker of Carousel: computes the steps that a core plans.")
    add = parser.add_argument
    add("--connect", required=True, metavar="ADDRESS", help="ZeroMQ address of the core, e.g. ipc:///run/carousel/workers")
    add("--keys", default="", metavar="DIR", help="keys of an encrypted link (`carousel keys`); needed for tcp://")
    add("--replaces", action="store_true", help="take the place of the worker that is there, which drains")
    add("--model", metavar="DIR_OR_HUB_ID", help="checkpoint directory, or a model id of the Hugging Face hub")
    add("--revision", help="branch, tag or commit of a hub id")
    add(
        "--device", default="auto", choices=DEVICES, help="auto: cuda if there is one, else cpu; sim: no model, invented tokens"
    )
    add("--dtype", default="auto", choices=DTYPES, help="auto: float32 on a CPU, the checkpoint's own on a GPU")
    add(
        "--quantization",
        default="none",
        choices=QUANTIZATIONS,
        help="int8: weights of 8 bits, on a CPU only [none]",
    )
    add(
        "--deterministic",
        action="store_true",
        help="bit for bit the same logits of a sequence in any company; on a CPU, in float32, slower",
    )
    add("--weights", default=STORED, metavar="random:SEED", help="made up instead of read, for measurements of a shape")
    add("--max-model-len", type=int, metavar="N", help="tokens of prompt and output together [the model's]")
    add("--block-size", type=int, default=16, metavar="N", help="tokens of one KV-cache block [16]")
    add("--num-blocks", type=int, metavar="N", help="blocks of the KV cache [what the memory allows]")
    add("--kv-memory-gib", type=float, metavar="X", help="memory of the KV cache, instead of --num-blocks")
    add(
        "--swap-gib",
        type=float,
        metavar="X",
        help="host memory for the KV cache of preempted sequences [0 on a CPU, else 4 or a tenth of what is available]",
    )
    add("--max-batch-rows", type=int, metavar="N", help="sequences in the batch [64; 256 on a GPU]")
    add("--max-step-tokens", type=int, metavar="N", help="tokens of the largest step [512; 2048 on a GPU]")
    add("--threads", type=int, metavar="N", help="threads on a CPU, no more than it has processors [one per core]")
    add("--group", type=int, default=0, metavar="N", help="worker group [0]")
    add("--sim-base-ns", type=int, default=0, metavar="NS", help="simulated time of any step [0]")
    add("--sim-per-row-ns", type=int, default=0, metavar="NS", help="… of each row [0]")
    add("--sim-per-token-ns", type=int, default=0, metavar="NS", help="… of each token computed [0]")
    add("--sim-per-context-token-ns", type=int, default=0, metavar="NS", help="… of each token attended to [0]")
    add("--sim-swap-block-ns", type=int, default=0, metavar="NS", help="… of each block swapped out or in [0]")
    add("--sim-copy-block-ns", type=int, default=0, metavar="NS", help="… of each block copied [0]")
    add("--sim-host-blocks", type=int, default=0, metavar="N", help="blocks of host memory to swap to, with --device sim [0]")
    add(
        "--sim-end-chance",
        type=float,
        default=0.0,
        metavar="P",
        help="chance that a token is the request's first stop token [0]",
    )
    add("--sim-vocab-size", type=int, default=32_000, metavar="N", help="vocabulary without --model [32000]")
    add("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    add("--log-format", default="text", choices=("text", "json"), help="of the lines on stderr; json: an object a line")
    options = vars(parser.parse_args(arguments))
    sim = SimConfig(**{field.name: options[f"sim_{field.name}"] for field in fields(SimConfig)})
    try:
        own = {field.name: options[field.name] for field in fields(WorkerConfig) if field.name != "sim"}
        return WorkerConfig(**own, sim=sim), options["log_level"], options["log_format"]
    except ConfigError as error:
        parser.error(str(error))


def make_executor(config: WorkerConfig) -> Executor:
    """Raises ConfigError, ModelError or SizingError, or whatever a library raises, when it can't be made."""
    model_dir = model_files.resolve(config.model, config.revision) if config.model is not None else None
    if config.device == "sim":
        from worker.sim_executor import SimExecutor

        return SimExecutor.of(config, model_dir)
    openmp.set_defaults()
    from worker.loading import load

    assert model_dir is not None
    loaded = load(config, model_dir)
    if loaded.device.type == "cuda":
        from worker.gpu.executor import GpuExecutor

        return GpuExecutor(loaded)
    from worker.model_executor import ModelExecutor

    return ModelExecutor.with_model(loaded)


def main(arguments: Sequence[str] | None = None) -> int:
    _end_at_signals()  # nothing here is worth a tidy end
    _obey_the_supervisor()
    config, log_level, log_format = parse(sys.argv[1:] if arguments is None else arguments)
    _log_to_stderr(log_level, log_format)
    try:
        keys = curve.keys_for(config.connect, config.keys)
        executor = make_executor(config)
        link = Link(config.connect, config.group, executor, keys=keys, replaces=config.replaces)
    except Exception as error:
        log.debug("the start failed", exc_info=True)
        print(f"worker: {_reason(error)}", file=sys.stderr)
        return 1
    log.info("%s", executor.facts.description)
    link.run()
    os._exit(0)


def _reason(error: Exception) -> str:
    """What is wrong and what to do, in one line."""
    if isinstance(error, ConfigError | ModelError | SizingError):
        return " ".join(str(error).split())
    if isinstance(error, zmq.ZMQError):
        return f"--connect: {error}"
    if isinstance(error, MemoryError):
        return f"{one_line(error)}: lower --max-model-len or --max-batch-rows"
    return one_line(error)


def _obey_the_supervisor() -> None:
    """Under a supervisor the kernel kills this process when the supervisor dies, however that happens (Linux; elsewhere
    nothing is done), and Ctrl-C, which a terminal sends to the whole foreground, is left to the supervisor."""
    supervisor = os.environ.get(SUPERVISOR_PID)
    if supervisor is None:
        signal.signal(signal.SIGINT, _heard)
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        return
    if os.getppid() != int(supervisor):  # it died before the line above
        os._exit(1)


def _heard(*_: object) -> None:
    """Python writes the number to the wakeup descriptor as the signal comes, and calls this when the main thread next can."""


def _end_at_signals() -> None:
    """A thread waits for them: the main thread may be about to sleep in a poll, which a signal that came just before does not
    wake, or be busy in a step."""
    signal.signal(signal.SIGTERM, _heard)
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    signal.set_wakeup_fd(writes, warn_on_full_buffer=False)

    def wait() -> None:
        while (number := os.read(reads, 1)[0]) not in _ENDS:
            pass
        os._exit(_ENDS[number])

    threading.Thread(target=wait, name="signals", daemon=True).start()


class _JsonFormatter(logging.Formatter):
    """An object a line, with the keys that the scheduler's processes use."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        told = {"time": at, "role": "worker", "pid": record.process, "level": record.levelname.lower()}
        told["message"] = record.getMessage()
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False)


def _log_to_stderr(level: str, form: str) -> None:
    """One line an event. Libraries' warnings are for developers: they show at level debug only."""
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s worker[%(process)d] %(levelname)s %(message)s", datefmt="%H:%M:%S")
    handler.setFormatter(_JsonFormatter() if form == "json" else text)
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.captureWarnings(True)
    if level != "debug":
        warnings.simplefilter("ignore")
