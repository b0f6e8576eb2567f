"""The front end's end of the link to the core: one DEALER socket, served by the event loop. No decisions, no text, no gRPC.

The socket's file descriptor tells only that something changed (edge-triggered), so all that has come is read whenever it
becomes readable, and after every send. When the connection breaks, everything that depended on the core fails at once, and
ZeroMQ connects again by itself; nothing here needs to survive that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import deque
from typing import TypeVar

import zmq
from zmq.utils.monitor import parse_monitor_message

from scheduler.errors import RefusedError, RequestError, UnavailableError
from scheduler.frontend.streams import Stream
from wire import (
    AbortRequest,
    AddRequest,
    CancelQuery,
    CancelReply,
    Facts,
    FrontendHello,
    LoadQuery,
    LoadReply,
    Message,
    Probe,
    Refused,
    StepRecord,
    TokenBatch,
    TruncateRequest,
    WatchSteps,
    WireError,
    decode,
    encode,
)

log = logging.getLogger(__name__)

_HEARTBEAT_MS = 2_000
_BURST = 16  # messages read in a row before the writers get their turn
_ANSWER_S = 10.0  # the core answers queries at once; later than this, something is wrong
_HANDLES = 1 << 32
_WATCHED_STEPS = 256  # records that wait for one slow watcher

ReplyT = TypeVar("ReplyT", CancelReply, LoadReply)


class Watcher:
    """One WatchSteps call: the newest records, and how many were left out because it was slow."""

    def __init__(self) -> None:
        self._records: deque[StepRecord] = deque()
        self._skipped = 0
        self._news = asyncio.Event()
        self._error: RequestError | None = None

    def put(self, record: StepRecord) -> None:
        if len(self._records) == _WATCHED_STEPS:
            self._records.popleft()
            self._skipped += 1
        self._records.append(record)
        self._news.set()

    def fail(self, error: RequestError) -> None:
        self._error = error
        self._news.set()

    async def next(self) -> tuple[StepRecord, int]:
        """(record, how many were left out before it)."""
        while not self._records:
            if self._error is not None:
                raise self._error
            self._news.clear()
            await self._news.wait()
        skipped, self._skipped = self._skipped, 0
        return self._records.popleft(), skipped


class CoreLink:
    """Belongs to the running event loop. `facts`: None while there is no connection."""

    def __init__(self, endpoint: str) -> None:
        self.facts: Facts | None = None
        self.facts_changed = asyncio.Event()  # set at each change; cleared by who follows it
        self._loop = asyncio.get_running_loop()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # what is said to a lost core is not kept for the next
        self._socket.setsockopt(zmq.SNDHWM, 0)  # bounded by the calls at once and their messages' size
        self._socket.setsockopt(zmq.RCVHWM, 0)  # bounded by max_tokens of each request
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._receive_scheduled = False
        self._streams: dict[int, Stream] = {}
        self._last_handle = 0
        self._queries: dict[int, asyncio.Future[CancelReply | LoadReply]] = {}
        self._last_query = 0
        self._watchers: set[Watcher] = set()
        self._loop.add_reader(self._socket.fileno(), self._receive)
        self._loop.add_reader(self._monitor.fileno(), self._hear_monitor)
        self._socket.connect(endpoint)
        self._schedule_receive()
        self._loop.call_soon(self._hear_monitor)

    def close(self) -> None:
        """Everything that still waits fails."""
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_reader(self._monitor.fileno())
        self._lose(UnavailableError("the server is shutting down", reason="DRAINING"))
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()
        self._context.term()

    # ------------------------------------------------------------------------------------------------ to the core

    def new_handle(self) -> int:
        self._last_handle = (self._last_handle + 1) % _HANDLES
        while self._last_handle in self._streams:
            self._last_handle = (self._last_handle + 1) % _HANDLES
        return self._last_handle

    def submit(self, add: AddRequest, stream: Stream) -> None:
        """Hands a request to the core; what comes back goes into `stream`, until it has ended or is dropped."""
        stream.handle = add.header.handle
        self._send(add)
        self._streams[stream.handle] = stream

    def drop(self, stream: Stream) -> None:
        """The reader is gone; does nothing when the request has ended."""
        if self._streams.pop(stream.handle, None) is not None:
            self._tell(AbortRequest(stream.handle))

    def truncate(self, handle: int, num_output_tokens: int) -> None:
        """A stop string was found."""
        self._tell(TruncateRequest(handle, num_output_tokens))

    async def cancel(self, request_id: str) -> CancelReply:
        """Raises UnavailableError."""
        return await self._ask(CancelQuery(self._new_query(), request_id), CancelReply)

    async def load(self) -> LoadReply:
        """Raises UnavailableError."""
        return await self._ask(LoadQuery(self._new_query()), LoadReply)

    def watch(self) -> Watcher:
        """The core's step records from now on, until `unwatch`. Raises UnavailableError."""
        if not self._watchers:
            self._send(WatchSteps(on=True))
        watcher = Watcher()
        self._watchers.add(watcher)
        return watcher

    def unwatch(self, watcher: Watcher) -> None:
        self._watchers.discard(watcher)
        if not self._watchers:
            self._tell(WatchSteps(on=False))

    def _new_query(self) -> int:
        self._last_query += 1
        return self._last_query

    async def _ask(self, query: CancelQuery | LoadQuery, kind: type[ReplyT]) -> ReplyT:
        answer: asyncio.Future[CancelReply | LoadReply] = self._loop.create_future()
        self._queries[query.query_id] = answer
        try:
            self._send(query)
            async with asyncio.timeout(_ANSWER_S):
                reply = await answer
        except TimeoutError:
            raise UnavailableError("the scheduler core does not answer") from None
        finally:
            del self._queries[query.query_id]
        assert isinstance(reply, kind)
        return reply

    def _send(self, message: Message) -> None:
        self._schedule_receive()
        events = self._socket.getsockopt(zmq.EVENTS)  # sending alone may not have noticed a new connection
        assert isinstance(events, int)
        if not events & zmq.POLLOUT:
            raise UnavailableError("the scheduler core is not connected")
        self._socket.send_multipart(encode(message), zmq.NOBLOCK, copy=False)

    def _tell(self, message: Message) -> None:
        """Sends what needs no telling to a core that is gone."""
        with contextlib.suppress(UnavailableError):
            self._send(message)

    # ---------------------------------------------------------------------------------------------- from the core

    def _schedule_receive(self) -> None:
        if not self._receive_scheduled:
            self._receive_scheduled = True
            self._loop.call_soon(self._receive)

    def _receive(self) -> None:
        self._receive_scheduled = False
        if self._read(_BURST) == _BURST:
            self._schedule_receive()

    def _read(self, limit: int) -> int:
        """Takes in messages that have come, at most `limit`; returns how many."""
        for count in range(limit):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.ZMQError:  # nothing more, or closed
                return count
            try:
                self._hear(decode(frames))
            except WireError as error:
                log.warning("dropped a message from the core: %s", error)
            except Exception:  # our mistake, which must not keep the other streams from their messages
                log.exception("a message from the core could not be handled")
        return limit

    def _hear(self, message: Message) -> None:
        match message:
            case TokenBatch():
                self._tokens(message)
            case Facts():
                self.facts = message
                self.facts_changed.set()
            case Refused(handle=handle):
                stream = self._streams.pop(handle, None)
                if stream is not None:
                    field, retry_after_ns = message.field, message.retry_after_ns
                    stream.fail(RefusedError(message.code, message.message, field=field, retry_after_ns=retry_after_ns))
            case CancelReply(query_id=query_id) | LoadReply(query_id=query_id):
                answer = self._queries.get(query_id)
                if answer is not None and not answer.done():
                    answer.set_result(message)
            case StepRecord():
                for watcher in self._watchers:
                    watcher.put(message)
            case Probe():
                pass
            case _:
                log.warning("the core sent %s, which is not for a front end", type(message).__name__)

    def _tokens(self, batch: TokenBatch) -> None:
        """Handles that are not known any more are of streams that were dropped a moment ago."""
        streams = self._streams
        ended = {end.handle: end for end in batch.header.ended}
        for handle, token in zip(batch.handles.tolist(), batch.tokens.tolist(), strict=True):
            stream = streams.get(handle)
            if stream is not None:
                end = ended.pop(handle, None)
                if end is not None:
                    del streams[handle]
                stream.token(token, end, self)
        for handle, end in ended.items():
            stream = streams.pop(handle, None)
            if stream is not None:
                stream.end(end)

    # ------------------------------------------------------------------------------------------ the connection itself

    def _hear_monitor(self) -> None:
        while True:
            try:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))["event"]
            except zmq.ZMQError:
                return
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._send(FrontendHello(os.getpid()))
            else:
                while self._read(_BURST):  # what it said before it went
                    pass
                log.warning("the connection to the core is lost")
                self._lose(UnavailableError("the scheduler core is gone"))

    def _lose(self, error: UnavailableError) -> None:
        self.facts = None
        self.facts_changed.set()
        streams, self._streams = self._streams, {}
        watchers, self._watchers = self._watchers, set()
        for stream in streams.values():
            stream.fail(error)
        for watcher in watchers:
            watcher.fail(error)
        for answer in self._queries.values():
            if not answer.done():
                answer.set_exception(error)
