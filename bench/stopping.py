"""Ctrl-C as a question: whoever measures asks now and then, and keeps what it has. Knows signals only."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Self


class Stop:
    """Ctrl-C sets `pressed` once; the second Ctrl-C is Python's own."""

    def __init__(self) -> None:
        self.pressed = False

    def __enter__(self) -> Self:
        self._before = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
