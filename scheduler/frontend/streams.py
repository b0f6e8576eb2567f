"""One request between the core's messages and its writer: what came in gathers here until the writer is free.

The core link puts tokens and the end in; the call's handler waits, takes and writes. So deltas merge while the reader is slow,
and what gathers is bounded by the request's max_tokens. Knows nothing of gRPC and of sockets.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from scheduler.errors import RequestError
from scheduler.frontend.output import Output
from wire import OutputEnded


class ToCore(Protocol):
    """What a stream tells the core."""

    def truncate(self, handle: int, num_output_tokens: int) -> None: ...


class Stream:
    """Alive from the AddRequest to OutputEnded, Refused, or the handler's end."""

    def __init__(self, output: Output, include_stop: bool) -> None:
        self.output = output
        self.handle = -1  # once it is submitted
        self.ended: OutputEnded | None = None
        self._include_stop = include_stop
        self._truncated = False
        self._error: RequestError | None = None
        self._news = asyncio.Event()

    async def wait(self) -> None:
        """Until there is something new. Raises what ended the request, if it was refused or lost."""
        await self._news.wait()
        self._news.clear()
        if self._error is not None:
            raise self._error

    def token(self, token: int, ended: OutputEnded | None, core: ToCore) -> None:
        """A token, and the output's end if this was its last."""
        is_stop = ended is not None and ended.stop_token_id == token
        if self._include_stop or not is_stop:
            self.output.push(token)
        if ended is not None:
            self.end(ended)
            return
        if self.output.stop_string and not self._truncated:
            self._truncated = True
            core.truncate(self.handle, self.output.num_tokens)
        self._news.set()

    def end(self, ended: OutputEnded) -> None:
        self.output.finish()
        self.ended = ended
        self._news.set()

    def fail(self, error: RequestError) -> None:
        self._error = error
        self._news.set()
