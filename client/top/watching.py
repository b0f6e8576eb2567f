"""Asks a server about itself from two threads, so seldom that it costs at most a hundredth of its work. Knows the client only.

What an answer costs the server depends on its batch and its pool. So each question is asked again only after many times the
time that its answer took, and steps are looked at a few in a row, with pauses, once they have many rows.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from carousel.v1 import inspect_pb2
from client.api import CarouselClient
from client.errors import CarouselError
from client.streams import Stream
from client.top.seen import Seen, Snapshot

_PATIENCE = 100  # times what the answer took, at least, until it is asked for again
_MOST_PAUSE_S = 10.0
_PAGE = 100  # requests that are listed
_BATCH_S = 2.0  # not more often: it costs more than all other answers
ROWS_PER_S = 60  # of steps that are looked at, in the long run: about 30 µs of processor time each, in all processes together
_LEAST_STEPS = 2  # in a row: the time between two is that between two tokens
_RETRY_S = 1.0
_GIVE_UP_S = 30.0  # of a server that does not come back
_JOIN_S = 2.0


class Sampling:
    """How many steps are looked at. Times are arguments."""

    def __init__(self, rows_per_s: int = ROWS_PER_S) -> None:
        self._rows_per_s = rows_per_s
        self._owed = 0.0  # rows that were looked at beyond what the time allows
        self._at_s = 0.0
        self._steps = 0  # in a row

    def begin(self, now_s: float) -> None:
        self._steps, self._at_s = 0, now_s

    def pause_s(self, num_rows: int, now_s: float) -> float:
        """A step was seen. 0: look at the next one too; else look away for so long."""
        self._owed = max(0.0, self._owed - (now_s - self._at_s) * self._rows_per_s) + num_rows
        self._at_s = now_s
        self._steps += 1
        if self._steps < _LEAST_STEPS or self._owed <= self._rows_per_s:
            return 0.0
        return self._owed / self._rows_per_s


@dataclass
class _Question:
    """Something that is asked for time and again."""

    ask: Callable[[], None]
    every_s: float
    due_s: float = 0.0

    def answer(self) -> None:
        began_s = time.monotonic()
        self.ask()
        ended_s = time.monotonic()
        self.due_s = ended_s + pause_after(ended_s - began_s, self.every_s)


def pause_after(took_s: float, every_s: float) -> float:
    return max(every_s, min(_MOST_PAUSE_S, _PATIENCE * took_s))


class Watcher:
    """Watches while it is entered. `failure`: why it has given up."""

    def __init__(self, client: CarouselClient, every_s: float, group: int = 0) -> None:
        """Asks who is there. group: of workers, whose rows and blocks are looked at. Raises CarouselError."""
        self.failure: CarouselError | None = None
        self._client, self._every_s = client, every_s
        self._seen = Seen(client.target, client.server_info(), group=group)
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._stream: Stream[inspect_pb2.WatchStepsResponse] | None = None
        self._questions = [
            _Question(self._ask_model, 10.0),
            _Question(self._ask_batch, max(_BATCH_S, every_s)),
            _Question(self._ask_load, every_s),
        ]
        for question in self._questions:
            with contextlib.suppress(_NoModelError):
                question.answer()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._poll, self._look_at_steps)]

    def __enter__(self) -> Watcher:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        stream = self._stream
        if stream is not None:
            stream.close()
        for thread in self._threads:
            thread.join(_JOIN_S)

    def snapshot(self) -> Snapshot:
        with self._lock:
            return self._seen.snapshot()

    # ----------------------------------------------------------------------------------------------------- questions

    def _poll(self) -> None:
        """In one thread. A server that is gone may come back, with other limits."""
        lost_s = 0.0
        while not self._over.wait(max(0.01, min(question.due_s for question in self._questions) - time.monotonic())):
            try:
                if lost_s:
                    self._ask_server()
                for question in self._questions:
                    if question.due_s <= time.monotonic():
                        with contextlib.suppress(_NoModelError):
                            question.answer()
                lost_s = 0.0
                self._say("")
            except CarouselError as error:
                lost_s = lost_s or time.monotonic()
                if time.monotonic() - lost_s > _GIVE_UP_S or self._over.is_set():
                    self.failure = error
                    return
                self._say(f"no answer for {time.monotonic() - lost_s:.0f} s from {self._client.target}: trying again")
                self._over.wait(_RETRY_S)

    def _say(self, trouble: str) -> None:
        with self._lock:
            self._seen.trouble = trouble

    def _ask_server(self) -> None:
        server = self._client.server_info()
        with self._lock:
            self._seen = Seen(self._client.target, server, self._seen.model, self._seen.group)
        for question in self._questions:
            question.due_s = 0.0

    def _ask_model(self) -> None:
        try:
            model = self._client.model_info()
        except CarouselError as error:
            raise _NoModelError from error
        with self._lock:
            self._seen.model = model

    def _ask_load(self) -> None:
        load = self._client.load()
        with self._lock:
            self._seen.take_load(load, time.monotonic())

    def _ask_batch(self) -> None:
        """One right after the other: they are shown as one."""
        requests = self._client.list_requests(_PAGE)
        tables = self._client.block_tables(self._seen.group)
        with self._lock:
            self._seen.take_requests(requests)
            self._seen.take_tables(tables)
            firsts = self._seen.firsts()
        for request_id, tenant in firsts:
            with contextlib.suppress(_ForgottenError):
                self._explain(request_id, tenant)

    def _explain(self, request_id: str, tenant: str) -> None:
        try:
            told = self._client.explain(request_id, tenant or None)
        except CarouselError as error:
            if error.code is grpc.StatusCode.NOT_FOUND:
                raise _ForgottenError from None
            raise
        with self._lock:
            self._seen.take_first(told)

    # --------------------------------------------------------------------------------------------------------- steps

    def _look_at_steps(self) -> None:
        """In another thread."""
        sampling = Sampling()
        while not self._over.is_set():
            pause_s = _RETRY_S
            with contextlib.suppress(CarouselError):  # the questions find out, and say so
                pause_s = self._look(sampling)
            self._over.wait(pause_s)

    def _look(self, sampling: Sampling) -> float:
        """At some steps; how long to look away then. Raises CarouselError."""
        with self._client.watch_steps() as stream:
            self._stream = stream
            if self._over.is_set():
                return 0.0
            sampling.begin(time.monotonic())
            for step in stream:
                with self._lock:
                    self._seen.take_step(step)
                pause_s = sampling.pause_s(len(step.rows), time.monotonic())
                if pause_s:
                    return pause_s
        return _RETRY_S


class _NoModelError(Exception):
    """No worker has loaded a model yet; all else can be told all the same."""


class _ForgottenError(Exception):
    """The request ended too long ago."""
