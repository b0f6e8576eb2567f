"""When a front end has more to write than it has time for, tokens gather a little longer and go out in fewer, larger messages.

A message costs much more than a token in it. Without this a front end that is busy all the time still answers, but everything
new, a refusal too, waits behind the writing. First tokens and ends never wait here. Belongs to the running event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

_LOOK_S = 0.05  # between two looks at how busy the process is
_BUSY, _IDLE = 0.75, 0.6  # of a processor: above the one writers wait longer, below the other less long
_LEAST_S, _MOST_S = 0.004, 0.05
_PAUSE_S = 1.0  # without a look: what was before says nothing any more
_STEP = 1.4  # by which the wait grows or shrinks at a look


class Pace:
    """Wakes writers, at once or all together after `wait_s`. clock, processor: seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, processor: Callable[[], float] = time.process_time) -> None:
        self.wait_s = 0.0
        self._clock, self._processor = clock, processor
        self._looked_s, self._spent_s = clock(), processor()
        self._asleep: list[asyncio.Event] = []

    def look(self) -> None:
        """As often as one likes: how busy the process is decides how long writers wait."""
        now_s = self._clock()
        passed_s = now_s - self._looked_s
        if passed_s < _LOOK_S:
            return
        spent_s = self._processor()
        share = (spent_s - self._spent_s) / passed_s
        self._looked_s, self._spent_s = now_s, spent_s
        if share > _BUSY:
            self.wait_s = min(_MOST_S, max(_LEAST_S, self.wait_s * _STEP))
        elif share < _IDLE:
            shorter_s = self.wait_s / _STEP
            self.wait_s = shorter_s if shorter_s >= _LEAST_S and passed_s < _PAUSE_S else 0.0

    def wake(self, news: asyncio.Event) -> None:
        """Who waits for this, soon."""
        if not self.wait_s:
            news.set()
            return
        if not self._asleep:
            asyncio.get_running_loop().call_later(self.wait_s, self._wake_all)
        self._asleep.append(news)

    def _wake_all(self) -> None:
        asleep, self._asleep = self._asleep, []
        for news in asleep:
            news.set()
