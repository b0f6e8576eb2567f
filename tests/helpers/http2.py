"""HTTP/2 by hand, for callers that do not keep to it: half a frame, streams opened and reset at once, nothing at all.

A blocking socket and the few frames that such a caller needs (RFC 9113). It takes no answer apart but for their frames.
"""

from __future__ import annotations

import socket
import struct
from types import TracebackType
from typing import Self

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
ACK, END_STREAM, END_HEADERS = 1, 1, 4
CANCEL = struct.pack(">L", 8)
INITIAL_WINDOW_SIZE = 4  # a setting
_FRAME = struct.Struct(">HBBBL")  # length (high, low), type, flags, stream


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return _FRAME.pack(len(payload) >> 8, len(payload) & 255, kind, flags, stream) + payload


def headers(path: str, stream: int, **more: str) -> bytes:
    """The beginning of a gRPC call; `more` with - for _."""
    fields = {"te": "trailers", "content-type": "application/grpc"} | {key.replace("_", "-"): more[key] for key in more}
    literals = b"".join(b"\x00" + _text(name) + _text(value) for name, value in fields.items())
    block = b"\x83\x86\x04" + _text(path) + b"\x01" + _text("localhost") + literals  # POST, http, :path, :authority
    return frame(HEADERS, END_HEADERS, stream, block)


def message(content: bytes, stream: int, flags: int = END_STREAM) -> bytes:
    """One gRPC message, not compressed."""
    return frame(DATA, flags, stream, struct.pack(">BL", 0, len(content)) + content)


def _text(value: str) -> bytes:
    assert len(value) < 127 and value.isascii(), "a longer one has a length of several bytes"
    return bytes([len(value)]) + value.encode()


class Connection:
    """To 127.0.0.1; settings: by their numbers."""

    def __init__(self, target: str, settings: dict[int, int] | None = None, begin: bool = True) -> None:
        """begin: with the preface and the settings; else nothing is sent."""
        host, _, port = target.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=20)
        if begin:
            pairs = b"".join(struct.pack(">HL", *pair) for pair in (settings or {}).items())
            self.send(PREFACE, frame(SETTINGS, payload=pairs))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.socket.close()

    def send(self, *frames: bytes) -> None:
        self.socket.sendall(b"".join(frames))

    def read_until(self, kind: int) -> bytes:
        """The payload of the next frame of this kind. Raises ConnectionError when there is none."""
        while True:
            high, low, found, _, _ = _FRAME.unpack(self._read(_FRAME.size))
            payload = self._read(high << 8 | low)
            if found == kind:
                return payload

    def is_open(self) -> bool:
        """Whether the server has not closed it; takes what has come."""
        self.socket.setblocking(False)
        try:
            while self.socket.recv(1 << 16):
                pass
            return False
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        finally:
            self.socket.settimeout(20)

    def _read(self, size: int) -> bytes:
        got = b""
        while len(got) < size:
            more = self.socket.recv(size - len(got))
            if not more:
                raise ConnectionError("the server has closed the connection")
            got += more
        return got
