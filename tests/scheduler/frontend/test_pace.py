"""Writers of a busy front end wait a little, so that more goes out at once; those of an idle one never do."""

from __future__ import annotations

import asyncio

import pytest

from scheduler.frontend.output import Output
from scheduler.frontend.pace import Pace
from scheduler.frontend.streams import Inbox, Stream
from wire import EndReason, OutputEnded, RequestStats


class Process:
    """A clock, and how much of the time the process computed."""

    def __init__(self) -> None:
        self.now_s = self.spent_s = 0.0
        self.pace = Pace(lambda: self.now_s, lambda: self.spent_s)

    def is_busy(self, share: float, seconds: float) -> None:
        for _ in range(round(seconds / 0.01)):
            self.now_s += 0.01
            self.spent_s += 0.01 * share
            self.pace.look()


class Core:
    def truncate(self, handle: int, num_output_tokens: int) -> None: ...

    def credit(self, handle: int, num_tokens: int) -> None: ...


def busy_pace() -> Pace:
    process = Process()
    process.is_busy(1.0, 0.2)
    assert process.pace.wait_s
    return process.pace


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_nobody_waits_where_there_is_time(share: float) -> None:
    process = Process()
    process.is_busy(share, 10.0)
    assert process.pace.wait_s == 0.0


def test_the_wait_grows_with_the_load_to_a_bound_stays_and_goes_when_it_is_over() -> None:
    process = Process()
    process.is_busy(1.2, 0.3)
    early_s = process.pace.wait_s
    process.is_busy(1.2, 0.3)
    assert 0 < early_s < process.pace.wait_s
    process.is_busy(1.2, 10.0)
    most_s = process.pace.wait_s
    process.is_busy(0.7, 10.0)
    assert process.pace.wait_s == most_s <= 0.05
    process.is_busy(0.4, 2.0)
    assert process.pace.wait_s == 0.0


def test_after_a_pause_nobody_waits() -> None:
    process = Process()
    process.is_busy(1.2, 1.0)
    assert process.pace.wait_s
    process.now_s += 5.0
    process.pace.look()
    assert process.pace.wait_s == 0.0


def test_a_busy_process_wakes_its_writers_together() -> None:
    async def run() -> None:
        pace, news = busy_pace(), [asyncio.Event() for _ in range(3)]
        for event in news:
            pace.wake(event)
        await asyncio.sleep(0)
        assert not any(event.is_set() for event in news)
        await asyncio.gather(*(event.wait() for event in news))

    asyncio.run(run())


def test_first_tokens_ends_and_failures_do_not_wait() -> None:
    async def run() -> None:
        stream = Stream([Output(None), Output(None)], False, inbox=Inbox(busy_pace()))
        inbox, (outlet, other), core = stream.inbox, stream.outlets, Core()

        def is_rung() -> bool:
            return inbox._news.is_set()

        def taken() -> None:
            for each in inbox.take()[0]:
                each.is_fresh = False

        outlet.token(7, None, core)
        assert is_rung(), "its first token"
        taken()
        outlet.token(8, None, core)
        assert not is_rung()
        other.token(7, None, core)
        assert is_rung(), "the first of another output, which brings what waited"
        taken()
        outlet.token(9, None, core)
        assert not is_rung()
        outlet.end(OutputEnded(1, EndReason.STOP, RequestStats()))
        assert is_rung(), "an end, behind a token that waits"
        taken()
        stream.fail(ValueError())  # type: ignore[arg-type]
        assert is_rung()

    asyncio.run(run())
