"""A front end as the supervisor starts it: `python -m scheduler frontend …`, in a process of its own, on a free port."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import msgspec
from grpc_health.v1 import health_pb2, health_pb2_grpc

from carousel.v1 import control_pb2, control_pb2_grpc, generation_pb2_grpc, inspect_pb2_grpc, tokenization_pb2_grpc
from scheduler.frontend.config import FrontendConfig
from scheduler.supervisor import ReservedPort

PATIENCE_S = 20.0
_OPTIONS = [("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", 64 << 20)]


class Frontend:
    """A running front end and one connection to it."""

    def __init__(
        self,
        model_dir: Path,
        core_endpoint: str,
        port: int | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        **options: Any,
    ) -> None:
        """port: one that another front end listens on already. credentials: of the connection, where TLS is on."""
        self._reserved = ReservedPort("127.0.0.1", 0) if port is None else None
        port = self._reserved.port if self._reserved is not None else port
        assert port is not None
        self.target = f"127.0.0.1:{port}"
        self._log = tempfile.NamedTemporaryFile("w+", prefix="carousel-frontend-", suffix=".log")  # noqa: SIM115
        config = FrontendConfig(
            core_endpoint=core_endpoint,
            host="127.0.0.1",
            port=port,
            model_dir=str(model_dir),
            served_model_name="tiny",
            **options,
        )
        command = [sys.executable, "-m", "scheduler", "frontend", msgspec.json.encode(config).decode()]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT)
        if credentials is None:
            self.channel = grpc.insecure_channel(self.target, _OPTIONS)
        else:
            self.channel = grpc.secure_channel(self.target, credentials, _OPTIONS)
        self.generation = generation_pb2_grpc.GenerationStub(self.channel)
        self.tokenization = tokenization_pb2_grpc.TokenizationStub(self.channel)
        self.control = control_pb2_grpc.ControlStub(self.channel)
        self.inspect = inspect_pb2_grpc.InspectStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)

    def log(self) -> str:
        return Path(self._log.name).read_text()

    def wait_listening(self) -> None:
        try:
            grpc.channel_ready_future(self.channel).result(PATIENCE_S)
        except grpc.FutureTimeoutError:
            raise AssertionError(f"the front end does not listen:\n{self.log()}") from None

    def wait_health(self, wanted: int, service: str = "") -> None:
        """Until health says so."""
        request = health_pb2.HealthCheckRequest(service=service)
        for answer in self.health.Watch(request, timeout=PATIENCE_S, wait_for_ready=True):
            if answer.status == wanted:
                return

    def wait_serving(self) -> None:
        self.wait_health(health_pb2.HealthCheckResponse.SERVING)

    def hear_core(self) -> None:
        """Returns once the front end has heard all that its core had said: the core's answer comes after it."""
        self.control.GetLoad(control_pb2.GetLoadRequest(), timeout=PATIENCE_S)

    def terminate(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)

    def close(self) -> None:
        self.channel.close()
        self.process.kill()
        self.process.wait()
        if self._reserved is not None:
            self._reserved.close()
        self._log.close()


@contextlib.contextmanager
def running(model_dir: Path, core_endpoint: str, **options: Any) -> Iterator[Frontend]:
    """A front end that listens."""
    frontend = Frontend(model_dir, core_endpoint, **options)
    try:
        frontend.wait_listening()
        yield frontend
    finally:
        frontend.close()
