"""`carousel serve` whose processes are killed: started, looked at, killed in parts or as a whole, started again, stopped.

Its log is read for what must never stand in it. Knows processes, signals and the log; nothing of requests.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench import processes
from bench.processes import CORE, FRONTEND, WORKER, Process
from client import CarouselClient, CarouselError
from client.server import safe_environment

_LIFELINE_FD = "CAROUSEL_LIFELINE_FD"  # the supervisor's word for it, too: the server ends with us
_NO_REQUEST_LOG = "CAROUSEL_NO_REQUEST_LOG"
_READY_S = 180.0
_GONE_S = 10.0  # what a killed server's other processes get to end
_STOP_S = 60.0
_POLL_S = 0.02
_BAD_WORDS = ("violated", "Traceback", "out of step", "the core failed", "leaked")


class ServerError(Exception):
    """It does not start, does not come back, or leaves processes behind."""


class KillableServer:
    """options: of `carousel serve`. expected: how many processes of each role it has when it is whole."""

    def __init__(self, options: Sequence[str], expected: Mapping[str, int], folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.target = f"127.0.0.1:{self.port}"
        self._expected, self._log = dict(expected), folder / "server.log"
        self._command = [sys.executable, "-m", "client", "serve", "--port", str(self.port), *options]
        self._temporary = folder / "tmp"  # of its processes: what is left there was left behind
        self._temporary.mkdir(parents=True)
        self._read = 0  # bytes of the log
        self._seen: set[Process] = set()
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline = -1

    # -------------------------------------------------------------------------------------------------------------- life

    def start(self) -> None:
        """Returns once it serves. Raises ServerError."""
        theirs, self._lifeline = os.pipe()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=safe_environment() | {_LIFELINE_FD: str(theirs), _NO_REQUEST_LOG: "1", "TMPDIR": str(self._temporary)},
                pass_fds=(theirs,),
                process_group=0,  # Ctrl-C is for whoever kills it
            )
        os.close(theirs)
        with CarouselClient(self.target) as client:
            until = time.monotonic() + _READY_S
            while time.monotonic() < until and self._process.poll() is None:
                with contextlib.suppress(CarouselError):
                    client.wait_ready(1.0)
                    return
        raise ServerError(f"the server does not serve; it said last: {self.log()[-2000:]}")

    def kill_all(self) -> None:
        """SIGKILL for the supervisor: the others end with it. Raises ServerError when one does not."""
        assert self._process is not None
        alive = self.members()
        self._process.kill()
        self._process.wait()
        self._close_lifeline()
        if not wait_until(lambda: not _left(alive), _GONE_S):
            raise ServerError(f"processes outlived their supervisor: {_left(alive)}")

    def stop(self) -> int:
        """SIGTERM; the exit code. Raises ServerError when it does not end, or leaves a process of all that it ever had."""
        if self._process is None or self._process.poll() is not None:
            code = -1 if self._process is None else self._process.returncode
        else:
            self.members()
            self._process.send_signal(signal.SIGTERM)
            try:
                code = self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                raise ServerError(f"the server did not stop within {_STOP_S:g} s") from None
            finally:
                self._close_lifeline()
        if left := _left(self._seen):
            raise ServerError(f"processes are left: {left}")
        return code

    def __enter__(self) -> KillableServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """However it came to that, nothing goes on."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_S)
            self._process.kill()
            self._process.wait()
        self._close_lifeline()

    def _close_lifeline(self) -> None:
        if self._lifeline >= 0:
            os.close(self._lifeline)
        self._lifeline = -1

    # --------------------------------------------------------------------------------------------------------- processes

    def members(self) -> list[Process]:
        assert self._process is not None
        found = processes.members(self._process.pid)
        self._seen.update(found)
        return found

    def of_role(self, role: str) -> list[Process]:
        return [process for process in self.members() if process.role == role]

    def is_whole(self) -> bool:
        """As many processes as it should have; of a stopped one nobody knows yet."""
        found = self.members()
        return all(sum(process.role == role for process in found) == count for role, count in self._expected.items())

    # --------------------------------------------------------------------------------------------------------------- log

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def complaints(self) -> list[str]:
        """Lines since the last call that must never be there."""
        with self._log.open("rb") as log:
            log.seek(self._read)
            news = log.read()
        news = news[: news.rfind(b"\n") + 1]
        self._read += len(news)
        return [line for line in news.decode(errors="replace").splitlines() if any(word in line for word in _BAD_WORDS)]

    def left_behind(self) -> list[str]:
        """Files and folders in the folder for temporary ones."""
        return sorted(path.name for path in self._temporary.iterdir())


def serving(frontends: int, standbys: int) -> dict[str, int]:
    """Processes of a whole server."""
    return {CORE: 1, FRONTEND: frontends, WORKER: 1 + standbys}


def keep_logs(folder: Path) -> list[Path]:
    """Copies of all servers' logs below a folder that is about to go."""
    kept = Path(tempfile.mkdtemp(prefix="carousel-logs-"))
    return [Path(shutil.copy(log, kept / f"{number}.log")) for number, log in enumerate(sorted(folder.rglob("server.log")))]


def _left(of: Sequence[Process] | set[Process]) -> list[Process]:
    return [process for process in of if processes.began(process.pid) == process.began]


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """False: not in time."""
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(_POLL_S)
    return True
