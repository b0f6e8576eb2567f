"""Tells the server of requests that nobody wants any more though they outlive their streams, in a thread of its own. Knows the
public protos and grpc."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeAlias

import grpc

TELL_S = 2.0  # the server has so long to hear of it; after that its window ends the request

Tell: TypeAlias = Callable[[str], "grpc.Future[Any]"]


class Leaving:
    """tell: starts a Cancel. The thread ends with `close`, or when nobody holds this object any more."""

    def __init__(self, tell: Tell) -> None:
        self._request_ids: SimpleQueue[str | None] = SimpleQueue()
        self._thread = threading.Thread(target=_run, args=(self._request_ids, tell), daemon=True)
        self._thread.start()

    def tell(self, request_id: str) -> None:
        """At once. From a destructor too, which may run in the middle of anything: SimpleQueue.put is made for that, grpc is
        not."""
        self._request_ids.put(request_id)

    def close(self) -> None:
        """Waits until the server has heard of all of them, TELL_S at most."""
        self._request_ids.put(None)
        self._thread.join()

    def __del__(self) -> None:
        self._request_ids.put(None)


def _run(request_ids: SimpleQueue[str | None], tell: Tell) -> None:
    calls: list[grpc.Future[Any]] = []
    for request_id in iter(request_ids.get, None):
        calls = [call for call in calls if not call.done()]
        with contextlib.suppress(ValueError):  # the channel is closed: its server has no more to hear
            calls.append(tell(request_id))
    for call in calls:
        with contextlib.suppress(grpc.FutureCancelledError):
            call.exception()  # it was told, or it can't be: its window ends it
