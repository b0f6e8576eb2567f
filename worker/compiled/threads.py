"""Work of one operation divided among threads: whoever is free takes the next part, so that a processor that somebody else uses
delays one part and not all. (OpenMP gives each thread its half beforehand, and all wait for the one that was not let run.)

The parts must release the interpreter's lock for most of their time. Threads sleep between operations.
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch

log = logging.getLogger(__name__)


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


_waiting: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
_helpers: list[threading.Thread] = []


def share(compute: Callable[[Any], None], parts: Sequence[Any]) -> None:
    """compute(part) for all parts, on as many threads as torch has."""
    helpers = min(torch.get_num_threads(), len(parts)) - 1
    if helpers < 1:
        for part in parts:
            compute(part)
        return
    operation = _Operation(compute, parts)
    _call(operation.help, helpers)
    operation.help()
    operation.wait()
    if operation.error is not None:
        raise operation.error


def together(prepare: Callable[[], Callable[[], None]]) -> None:
    """prepare()() here, and on as many other threads as torch has. They may begin late, or when all is done; nobody waits for
    them to begin or to end. So what is prepared must know what is left to do, and must not fail: preparing may."""
    compute = prepare()
    _call(lambda: prepare()(), torch.get_num_threads() - 1)
    compute()


def _call(compute: Callable[[], None], helpers: int) -> None:
    while len(_helpers) < helpers:
        _helpers.append(threading.Thread(target=_help, name="helper", daemon=True))
        _helpers[-1].start()
    for _ in range(helpers):
        _waiting.put(compute)


def _help() -> None:
    while (compute := _waiting.get()) is not None:
        try:
            compute()
        except Exception:
            log.exception("a helping thread")


@atexit.register
def _dismiss() -> None:
    """A thread that comes back from compiled code to an interpreter that has ended would end the process with SIGABRT."""
    for _ in _helpers:
        _waiting.put(None)
    for helper in _helpers:
        helper.join()
