"""The journal's files: their records, and reading them after a core has died. Bytes and messages; no socket, no core.

Nine bytes tell the kind of file and the version of its format; records follow (framing.py): the header, then requests, tokens
and those that are gone, in msgpack. A segment whose header says that it `starts` makes all before it void. A last record that
is not all there was being written when the process died, and nothing of it was ever sent.
"""

from __future__ import annotations

import fcntl
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TypeAlias

import msgspec
import numpy as np

from scheduler.errors import StartError
from scheduler.framing import FRAME, MOST_RECORD_BYTES, framed
from wire import WIRE_VERSION, AddHeader, OutputEnded, RestoreHeader, RestoreRequest, TokenBatch, WireError, decode
from wire.messages import I32, U32

MAGIC = b"CAROUJNL"
FORMAT_VERSION = 1
_SUFFIX = ".journal"
_MOST_UNTOLD = 1 << 20  # tokens
_FIRST = len(MAGIC) + 1  # where the first record begins
_HEADER_BYTES = 1 << 16  # a header is shorter

Key: TypeAlias = tuple[int, int]  # number of a front end, handle of a request's first output


class JournalError(StartError):
    """A journal that can't be used: of another version or model, in use, open to others."""


class JournalHeader(msgspec.Struct, kw_only=True, frozen=True):
    """The first record of a segment."""

    wire_version: int = WIRE_VERSION
    carousel_version: str
    date: str  # ISO 8601, UTC
    model: str
    starts: bool  # what stands in the segments before it is void


class Kept(msgspec.Struct, array_like=True, tag="kept"):
    """All that is known of a request."""

    now: int  # CLOCK_MONOTONIC nanoseconds, for the times in it …
    wall: int  # … and the same moment since 1970, as the machine may start anew
    frontend: int
    frames: tuple[bytes, ...]  # a RestoreRequest


class Batch(msgspec.Struct, array_like=True, tag="batch"):
    """Tokens and ends, of all requests of one front end, those that are not in the journal too."""

    frontend: int
    frames: tuple[bytes, ...]  # a TokenBatch


class Gone(msgspec.Struct, array_like=True, tag="gone"):
    """A request that nobody can resume any more."""

    frontend: int
    handle: int


Record: TypeAlias = Kept | Batch | Gone

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Record] = msgspec.msgpack.Decoder(Record)
_header_decoder = msgspec.msgpack.Decoder(JournalHeader)


def packed(record: Record) -> bytes:
    return framed(_encoder.encode(record))


