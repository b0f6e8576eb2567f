"""Going on with a request that another stream, or another front end, began: its state as bytes, its outputs replayed, what the
caller has skipped. Knows messages; no connection, and nothing of who waits for what in the core process."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import msgspec

from carousel.v1 import generation_pb2 as pb
from scheduler.errors import InvalidFieldError, OutOfRangeError
from scheduler.frontend.output import Output
from scheduler.frontend.streams import Inbox, ResumedOutlet, ResumedStream
from scheduler.frontend.validation import Options, check_id
from wire import ResumeReply


class ResumeState(msgspec.Struct, array_like=True, frozen=True):
    """What a front end must know of a request beside its tokens. Travels with it, for the front ends of the same server."""

    options: Options
    allowed_ns: int  # its time, as the caller gave it
    prompt_text: str  # where the prompt was given as text; travels only to be echoed

    def encode(self) -> bytes:
        echoes = self.options.echo and self.options.text
        return _encoder.encode(self if echoes else msgspec.structs.replace(self, prompt_text=""))

    @staticmethod
    def decode(state: bytes) -> ResumeState:
        return _decoder.decode(state)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ResumeState)


def check_resume(request: pb.ResumeRequest) -> None:
    """As far as the request alone says. Raises InvalidFieldError."""
    check_id("request_id", request.request_id)
    seen: set[int] = set()
    for i, offset in enumerate(request.outputs):
        if offset.output_index in seen:
            raise InvalidFieldError(f"outputs[{i}].output_index", f"has {offset.output_index} once more")
        seen.add(offset.output_index)


def resumed_stream(
    reply: ResumeReply, outputs: Sequence[Output], include_stop: bool, inbox: Inbox | None = None
) -> ResumedStream:
    """Of what the core has, yet to be replayed. outputs: new ones, one for each output of the request."""
    stream, bounds = ResumedStream(include_stop, len(reply.prompt), inbox), accumulate(reply.num_tokens.tolist(), initial=0)
    parts = [reply.tokens[begin:end].tolist() for begin, end in pairwise(bounds)]
    stream.outlets = [
        ResumedOutlet(stream, index, output, tokens, ended)
        for index, (output, tokens, ended) in enumerate(zip(outputs, parts, reply.header.ended, strict=True))
    ]
    return stream


def skip(request: pb.ResumeRequest, stream: ResumedStream, with_text: bool) -> list[int]:
    """Leaves out what the caller has, once all is replayed; returns of which outputs it has something. with_text: text is sent.
    Raises InvalidFieldError, OutOfRangeError."""
    for i, offset in enumerate(request.outputs):
        if offset.output_index >= len(stream.outlets):
            what = f"must be below the request's num_outputs, {len(stream.outlets)}, not {offset.output_index}"
            raise InvalidFieldError(f"outputs[{i}].output_index", what)
        output = stream.outlets[offset.output_index].output
        num_tokens, text = output.certain
        text = text if with_text else b""
        if offset.token_offset > num_tokens:
            raise OutOfRangeError(f"outputs[{i}].token_offset", f"is {offset.token_offset}; {num_tokens} tokens are there")
        if offset.text_offset > len(text):
            raise OutOfRangeError(f"outputs[{i}].text_offset", f"is {offset.text_offset}; {len(text)} bytes of text are there")
        if text[offset.text_offset : offset.text_offset + 1] and 0x80 <= text[offset.text_offset] < 0xC0:
            raise OutOfRangeError(f"outputs[{i}].text_offset", f"is {offset.text_offset}, which is inside a character")
        output.skip(offset.token_offset, offset.text_offset)
    return [offset.output_index for offset in request.outputs]
