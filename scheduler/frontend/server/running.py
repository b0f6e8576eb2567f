"""A request on its way out: what is new of its outputs becomes events, its end a summary or a status. Generate and GenerateMany
share it. Knows messages of the public API; no connection."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import msgspec

from carousel.v1 import generation_pb2 as pb
from scheduler.errors import CancelledElsewhereError, DeadlineError, UnavailableError
from scheduler.frontend.output import Piece
from scheduler.frontend.server.stats import FINISH_REASONS, timing, usage
from scheduler.frontend.server.status import internal_error
from scheduler.frontend.streams import Outlet, Stream, Told
from scheduler.frontend.validation import Options
from wire import EndReason, OutputEnded, RequestStats


class Event(Protocol):
    """A GenerateResponse, or an event of GenerateManyResponse."""

    @property
    def delta(self) -> pb.Delta: ...

    @property
    def finished(self) -> pb.Finished: ...

    @property
    def summary(self) -> pb.Summary: ...


class Running:
    """echo: the prompt as a delta, where it is wanted. allowed_ns: its time. echoed: outputs whose reader has the prompt."""

    def __init__(
        self, options: Options, stream: Stream, echo: pb.Delta | None, allowed_ns: int, echoed: Collection[int] = ()
    ) -> None:
        self.options, self.stream = options, stream
        self._echo, self._allowed_ns = echo, allowed_ns
        self._num_open = len(stream.outlets)
        self.first_ns = 0  # CLOCK_MONOTONIC when its first token was ready for the reader; 0: not yet
        self._unechoed = set(range(self._num_open) if options.echo else range(1)).difference(echoed)

    @property
    def has_ended(self) -> bool:
        """All its outputs have."""
        return self._num_open == 0

    def take(self, outlet: Outlet, new: Callable[[], Event]) -> int:
        """What is new of an output, as events that `new` makes; returns how many tokens of it the reader has been given then,
        held back ones too."""
        outlet.is_fresh = False
        if self._echo is not None and outlet.index in self._unechoed and (outlet.num_received or self.options.echo):
            self._tell_prompt(outlet, new().delta)
        num_received, ended = outlet.num_received, outlet.ended
        if not self.first_ns and num_received:
            self.first_ns = time.monotonic_ns()
        piece = outlet.output.take()
        if piece is not None and (piece.tokens or self.options.text):
            self._tell(outlet, piece, new().delta)
        if ended is not None:  # before the piece was taken
            _finish(outlet, ended, new().finished)
            self._num_open -= 1
        return num_received

    def summarize(self, summary: pb.Summary) -> None:
        """Once all outputs have ended. Raises the status of a request of which one did not end by itself."""
        for outlet in self.stream.outlets:
            if outlet.ended is not None and not outlet.output.stop_string:
                self._check_end(outlet.ended)
        stats = self._total()
        summary.request_id = self.options.request_id
        summary.usage.CopyFrom(usage(stats))
        summary.timing.CopyFrom(timing(stats))
        summary.timing.seed = self.options.sampling.seed

    def account(self) -> tuple[RequestStats, tuple[str, ...], bool]:
        """What is known of it by now: counts and times, why its outputs ended, whether all have."""
        outlets = self.stream.outlets
        reasons = tuple(_reason(outlet) for outlet in outlets if outlet.ended is not None)
        if len(reasons) == len(outlets):
            return self._total(), reasons, True
        received = sum(outlet.num_received for outlet in outlets)
        return RequestStats(prompt_tokens=self.stream.num_prompt, output_tokens=received), reasons, False

    def _tell_prompt(self, outlet: Outlet, delta: pb.Delta) -> None:
        assert self._echo is not None
        self._unechoed.discard(outlet.index)
        stream = self.stream
        if outlet.num_received and self.options.sampling.prompt_logprobs >= 0 and not self._echo.logprobs:
            _fill(self._echo, [stream.prompt_logprobs.get(position) for position in range(stream.num_prompt)])
        delta.CopyFrom(self._echo)
        delta.output_index = outlet.index

    def _tell(self, outlet: Outlet, piece: Piece, delta: pb.Delta) -> None:
        """Filled in place: half the time of building it apart."""
        delta.output_index, delta.token_offset = outlet.index, piece.token_offset
        delta.token_ids.extend(piece.tokens)
        if self.options.text:
            delta.text_offset, delta.text = piece.text_offset, piece.text
        if self.options.sampling.logprobs >= 0:
            offset = piece.token_offset
            _fill(delta, [outlet.logprobs.pop(offset + i) for i in range(len(piece.tokens))])

    def _check_end(self, ended: OutputEnded) -> None:
        match ended.reason:
            case EndReason.CANCELLED:
                raise CancelledElsewhereError("the request was cancelled by its id")
            case EndReason.DEADLINE if not self.options.partial_at_deadline:
                allowed_ms, num_tokens = self._allowed_ns // 1_000_000, self._total().output_tokens
                said = f"the request's time, {allowed_ms} ms, is over after {num_tokens} tokens"
                raise DeadlineError(said, {"allowed_ms": str(allowed_ms), "output_tokens": str(num_tokens)})
            case EndReason.UNAVAILABLE:
                raise UnavailableError(ended.message or "the server is shutting down", reason="DRAINING")
            case EndReason.ERROR:
                raise internal_error(f"request {self.options.request_id!r} failed: {ended.message}")

    def _total(self) -> RequestStats:
        """Of all outputs, once they have ended: counts are summed; the prompt and the times are those of output 0."""
        outputs = [_stats(outlet) for outlet in self.stream.outlets]
        return msgspec.structs.replace(
            outputs[0],
            output_tokens=sum(stats.output_tokens for stats in outputs),
            recomputed_tokens=sum(stats.recomputed_tokens for stats in outputs),
            preemptions=sum(stats.preemptions for stats in outputs),
            block_ns=sum(stats.block_ns for stats in outputs),
        )


def _stats(outlet: Outlet) -> RequestStats:
    """The tokens that a stop string was found in count, those computed after it do not."""
    assert outlet.ended is not None
    stats = outlet.ended.stats
    if not outlet.output.stop_string:
        return stats
    return msgspec.structs.replace(stats, output_tokens=min(stats.output_tokens, outlet.output.num_tokens))


def _reason(outlet: Outlet) -> str:
    assert outlet.ended is not None
    return EndReason.STOP.value if outlet.output.stop_string else outlet.ended.reason.value


def _fill(delta: pb.Delta, told: Sequence[Told | None]) -> None:
    """None: of a prompt's first token, which nothing precedes."""
    for each in told:
        entry = delta.logprobs.add()
        if each is not None:
            values, token_ids = each
            entry.logprob = values[0]
            for token_id, value in zip(token_ids[1:], values[1:], strict=True):
                entry.top.add(token_id=token_id, logprob=value)


def _finish(outlet: Outlet, ended: OutputEnded, finished: pb.Finished) -> None:
    finished.output_index, finished.reason = outlet.index, pb.FINISH_REASON_STOP
    if outlet.output.stop_string:  # whatever the core saw at the same time came later
        finished.stop_match.stop = outlet.output.stop_string
    elif ended.stop_token_id >= 0:
        finished.stop_match.token_id = ended.stop_token_id
    else:
        finished.reason = FINISH_REASONS[ended.reason]
