"""One request between the core's messages and its writer: what came in gathers here until the writer is free.

The core link puts tokens and ends in, output by output; the call's handler waits, takes and writes. So deltas merge while the
reader is slow. What gathers is bounded: the core computes no more of an output than `max_unread_tokens` beyond what `accepted`
reports. Knows nothing of gRPC and of sockets.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Protocol, TypeAlias

from scheduler.errors import RequestError
from scheduler.frontend.output import Output
from scheduler.frontend.pace import Pace
from wire import OutputEnded
from wire.messages import F32, I32

# Of one token: log-probabilities and the ids that they are of, its own first, then the most likely ones.
Told: TypeAlias = tuple[list[float], list[int]]

_REPLAYED_AT_ONCE = 500  # tokens; some milliseconds where stop strings are looked for


class ToCore(Protocol):
    """What a stream tells the core."""

    def truncate(self, handle: int, num_output_tokens: int) -> None: ...

    def credit(self, handle: int, num_tokens: int) -> None: ...


class Outlet:
    """One output of a request; the core knows it by its handle."""

    __slots__ = (
        "_num_reported",
        "_truncated",
        "ended",
        "handle",
        "index",
        "is_fresh",
        "logprobs",
        "num_received",
        "output",
        "stream",
    )

    def __init__(self, stream: Stream, index: int, output: Output) -> None:
        self.index = index
        self.output = output
        self.handle = -1  # once it is submitted
        self.ended: OutputEnded | None = None
        self.num_received = 0  # tokens, also those that are held back or left out
        self.is_fresh = False  # it is in the inbox, or with the writer, who has not looked at it yet
        self._num_reported = 0  # of these, reported to the core as accepted
        self.logprobs: dict[int, Told] = {}  # of tokens that did not go out yet, by their place in the output
        self.stream = stream
        self._truncated = False

    def token(self, token: int, ended: OutputEnded | None, core: ToCore) -> None:
        """A token, and the output's end if this was its last."""
        self.num_received += 1
        output = self.output
        if ended is not None:
            if self.stream.include_stop or ended.stop_token_id != token:
                output.push(token)
            self.end(ended)
            return
        output.push(token)
        if output.stop_string and not self._truncated:
            self._truncated = True
            core.truncate(self.handle, output.num_tokens)
        if not self.is_fresh:
            self.stream.put(self, is_first=self.num_received == 1)

    def tell(self, position: int, logprobs: F32, token_ids: I32) -> None:
        """Of the tokens at `position` of the sequence and behind it. What is told twice, after a recompute, is the same."""
        entries = zip(logprobs.tolist(), token_ids.tolist(), strict=True)
        for i, told in enumerate(entries, position - self.stream.num_prompt):
            if i < 0:
                self.stream.prompt_logprobs[i + self.stream.num_prompt] = told
            else:
                self.logprobs[i] = told

    def end(self, ended: OutputEnded) -> None:
        self.output.finish()
        self.ended = ended
        self.stream.put(self)

    def accepted(self, num_received: int, report_after: int, core: ToCore) -> None:
        """The reader's side has taken all that came of the first `num_received` tokens. Reported once it is `report_after`
        tokens: a quarter of what the core lets gather, so that it never waits for the rest."""
        unreported = num_received - self._num_reported
        if unreported >= report_after and self.ended is None:
            self._num_reported = num_received
            core.credit(self.handle, unreported)


class ResumedOutlet(Outlet):
    """One of a request that was resumed: it begins with all that it has ever brought. Until that is replayed, what comes waits
    behind it."""

    __slots__ = ("_last_end", "_waiting")

    def __init__(self, stream: Stream, index: int, output: Output, tokens: Sequence[int], ended: OutputEnded | None) -> None:
        """tokens, ended: what the core said at Resume; these tokens count as accepted."""
        super().__init__(stream, index, output)
        self._num_reported = len(tokens)
        self._waiting: deque[int] | None = deque(tokens)  # None: all is replayed
        self._last_end = ended

    def token(self, token: int, ended: OutputEnded | None, core: ToCore) -> None:
        if self._waiting is None:
            super().token(token, ended, core)
        else:
            self._waiting.append(token)
            self._last_end = ended

    def end(self, ended: OutputEnded) -> None:
        if self._waiting:
            self._last_end = ended
        else:
            super().end(ended)

    async def replay(self, core: ToCore) -> None:
        """A part at a time, so that a long output holds up no other stream."""
        assert self._waiting is not None
        while self._waiting:
            for _ in range(min(_REPLAYED_AT_ONCE, len(self._waiting))):
                token = self._waiting.popleft()
                super().token(token, None if self._waiting else self._last_end, core)
            await asyncio.sleep(0)
        self._waiting = None
        if self._last_end is not None and self.ended is None:
            super().end(self._last_end)


class Inbox:
    """Where a writer finds what is new: of one stream, or of many that share it."""

    def __init__(self, pace: Pace | None = None) -> None:
        """pace: of all writers; None: each is woken at once."""
        self._pace = pace
        self._fresh: deque[Outlet] = deque()  # whose turn it is
        self._failed: deque[Stream] = deque()
        self._news = asyncio.Event()

    def put(self, outlet: Outlet, is_urgent: bool = True) -> None:
        self._fresh.append(outlet)
        if is_urgent or self._pace is None:
            self._news.set()
        else:
            self._pace.wake(self._news)

    def put_failed(self, stream: Stream) -> None:
        self._failed.append(stream)
        self._news.set()

    def ring(self) -> None:
        """The writer looks, though nothing may be new."""
        self._news.set()

    async def wait(self) -> None:
        """Until something is new."""
        await self._news.wait()

    def take(self) -> tuple[list[Outlet], list[Stream]]:
        """All that is new: outputs, which stay fresh until each is looked at, and streams that were refused or lost."""
        self._news.clear()
        outlets, failed = list(self._fresh), list(self._failed)
        self._fresh.clear()
        self._failed.clear()
        return outlets, failed


class Stream:
    """A request, alive from its AddRequest until all its outputs have ended, it is refused, or its handler ends."""

    def __init__(self, outputs: Sequence[Output], include_stop: bool, num_prompt: int = 0, inbox: Inbox | None = None) -> None:
        self.outlets: Sequence[Outlet] = [Outlet(self, index, output) for index, output in enumerate(outputs)]
        self.include_stop = include_stop
        self.num_prompt = num_prompt  # tokens
        self.prompt_logprobs: dict[int, Told] = {}  # by position
        self.error: RequestError | None = None  # why it was refused or lost
        self.inbox = inbox or Inbox()

    def put(self, outlet: Outlet, is_first: bool = False) -> None:
        """Something is new of this output."""
        if not outlet.is_fresh:
            outlet.is_fresh = True
            self.inbox.put(outlet, is_first or outlet.ended is not None)
        elif outlet.ended is not None:
            self.inbox.ring()

    def fail(self, error: RequestError) -> None:
        self.error = error
        self.inbox.put_failed(self)


class ResumedStream(Stream):
    """Of a request that was resumed; its outlets are put in by who makes it, and are replayed before anything is taken."""

    outlets: Sequence[ResumedOutlet]

    def __init__(self, include_stop: bool, num_prompt: int, inbox: Inbox | None = None) -> None:
        super().__init__((), include_stop, num_prompt, inbox)
