"""The worker's end of the wire: hello, plans in, results out. Knows sockets and an Executor; no tensors, no torch.

One thread owns the socket and sleeps in a poll until there is something to do. An executor that answers from a thread of its
own hands its answers over through an in-process socket; one that answers at once sends them here and now.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import zmq

from wire import Message, Probe, StepFailed, StepPlan, StepResult, Welcome, WireError, WorkerHello, decode, encode
from worker.executor import Executor

log = logging.getLogger(__name__)


class Link:
    """`run()` serves until `stop()`. The state is one number: the epoch whose plans are computed, None between a failed step
    (or the start) and the next Welcome."""

    def __init__(self, address: str, group: int, executor: Executor) -> None:
        self._group, self._executor = group, executor
        self._epoch: int | None = None
        self._thread = threading.get_ident()
        self._context = zmq.Context()
        self._core = self._context.socket(zmq.DEALER)
        self._core.setsockopt(zmq.LINGER, 0)
        self._core.setsockopt(zmq.SNDHWM, 0)  # what waits here is at most one answer per plan
        self._connections = self._core.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._handover_out = self._context.socket(zmq.PAIR)
        self._handover_in = self._context.socket(zmq.PAIR)
        self._handover_in.bind("inproc://handover")
        self._handover_out.connect("inproc://handover")
        self._handover_lock = threading.Lock()  # guards _handover_out
        self._core.connect(address)

    def run(self) -> None:
        """Serves plans. A new connection to the core, the first or after the core came back, begins with a hello."""
        self._thread = threading.get_ident()
        poller = zmq.Poller()
        for socket in (self._connections, self._handover_in, self._core):
            poller.register(socket, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._connections in ready:
                self._connections.recv_multipart()
                self._core.send_multipart(encode(WorkerHello(self._group, self._executor.facts)))
            if self._handover_in in ready:
                frames = self._handover_in.recv_multipart()
                if frames == [b""]:
                    return
                self._answer(decode(frames))
            if self._core in ready:
                self._receive(self._core.recv_multipart())

    def stop(self) -> None:
        """Makes run() return once the step at hand is done. From any thread."""
        with self._handover_lock:
            self._handover_out.send_multipart([b""])

    def close(self) -> None:
        """After run() has returned and the executor is closed."""
        self._core.disable_monitor()
        self._context.destroy(linger=0)

    def _receive(self, frames: Sequence[bytes]) -> None:
        try:
            message = decode(frames)
        except WireError as error:
            log.warning("dropped a message that is none of ours: %s", error)
            return
        match message:
            case Welcome() if message.group == self._group:
                self._executor.reset()
                self._epoch = message.epoch
                log.debug("epoch %d", message.epoch)
            case StepPlan() if (message.header.group, message.header.epoch) == (self._group, self._epoch):
                self._executor.submit(message, self._deliver)
            case Probe():
                pass
            case StepPlan():
                log.debug("dropped a plan of epoch %d, this is %s", message.header.epoch, self._epoch)
            case _:
                log.warning("dropped a %s that a worker has no use for", type(message).__name__)

    def _deliver(self, answer: StepResult | StepFailed) -> None:
        if threading.get_ident() == self._thread:
            self._answer(answer)
        else:
            with self._handover_lock:
                self._handover_out.send_multipart(encode(answer))

    def _answer(self, answer: Message) -> None:
        assert isinstance(answer, StepResult | StepFailed)
        epoch = answer.header.epoch if isinstance(answer, StepResult) else answer.epoch
        if epoch != self._epoch:
            return
        self._core.send_multipart(encode(answer))
        if isinstance(answer, StepFailed):
            self._epoch = None
