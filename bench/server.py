"""`carousel serve` as a process of its own, for measurements: started, waited for, stopped."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from client import CarouselClient, CarouselError

_READY_S = 180.0
_STOP_S = 30.0
_POLL_S = 0.5
_KEPT_CHARACTERS = 2000


class ServerFailedError(Exception):
    """It ended by itself, or did not get ready; the text ends with what it said last."""


class Server:
    """Runs while it is entered, on a free port of loopback."""

    def __init__(self, options: Sequence[str]) -> None:
        self.port = _free_port()
        self.target = f"127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", "scheduler", *options, "--port", str(self.port)]

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT, process_group=0
        )
        try:
            self._wait_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    @property
    def pid(self) -> int:
        """Of the process whose descendants are all of the server."""
        return self._process.pid

    def _wait_ready(self) -> None:
        until = time.monotonic() + _READY_S
        with CarouselClient(self.target) as client:
            while time.monotonic() < until:
                with contextlib.suppress(CarouselError):
                    return client.wait_ready(_POLL_S)
                if self._process.poll() is not None:
                    raise ServerFailedError(f"the server ended with exit code {self._process.returncode}: {self._said()}")
        raise ServerFailedError(f"the server was not ready after {_READY_S:g} s: {self._said()}")

    def _said(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-_KEPT_CHARACTERS:]

    def _stop(self) -> None:
        """SIGTERM, and waits; what does not end is killed."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
