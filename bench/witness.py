"""What comes of one request, held against what must come: tokens that were lost, came twice, or are others. Knows the API's
messages only; no connection, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from carousel.v1 import generation_pb2 as pb

_MISSING = -1  # in the place of a token that never came


@dataclass
class Flaws:
    """Counts of tokens. All 0: nothing is wrong."""

    lost: int = 0  # left out before a later one, or absent from an output that has ended
    doubled: int = 0
    wrong: int = 0  # others than must come in this place
    text: int = 0  # deltas whose text does not begin where the text before it ended

    def __bool__(self) -> bool:
        return bool(self.lost or self.doubled or self.wrong or self.text)

    def __iadd__(self, other: Flaws) -> Flaws:
        self.lost += other.lost
        self.doubled += other.doubled
        self.wrong += other.wrong
        self.text += other.text
        return self


@dataclass
class _Output:
    tokens: list[int] = field(default_factory=list)
    text_bytes: int = 0
    reason: pb.FinishReason.ValueType | None = None


class Witness:
    """Is shown every event of a request, over all streams that brought them. No stream may bring again what was there."""

    def __init__(self, num_outputs: int = 1) -> None:
        self._outputs = [_Output() for _ in range(num_outputs)]
        self._flaws = Flaws()
        self.has_summary = False

    @property
    def num_tokens(self) -> int:
        return sum(len(output.tokens) for output in self._outputs)

    @property
    def reasons(self) -> set[pb.FinishReason.ValueType | None]:
        """Of all outputs; None: one has not ended."""
        return {output.reason for output in self._outputs}

    @property
    def is_whole(self) -> bool:
        """Every output has come to its full length."""
        return self.has_summary and self.reasons == {pb.FINISH_REASON_LENGTH}

    def tokens(self, output_index: int = 0) -> list[int]:
        return self._outputs[output_index].tokens

    def take(self, event: pb.GenerateResponse | pb.RequestEvent) -> None:
        match event.WhichOneof("event"):
            case "delta":
                self._take_delta(event.delta)
            case "finished":
                self._outputs[event.finished.output_index].reason = event.finished.reason
            case "summary":
                self.has_summary = True

    def resumed(self) -> None:
        """Another stream goes on: ends come again."""
        self.has_summary = False
        for output in self._outputs:
            output.reason = None

    def rest(self, request_id: str) -> pb.ResumeRequest:
        """Asks for all that has not come."""
        offsets = [
            pb.OutputOffset(output_index=index, token_offset=len(output.tokens), text_offset=output.text_bytes)
            for index, output in enumerate(self._outputs)
        ]
        return pb.ResumeRequest(request_id=request_id, outputs=offsets)

    def flaws(self, expected: Sequence[Sequence[int]]) -> Flaws:
        """expected: all tokens of each output; one that ended by its length must have all of them, others may have fewer."""
        found = Flaws()
        found += self._flaws
        for output, tokens in zip(self._outputs, expected, strict=True):
            pairs = zip(output.tokens, tokens, strict=False)  # an output may be shorter
            found.wrong += sum(mine != theirs for mine, theirs in pairs if mine != _MISSING)
            found.wrong += max(0, len(output.tokens) - len(tokens))
            if output.reason == pb.FINISH_REASON_LENGTH:
                found.lost += max(0, len(tokens) - len(output.tokens))
        return found

    def _take_delta(self, delta: pb.Delta) -> None:
        output = self._outputs[delta.output_index]
        new, gap = list(delta.token_ids), delta.token_offset - len(output.tokens)
        if new and gap > 0:
            self._flaws.lost += gap
            output.tokens += [_MISSING] * gap
        elif new and gap < 0:
            self._flaws.doubled += min(-gap, len(new))
            new = new[-gap:]
        output.tokens += new
        if delta.text:
            self._flaws.text += delta.text_offset != output.text_bytes
            output.text_bytes = delta.text_offset + len(delta.text.encode())


def first_difference(mine: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Where two outputs part; None: they are the same as far as both go."""
    return next((i for i, (one, other) in enumerate(zip(mine, theirs, strict=False)) if one != other), None)
