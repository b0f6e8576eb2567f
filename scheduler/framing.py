"""How a record stands in a file of ours: its length, the CRC-32 of its content, the content. Bytes only; the recorder and the
journal share it."""

from __future__ import annotations

import struct
import zlib

FRAME = struct.Struct("<II")  # length and CRC-32 of a record's content
MOST_RECORD_BYTES = 1 << 30  # a longer one is damage


def framed(content: bytes) -> bytes:
    return FRAME.pack(len(content), zlib.crc32(content)) + content
