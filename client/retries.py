"""Which failed calls are made again, and how long later. Knows the client's errors; no connection, no clock, no randomness.

Not a library's: the delay is the server's word (RetryInfo, which gRPC's own retry policy does not read), the end is the call's
deadline, and a stream goes on by another call than it began with. What is left are these lines, shared by both clients.
"""

from __future__ import annotations

import grpc

from client.errors import CarouselError

RETRIES = 4  # of a call, by default
RESUME_WINDOW_MS = 30_000  # by default
MAX_RESUME_WINDOW_MS = 600_000  # the server's limit too
_FIRST_S = 0.1  # at most, before the first retry; doubles with each
_LONGEST_S = 2.0  # whoever resumes a stream comes back soon after the server does


def is_retryable(error: CarouselError, *, idempotent: bool) -> bool:
    """RESOURCE_EXHAUSTED only with the server's word when to come again: a message that is too large is refused so, too.
    idempotent: the call may be carried out twice."""
    match error.code:
        case grpc.StatusCode.UNAVAILABLE:
            return True
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return error.retry_after_s is not None
        case grpc.StatusCode.ABORTED:
            return idempotent
    return False


class Attempts:
    """The attempts of one call. retries: how many after the first one; None: any number. until_s: when the last one must have
    begun, on the clock of `now_s`, seconds; None: no bound."""

    def __init__(self, retries: int | None, until_s: float | None) -> None:
        self._retries, self._until_s = retries, until_s
        self._made = 0

    def left_s(self, now_s: float) -> float | None:
        """The deadline of an attempt that begins now; None: none."""
        return None if self._until_s is None else max(0.0, self._until_s - now_s)

    def delay_s(self, error: CarouselError, now_s: float, draw: float) -> float | None:
        """Seconds until the next attempt after this error; None: there is none. draw: random, [0, 1). Exponential back-off
        with equal jitter (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter), on top of the delay that
        the server asks for: those who are refused together do not come again together, and nobody so soon that gRPC, which
        has a back-off of its own before it connects again, has not tried."""
        if self._retries is not None and self._made >= self._retries:
            return None
        delay_s = (error.retry_after_s or 0.0) + min(_LONGEST_S, _FIRST_S * 2.0**self._made) * (1 + draw) / 2
        if self._until_s is not None and now_s + delay_s >= self._until_s:
            return None
        self._made += 1
        return delay_s


def wait_s(attempts: Attempts, error: CarouselError, now_s: float, draw: float) -> float:
    """Of an idempotent call: seconds until its next attempt. Raises the error where there is none."""
    delay_s = attempts.delay_s(error, now_s, draw) if is_retryable(error, idempotent=True) else None
    if delay_s is None:
        raise error
    return delay_s


def check_retries(retries: int, resume_window_ms: int) -> None:
    """What both clients are given. Raises ValueError."""
    if retries < 0:
        raise ValueError(f"retries must be 0 or more, not {retries}")
    if not 0 <= resume_window_ms <= MAX_RESUME_WINDOW_MS:
        raise ValueError(f"resume_window_ms must be 0 to {MAX_RESUME_WINDOW_MS}, not {resume_window_ms}")
