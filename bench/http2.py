"""A gRPC caller at the level of HTTP/2 frames, for measurements: it costs a small part of what a server does.

Calls over plain or TLS connections, from one thread. What comes is kept as it came, whole messages in order; looking into
it is for afterwards. Our own, because any client library in Python costs as much as the server that it is to measure. Knows
frames (RFC 9113) and gRPC's five bytes before a message; nothing of what is said.
"""

from __future__ import annotations

import itertools
import selectors
import socket
import ssl
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM = _ACK = 1
_END_HEADERS = 4
_HEADER_TABLE_SIZE, _INITIAL_WINDOW_SIZE = 1, 4  # settings
_TAKES_BINARY = 0xFE03  # gRPC's own: values of headers whose names end in -bin may come as they are
_LARGEST_WINDOW = (1 << 31) - 1
_FIRST_WINDOW = 65_535
_MOST_DATA = 16_384  # of one frame
_READ = 1 << 18  # bytes at a time
_WIDEN_AFTER = 1 << 28  # bytes read, until the peer is told that they were
_FRAME = struct.Struct(">HBBBL")  # length (high, low), type, flags, stream
_CONNECT_S = 10.0
_NOT_NOW = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_PREFIX = struct.Struct(">BL")  # of a message: compressed or not, length
_STATUS_NAME, _DETAILS_NAME = b"\x0bgrpc-status", b"\x17grpc-status-details-bin"  # after their lengths


class CallError(Exception):
    """The connection broke, or nothing came in time."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is called."""

    host: str
    port: int
    tls: ssl.SSLContext | None = None  # that offers h2; None: in the clear
    headers: tuple[tuple[str, str], ...] = ()  # of every call, such as a token


@dataclass(frozen=True, slots=True)
class Call:
    """What is said in one call, all at once; the caller's side is closed then."""

    path: str
    messages: tuple[bytes, ...]
    key: int = 0  # the caller's own; its answer has the same


@dataclass(slots=True)
class Answer:
    """Times by CLOCK_MONOTONIC, in nanoseconds; 0: never."""

    started_ns: int = 0
    heard_ns: int = 0  # its headers
    first_ns: int = 0  # message
    ended_ns: int = 0
    status: int = -1  # gRPC's; −1: reset, or not told
    messages: list[bytes] = field(default_factory=list)
    at_ns: list[int] = field(default_factory=list)  # of each message: when its last byte was read
    key: int = 0
    details: bytes = b""  # a google.rpc.Status, where the server told more than the status


class _Stream:
    __slots__ = ("answer", "left", "part", "window")

    def __init__(self, answer: Answer, left: bytes, window: int) -> None:
        self.answer, self.left, self.window = answer, left, window
        self.part = b""  # of a message of which more comes


