"""The journal: what a core that dies leaves to the next one. Requests with a resume window, and their tokens, in files.

A token is written before it leaves the core process, all of a step in one write(2): after a kill -9 the files hold whatever a
client can have seen. A write that fails ends the journal there, until a new beginning can be written; meanwhile what is alive
goes on, and whoever wants a window is refused. Knows files and messages; no socket, no core. Reading is journal_files.py's.

The files are segments, written one after the other. A request's whole state stands in one record, its tokens since then in
those behind it; so the oldest segment can go as soon as the requests that begin in it are written once more, and all of them
together stay below a limit.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from scheduler.core import Output
from scheduler.journal_files import Batch, Gone, Kept, Key, beginning, packed, segment_path, segments
from wire import AddRequest, RestoreHeader, RestoreRequest, encode

log = logging.getLogger(__name__)

_SEGMENTS = 8  # that the limit is cut into
_FIRST_RETRY_S, _LONGEST_RETRY_S = 1.0, 60.0
_MOST_ALIVE = 2  # what requests begin with takes at most one part in so many of the limit; then no more are taken
_MS = 1_000_000
_SECOND = 1_000_000_000

_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC

Snapshot: TypeAlias = Callable[[Key], RestoreRequest | None]  # all that is known of a request now; None: it is forgotten


class Fsync:
    """When what was written is forced to the disk, which guards against loss of power only: never, at every write, or when so
    much time has passed since."""

    def __init__(self, policy: str) -> None:
        """Raises ValueError."""
        name, _, number = policy.partition(":")
        if not (policy in ("never", "always") or (name == "interval" and number.isdecimal() and int(number) > 0)):
            raise ValueError(f"--journal-fsync {policy}: write it as never, always or interval:MS, with whole milliseconds")
        self.interval_ns = {"never": -1, "always": 0}.get(name, int(number or 0) * _MS)

    @property
    def is_on(self) -> bool:
        return self.interval_ns >= 0


class Journal:
    """Appends. `failure`: why nothing can be written now; empty: all is well."""

    def __init__(
        self,
        folder: Path,
        model: str,
        *,
        fsync: Fsync,
        max_bytes: int,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """max_bytes: of all files together, as long as what is alive needs less than half of it. clock: nanoseconds, as the
        requests' times. Nothing is written before `begin`."""
        self.failure = "it is not open yet"
        self._folder, self._model = folder, model
        self._fsync, self._max_bytes, self._clock = fsync, max_bytes, clock
        self._segment_bytes = max_bytes // _SEGMENTS
        self._file = -1
        self._sizes: dict[int, int] = {}  # bytes by segment, oldest first; the last one is written to
        self._buffer = bytearray()
        self._first: dict[Key, tuple[int, int]] = {}  # request → (segment of its state, bytes of that)
        self._alive_bytes = 0  # of these
        self._per_frontend: dict[int, int] = {}  # requests that came from it
        self._unsynced_since = 0  # time of the first write since the last fsync; 0: none
        self._retry_ns, self._retry_s = 0, _FIRST_RETRY_S

    @property
    def num_bytes(self) -> int:
        return sum(self._sizes.values())

    @property
    def refusal(self) -> str:
        """Why no request with a window can be taken now; empty: it can."""
        if self.failure:
            return f"the journal can't be written ({self.failure})"
        if self._alive_bytes * _MOST_ALIVE > self._max_bytes:
            alive, most = self._alive_bytes >> 20, self._max_bytes >> 20
            return f"the journal is full: requests that may be resumed take {alive} of its {most} MiB"
        return ""

    # -------------------------------------------------------------------------------------------------------- what happens

    def begin(self, requests: Iterable[RestoreRequest], frontend: int) -> None:
        """A new beginning with these requests of a front end's, after which all that was there before is gone."""
        known = {(frontend, request.header.add.handle): request for request in requests}
        for key in known:
            self._note(key, 0)
        self._begin(known.get)

    def added(self, add: AddRequest, frontend: int) -> bool:
        """A request was accepted. Written at once; False: it can't be, and is not in the journal."""
        header = RestoreHeader(add.header, (None,) * add.header.num_outputs)
        key = (frontend, add.header.handle)
        num_tokens = np.zeros(add.header.num_outputs, np.int32)
        self._buffer += self._keep(key, RestoreRequest(header, prompt=add.prompt, num_tokens=num_tokens))
        if self._commit():
            return True
        self._drop(key)
        return False

    def tokens(self, outputs: Sequence[Output]) -> None:
        """What is about to leave: tokens and ends. A failure to write it is logged, and keeps nothing from leaving."""
        for output in outputs:
            if output.frontend in self._per_frontend and not self.failure:
                self._buffer += packed(Batch(output.frontend, tuple(encode(output.batch))))
        self._commit()

    def forget(self, key: Key) -> None:
        """A request can't be resumed any more. Written with what comes next."""
        if self._drop(key) and not self.failure:
            self._buffer += packed(Gone(*key))

    def tidy(self, snapshot: Snapshot) -> None:
        """Once all that is known of the requests was written: what the clock and the limits ask for, a little at a time."""
        if self.failure:
            if self._retry_ns and self._clock() >= self._retry_ns:
                self._begin(snapshot)
            return
        self._commit()
        if self._sizes[self._last] >= self._segment_bytes:
            self._next_segment()
        if self.num_bytes > self._max_bytes - self._segment_bytes and len(self._sizes) > 1:
            self._empty_oldest(snapshot)
        if self._unsynced_since and self._clock() >= self._unsynced_since + self._fsync.interval_ns:
            self._sync()

    def next_due_ns(self) -> int:
        """When `tidy` has something to do by the clock alone; 0: never."""
        if self.failure:
            return self._retry_ns
        return self._unsynced_since + self._fsync.interval_ns if self._unsynced_since else 0

    def close(self) -> None:
        """What was noted is written, as far as it can be. Nothing is noted any more."""
        if not self.failure and self._commit() and self._unsynced_since:
            self._sync()
        if self._file >= 0:
            os.close(self._file)
        self._file, self.failure, self._retry_ns = -1, "it is closed", 0

    # ------------------------------------------------------------------------------------------------------------- segments

    @property
    def _last(self) -> int:
        return next(reversed(self._sizes))

    def _begin(self, snapshot: Snapshot) -> None:
        """All requests once more, in a segment that makes those before it void; they go only when it is complete."""
        old, before = segments(self._folder), self._sizes
        number = max(old, default=0) + 1
        self._sizes, self._buffer = {number: 0}, bytearray(beginning(self._model, starts=True))
        for key in list(self._first):
            self._drop(key)
            if (request := snapshot(key)) is not None:
                self._buffer += self._keep(key, request)
        try:
            file = self._new_segment(number)
        except OSError as error:
            self._sizes = before
            self._fail(error)
            return
        if self._retry_ns:
            log.warning("the journal in %s can be written again", self._folder)
        if self._file >= 0:
            os.close(self._file)
        self._file, self._sizes[number], self.failure = file, len(self._buffer), ""
        self._buffer, self._unsynced_since, self._retry_ns, self._retry_s = bytearray(), 0, 0, _FIRST_RETRY_S
        for each in old:
            self._remove(each)

    def _new_segment(self, number: int) -> int:
        """With what was noted, on the disk. Returns its descriptor; raises OSError."""
        path = segment_path(self._folder, number)
        unfinished = path.with_suffix(".new")
        file = os.open(unfinished, _FLAGS, 0o600)
        try:
            _write(file, self._buffer)
            os.fdatasync(file)
            os.rename(unfinished, path)
            self._sync_folder()
        except OSError:
            os.close(file)
            unfinished.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise
        return file

    def _next_segment(self) -> None:
        number, content = self._last + 1, beginning(self._model, starts=False)
        try:
            if self._fsync.is_on:
                os.fdatasync(self._file)
            file = os.open(segment_path(self._folder, number), _FLAGS, 0o600)
        except OSError as error:
            self._fail(error)
            return
        os.close(self._file)
        self._file, self._sizes[number] = file, 0
        self._buffer += content
        self._commit()

    def _empty_oldest(self, snapshot: Snapshot) -> None:
        """Its requests are written once more, behind the newest, and it goes."""
        oldest = next(iter(self._sizes))
        for key in [key for key, (segment, _) in self._first.items() if segment == oldest]:
            request = snapshot(key)
            self._drop(key)
            if request is not None:
                self._buffer += self._keep(key, request)
        if not self._commit() or (self._fsync.is_on and not self._sync()):
            return
        self._remove(oldest)
        del self._sizes[oldest]

    # --------------------------------------------------------------------------------------------------------------- inside

    def _keep(self, key: Key, request: RestoreRequest) -> bytes:
        """Its record, which is to be written next."""
        record = packed(Kept(self._clock(), time.time_ns(), key[0], tuple(encode(request))))
        self._note(key, len(record))
        return record

    def _note(self, key: Key, num_bytes: int) -> None:
        self._first[key] = (self._last if self._sizes else 0, num_bytes)
        self._alive_bytes += num_bytes
        self._per_frontend[key[0]] = self._per_frontend.get(key[0], 0) + 1

    def _drop(self, key: Key) -> bool:
        """Whether it was there."""
        place = self._first.pop(key, None)
        if place is None:
            return False
        self._alive_bytes -= place[1]
        self._per_frontend[key[0]] -= 1
        if not self._per_frontend[key[0]]:
            del self._per_frontend[key[0]]
        return True

    def _commit(self) -> bool:
        """Writes what was noted. False: the journal has failed, now or before."""
        if self.failure:
            self._buffer.clear()
            return False
        if not self._buffer:
            return True
        last = self._last
        try:
            _write(self._file, self._buffer)
        except OSError as error:
            self._cut(self._sizes[last])
            self._fail(error)
            return False
        self._sizes[last] += len(self._buffer)
        self._buffer.clear()
        if self._fsync.is_on and not self._unsynced_since:
            self._unsynced_since = self._clock()
        return self._fsync.interval_ns != 0 or self._sync()

    def _remove(self, number: int) -> None:
        """Where it can't be, it is void all the same, or its requests stand once more behind it."""
        try:
            segment_path(self._folder, number).unlink(missing_ok=True)
        except OSError as error:
            log.warning("segment %d of the journal can't be removed: %s", number, error.strerror)

    def _cut(self, size: int) -> None:
        """Half a record must not stand before what may come."""
        try:
            os.ftruncate(self._file, size)
        except OSError as error:
            log.debug("the journal can't be cut to %d bytes: %s", size, error.strerror)

    def _sync(self) -> bool:
        try:
            os.fdatasync(self._file)
        except OSError as error:
            self._fail(error)
            return False
        self._unsynced_since = 0
        return True

    def _sync_folder(self) -> None:
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _fail(self, error: OSError) -> None:
        """What is in the files stays good; what comes now is not, until a new beginning is written."""
        if not self.failure or not self._retry_ns:
            words = "requests that want a resume window are refused, those alive go on without it"
            log.error("the journal in %s can't be written: %s; %s", self._folder, error.strerror, words)
        self.failure = error.strerror or str(error)
        self._buffer, self._unsynced_since = bytearray(), 0
        self._retry_ns = self._clock() + int(self._retry_s * _SECOND)
        self._retry_s = min(_LONGEST_RETRY_S, 2 * self._retry_s)


def _write(file: int, content: bytes | bytearray) -> None:
    """All of it; as a rule one write(2). Raises OSError."""
    written = os.write(file, content)
    while written < len(content):
        written += os.write(file, memoryview(content)[written:])
