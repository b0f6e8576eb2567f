"""One engine, one run: a driver started in the peer's environment, waited for, its result read as an Outcome.

Knows the job and the result of drivers/harness.py; nothing of rounds and tables.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bench import cpu_carousel
from bench.cpu_workload import Outcome, Request, peak_tree_bytes, single_rate
from bench.peers.engines import Engine, driver_options, surroundings
from bench.peers.environments import HERE, Environment, PeerUnavailableError, last_error
from bench.server import ServerFailedError
from client import CarouselError

DRIVERS = HERE / "drivers"
CONVERT_S = 3600.0

_WARM_TOKENS = 8
_POLL_S = 0.2
_STOP_S = 20.0


@dataclass(frozen=True)
class Work:
    """What every engine is asked, and what it may use."""

    requests: Sequence[Request]
    single: Request
    cores: tuple[int, ...]
    kv_gib: int
    limit_s: float  # of one run, its start included

    def job(self, engine: Engine, environment: Environment, model: Path) -> dict[str, Any]:
        warm_up = Request(self.single.prompt_ids[::-1], _WARM_TOKENS)  # no prefix of a later one
        return {
            "model": str(model),
            "dtype": engine.dtype,
            "threads": len(self.cores),
            "max_len": max(len(r.prompt_ids) + r.max_tokens for r in (*self.requests, self.single, warm_up)),
            "max_rows": len(self.requests),
            "kv_gib": self.kv_gib,
            "options": dict(engine.options),
            "warm_up": _as_pairs([warm_up]),
            "single": _as_pairs([self.single]),
            "requests": _as_pairs(self.requests),
        } | driver_options(engine, environment)


def convert(engine: Engine, checkpoint: Path, environment: Environment) -> Path:
    """The checkpoint as this engine reads it; made once, kept in its environment. Raises PeerUnavailableError."""
    if not engine.convert:
        return checkpoint
    folder = environment.models
    folder.mkdir(exist_ok=True)
    name = f"{checkpoint.name}-{engine.weights}{engine.model_suffix}"
    out, unfinished = folder / name, folder / f"unfinished-{name}"
    if not out.exists():
        command = engine.converter(checkpoint, unfinished, environment, DRIVERS)
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CONVERT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PeerUnavailableError(f"its converter failed: {error}") from error
        if done.returncode:
            raise PeerUnavailableError(f"its converter failed: {last_error(done.stdout + done.stderr)}")
        unfinished.rename(out)
    return out


def run_carousel(engine: Engine, checkpoint: Path, work: Work) -> Outcome:
    """Raises PeerUnavailableError."""
    options = (*cpu_carousel.OPTIONS, "--max-batch-rows", str(len(work.requests)), "--threads", str(len(work.cores)))
    try:
        return cpu_carousel.run(
            engine.name, checkpoint, work.requests, work.single, (*options, *engine.options.get("serve", ()))
        )[0]
    except (ServerFailedError, CarouselError) as error:
        raise PeerUnavailableError(f"failed: {last_error(str(error))}") from error


def run(engine: Engine, model: Path, work: Work, environment: Environment) -> tuple[Outcome, dict[str, str]]:
    """A peer's outcome, and the versions that it names. Raises PeerUnavailableError."""
    with tempfile.TemporaryDirectory(prefix="carousel-peer-") as folder, tempfile.TemporaryFile() as log:
        job, result = Path(folder) / "job.json", Path(folder) / "result.json"
        job.write_text(json.dumps(work.job(engine, environment, model)))
        started_at = time.time()
        driver = subprocess.Popen(
            [str(environment.python), str(DRIVERS / engine.driver), str(job), str(result)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=os.environ | surroundings(engine, environment, work.cores, work.kv_gib),
            start_new_session=True,  # so that its children can be ended with it
        )
        try:
            _wait_for(result, driver, work.limit_s, log)
            peak = peak_tree_bytes(driver.pid)
            return outcome(engine, work, json.loads(result.read_text()), started_at, peak)
        finally:
            _stop(driver)


def outcome(
    engine: Engine, work: Work, result: dict[str, Any], started_at: float, peak_bytes: int | None
) -> tuple[Outcome, dict[str, str]]:
    """Raises PeerUnavailableError when it did not do what it was asked."""
    token_s, (single_s,) = result["token_s"], result["single_token_s"]
    for asked, times in zip((*work.requests, work.single), (*token_s, single_s), strict=True):
        if len(times) != asked.max_tokens:
            raise PeerUnavailableError(f"made {len(times)} tokens where it was asked for {asked.max_tokens}")
    more = {
        "ready_s": result["ready_at"] - started_at,
        "single_tokens_per_s": single_rate(single_s) if len(single_s) > 1 else None,
        "note": engine.note,
    }
    return Outcome.of(engine.name, work.requests, token_s, peak_bytes, **more), result["versions"]


def _wait_for(result: Path, driver: subprocess.Popen[bytes], limit_s: float, log: IO[bytes]) -> None:
    until = time.monotonic() + limit_s
    while not result.exists():
        if (code := driver.poll()) is not None:
            raise PeerUnavailableError(f"ended with exit code {code}: {_said(log)}")
        if time.monotonic() > until:
            raise PeerUnavailableError(f"was not done after {limit_s:g} s: {_said(log)}")
        time.sleep(_POLL_S)


def _said(log: IO[bytes]) -> str:
    log.seek(0)
    return last_error(log.read().decode(errors="replace"))


def _stop(driver: subprocess.Popen[bytes]) -> None:
    """Closing its standard input ends one that is done; what is left of its session after that is killed."""
    assert driver.stdin is not None
    driver.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        driver.wait(_STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()


def _as_pairs(requests: Sequence[Request]) -> list[tuple[list[int], int]]:
    return [(request.prompt_ids, request.max_tokens) for request in requests]
