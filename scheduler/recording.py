"""The flight recorder's file: what the core was told, when, and what it planned. Bytes only; it knows neither core nor clock.

Nine bytes tell the kind of file and the version of its format; one zlib stream of records follows. A record is its length, the
CRC-32 of its content and the content, in msgpack: first the header, then events, last an event END. What stands before any
byte can be read without what follows it, so that a cut or damaged file is good up to there.
"""

from __future__ import annotations

import enum
import os
import zlib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import BinaryIO

import msgspec

from scheduler.core import CoreConfig
from scheduler.framing import FRAME, MOST_RECORD_BYTES, framed
from wire import (
    WIRE_VERSION,
    AbortRequest,
    AddRequest,
    CancelQuery,
    Credit,
    Message,
    MovedRequest,
    RestoreRequest,
    SetPolicyQuery,
    StepPlan,
    StepResult,
    TruncateRequest,
    WireError,
    WorkerHello,
    decode,
    encode,
)

MAGIC = b"CAROUREC"
FORMAT_VERSION = 1
_FLUSH_BYTES = 1 << 16  # of records, not compressed yet: what a killed process leaves unwritten
_FLUSH_NS = 1_000_000_000  # likewise, in the recording's own time
_LEVEL = 1  # 6 times smaller for 17 µs a step of 256 rows; level 6 gains 12 % more for 80 µs
_READ_BYTES = 1 << 16


class Verb(enum.StrEnum):
    """The core's inputs, and three marks."""

    ADD = "add"
    RESTORE = "restore"
    GIVE = "give"  # to another core …
    TAKE = "take"  # … and from one
    ABORT = "abort"
    CANCEL = "cancel"
    TRUNCATE = "truncate"
    CREDIT = "credit"
    FRONTEND_LOST = "frontend_lost"
    WORKER_JOINED = "worker_joined"
    WORKER_LOST = "worker_lost"
    SET_POLICY = "set_policy"
    DROP_ALL = "drop_all"
    DRAIN = "drain"
    PLAN = "plan"
    APPLY = "apply"
    FAILED = "failed"  # the verb before raised what it must never raise; text: what
    RENEWED = "renewed"  # a new core took the place of one that can't be trusted any more
    END = "end"  # the recorder stopped by itself; text: why, if it was not the end of the service


# The message that comes with a verb. A plan() that gave no plan has none.
_MESSAGES: dict[Verb, type] = {
    Verb.ADD: AddRequest,
    Verb.RESTORE: RestoreRequest,
    Verb.GIVE: AbortRequest,  # as its handle is all that is to be said
    Verb.TAKE: MovedRequest,
    Verb.ABORT: AbortRequest,
    Verb.CANCEL: CancelQuery,
    Verb.TRUNCATE: TruncateRequest,
    Verb.CREDIT: Credit,
    Verb.WORKER_JOINED: WorkerHello,
    Verb.SET_POLICY: SetPolicyQuery,
    Verb.PLAN: StepPlan,
    Verb.APPLY: StepResult,
}


class Event(msgspec.Struct):
    """One call of one of the core's verbs, or a mark."""

    verb: Verb
    now: int = 0  # the call's time argument; 0 where there is none
    frontend: int = -1
    text: str = ""
    message: Message | None = None
    frames: tuple[bytes, ...] = ()  # the message's bytes, of an event that was read


class RecordingHeader(msgspec.Struct, kw_only=True, frozen=True):
    """What is said once."""

    wire_version: int = WIRE_VERSION
    carousel_version: str
    date: str  # ISO 8601, UTC
    core: CoreConfig
    first_event: int = 0  # events before the first one here that are gone; it can be replayed only if there are none
    why: str = ""  # it was written: empty for --record


class RecordingError(Exception):
    """A file that is no recording, of another version, cut off or damaged; the text says where."""


class _Record(msgspec.Struct, array_like=True):
    verb: Verb
    now: int
    frontend: int
    text: str
    frames: tuple[bytes, ...]


_encoder = msgspec.msgpack.Encoder()
_record_decoder = msgspec.msgpack.Decoder(_Record)
_header_decoder = msgspec.msgpack.Decoder(RecordingHeader)


def pack(event: Event) -> bytes:
    frames = tuple(encode(event.message)) if event.message is not None else ()
    return framed(_encoder.encode(_Record(event.verb, event.now, event.frontend, event.text, frames)))


class RecordingWriter:
    """Appends events to a file. Buffered: what was not flushed is lost when the process is killed."""

    def __init__(self, file: BinaryIO, header: RecordingHeader) -> None:
        self._file = file
        self._stream = zlib.compressobj(_LEVEL)
        self._buffer = bytearray(MAGIC + bytes([FORMAT_VERSION]))
        self._written = 0
        self._unflushed = 0  # bytes of records since the last flush
        self._flush_at_ns = 0
        self._append(framed(_encoder.encode(header)))
        self.flush()

    @property
    def most_bytes(self) -> int:
        """The file with all that was written to it is not longer than this."""
        return self._written + len(self._buffer) + self._unflushed

    def write(self, record: bytes, now: int) -> None:
        """record: of `pack`."""
        if not self._unflushed:
            self._flush_at_ns = now + _FLUSH_NS
        self._append(record)
        if self._unflushed >= _FLUSH_BYTES or now >= self._flush_at_ns:
            self.flush()

    def _append(self, record: bytes) -> None:
        self._buffer += self._stream.compress(record)
        self._unflushed += len(record)

    def flush(self, mode: int = zlib.Z_SYNC_FLUSH) -> None:
        """Raises OSError when the disk is full or gone."""
        self._buffer += self._stream.flush(mode)
        self._file.write(self._buffer)
        self._file.flush()
        self._written += len(self._buffer)
        self._buffer, self._unflushed = bytearray(), 0

    def close(self, why: str = "") -> None:
        self._append(pack(Event(Verb.END, text=why)))
        self.flush(zlib.Z_FINISH)
        self._file.close()


