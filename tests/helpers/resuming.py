"""What a caller does whose streams drop: it keeps what it has, and asks for the rest."""

from __future__ import annotations

from collections.abc import Iterable

from carousel.v1 import generation_pb2 as pb
from tests.helpers.streams import Got


class Had:
    """What all streams of one request have brought, put together; offsets and order are checked on the way."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.got = Got()

    def take(self, events: Iterable[pb.GenerateResponse]) -> None:
        """Of one stream, from its beginning or after what was taken of it."""
        for event in events:
            self.got.take(event)

    def rest(self) -> pb.ResumeRequest:
        """For another stream; ends come again."""
        self.got.summary = None
        for output in self.got.outputs.values():
            output.finished = None
        return pb.ResumeRequest(
            request_id=self.request_id,
            outputs=[
                pb.OutputOffset(output_index=i, token_offset=len(output.tokens), text_offset=len(output.text.encode()))
                for i, output in self.got.outputs.items()
                if output.prompt is not None or output.num_deltas
            ],
        )


def whole(got: Got) -> list[tuple[object, ...]]:
    """All that must be the same, however often a stream was cut."""
    return [(i, output.prompt, output.tokens, output.text, output.finished) for i, output in sorted(got.outputs.items())]
