"""The core process by itself, with hand-driven peers: a front end and a worker that speak the wire over real sockets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq

from scheduler.config import EngineConfig
from scheduler.core import CoreConfig
from wire import (
    AddHeader,
    AddRequest,
    Heartbeat,
    Message,
    Probe,
    SamplingSpec,
    StepFailed,
    StepPlan,
    StepResult,
    Welcome,
    WorkerHello,
    encode,
)
from wire import decode as decode_frames
from worker.sim_executor import SimExecutor

PATIENCE_MS = 20_000
GREEDY = SamplingSpec(0.0, 0, 1.0, 0.0, 0)


class EngineProcess:
    """`python -m scheduler engine …` on sockets in a folder of its own, where it also leaves what it dumps."""

    def __init__(
        self,
        core: CoreConfig | None = None,
        drain_timeout_s: float = 10.0,
        record: Path | None = None,
        sabotage: str = "",
        **options: Any,
    ) -> None:
        """sabotage: Python that the process runs first, to break something in itself. options: of EngineConfig; with
        `control=True` the process reads what is written to `self.control`."""
        self._folder = tempfile.TemporaryDirectory(prefix="carousel-test-")
        self.frontends = f"ipc://{self._folder.name}/core"
        self.workers = f"ipc://{self._folder.name}/workers"
        status, writer = os.pipe()
        control, self.control = os.pipe()
        options.setdefault("worker_endpoint", self.workers)
        self.workers = options["worker_endpoint"]
        if options.pop("control", False):
            options["control_fd"] = control
        config = EngineConfig(
            core=core or CoreConfig(),
            frontend_endpoint=self.frontends,
            status_fd=writer,
            drain_timeout_s=drain_timeout_s,
            log_level="info",
            record=str(record or ""),
            dump_folder=self._folder.name,
            **options,
        )
        self.log_path = Path(self._folder.name) / "log"
        program = ["-m", "scheduler"]
        if sabotage:
            program = ["-c", f"{sabotage}\nimport runpy\nrunpy.run_module('scheduler', run_name='__main__', alter_sys=True)"]
        with self.log_path.open("wb") as log:
            command = [sys.executable, *program, "engine", msgspec.json.encode(config).decode()]
            self.process = subprocess.Popen(command, pass_fds=(writer, control), stderr=log)
        os.close(writer)
        os.close(control)
        self.status = status
        self.context = zmq.Context()

    def log(self) -> str:
        return self.log_path.read_text()

    def dumps(self) -> list[Path]:
        """What it wrote of its last minutes."""
        return sorted(Path(self._folder.name).glob("*.rec"))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.status)
        os.close(self.control)
        self.context.destroy(linger=0)
        self._folder.cleanup()

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


class Dealer:
    """One peer of the engine."""

    def __init__(self, engine: EngineProcess, endpoint: str) -> None:
        self.socket = engine.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(endpoint)

    def send(self, message: Message) -> None:
        self.socket.send_multipart(encode(message))

    def receive(self, timeout_ms: int = PATIENCE_MS) -> Message | None:
        """The next message that is not a probe; None when nothing comes."""
        until = time.monotonic() + timeout_ms / 1000
        while (left := until - time.monotonic()) > 0 and self.socket.poll(max(1, int(left * 1000))):
            message = decode_frames(self.socket.recv_multipart())
            if not isinstance(message, Probe):
                return message
        return None

    def until(self, wanted: Callable[[Message], bool]) -> list[Message]:
        """Receives until `wanted` is true of a message; returns all of them."""
        messages: list[Message] = []
        while True:
            message = self.receive()
            assert message is not None, f"nothing more came after {messages[-3:]}"
            messages.append(message)
            if wanted(message):
                return messages

    def close(self) -> None:
        self.socket.close()


class HandWorker(Dealer):
    """A simulated worker that computes a step when it is told to."""

    def __init__(
        self, engine: EngineProcess, executor: SimExecutor, *, link_id: str = "", replaces: bool = False, waits: bool = True
    ) -> None:
        """link_id: it has heartbeats, sent by hand. waits: for its welcome, which comes later to one who stands by."""
        super().__init__(engine, engine.workers)
        self.executor, self.link_id = executor, link_id
        self.send(WorkerHello(0, executor.facts, link_id, 50 if link_id else 0, replaces))
        if waits:
            self._welcome(self.receive())

    def beat(self, stalled_ms: int = 0) -> None:
        self.send(Heartbeat(self.link_id, stalled_ms))

    def _welcome(self, message: Message | None) -> None:
        assert isinstance(message, Welcome), message
        self.group, self.epoch = message.group, message.epoch
        self.executor.reset()

    def step(self, timeout_ms: int = PATIENCE_MS) -> StepPlan | None:
        """Computes the next plan; None when none comes."""
        message = self.receive(timeout_ms)
        if message is None:
            return None
        if isinstance(message, Welcome):
            self._welcome(message)
            return self.step(timeout_ms)
        assert isinstance(message, StepPlan), message
        self.executor.submit(message, self._deliver)
        return message

    def fail(self, why: str) -> None:
        """Answers the next plan with StepFailed, and takes no other before the next Welcome, as a worker does."""
        plan = self.receive()
        assert isinstance(plan, StepPlan), plan
        self.send(StepFailed(self.group, self.epoch, plan.header.step_id, why))
        self.welcome()

    def welcome(self) -> None:
        """Waits for the next epoch."""
        self._welcome(self.until(lambda message: isinstance(message, Welcome))[-1])

    def _deliver(self, result: StepResult | StepFailed) -> None:
        assert isinstance(result, StepResult), result
        self.send(result)


def request(handle: int, prompt: list[int], max_tokens: int, sampling: SamplingSpec = GREEDY) -> AddRequest:
    header = AddHeader(handle, f"request-{handle}", time.monotonic_ns(), 2, max_tokens, sampling)
    return AddRequest(header, np.array(prompt, np.int32))
