"""The worker's pulse: a thread with a connection of its own that tells the core, while a step computes, that the process lives.

A long step is no hang. On a CPU the two are told apart by processor time: a step that computes uses some, one that waits for a
lock, a dead thread or a device uses none; how long that has lasted travels with each beat, and the core decides. A process that
is stopped, or whose interpreter is held by a call that never returns, sends no beat at all. Knows no tensors and no plans.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

import zmq

from wire import Heartbeat, encode

INTERVAL_MS = 250
_LEAST_NS = 1_000_000  # processor time between two beats below which a step does not move; polling sockets takes less


class Stall:
    """For how long the step under way has used no processor time. Pure: the clocks' readings are arguments."""

    def __init__(self) -> None:
        self._step = 0
        self._busy_ns = 0
        self._since_ns = 0

    def observe(self, step: int, busy_ns: int, now_ns: int) -> int:
        """Nanoseconds. step: another number for each step, 0 between them. busy_ns: processor time of the process so far."""
        if not step or step != self._step or busy_ns - self._busy_ns >= _LEAST_NS:
            self._since_ns = now_ns
        self._step, self._busy_ns = step, busy_ns
        return now_ns - self._since_ns


class Heartbeats:
    """`start()` … `stop()`. step: as Stall.observe wants it, from any thread."""

    def __init__(
        self, connect: Callable[[], zmq.Socket[bytes]], link_id: str, step: Callable[[], int], tells_stalls: bool
    ) -> None:
        """connect: makes the connection, in the thread that uses it. tells_stalls: steps use this process's processor time."""
        self._connect, self._link_id, self._step, self._tells_stalls = connect, link_id, step, tells_stalls
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        socket, stall = self._connect(), Stall()
        try:
            while not self._stopped.wait(INTERVAL_MS / 1000):
                others_ns = time.process_time_ns() - time.thread_time_ns()
                stalled_ns = stall.observe(self._step(), others_ns, time.monotonic_ns()) if self._tells_stalls else 0
                with contextlib.suppress(zmq.Again):  # the core is away: nobody counts the beats
                    socket.send_multipart(encode(Heartbeat(self._link_id, stalled_ns // 1_000_000)), zmq.NOBLOCK)
        finally:
            socket.close(linger=0)
