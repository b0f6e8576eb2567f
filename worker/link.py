"""The worker's end of the wire: hello, plans in, results out. Knows sockets and an Executor; no tensors, no torch.

One thread owns the socket and sleeps in a poll until there is something to do. An executor that answers from a thread of its
own leaves its answers in a deque and wakes the poll through an in-process socket; one that answers at once needs neither.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence

import zmq

from wire import Probe, StepFailed, StepPlan, Welcome, WireError, WorkerHello, decode, encode
from worker.executor import Answer, Executor

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
        self._left_here: deque[Answer | None] = deque()  # by other threads; None: stop
        self._bell, self._bell_button = self._context.socket(zmq.PAIR), self._context.socket(zmq.PAIR)
        self._bell.bind("inproc://bell")
        self._bell_button.connect("inproc://bell")
        self._bell_lock = threading.Lock()  # guards _bell_button
        self._core.connect(address)

    def run(self) -> None:
        """Serves plans. A new connection to the core, the first or after the core came back, begins with a hello."""
        self._thread = threading.get_ident()
        poller = zmq.Poller()
        for socket in (self._connections, self._bell, self._core):
            poller.register(socket, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._connections in ready:
                self._connections.recv_multipart()
                self._core.send_multipart(encode(WorkerHello(self._group, self._executor.facts)))
            if self._bell in ready:
                self._bell.recv()
                answer = self._left_here.popleft()
                if answer is None:
                    return
                self._answer(answer)
            if self._core in ready:
                self._receive(self._core.recv_multipart())

    def stop(self) -> None:
        """Makes run() return once the step at hand is done. From any thread."""
        self._leave(None)

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

    def _deliver(self, answer: Answer) -> None:
        if threading.get_ident() == self._thread:
            self._answer(answer)
        else:
            self._leave(answer)

    def _leave(self, answer: Answer | None) -> None:
        self._left_here.append(answer)
        with self._bell_lock:
            self._bell_button.send(b"")

    def _answer(self, answer: Answer) -> None:
        epoch = answer.epoch if isinstance(answer, StepFailed) else answer.header.epoch
        if epoch != self._epoch:
            return
        self._core.send_multipart(encode(answer))
        if isinstance(answer, StepFailed):
            self._epoch = None