class _Connection:
    """Ended answers go into `ended`. holds: no message may come before `release`."""

    def __init__(self, to: Peer, holds: bool) -> None:
        self._to = to
        self.socket = socket.create_connection((to.host, to.port), timeout=_CONNECT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if to.tls is not None:
            self.socket = to.tls.wrap_socket(self.socket, server_hostname=to.host)
        self.socket.setblocking(False)
        self.ended: list[Answer] = []
        self.num_heard = 0  # calls, by their headers or their end
        self._streams: dict[int, _Stream] = {}
        self._next_stream = 1
        self._window, self._stream_window = _FIRST_WINDOW, _FIRST_WINDOW  # of what may be sent
        self._rest = b""  # of a frame of which more comes
        self._num_read = 0
        self._now_ns = 0  # of the last read
        self._out = bytearray(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        # No table for headers: what comes is then readable without remembering.
        window = 0 if holds else _LARGEST_WINDOW
        settings = ((_HEADER_TABLE_SIZE, 0), (_INITIAL_WINDOW_SIZE, window), (_TAKES_BINARY, 1))
        self._out += _frame(_SETTINGS, 0, 0, b"".join(struct.pack(">HL", *setting) for setting in settings))
        self._widen(_LARGEST_WINDOW - _FIRST_WINDOW)

    @property
    def has_more_to_send(self) -> bool:
        return bool(self._out)

    def start(self, call: Call) -> None:
        number, self._next_stream = self._next_stream, self._next_stream + 2
        left = b"".join(_PREFIX.pack(0, len(message)) + message for message in call.messages)
        answer = Answer(started_ns=time.monotonic_ns(), key=call.key)
        self._streams[number] = _Stream(answer, left, self._stream_window)
        self._out += _frame(_HEADERS, _END_HEADERS, number, _request_headers(call.path, self._to))
        self._put_data(number)

    def release(self) -> None:
        self._out += _frame(_SETTINGS, 0, 0, struct.pack(">HL", _INITIAL_WINDOW_SIZE, _LARGEST_WINDOW))

    def _put_data(self, number: int) -> None:
        """As much as the peer's windows take."""
        stream = self._streams[number]
        while stream.left and (size := min(len(stream.left), _MOST_DATA, stream.window, self._window)) > 0:
            part, stream.left = stream.left[:size], stream.left[size:]
            stream.window -= size
            self._window -= size
            self._out += _frame(_DATA, 0 if stream.left else _END_STREAM, number, part)

    def send(self) -> None:
        """As much as the socket takes. Raises CallError."""
        try:
            while self._out:
                del self._out[: self.socket.send(self._out)]
        except _NOT_NOW:
            pass
        except OSError as error:
            raise CallError(f"the connection broke: {error.strerror or error}") from None

    def receive(self) -> None:
        """All that has come. Raises CallError."""
        try:
            data = self.socket.recv(_READ)
            # TLS gives a record at a time, and what it has already read wakes nobody.
            while isinstance(self.socket, ssl.SSLSocket) and self.socket.pending():
                data += self.socket.recv(_READ)
        except _NOT_NOW:
            return
        except OSError as error:
            raise CallError(f"the connection broke: {error.strerror or error}") from None
        if not data:
            raise CallError("the server closed the connection")
        self._now_ns = time.monotonic_ns()
        if self._rest:
            data = self._rest + data
        at, end = 0, len(data)
        while end - at >= 9:
            high, low, kind, flags, number = _FRAME.unpack_from(data, at)
            begin = at + 9
            after = begin + (high << 8 | low)
            if after > end:
                break
            at = after
            if kind == _DATA:
                self._take_data(self._streams[number], data[begin:after])
                if flags & _END_STREAM:
                    self._end(number)
            else:
                self._take_other(kind, flags, number, data[begin:after])
        self._rest = data[at:]
        self._num_read += at
        if self._num_read > _WIDEN_AFTER:
            self._widen(self._num_read)
            self._num_read = 0

    def _take_data(self, stream: _Stream, data: bytes) -> None:
        answer = stream.answer
        if not answer.first_ns:
            answer.first_ns = self._now_ns
        if stream.part:
            data = stream.part + data
        while len(data) >= 5:
            size = 5 + _PREFIX.unpack_from(data)[1]
            if len(data) < size:
                break
            answer.messages.append(data[5:size])
            answer.at_ns.append(self._now_ns)
            data = data[size:]
        stream.part = data

    def _take_other(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == _HEADERS:
            self._hear(self._streams[number].answer)
            if flags & _END_STREAM:
                answer = self._streams[number].answer
                answer.status, answer.details = _status(payload), _details(payload)
                self._end(number)
        elif kind == _RST_STREAM:
            if number in self._streams:
                self._end(number)
        elif kind == _SETTINGS and not flags & _ACK:
            self._obey(payload)
            self._out += _frame(_SETTINGS, _ACK, 0, b"")
        elif kind == _PING and not flags & _ACK:
            self._out += _frame(_PING, _ACK, 0, payload)
        elif kind == _WINDOW_UPDATE:
            self._widened(number, struct.unpack(">L", payload)[0])
        elif kind == _GOAWAY:
            raise CallError(f"the server sends the connection away: {payload[8:].decode(errors='replace')}")

    def _obey(self, settings: bytes) -> None:
        for name, value in struct.iter_unpack(">HL", settings):
            if name == _INITIAL_WINDOW_SIZE:
                more, self._stream_window = value - self._stream_window, value
                for stream in self._streams.values():
                    stream.window += more
        self._put_all_data()

    def _widened(self, number: int, more: int) -> None:
        if number == 0:
            self._window += more
            self._put_all_data()
        elif number in self._streams:
            self._streams[number].window += more
            self._put_data(number)

    def _put_all_data(self) -> None:
        for number, stream in self._streams.items():
            if stream.left:
                self._put_data(number)

    def _widen(self, more: int) -> None:
        self._out += _frame(_WINDOW_UPDATE, 0, 0, struct.pack(">L", more))

    def _hear(self, answer: Answer) -> None:
        if not answer.heard_ns:
            answer.heard_ns = self._now_ns
            self.num_heard += 1

    def _end(self, number: int) -> None:
        answer = self._streams.pop(number).answer
        self._hear(answer)
        answer.ended_ns = self._now_ns
        self.ended.append(answer)


def _frame(kind: int, flags: int, number: int, payload: bytes) -> bytes:
    size = len(payload)
    return _FRAME.pack(size >> 8, size & 0xFF, kind, flags, number) + payload


def _request_headers(path: str, to: Peer) -> bytes:
    """POST over HTTP; the rest as literals that nobody need remember."""
    literals = (("te", "trailers"), ("content-type", "application/grpc"), *to.headers)
    named = (b"\x00" + _text(name.encode()) + _text(value.encode()) for name, value in literals)
    scheme = b"\x86" if to.tls is None else b"\x87"
    authority = to.host.encode()
    return b"\x83" + scheme + b"\x04" + _text(path.encode()) + b"\x01" + _text(authority) + b"".join(named)


def _text(value: bytes) -> bytes:
    size = len(value)
    if size < 127:
        return bytes([size]) + value
    length, size = bytearray([127]), size - 127  # RFC 7541, section 5.1
    while size >= 128:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes(length) + bytes([size]) + value


def _status(headers: bytes) -> int:
    """gRPC's, from trailers without a table."""
    _, name, rest = headers.partition(_STATUS_NAME)
    return int(rest[1 : 1 + rest[0]]) if name else -1


def _details(headers: bytes) -> bytes:
    """Behind the name stand a length (RFC 7541, section 5.1), a 0 for binary, and the bytes."""
    _, name, rest = headers.partition(_DETAILS_NAME)
    if not name:
        return b""
    size, at = rest[0] & 127, 1
    if size == 127:
        shift, more = 0, True
        while more:
            size += (rest[at] & 127) << shift
            shift, more, at = shift + 7, rest[at] >= 128, at + 1
    value = rest[at : at + size]
    return value[1:] if value[:1] == b"\0" else b""


class Caller:
    """So many connections; calls go to one after the other."""

    def __init__(self, to: Peer | int, connections: int, holds: bool = False, patience_s: float = 60.0) -> None:
        """to: a port alone is one of loopback, in the clear. holds: no message may come before the headers of all calls have.
        patience_s: most without any news in `run`. Raises OSError."""
        self._holds = holds
        self._patience_s = patience_s
        self._selector = selectors.DefaultSelector()
        peer = Peer("127.0.0.1", to) if isinstance(to, int) else to
        self._connections = [_Connection(peer, holds) for _ in range(connections)]
        for connection in self._connections:
            self._selector.register(connection.socket, selectors.EVENT_READ, connection)

    def close(self) -> None:
        for connection in self._connections:
            connection.socket.close()
        self._selector.close()

    def run(self, calls: Sequence[Call], at_once: int) -> list[Answer]:
        """All calls, at most so many at a time; in the order in which they end. Raises CallError."""
        assert not self._holds or at_once >= len(calls), "the last one would never begin"
        waiting, answers = iter(calls), list[Answer]()
        started = self._start(waiting, at_once)
        while len(answers) < started:
            news = self.turn(self._patience_s)
            if news is None:
                raise CallError(f"nothing came for {self._patience_s:g} s")
            answers += news
            if self._holds and self.num_heard == len(calls):
                self.release()
            if news:
                started += self._start(waiting, len(news))
        return answers

    @property
    def num_heard(self) -> int:
        """Calls that the server has said something of."""
        return sum(connection.num_heard for connection in self._connections)

    def release(self) -> None:
        """Messages that were held may come, from the next turn on."""
        self._holds = False
        for connection in self._connections:
            connection.release()

    def _start(self, calls: Iterator[Call], most: int) -> int:
        started = 0
        for call in itertools.islice(calls, most):
            self.start(call)
            started += 1
        return started

    def start(self, call: Call) -> None:
        """It is sent with the next turn."""
        self._connections[0].start(call)
        self._connections.append(self._connections.pop(0))

    def turn(self, wait_s: float) -> list[Answer] | None:
        """Sends and receives; the answers that have ended meanwhile. None: nothing came in that time. Raises CallError."""
        for connection in self._connections:
            if connection.has_more_to_send:
                connection.send()
                wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.has_more_to_send else 0)
                if self._selector.get_key(connection.socket).events != wanted:
                    self._selector.modify(connection.socket, wanted, connection)
        ready = self._selector.select(wait_s)
        if not ready:
            return None
        answers: list[Answer] = []
        for key, events in ready:
            found: _Connection = key.data
            if events & selectors.EVENT_READ:
                found.receive()
            else:
                self._selector.modify(found.socket, selectors.EVENT_READ, found)
            answers += found.ended
            found.ended.clear()
        return answers
