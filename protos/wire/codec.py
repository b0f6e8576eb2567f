"""Messages to ZeroMQ frames and back. Decoding trusts nothing: version, types, array lengths and sizes are checked.

Frame 0: one byte WIRE_VERSION, then a msgpack array [[tag, header fields…], array lengths…].
Frame 1 (only for messages with arrays): the arrays back to back, little-endian, widest first so that each stays aligned;
decoding gives read-only views into the frame, no copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import msgspec
import numpy as np

from wire import messages
from wire.messages import WIRE_VERSION, WITH_ARRAYS, Header, Message

_VERSION = bytes([WIRE_VERSION])
_Headers = (
    messages.WorkerHello
    | messages.Heartbeat
    | messages.Retired
    | messages.Welcome
    | messages.Probe
    | messages.PlanHeader
    | messages.ResultHeader
    | messages.LogprobsHeader
    | messages.StepFailed
    | messages.FrontendHello
    | messages.Facts
    | messages.AddHeader
    | messages.RestoreHeader
    | messages.MovedHeader
    | messages.AbortRequest
    | messages.TruncateRequest
    | messages.CreditHeader
    | messages.Refused
    | messages.TokenBatchHeader
    | messages.CancelQuery
    | messages.CancelReply
    | messages.ResumeQuery
    | messages.ResumeHeader
    | messages.LoadQuery
    | messages.LoadReply
    | messages.MetricsQuery
    | messages.MetricsReply
    | messages.SetPolicyQuery
    | messages.SetPolicyReply
    | messages.DrainQuery
    | messages.DrainReply
    | messages.ReplaceQuery
    | messages.ReplaceReply
    | messages.ExplainQuery
    | messages.ExplainReply
    | messages.ListQuery
    | messages.ListReply
    | messages.BlockTablesQuery
    | messages.BlockTablesHeader
    | messages.WatchSteps
    | messages.StepRecord
)
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(tuple[_Headers, tuple[int, ...]])


class WireError(Exception):
    """A frame that is not one of our messages; the text says what is wrong with it."""


def encode(message: Message) -> list[bytes]:
    """Frames of a message, ready for `send_multipart`."""
    if isinstance(message, Header):
        return [_VERSION + _encoder.encode((message, ()))]
    arrays = [np.ascontiguousarray(getattr(message, name), dtype) for name, dtype in message.ARRAYS]
    head = _encoder.encode((message.header, tuple(len(array) for array in arrays)))
    return [_VERSION + head, b"".join([array.tobytes() for array in arrays if len(array)])]


def decode(frames: Sequence[bytes | memoryview]) -> Message:
    """The message in these frames. Raises WireError for anything malformed, truncated, oversized or of another version."""
    if not frames or len(frames[0]) < 2:
        raise WireError("empty message")
    if frames[0][:1] != _VERSION:
        raise WireError(f"wire version {frames[0][0]}, this process speaks {WIRE_VERSION}")
    try:
        header, lengths = _decoder.decode(memoryview(frames[0])[1:])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise WireError(f"malformed header: {error}") from None
    cls = WITH_ARRAYS.get(type(header))
    if cls is None:
        if len(frames) != 1 or lengths:
            raise WireError(f"{type(header).__name__} carries no arrays, got {len(frames) - 1} frames")
        return cast(Message, header)
    if len(frames) != 2 or len(lengths) != len(cls.ARRAYS):
        raise WireError(f"{cls.__name__}: {len(frames)} frames and {len(lengths)} lengths")
    return cast(Message, cls(header, **_views(cls, lengths, frames[1])))


def _views(cls: Any, lengths: Sequence[int], payload: bytes | memoryview) -> dict[str, Any]:
    arrays, offset = {}, 0
    sizes = [length * np.dtype(dtype).itemsize for length, (_, dtype) in zip(lengths, cls.ARRAYS, strict=True)]
    if min(lengths) < 0 or sum(sizes) != len(payload):
        raise WireError(f"{cls.__name__}: {len(payload)} bytes of arrays, the header says {sum(sizes)}")
    for length, size, (name, dtype) in zip(lengths, sizes, cls.ARRAYS, strict=True):
        arrays[name] = np.frombuffer(payload, dtype, length, offset) if length else np.empty(0, dtype)
        offset += size
    return arrays