class Recording:
    """A file that was opened. Raises RecordingError unless its beginning is that of a recording of this version."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._size = os.stat(path).st_size
            with path.open("rb") as file:
                start = file.read(len(MAGIC) + 1)
        except OSError as error:
            raise RecordingError(f"{path}: {error.strerror}") from None
        if start[: len(MAGIC)] != MAGIC[: len(start)] or not start:
            raise RecordingError(f"{path} is not a recording of Carousel")
        if len(start) > len(MAGIC) and start[-1] != FORMAT_VERSION:
            raise RecordingError(f"{path} is of format {start[-1]}, this program reads format {FORMAT_VERSION}")
        self.end = ""  # why the recorder stopped before the service did; known when all events were read
        self.header = self._header(next(self._contents(), b""))

    def events(self) -> Iterator[Event]:
        """All events but END, in order. Raises RecordingError after the last good one when something is wrong behind it."""
        contents = self._contents()
        next(contents)
        for content in contents:
            event = _unpack(content)
            if event.verb is Verb.END:
                self.end = event.text
            else:
                yield event

    def _header(self, content: bytes) -> RecordingHeader:
        try:
            plain = msgspec.msgpack.decode(content)
            version = plain["wire_version"]
            unknown = set(plain["core"]) - {field.name for field in fields(CoreConfig)}
        except (msgspec.MsgspecError, KeyError, TypeError) as error:
            raise RecordingError(f"{self._path}: its header makes no sense ({error!r})") from None
        if version != WIRE_VERSION:
            raise RecordingError(f"{self._path} holds messages of version {version}, this program reads version {WIRE_VERSION}")
        if unknown:
            words = f"options of another version of Carousel ({plain.get('carousel_version')}): {', '.join(sorted(unknown))}"
            raise RecordingError(f"{self._path} has {words}")
        try:
            return _header_decoder.decode(content)
        except msgspec.MsgspecError as error:
            raise RecordingError(f"{self._path}: its header makes no sense ({error})") from None

    def _contents(self) -> Iterator[bytes]:
        """The contents of the records, END's the last."""
        stream, records = zlib.decompressobj(), _Records()
        with self._path.open("rb") as file:
            file.seek(len(MAGIC) + 1)
            while block := file.read(_READ_BYTES):
                before, records_before = stream.copy(), records.copy()
                try:
                    contents = list(records.take(stream.decompress(block)))
                except (zlib.error, _DamagedError):
                    yield from self._as_far_as_good(before, records_before, block, file.tell() - len(block))
                yield from contents
                if stream.eof:
                    break
            if not stream.eof:
                raise RecordingError(f"the recording is cut off at byte {self._size}: its writer was killed, or still writes")
            if (rest := len(stream.unused_data) + len(file.read())) != 0:
                raise RecordingError(f"the recording ends at byte {self._size - rest}, and {rest} bytes follow")

    def _as_far_as_good(self, stream: zlib._Decompress, records: _Records, block: bytes, start: int) -> Iterator[bytes]:
        """Byte by byte up to the damage in this block."""
        good = start
        for at in range(len(block)):
            try:
                contents = list(records.take(stream.decompress(block[at : at + 1])))
            except (zlib.error, _DamagedError):
                words = f"the recording is damaged: it is good up to byte {good}, and makes no sense at byte {start + at}"
                raise RecordingError(words) from None
            if contents:
                good = start + at + 1
                yield from contents
        raise AssertionError("the damage is gone")


class _DamagedError(Exception):
    """A record's checksum differs."""


class _Records:
    """Cuts a stream of bytes into the records' contents."""

    def __init__(self, rest: bytes = b"") -> None:
        self._rest = rest  # begins with a record's frame

    def copy(self) -> _Records:
        return _Records(self._rest)

    def take(self, data: bytes) -> Iterator[bytes]:
        data, at = self._rest + data, 0
        while at + FRAME.size <= len(data):
            length, checksum = FRAME.unpack_from(data, at)
            if length > MOST_RECORD_BYTES:
                raise _DamagedError
            end = at + FRAME.size + length
            if end > len(data):
                break
            content = data[at + FRAME.size : end]
            if zlib.crc32(content) != checksum:
                raise _DamagedError
            yield content
            at = end
        self._rest = data[at:]


def _unpack(content: bytes) -> Event:
    """Raises RecordingError for what no recorder of this version has written."""
    try:
        record = _record_decoder.decode(content)
        message = decode(record.frames) if record.frames else None
    except (msgspec.MsgspecError, WireError) as error:
        raise RecordingError(f"the recording holds an event that makes no sense: {error}") from None
    wanted = _MESSAGES.get(record.verb)
    may_lack = wanted is None or record.verb is Verb.PLAN
    if not (message is None and may_lack) and not (wanted is not None and isinstance(message, wanted)):
        raise RecordingError(f"the recording holds {record.verb.value!r} with {type(message).__name__}")
    return Event(record.verb, record.now, record.frontend, record.text, message, record.frames)
