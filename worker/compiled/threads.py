"""Work of one operation divided among threads: whoever is free takes the next part, so that a processor that somebody else uses
delays one part and not all. (OpenMP gives each thread its half beforehand, and all wait for the one that was not let run.)

The parts must release the interpreter's lock for most of their time. Threads sleep between operations.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch


class _Operation:
    def __init__(self, compute: Callable[[Any], None], parts: Sequence[Any]) -> None:
        self._compute, self._parts = compute, parts
        self._next = count()  # its increment is one step of the interpreter
        self._left = threading.Semaphore(0)
        self.error: BaseException | None = None

    def help(self) -> None:
        """Computes parts until none is left to begin."""
        for at in self._next:
            if at >= len(self._parts):
                return
            try:
                self._compute(self._parts[at])
            except BaseException as error:
                self.error = error
            finally:
                self._left.release()

    def wait(self) -> None:
        """Until all parts are done."""
        for _ in self._parts:
            self._left.acquire()


_waiting: queue.SimpleQueue[_Operation] = queue.SimpleQueue()
_helpers: list[threading.Thread] = []


def share(compute: Callable[[Any], None], parts: Sequence[Any]) -> None:
    """compute(part) for all parts, on as many threads as torch has."""
    helpers = min(torch.get_num_threads(), len(parts)) - 1
    if helpers < 1:
        for part in parts:
            compute(part)
        return
    while len(_helpers) < helpers:
        _helpers.append(threading.Thread(target=_help, name="attention", daemon=True))
        _helpers[-1].start()
    operation = _Operation(compute, parts)
    for _ in range(helpers):
        _waiting.put(operation)
    operation.help()
    operation.wait()
    if operation.error is not None:
        raise operation.error


def _help() -> None:
    while True:
        _waiting.get().help()
