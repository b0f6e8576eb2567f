"""A whole server as a user starts it: `carousel serve` in a process of its own, on a free port of the loopback."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from carousel.v1 import control_pb2, control_pb2_grpc

CAROUSEL = str(Path(sys.executable).parent / "carousel")
START_TIMEOUT_S = 90
STOP_TIMEOUT_S = 45


class Server:
    """A running server; `target` is its address."""

    def __init__(self, *options: str, environment: dict[str, str] | None = None) -> None:
        self._log = tempfile.NamedTemporaryFile("w+", prefix="carousel-server-", suffix=".log")  # noqa: SIM115
        command = [CAROUSEL, "serve", "--port", "0", *options]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=os.environ | (environment or {}),
        )
        self.target = ""

    def log(self) -> str:
        return Path(self._log.name).read_text()

    def wait_ready(self) -> None:
        until = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < until and self.process.poll() is None:
            found = re.search(r"is served on (\S+:\d+)", self.log())
            if found and self._is_serving(found[1]):
                self.target = found[1]
                return
            time.sleep(0.05)
        raise AssertionError(f"the server does not serve:\n{self.log()}")

    def load(self) -> control_pb2.GetLoadResponse:
        with grpc.insecure_channel(self.target) as channel:
            return control_pb2_grpc.ControlStub(channel).GetLoad(control_pb2.GetLoadRequest(), timeout=10)

    def children(self) -> dict[str, list[int]]:
        """Process ids by role: engine, frontend, worker."""
        roles: dict[str, list[int]] = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with contextlib.suppress(OSError, IndexError, StopIteration):
                    words = (folder / "cmdline").read_bytes().decode().split("\0")
                    parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                    if parent == self.process.pid and "-m" in words:
                        role = words[3] if words[2] == "scheduler" else words[2]
                        roles.setdefault(role, []).append(int(folder.name))
        return roles

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the server does not stop:\n{self.log()}") from None

    @staticmethod
    def _is_serving(target: str) -> bool:
        with grpc.insecure_channel(target) as channel, contextlib.suppress(grpc.RpcError):
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2)
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
        return False


@contextlib.contextmanager
def running(*options: str, environment: dict[str, str] | None = None) -> Iterator[Server]:
    """A server that is ready, stopped at the end."""
    server = Server(*options, environment=environment)
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


def is_alive(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def eventually(condition: object, timeout_s: float = 20.0) -> bool:
    """Waits until condition() is true; False when it is not in time."""
    assert callable(condition)
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.02)
    return bool(condition())


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
