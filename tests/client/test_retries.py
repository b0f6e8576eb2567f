"""Which failures are tried again, and when: values in, values out."""

from __future__ import annotations

import grpc
import pytest

from client import CarouselError
from client.retries import Attempts, is_retryable, wait_s

BUSY = CarouselError(grpc.StatusCode.UNAVAILABLE, "busy")


def error(code: str, retry_after_s: float | None = None) -> CarouselError:
    return CarouselError(grpc.StatusCode[code], "so", retry_after_s=retry_after_s)


@pytest.mark.parametrize(
    ("failure", "idempotent", "again"),
    [
        (error("UNAVAILABLE"), False, True),
        (error("UNAVAILABLE", 1.0), False, True),
        (error("RESOURCE_EXHAUSTED", 1.0), False, True),
        (error("RESOURCE_EXHAUSTED"), True, False),  # too large a message, and it will be the next time
        (error("ABORTED"), True, True),
        (error("ABORTED"), False, False),
    ],
)
def test_what_may_be_tried_again(failure: CarouselError, idempotent: bool, again: bool) -> None:
    assert is_retryable(failure, idempotent=idempotent) is again


def test_nothing_else_is_tried_again_whatever_the_server_says_with_it() -> None:
    others = {code.name for code in grpc.StatusCode} - {"UNAVAILABLE", "RESOURCE_EXHAUSTED", "ABORTED"}
    assert not any(is_retryable(error(name, 1.0), idempotent=True) for name in others)


def test_delays_double_up_to_two_seconds() -> None:
    attempts = Attempts(9, None)
    assert [attempts.delay_s(BUSY, 0.0, 1.0) for _ in range(8)] == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0]


def test_delays_are_drawn_from_their_upper_half() -> None:
    assert [Attempts(1, None).delay_s(BUSY, 0.0, draw) for draw in (0.0, 0.5)] == [0.05, pytest.approx(0.075)]


def test_the_servers_delay_is_the_least() -> None:
    attempts = Attempts(2, None)
    asked = error("RESOURCE_EXHAUSTED", 7.5)
    assert attempts.delay_s(asked, 0.0, 0.0) == 7.55
    assert attempts.delay_s(asked, 0.0, 0.5) == pytest.approx(7.65)


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_there_are_so_many_retries(retries: int) -> None:
    attempts = Attempts(retries, None)
    delays = [attempts.delay_s(BUSY, 0.0, 0.5) for _ in range(retries + 1)]
    assert None not in delays[:retries] and delays[retries] is None


def test_what_would_begin_after_the_deadline_does_not_wait_for_it() -> None:
    attempts = Attempts(9, 10.0)
    assert attempts.delay_s(error("UNAVAILABLE", 1.0), 8.0, 0.0) == 1.05
    assert attempts.delay_s(error("UNAVAILABLE", 1.0), 9.0, 0.0) is None
    assert (attempts.left_s(9.0), attempts.left_s(11.0)) == (1.0, 0.0)
    assert Attempts(1, None).left_s(5.0) is None


def test_where_there_is_no_retry_the_error_is_raised() -> None:
    assert wait_s(Attempts(1, None), BUSY, 0.0, 0.5) == pytest.approx(0.075)
    for attempts, failure in ((Attempts(0, None), BUSY), (Attempts(9, None), error("INVALID_ARGUMENT"))):
        with pytest.raises(CarouselError) as raised:
            wait_s(attempts, failure, 0.0, 0.5)
        assert raised.value is failure
