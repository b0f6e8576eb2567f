"""Ctrl-C and its like, noticed at moments of the demo's own choosing.

Not as exceptions: one in the middle of grpc's own work leaves a channel that never closes, and the demo would hang.
"""

from __future__ import annotations

import signal


class Interrupted(Exception):
    """The demo was told to end, by this signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Interrupts:
    """The signals that came. `check` where it is safe to stop; more than one: the user is in a hurry."""

    def __init__(self) -> None:
        self._came: list[int] = []

    def install(self) -> None:
        """From now on SIGINT, SIGTERM and SIGHUP are only noted."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: self._came.append(number))

    def check(self) -> None:
        """Raises Interrupted if a signal has come."""
        if self._came:
            raise Interrupted(self._came[0])

    @property
    def in_a_hurry(self) -> bool:
        return len(self._came) > 1
