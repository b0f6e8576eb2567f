"""What is known of one request while its stream runs: what has come of each output, and how it goes on after a failure.

Knows the public protos and the client's errors. No connection, no clock, no randomness: a stream that has those asks here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

import grpc

from carousel.v1 import generation_pb2 as pb
from client.errors import CarouselError, ServerUnreachableError, explained
from client.retries import Attempts, is_retryable

_ITS_END = (grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.INTERNAL)  # of a request, kept or not
_CORE_LOST = "CORE_LOST"  # the server's word for a part of it that died with the request, and may have kept it


class _Phase(Enum):
    """SENT -> FLOWING -> RESUMING -> FLOWING …, each of them -> OVER; a request that is only attached to starts RESUMING. SENT
    -> RESUMING -> SENT: the server can't say whether it has the request."""

    SENT = auto()  # Generate was called, nothing has come
    FLOWING = auto()  # the call gives events
    RESUMING = auto()  # Resume was called, nothing has come of it
    OVER = auto()  # ended, failed for good, or left


@dataclass(slots=True)
class _Seen:
    """What has come of one output."""

    tokens: int = 0
    text_bytes: int = 0


class Progress:
    """request: what is sent first. window_ms: how long the server keeps the request after its stream dropped; 0: it can't be
    resumed. attempts: of the first call, and with their deadline of all later ones. own_id: nobody else can have a request with
    this id, so that ALREADY_EXISTS after a broken attempt says that the attempt got through."""

    def __init__(
        self, request: pb.GenerateRequest | pb.ResumeRequest, window_ms: int, attempts: Attempts, *, own_id: bool = False
    ) -> None:
        self.finished: dict[int, pb.Finished] = {}
        self.summary: pb.Summary | None = None
        self._request, self._window_s, self._attempts, self._own_id = request, window_ms / 1000, attempts, own_id
        self._seen: dict[int, _Seen] = {}
        self._may_be_alive = False  # an attempt to begin it broke off, perhaps after it had begun
        self._resumed = False
        self._broken: CarouselError | None = None  # what the caller hears if it can't be resumed
        self._resumes = attempts
        self._phase = _Phase.SENT
        if isinstance(request, pb.ResumeRequest):
            self._seen = {each.output_index: _Seen(each.token_offset, each.text_offset) for each in request.outputs}
            self._phase, self._resumed = _Phase.RESUMING, True

    @property
    def request_id(self) -> str:
        return self._request.request_id

    @property
    def answered(self) -> bool:
        """Something has come of the call that runs."""
        return self._phase is _Phase.FLOWING

    @property
    def outlives_its_stream(self) -> bool:
        """The server goes on with it unless it is told that nobody wants it any more."""
        return self._phase is not _Phase.OVER and self._window_s > 0

    def call(self, now_s: float) -> tuple[pb.GenerateRequest | pb.ResumeRequest, float | None]:
        """What is to be called now, and its deadline in seconds."""
        left_s = self._attempts.left_s(now_s)
        if self._phase is not _Phase.RESUMING:
            return self._request, left_s
        request = pb.ResumeRequest(request_id=self.request_id)
        for index, seen in self._seen.items():
            request.outputs.add(output_index=index, token_offset=seen.tokens, text_offset=seen.text_bytes)
        return request, left_s

    def end(self) -> None:
        """Nothing more is expected of it."""
        self._phase = _Phase.OVER

    # -------------------------------------------------------------------------------------------------------- events

    def take(self, event: pb.GenerateResponse) -> bool:
        """An event has come; what the caller already has is cut off. False: nothing is left. Raises CarouselError (DATA_LOSS)
        for a gap."""
        self._phase = _Phase.FLOWING
        match event.WhichOneof("event"):
            case "delta":
                return self._take_delta(event.delta)
            case "finished":
                is_new = event.finished.output_index not in self.finished
                self.finished[event.finished.output_index] = event.finished
                return is_new
            case "summary":
                self.summary = event.summary
                self._phase = _Phase.OVER
        return True

    def _take_delta(self, delta: pb.Delta) -> bool:
        seen, is_first = self._seen.get(delta.output_index), False
        if seen is None:
            seen, is_first = self._seen.setdefault(delta.output_index, _Seen()), True
        if delta.is_prompt:
            return is_first
        if self._resumed and not self._cut(delta, seen):
            return False
        seen.tokens = delta.token_offset + len(delta.token_ids)
        if delta.text:
            seen.text_bytes = delta.text_offset + (len(delta.text) if delta.text.isascii() else len(delta.text.encode()))
        return True

    def _cut(self, delta: pb.Delta, seen: _Seen) -> bool:
        """Tokens and text go on each at its own offset: text straddles tokens."""
        known_tokens, known_bytes = seen.tokens - delta.token_offset, seen.text_bytes - delta.text_offset
        if known_tokens < 0 or (delta.text and known_bytes < 0):
            said = f"the resumed stream goes on at token {delta.token_offset} of output {delta.output_index}, not {seen.tokens}"
            raise CarouselError(grpc.StatusCode.DATA_LOSS, said)
        if known_tokens:
            del delta.token_ids[:known_tokens], delta.logprobs[:known_tokens]
            delta.token_offset = seen.tokens
        if known_bytes > 0:
            delta.text = delta.text.encode()[known_bytes:].decode()
            delta.text_offset = seen.text_bytes
        return bool(delta.token_ids or delta.text)

    # ------------------------------------------------------------------------------------------------------ failures

    def failed(self, error: CarouselError, now_s: float, draw: float) -> float:
        """The call has failed: seconds until `call` says what to call next. draw: random, [0, 1). Raises the error that the
        caller is to have when nothing can be done."""
        match self._phase:
            case _Phase.SENT:
                delay_s = self._after_sent(error, now_s, draw)
            case _Phase.FLOWING if error.code is grpc.StatusCode.UNAVAILABLE and self._window_s:
                delay_s = self._resume(error, now_s, draw)
            case _Phase.RESUMING if error.code is grpc.StatusCode.NOT_FOUND and self._may_begin_again:
                self._phase = _Phase.SENT
                delay_s = self._attempts.delay_s(error, now_s, draw)
            case _Phase.RESUMING if is_retryable(error, idempotent=False):
                delay_s = self._resumes.delay_s(error, now_s, draw)
            case _:
                delay_s = None
        if delay_s is not None:
            return delay_s
        could_resume = self._phase is not _Phase.RESUMING or error.code in _ITS_END
        self.end()
        if could_resume or self._broken is None or self._broken is error:
            raise error from None
        raise explained(self._broken, f"it could not be resumed: {error.message}") from None

    @property
    def _may_begin_again(self) -> bool:
        """Nothing has come of it, and the server has not kept it."""
        return self._broken is not None and self._broken.reason == _CORE_LOST and not self._seen

    def _after_sent(self, error: CarouselError, now_s: float, draw: float) -> float | None:
        if error.code is grpc.StatusCode.ALREADY_EXISTS and self._own_id and self._may_be_alive:
            if self._window_s:
                self._resume(error, now_s, draw)
                return 0.0
            return self._attempts.delay_s(error, now_s, draw)  # until the server hears that its stream has gone
        if not is_retryable(error, idempotent=False):
            return None
        if error.reason == _CORE_LOST and self._own_id and self._window_s:
            return self._resume(error, now_s, draw)
        self._may_be_alive |= isinstance(error, ServerUnreachableError)
        return self._attempts.delay_s(error, now_s, draw)

    def _resume(self, error: CarouselError, now_s: float, draw: float) -> float | None:
        """As often as the window and the caller's time allow."""
        self._phase, self._resumed, self._broken = _Phase.RESUMING, True, error
        left_s = self._attempts.left_s(now_s)
        self._resumes = Attempts(None, now_s + (self._window_s if left_s is None else min(left_s, self._window_s)))
        return self._resumes.delay_s(error, now_s, draw)