def beginning(model: str, starts: bool) -> bytes:
    """Of a segment."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    header = JournalHeader(carousel_version=version("carousel-serve"), date=date, model=model, starts=starts)
    return MAGIC + bytes([FORMAT_VERSION]) + framed(_encoder.encode(header))


def segment_path(folder: Path, number: int) -> Path:
    return folder / f"{number:010}{_SUFFIX}"


def segments(folder: Path) -> list[int]:
    """Their numbers, oldest first."""
    return sorted(int(path.stem) for path in folder.glob(f"*{_SUFFIX}") if path.stem.isdecimal())


# ----------------------------------------------------------------------------------------------------------- the folder


def claim(folder: Path, model: str) -> int:
    """Makes the folder if there is none, and holds it for this process as long as the returned descriptor is open. Raises
    JournalError: open to others, in use, or of another version or model."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_mode & 0o077:
            raise JournalError(f"--journal {folder} is open to others, and prompts stand in it: chmod 700 {folder}")
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise JournalError(f"--journal {folder}: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for number in segments(folder):
            _header_of(segment_path(folder, number), model)
    except BlockingIOError:
        os.close(lock)
        raise JournalError(f"--journal {folder} is in use by another server") from None
    except OSError as error:
        os.close(lock)
        raise JournalError(f"--journal {folder}: {error.strerror}") from None
    except JournalError:
        os.close(lock)
        raise
    return lock


def _header_of(path: Path, model: str) -> JournalHeader | None:
    """None: it is cut off or damaged. Raises JournalError, OSError."""
    with path.open("rb") as file:
        start = file.read(_HEADER_BYTES)
    if len(start) < _FIRST or start[: len(MAGIC)] != MAGIC:
        return None
    what_now = "start the version that wrote it, or remove it, and with it the requests in it"
    if start[len(MAGIC)] != FORMAT_VERSION:
        raise JournalError(f"{path} is of format {start[len(MAGIC)]}, this program writes {FORMAT_VERSION}: {what_now}")
    try:
        header = _header_decoder.decode(next(_records(start, _FIRST), (0, b""))[1])
    except (_BrokenError, msgspec.MsgspecError):
        return None
    if header.wire_version != WIRE_VERSION:
        words = f"holds messages of version {header.wire_version}, this program speaks version {WIRE_VERSION}"
        raise JournalError(f"{path} {words}: {what_now}")
    if header.model != model:
        words = f"is of requests to the model {header.model}, this server has {model}"
        raise JournalError(f"{path} {words}: serve that one, or take another --journal folder")
    return header


# --------------------------------------------------------------------------------------------------------------- reading


@dataclass(slots=True)
class Found:
    """What a journal holds. notes: what was wrong with it, in lines; damaged: it was more than a last record cut off."""

    requests: list[RestoreRequest] = field(default_factory=list)  # by arrival, handles from 1
    notes: list[str] = field(default_factory=list)
    damaged: bool = False


class _BrokenError(Exception):
    """What stands at this byte is no record. is_cut: it may be the beginning of one."""

    def __init__(self, at: int, is_cut: bool) -> None:
        super().__init__(at, is_cut)
        self.at, self.is_cut = at, is_cut


def read(folder: Path, model: str, now: int, wall: int) -> Found:
    """All requests that may be resumed, as far as the files are good. now, wall: this moment by both clocks, for the times in
    the requests. Raises JournalError."""
    try:
        return _read(folder, model, now, wall)
    except OSError as error:
        raise JournalError(f"the journal in {folder} can't be read: {error.strerror}") from None


def _read(folder: Path, model: str, now: int, wall: int) -> Found:
    found, state, numbers = Found(), _State(now, wall), segments(folder)
    headers = {number: _header_of(segment_path(folder, number), model) for number in numbers}
    first = max((number for number, header in headers.items() if header is not None and header.starts), default=0)
    numbers = [number for number in numbers if number >= first]
    for i, number in enumerate(numbers):
        path, is_last = segment_path(folder, number), i == len(numbers) - 1
        data = path.read_bytes()
        try:
            if i and number != numbers[i - 1] + 1:
                raise _BrokenError(0, is_cut=False)
            _read_segment(data, state)
        except _BrokenError as broken:
            if broken.is_cut and is_last:
                dropped = len(data) - broken.at
                found.notes.append(f"{path}: its last record is cut off at byte {broken.at}, its {dropped} bytes are dropped")
            else:
                left = f"{len(data) - broken.at} bytes and {len(numbers) - 1 - i} later files are not"
                found.notes.append(f"{path} is damaged at byte {broken.at}: what stands before it is used, {left}")
                found.damaged = True
            break
    found.requests = state.requests()
    return found


def _read_segment(data: bytes, state: _State) -> None:
    """Raises _BrokenError, after all that is good."""
    if len(data) < _FIRST or data[: len(MAGIC)] != MAGIC:
        raise _BrokenError(0, is_cut=not any(data) or (MAGIC + data[-1:]).startswith(data))
    records = _records(data, _FIRST)
    if next(records, None) is None:
        raise _BrokenError(_FIRST, is_cut=True)
    for place, content in records:
        try:
            state.take(_decoder.decode(content))
        except (msgspec.MsgspecError, WireError, _SenselessError):
            raise _BrokenError(place, is_cut=False) from None


def _records(data: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    """(place, content) of each. Raises _BrokenError."""
    while at < len(data):
        rest = len(data) - at
        if rest < FRAME.size:
            raise _BrokenError(at, is_cut=True)
        length, checksum = FRAME.unpack_from(data, at)
        if not 0 < length <= MOST_RECORD_BYTES:
            raise _BrokenError(at, is_cut=not any(data[at:]))  # zeros: a file that grew before its content came
        end = at + FRAME.size + length
        content = data[at + FRAME.size : end]
        if len(content) < length or zlib.crc32(content) != checksum:
            raise _BrokenError(at, is_cut=end >= len(data))
        yield at, content
        at = end


class _SenselessError(Exception):
    """A record that contradicts those before it."""


@dataclass(slots=True)
class _Request:
    add: AddHeader
    prompt: I32
    tokens: list[list[I32]]  # of each output, in parts
    ends: list[OutputEnded | None]


@dataclass(slots=True)
class _Untold:
    """Tokens of one front end that are not with their requests yet: sorted many at a time they cost a tenth."""

    handles: list[U32] = field(default_factory=list)
    tokens: list[I32] = field(default_factory=list)
    count: int = 0


class _State:
    """What the records so far come to."""

    def __init__(self, now: int, wall: int) -> None:
        self._boot = wall - now  # when the clock of the requests' times was 0
        self._requests: dict[Key, _Request] = {}
        self._outputs: dict[Key, tuple[_Request, int]] = {}  # (request, output) by each handle
        self._untold: dict[int, _Untold] = {}  # by front end

    def take(self, record: Record) -> None:
        """Raises WireError, _SenselessError."""
        match record:
            case Kept(frontend=frontend, frames=frames):
                message = decode(frames)
                if not isinstance(message, RestoreRequest):
                    raise _SenselessError
                self._keep(frontend, message, record.wall - record.now - self._boot)
            case Batch(frontend=frontend, frames=frames):
                message = decode(frames)
                if not isinstance(message, TokenBatch) or len(message.handles) != len(message.tokens):
                    raise _SenselessError
                self._tokens(frontend, message)
            case Gone(frontend=frontend, handle=handle):
                self._drop((frontend, handle))

    def requests(self) -> list[RestoreRequest]:
        for frontend in list(self._untold):
            self._tell(frontend)
        handle, made = 1, []
        for request in sorted(self._requests.values(), key=lambda request: request.add.arrival_ns):
            made.append(_message(request, handle))
            handle += len(request.tokens)
        return made

    def _keep(self, frontend: int, message: RestoreRequest, shift_ns: int) -> None:
        """shift_ns: from the times in it to those of now."""
        header = message.header
        if not len(message.num_tokens) == len(header.ended) == header.add.num_outputs > 0:
            raise _SenselessError
        if message.num_tokens.min() < 0 or message.num_tokens.sum() != len(message.tokens):
            raise _SenselessError
        add = header.add
        key, is_new = (frontend, add.handle), not len(message.tokens) and not any(header.ended)
        if key in self._requests or not is_new:
            self._tell(frontend)  # what came before is in it
        deadline_ns = add.deadline_ns + shift_ns if add.deadline_ns else 0
        add = msgspec.structs.replace(add, arrival_ns=add.arrival_ns + shift_ns, deadline_ns=deadline_ns)
        parts = np.split(message.tokens, np.cumsum(message.num_tokens)[:-1])
        self._drop(key)
        request = _Request(add, message.prompt, [[part] for part in parts], list(header.ended))
        self._requests[key] = request
        for index in range(add.num_outputs):
            self._outputs[frontend, add.handle + index] = (request, index)

    def _tokens(self, frontend: int, batch: TokenBatch) -> None:
        untold = self._untold.setdefault(frontend, _Untold())
        untold.handles.append(batch.handles)
        untold.tokens.append(batch.tokens)
        untold.count += len(batch.tokens)
        for end in batch.header.ended:
            whose = self._outputs.get((frontend, end.handle))
            if whose is not None:
                whose[0].ends[whose[1]] = end
        if untold.count > _MOST_UNTOLD:
            self._tell(frontend)

    def _tell(self, frontend: int) -> None:
        """Each output its tokens. Those of requests that are not here are left out."""
        untold = self._untold.pop(frontend, None)
        if untold is None or not untold.count:
            return
        handles, tokens = np.concatenate(untold.handles), np.concatenate(untold.tokens)
        order = np.argsort(handles, kind="stable")
        handles, tokens = handles[order], tokens[order]
        first = np.flatnonzero(np.diff(handles, prepend=~handles[:1]))
        for handle, part in zip(handles[first].tolist(), np.split(tokens, first[1:]), strict=True):
            whose = self._outputs.get((frontend, handle))
            if whose is not None:
                whose[0].tokens[whose[1]].append(part.copy())

    def _drop(self, key: Key) -> None:
        request = self._requests.pop(key, None)
        if request is not None:
            for index in range(len(request.ends)):
                del self._outputs[key[0], key[1] + index]


def _message(request: _Request, handle: int) -> RestoreRequest:
    """An output that was cut short has fewer tokens than came."""
    ends = tuple(
        None if end is None else msgspec.structs.replace(end, handle=handle + index) for index, end in enumerate(request.ends)
    )
    whole = [np.concatenate(parts) for parts in request.tokens]
    tokens = [mine if end is None else mine[: end.stats.output_tokens] for mine, end in zip(whole, ends, strict=True)]
    return RestoreRequest(
        RestoreHeader(msgspec.structs.replace(request.add, handle=handle), ends),
        prompt=request.prompt.copy(),
        tokens=np.concatenate(tokens),
        num_tokens=np.array([len(mine) for mine in tokens], np.int32),
    )
