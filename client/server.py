"""A server of one's own: `python -m scheduler` as a child process on a free port of loopback, started, waited for, ended.

It ends with its owner, however that ends. Knows processes and the health check; nothing of requests. Ctrl-C reaches only the
owner (the server is in a process group of its own), and never in the middle of a call.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import IO, Any, Self

from client.api import CarouselClient
from client.errors import CarouselError

_LIFELINE_FD = "CAROUSEL_LIFELINE_FD"  # the supervisor's word for it, too
_NO_REQUEST_LOG = "CAROUSEL_NO_REQUEST_LOG"  # nobody reads the log but for what went wrong
_POLL_S = 0.1
_CALL_S = 0.5
_TELL_EVERY_S = 10.0
_STOP_S = 15.0
_KEPT_BYTES = 8000
_KEPT_LINES = 12
_LOGGED = re.compile(r"\d\d:\d\d:\d\d ")  # a line of the log; what is wrong at the start is said without


class ServerFailedError(Exception):
    """The server ended by itself, or did not get ready; the text is its own words."""


def server_options(options: Mapping[str, Any]) -> list[str]:
    """Keyword arguments as options of the command line: max_batch_rows=4 is --max-batch-rows 4, True a flag alone, a list the
    option several times, None nothing."""
    arguments: list[str] = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            arguments.append(flag)
        elif value is not None and value is not False:
            for each in value if isinstance(value, (tuple, list)) else (value,):
                arguments += [flag, str(each)]
    return arguments


def safe_environment() -> dict[str, str]:
    """For a `python -m` of ours: a folder or file named scheduler, worker, … where the user happens to stand is not ours."""
    return os.environ | {"PYTHONSAFEPATH": "1"}


class OwnServer:
    """options: of `carousel serve`. ready_s: most seconds until it serves; None: as long as it takes, a model may have to be
    downloaded. tell: gets a line now and then while it is waited for. module: what `python -m` runs. It runs from `start` to
    `stop`, or while it is entered."""

    def __init__(
        self,
        options: Sequence[str],
        *,
        ready_s: float | None = None,
        tell: Callable[[str], None] | None = None,
        module: str = "scheduler",
    ) -> None:
        self.port = _free_port()
        self.target = f"127.0.0.1:{self.port}"
        # Who stops it has no more questions: requests that run are not waited for, unless the options say so.
        self._command = [sys.executable, "-m", module, "--drain-timeout", "0", *options, "--port", str(self.port)]
        self._ready_s = ready_s
        self._tell = tell or (lambda text: None)

    def start(self) -> None:
        """Returns once it serves. Raises ServerFailedError."""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 -- _end closes it
        theirs, ours = os.pipe()  # at its end once this process is gone: then the server ends itself
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                env=safe_environment() | {_LIFELINE_FD: str(theirs), _NO_REQUEST_LOG: "1"},
                pass_fds=(theirs,),
                process_group=0,
            )
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        # Also when this object is dropped, and at the interpreter's end.
        self._end = weakref.finalize(self, _end, self._process, ours, self._log, os.getpid())
        try:
            self._wait_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """SIGTERM, and waits; what does not end is killed. May be called again."""
        self._end()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Of the process whose descendants are all of the server."""
        return self._process.pid

    def check(self) -> None:
        """Raises ServerFailedError when it has ended by itself."""
        if self._end.alive and self._process.poll() is not None:
            raise ServerFailedError(self._reason())

    def _wait_ready(self) -> None:
        # The calls are a thread's: KeyboardInterrupt in the middle of grpc's own work leaves a channel that never closes.
        ready = threading.Event()
        threading.Thread(target=_watch, args=(self.target, self._process, ready), daemon=True).start()
        started_s = time.monotonic()
        tell_at_s = started_s + _TELL_EVERY_S
        while not ready.wait(_POLL_S):
            self.check()
            now_s = time.monotonic()
            if self._ready_s is not None and now_s - started_s > self._ready_s:
                raise ServerFailedError(f"the server was not ready after {self._ready_s:g} s: {self._said()}")
            if now_s >= tell_at_s:
                tell_at_s += _TELL_EVERY_S
                last = _LOGGED.sub("", (self._lines() or ["nothing yet"])[-1])
                self._tell(f"the server is not ready after {now_s - started_s:.0f} s; it said last: {last}")
        self.check()

    def _reason(self) -> str:
        code = self._process.returncode
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"the server {how}: {self._said()}"

    def _said(self) -> str:
        """What is wrong, as far as it has said."""
        lines = self._lines()
        plain = [line.removeprefix("carousel: ") for line in lines if not _LOGGED.match(line)]
        errors = [line for line in lines if " ERROR " in line]
        return "\n".join((plain or errors or lines or ["it said nothing"])[-_KEPT_LINES:])

    def _lines(self) -> list[str]:
        size = os.fstat(self._log.fileno()).st_size
        # pread: the server writes at the file's own offset
        kept = os.pread(self._log.fileno(), _KEPT_BYTES, max(0, size - _KEPT_BYTES))
        return [line.rstrip() for line in kept.decode(errors="replace").splitlines() if line.strip()]


def _end(process: subprocess.Popen[bytes], lifeline: int, log: IO[bytes], owner: int) -> None:
    if os.getpid() != owner:  # a fork of the owner ends; the server is not its
        return
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_S)
    finally:  # in time, or interrupted once more
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(lifeline)
        log.close()


def _watch(target: str, process: subprocess.Popen[bytes], ready: threading.Event) -> None:
    with CarouselClient(target) as client:
        while process.poll() is None:
            with contextlib.suppress(CarouselError):
                client.wait_ready(_CALL_S)
                ready.set()
                return


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
