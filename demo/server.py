"""A server that the demo starts as a user would, and stops again. Knows processes and the client's health check only."""

from __future__ import annotations

import collections
import contextlib
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from client import CarouselClient, CarouselError
from demo.interrupts import Interrupts

CAROUSEL = (str(Path(sys.executable).parent / "carousel"),)
READY_S = 120.0  # a cold start reads torch from disk
_STOP_S = 15.0
_POLL_S = 0.5
_KEPT_LINES = 15


class ServerFailedError(Exception):
    """The server ended by itself or did not get ready; what it said has been told."""


class DemoServer:
    """`carousel serve` on a free port of loopback, running while it is entered. tell: gets what it says until it is ready.

    Waiting for it ends with Interrupted when `interrupts` has a signal; a second one while it stops kills it.
    """

    def __init__(
        self, options: Sequence[str], tell: Callable[[str], None], interrupts: Interrupts, command: Sequence[str] = CAROUSEL
    ) -> None:
        self.port = _free_port()
        self.target = f"127.0.0.1:{self.port}"
        arguments = ["serve", *options, "--port", str(self.port)]
        self.shown = shlex.join(["carousel", *arguments])
        self._interrupts = interrupts
        self._command = [*command, *arguments]
        self._tell: Callable[[str], None] | None = tell
        self._lines: collections.deque[str] = collections.deque(maxlen=_KEPT_LINES)

    def __enter__(self) -> Self:
        # A process group of its own: Ctrl-C reaches the demo, which then ends the server in order.
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self._wait_ready()
        except BaseException:
            self.stop()
            raise
        self._tell = None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _wait_ready(self) -> None:
        with CarouselClient(self.target) as client:
            for _ in range(int(READY_S / _POLL_S)):
                self._interrupts.check()
                with contextlib.suppress(CarouselError):
                    return client.wait_ready(_POLL_S)
                if self._process.poll() is not None:
                    self._reader.join(_POLL_S)
                    code = self._process.returncode
                    raise ServerFailedError(f"the server ended with exit code {code} before it was ready, see above")
        raise ServerFailedError(f"the server was not ready after {READY_S:g} s, see above")

    def last_lines(self) -> list[str]:
        return list(self._lines)

    def stop(self) -> None:
        """SIGTERM, and waits; a server that does not end is killed. Its children end with it."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        until = time.monotonic() + _STOP_S
        while self._is_running() and time.monotonic() < until and not self._interrupts.in_a_hurry:
            pass
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
            raise ServerFailedError("the server did not stop in time and was killed")
        self._reader.join(_POLL_S)

    def _is_running(self) -> bool:
        """Whether it still runs after a moment."""
        try:
            self._process.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            return True
        return False

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for raw in output:
                line = raw.decode(errors="replace").rstrip()
                self._lines.append(line)
                if (tell := self._tell) is not None:
                    tell(line)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
