"""The worker's end of the wire: hello, plans in, results out. Knows sockets and an Executor; no tensors, no torch.

One thread owns the socket and sleeps in a poll until there is something to do. An executor that answers from a thread of its
own leaves its answers in a deque and wakes the poll through an in-process socket; one that answers at once needs neither.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections import deque
from collections.abc import Sequence

import zmq

from wire import Probe, Retired, StepFailed, StepPlan, Welcome, WireError, WorkerHello, decode, encode
from worker.curve import Keys
from worker.executor import Answer, Executor
from worker.heartbeat import INTERVAL_MS, Heartbeats

log = logging.getLogger(__name__)

_MOST_BYTES = 1 << 30  # of one frame: the starts of a plan, at their largest


class Link:
    """`run()` serves until `stop()`, or until the core wants it no more. The state is one number: the epoch whose plans are
    computed, None between a failed step (or the start) and the next Welcome; epochs are counted by each group."""

    def __init__(
        self, address: str, group: int, executor: Executor, *, keys: Keys | None = None, replaces: bool = False
    ) -> None:
        """group: that it would like to compute for; the core says which one it does. replaces: it comes to take the place of
        the worker that is there."""
        self._address, self._group, self._executor, self._keys, self._replaces = address, group, executor, keys, replaces
        self._epoch: int | None = None
        self._link_id = uuid.uuid4().hex
        self._step, self._num_steps = 0, 0  # number of the step under way, 0 between them; steps so far
        self._thread = threading.get_ident()
        self._context = zmq.Context()
        self._core = self._socket()
        self._core.setsockopt(zmq.SNDHWM, 0)  # what waits here is at most one answer per plan
        self._connections = self._core.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._left_here: deque[Answer | None] = deque()  # by other threads; None: stop
        self._bell, self._bell_button = self._context.socket(zmq.PAIR), self._context.socket(zmq.PAIR)
        self._bell.bind("inproc://bell")
        self._bell_button.connect("inproc://bell")
        self._bell_lock = threading.Lock()  # guards _bell_button
        on_cpu = executor.facts.device == "cpu"  # a GPU computes, and the simulated one sleeps, without using a processor
        self._heartbeats = Heartbeats(self._connected, self._link_id, lambda: self._step, tells_stalls=on_cpu)
        self._core.connect(address)
        self._heartbeats.start()

    def _socket(self) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, _MOST_BYTES)
        if self._keys is not None:
            self._keys.set(socket)
        return socket

    def _connected(self) -> zmq.Socket[bytes]:
        socket = self._socket()
        socket.setsockopt(zmq.SNDHWM, 4)  # old beats are of no use
        socket.connect(self._address)
        return socket

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
                hello = WorkerHello(self._group, self._executor.facts, self._link_id, INTERVAL_MS, self._replaces)
                self._core.send_multipart(encode(hello))
            if self._bell in ready:
                self._bell.recv()
                answer = self._left_here.popleft()
                if answer is None:
                    return
                self._answer(answer)
            if self._core in ready and not self._receive(self._core.recv_multipart()):
                return

    def stop(self) -> None:
        """Makes run() return once the step at hand is done. From any thread."""
        self._leave(None)

    def close(self) -> None:
        """After run() has returned and the executor is closed."""
        self._heartbeats.stop()
        self._core.disable_monitor()
        self._context.destroy(linger=0)

    def _receive(self, frames: Sequence[bytes]) -> bool:
        """False: this worker is wanted no more."""
        try:
            message = decode(frames)
        except WireError as error:
            log.warning("dropped a message that is none of ours: %s", error)
            return True
        match message:
            case Welcome():
                self._executor.reset()
                self._group, self._epoch, self._replaces = message.group, message.epoch, False
                log.debug("group %d, epoch %d", message.group, message.epoch)
            case StepPlan() if (message.header.group, message.header.epoch) == (self._group, self._epoch):
                self._num_steps += 1
                self._step = self._num_steps
                self._executor.submit(message, self._deliver)
                self._step = 0
            case Retired(reason=reason):
                log.info("retired: %s", reason)
                return False
            case Probe():
                pass
            case StepPlan():
                log.debug("dropped a plan of epoch %d, this is %s", message.header.epoch, self._epoch)
            case _:
                log.warning("dropped a %s that a worker has no use for", type(message).__name__)
        return True

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
        header = answer if isinstance(answer, StepFailed) else answer.header
        if (header.group, header.epoch) != (self._group, self._epoch):
            return
        self._core.send_multipart(encode(answer))
        if isinstance(answer, StepFailed):
            self._epoch = None
