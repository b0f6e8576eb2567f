"""Many requests over one connection: commands come up, events of all requests go down, as many as are new in one message."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from carousel.v1 import generation_pb2 as pb
from scheduler.errors import InvalidFieldError, RequestError
from scheduler.frontend.callers import core_id
from scheduler.frontend.core_link import CoreLink
from scheduler.frontend.ledger import Entry, Ledger
from scheduler.frontend.server.authentication import caller
from scheduler.frontend.server.running import Running
from scheduler.frontend.server.status import Context, internal_error, status_message
from scheduler.frontend.streams import Inbox, Outlet, Stream
from wire import EndReason

Open = Callable[[pb.GenerateRequest, Inbox], Awaitable[Running]]  # raises RequestError

_MOST_EVENTS = 1000  # of one message
_IN_DUE_COURSE = (EndReason.STOP, EndReason.LENGTH)  # any other end is told at once, whatever the window


class _One:
    """A request of this connection."""

    def __init__(self, running: Running, window: int, entry: Entry) -> None:
        self.running, self.entry = running, entry
        self.window = window  # tokens sent and not credited, at most; 0: no window
        self.num_uncredited = 0  # negative: credit was given ahead
        self.waiting: set[Outlet] = set()  # of which something is new, and the window is full

    @property
    def is_full(self) -> bool:
        return 0 < self.window <= self.num_uncredited


class Many:
    def __init__(
        self, link: CoreLink, open_request: Open, context: Context, count: Callable[[int], None], ledger: Ledger
    ) -> None:
        """count: told how many more requests, or fewer, are under way."""
        self._link, self._open, self._context, self._count = link, open_request, context, count
        self._ledger = ledger
        self._inbox = Inbox(link.pace)
        self._of_stream: dict[Stream, _One] = {}
        self._by_id: dict[str, _One] = {}
        self._early: list[tuple[str, RequestError]] = []  # refused before it had a stream
        self._is_closed = False  # no more commands

    async def run(self, commands: AsyncIterator[pb.GenerateManyRequest]) -> None:
        """Until the caller has closed its side and all requests have ended."""
        reading = asyncio.create_task(self._read(commands))
        try:
            while not self._is_closed or self._of_stream or self._early:
                await self._inbox.wait()
                await self._write()
            await reading
        finally:
            reading.cancel()
            self._count(-len(self._of_stream))
            for stream, one in self._of_stream.items():
                self._link.drop(stream)
                one.entry.end(asyncio.CancelledError())

    # --------------------------------------------------------------------------------------------------------- commands

    async def _read(self, commands: AsyncIterator[pb.GenerateManyRequest]) -> None:
        """One after the other: a prompt that takes long to tokenize holds up the caller's next one, and no events."""
        try:
            async for command in commands:
                match command.WhichOneof("command"):
                    case "submit":
                        await self._submit(command.submit)
                    case "cancel":
                        await self._cancel(command.cancel.request_id)
                    case "credit":
                        self._credit(command.credit)
        finally:
            self._is_closed = True
            self._inbox.ring()

    async def _submit(self, submit: pb.Submit) -> None:
        request_id = submit.request.request_id
        entry = self._ledger.open(submit.request, self._context, caller())
        try:
            if not request_id:
                raise InvalidFieldError("request_id", "must be given, for the events to name it")
            if request_id in self._by_id:
                raise _AlreadyExistsError(f"request_id {request_id!r} is alive on this connection")
            running = entry.running = await self._open(submit.request, self._inbox)
            one = _One(running, submit.window_tokens, entry)
        except RequestError as error:
            self._refuse(request_id, error)
            entry.end(error)
        except Exception:
            self._refuse(request_id, internal_error("GenerateMany", exc_info=True))
            entry.end(RequestError("see the line before"))
        else:
            self._of_stream[one.running.stream] = self._by_id[request_id] = one
            self._count(1)

    def _refuse(self, request_id: str, error: RequestError) -> None:
        self._early.append((request_id, error))
        self._inbox.ring()

    async def _cancel(self, request_id: str) -> None:
        """Its outputs end as cancelled. One that has ended, or never was here: nothing."""
        if request_id in self._by_id:
            await self._link.cancel(core_id(caller(), request_id))

    def _credit(self, credit: pb.AddCredit) -> None:
        one = self._by_id.get(credit.request_id)
        if one is None:
            return
        one.num_uncredited -= credit.num_tokens
        if not one.is_full:
            waiting, one.waiting = one.waiting, set()
            for outlet in sorted(waiting, key=lambda outlet: outlet.index):
                one.running.stream.put(outlet)

    # ----------------------------------------------------------------------------------------------------------- events

    async def _write(self) -> None:
        """What is new now. While the transport is not free, more gathers, and goes out together."""
        outlets, failed = self._inbox.take()
        early, self._early = self._early, []
        for begin in range(0, max(1, len(outlets)), _MOST_EVENTS):
            response, given = pb.GenerateManyResponse(), []
            for outlet in outlets[begin : begin + _MOST_EVENTS]:
                given += self._take(outlet, response)
            if not begin:
                for request_id, error in early:
                    _fail(response, request_id, error)
                for stream in failed:
                    self._end(stream, response, stream.error)
            if response.events:
                await self._context.write(response)
            for outlet, num_received in given:
                outlet.accepted(num_received, self._link.report_after, self._link)

    def _take(self, outlet: Outlet, response: pb.GenerateManyResponse) -> list[tuple[Outlet, int]]:
        one = self._of_stream.get(outlet.stream)
        if one is None or outlet.stream.error is not None:  # it is over
            return []
        if one.is_full and (outlet.ended is None or outlet.ended.reason in _IN_DUE_COURSE):
            outlet.is_fresh = False
            one.waiting.add(outlet)
            return []
        one.waiting.discard(outlet)
        running, request_id = one.running, one.running.options.request_id
        first = len(response.events)
        num_received = running.take(outlet, lambda: response.events.add(request_id=request_id))
        if one.window:
            one.num_uncredited += sum(len(event.delta.token_ids) for event in response.events[first:])
        if running.has_ended:
            self._end(outlet.stream, response, None)
        return [(outlet, num_received)]

    def _end(self, stream: Stream, response: pb.GenerateManyResponse, error: RequestError | None) -> None:
        one = self._of_stream.pop(stream, None)
        if one is None:
            return
        request_id = one.running.options.request_id
        del self._by_id[request_id]
        self._count(-1)
        try:
            if error is not None:
                raise error
            summary = pb.Summary()
            one.running.summarize(summary)
            response.events.add(request_id=request_id, summary=summary)
            one.entry.end(None)
        except RequestError as failure:
            _fail(response, request_id, failure)
            one.entry.end(failure)
        self._link.drop(stream)


class _AlreadyExistsError(RequestError):
    status = "ALREADY_EXISTS"


def _fail(response: pb.GenerateManyResponse, request_id: str, error: RequestError) -> None:
    status = status_message(error)
    failed = pb.Failed(request_id=request_id, code=status.code, message=status.message, details=status.details)
    response.events.add(request_id=request_id, failed=failed)
