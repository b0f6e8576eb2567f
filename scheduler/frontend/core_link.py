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
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import msgspec
import numpy as np
import zmq
from zmq.utils.monitor import parse_monitor_message

from scheduler.errors import RefusedError, RequestError, UnavailableError
from scheduler.frontend.pace import Pace
from scheduler.frontend.streams import Outlet, ResumedStream, Stream
from wire import (
    AbortRequest,
    AddRequest,
    BlockTablesQuery,
    BlockTablesReply,
    CancelQuery,
    CancelReply,
    Credit,
    DrainQuery,
    DrainReply,
    ExplainQuery,
    ExplainReply,
    Facts,
    FrontendHello,
    ListQuery,
    ListReply,
    LoadQuery,
    LoadReply,
    Logprobs,
    Message,
    Probe,
    Refused,
    ReplaceQuery,
    ReplaceReply,
    ResumeQuery,
    ResumeReply,
    SetPolicyQuery,
    SetPolicyReply,
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
_CORE_AGAIN_NS = 200_000_000  # a core that died may be back so soon
_WATCHED_STEPS = 256  # records that wait for one slow watcher

_NEVER = 1 << 62  # tokens: no output has so many

Query: TypeAlias = (
    CancelQuery | LoadQuery | SetPolicyQuery | DrainQuery | ReplaceQuery | ListQuery | ExplainQuery | BlockTablesQuery
)
Reply: TypeAlias = (
    CancelReply | LoadReply | SetPolicyReply | DrainReply | ReplaceReply | ListReply | ExplainReply | BlockTablesReply
)
ReplyT = TypeVar(
    "ReplyT", CancelReply, LoadReply, SetPolicyReply, DrainReply, ReplaceReply, ListReply, ExplainReply, BlockTablesReply
)


@dataclass(slots=True)
class _Resuming:
    """A Resume that waits for the core's answer."""

    make: Callable[[ResumeReply], ResumedStream]
    opened: asyncio.Future[tuple[ResumeReply, ResumedStream] | None]
    stream: ResumedStream | None = None  # that is fed already


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
        self.report_after = _NEVER  # tokens of an output that its reader accepted, before the core is told
        self.pace = Pace()  # of the writers of all that the core sends
        self._loop = asyncio.get_running_loop()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # what is said to a lost core is not kept for the next
        self._socket.setsockopt(zmq.SNDHWM, 0)  # bounded by the calls at once and their messages' size
        self._socket.setsockopt(zmq.RCVHWM, 0)  # bounded by the core: max_unread_tokens of each output
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._receive_scheduled = False
        self._is_connected = False  # else nothing is sent: the core hears FrontendHello before all else
        self._outlets: dict[int, Outlet] = {}  # by handle
        self._last_handle = 0
        self._credits: dict[int, int] = {}  # tokens by handle, to be told
        self._queries: dict[int, asyncio.Future[Reply]] = {}
        self._resuming: dict[int, _Resuming] = {}  # by query
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

    def new_handle(self, num_outputs: int) -> int:
        """The first of so many consecutive ones."""
        first = self._last_handle + 1
        while not self._are_free(first, num_outputs):
            first = first + 1 if first + num_outputs < _HANDLES else 0
        self._last_handle = first + num_outputs - 1
        return first

    def _are_free(self, first: int, count: int) -> bool:
        return first + count <= _HANDLES and not any(handle in self._outlets for handle in range(first, first + count))

    def submit(self, add: AddRequest, stream: Stream) -> None:
        """Hands a request to the core; what comes back goes into `stream`, until its outputs have ended or it is dropped."""
        self._send(add)
        for outlet in stream.outlets:
            outlet.handle = add.header.handle + outlet.index
            self._outlets[outlet.handle] = outlet

    def drop(self, stream: Stream) -> None:
        """The reader is gone; does nothing when the request has ended. One with a resume window goes on."""
        if self._forget(stream):
            self._tell(AbortRequest(stream.outlets[0].handle))

    def truncate(self, handle: int, num_output_tokens: int) -> None:
        """A stop string was found."""
        self._tell(TruncateRequest(handle, num_output_tokens))

    def credit(self, handle: int, num_tokens: int) -> None:
        """The reader accepted so many more tokens; all that is said in one turn of the loop goes in one message."""
        if not self._credits:
            self._loop.call_soon(self._tell_credits)
        self._credits[handle] = self._credits.get(handle, 0) + num_tokens

    def _tell_credits(self) -> None:
        credits, self._credits = self._credits, {}
        if credits:  # else the core is lost since
            num_tokens = np.fromiter(credits.values(), np.int32, len(credits))
            self._tell(Credit(num_tokens=num_tokens, handles=np.fromiter(credits, np.uint32, len(credits))))

    def _forget(self, stream: Stream) -> bool:
        """Whether any of its outputs had not ended."""
        live = [outlet for outlet in stream.outlets if self._outlets.pop(outlet.handle, None) is not None]
        return bool(live)

    async def cancel(self, request_id: str) -> CancelReply:
        """Raises UnavailableError."""
        return await self._ask(CancelQuery(self._new_query(), request_id), CancelReply)

    async def resume(
        self, request_id: str, most_outputs: int, arrival_ns: int, make: Callable[[ResumeReply], ResumedStream]
    ) -> tuple[ResumeReply, ResumedStream] | None:
        """Takes over a request with a resume window; to be dropped in the end. `make` makes a stream of the core's answer, and
        what comes from then on goes into it: nothing is missed. None: no such request is kept. Raises UnavailableError."""
        query = ResumeQuery(self._new_query(), request_id, self.new_handle(most_outputs), arrival_ns)
        resuming = self._resuming[query.query_id] = _Resuming(make, self._loop.create_future())
        try:
            self._send(query)
            async with asyncio.timeout(_ANSWER_S):
                return await resuming.opened
        except BaseException as error:
            if resuming.stream is not None:  # cancelled at the very moment
                self.drop(resuming.stream)
            if isinstance(error, TimeoutError):
                raise UnavailableError("the scheduler core does not answer") from None
            raise
        finally:
            del self._resuming[query.query_id]

    async def load(self) -> LoadReply:
        """Raises UnavailableError."""
        return await self._ask(LoadQuery(self._new_query()), LoadReply)

    async def set_policy(self, policy: str) -> SetPolicyReply:
        """Raises UnavailableError."""
        reply = await self._ask(SetPolicyQuery(self._new_query(), policy), SetPolicyReply)
        if self.facts is not None:  # the core tells all front ends, but whoever asked may not look at it too early
            self.facts = msgspec.structs.replace(self.facts, policy=reply.policy)
        return reply

    async def drain(self, timeout_ms: int) -> DrainReply:
        """timeout_ms: what those alive get at most; negative: as configured. Raises UnavailableError."""
        return await self._ask(DrainQuery(self._new_query(), timeout_ms), DrainReply)

    async def replace_worker(self, device: str, group: int) -> ReplaceReply:
        """group: -1: the first that has a worker. Answered once the new worker computes: the caller's deadline is the only one.
        Raises UnavailableError."""
        return await self._ask(ReplaceQuery(self._new_query(), device, group), ReplaceReply, None)

    async def list_requests(self, after: int, limit: int) -> ListReply:
        """after: `next` of the reply before, 0 for the first. Raises UnavailableError."""
        return await self._ask(ListQuery(self._new_query(), after, limit), ListReply)

    async def explain(self, request_id: str) -> ExplainReply:
        """Raises UnavailableError."""
        return await self._ask(ExplainQuery(self._new_query(), request_id), ExplainReply)

    async def block_tables(self, group: int) -> BlockTablesReply:
        """Raises UnavailableError."""
        return await self._ask(BlockTablesQuery(self._new_query(), group), BlockTablesReply)

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

    async def _ask(self, query: Query, kind: type[ReplyT], timeout_s: float | None = _ANSWER_S) -> ReplyT:
        answer: asyncio.Future[Reply] = self._loop.create_future()
        self._queries[query.query_id] = answer
        try:
            self._send(query)
            async with asyncio.timeout(timeout_s):
                reply = await answer
        except TimeoutError:
            raise UnavailableError("the scheduler core does not answer") from None
        finally:
            del self._queries[query.query_id]
        assert isinstance(reply, kind)
        return reply

    def _send(self, message: Message) -> None:
        """Raises UnavailableError, also when the connection breaks at this very moment."""
        self._schedule_receive()
        if self._is_connected:
            self._socket.getsockopt(zmq.EVENTS)  # sending alone may not have noticed a new connection
            with contextlib.suppress(zmq.Again):
                self._socket.send_multipart(encode(message), zmq.NOBLOCK, copy=False)
                return
        raise UnavailableError("the scheduler core is not connected", retry_after_ns=_CORE_AGAIN_NS)

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
                self.pace.look()
                self._tokens(message)
            case Logprobs():
                self._logprobs(message)
            case Facts():
                self.facts = message
                self.facts_changed.set()
                self.report_after = max(1, message.max_unread_tokens // 4) if message.max_unread_tokens else _NEVER
            case Refused():
                self._refused(message)
            case CancelReply() | LoadReply() | SetPolicyReply() | DrainReply() | ListReply() | ExplainReply():
                self._answer(message.query_id, message)
            case ReplaceReply():
                self._answer(message.query_id, message)
            case BlockTablesReply():
                self._answer(message.header.query_id, message)
            case ResumeReply():
                self._resumed(message)
            case StepRecord():
                for watcher in self._watchers:
                    watcher.put(message)
            case Probe():
                pass
            case _:
                log.warning("the core sent %s, which is not for a front end", type(message).__name__)

    def _tokens(self, batch: TokenBatch) -> None:
        """Handles that are not known any more are of streams that were dropped a moment ago."""
        outlets = self._outlets
        ended = {end.handle: end for end in batch.header.ended}
        for handle, token in zip(batch.handles.tolist(), batch.tokens.tolist(), strict=True):
            outlet = outlets.get(handle)
            if outlet is not None:
                end = ended.pop(handle, None) if ended else None
                if end is not None:
                    del outlets[handle]
                outlet.token(token, end, self)
        for handle, end in ended.items():
            outlet = outlets.pop(handle, None)
            if outlet is not None:
                outlet.end(end)

    def _logprobs(self, message: Logprobs) -> None:
        at = 0
        for run in message.header.runs:
            end = at + run.num_tokens * (1 + run.num_best)
            outlet = self._outlets.get(run.row)
            if outlet is not None:
                shape = (run.num_tokens, 1 + run.num_best)
                outlet.tell(run.position, message.logprobs[at:end].reshape(shape), message.token_ids[at:end].reshape(shape))
            at = end

    def _refused(self, refused: Refused) -> None:
        outlet = self._outlets.get(refused.handle)
        if outlet is not None:
            self._forget(outlet.stream)
            field, retry_after_ns = refused.field, refused.retry_after_ns
            error = RefusedError(
                refused.code, refused.message, field=field, retry_after_ns=retry_after_ns, metadata=refused.details
            )
            outlet.stream.fail(error)

    def _resumed(self, reply: ResumeReply) -> None:
        """At once: the next message may hold its next token."""
        header, resuming = reply.header, self._resuming.get(reply.header.query_id)
        if resuming is None or resuming.opened.done():
            if header.is_known:  # whoever asked is gone
                self._tell(AbortRequest(header.handle))
            return
        if not header.is_known:
            resuming.opened.set_result(None)
            return
        try:
            stream = resuming.stream = resuming.make(reply)
        except Exception as error:  # our mistake, which is the call's to tell
            self._tell(AbortRequest(header.handle))
            resuming.opened.set_exception(error)
            return
        for outlet, ended in zip(stream.outlets, header.ended, strict=True):
            outlet.handle = header.handle + outlet.index
            if ended is None:
                self._outlets[outlet.handle] = outlet
        resuming.opened.set_result((reply, stream))

    def _answer(self, query_id: int, reply: Reply) -> None:
        answer = self._queries.get(query_id)
        if answer is not None and not answer.done():
            answer.set_result(reply)

    # ------------------------------------------------------------------------------------------ the connection itself

    def _hear_monitor(self) -> None:
        while True:
            try:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))["event"]
            except zmq.ZMQError:
                return
            self._is_connected = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            if self._is_connected:
                self._tell(FrontendHello(os.getpid()))
            else:
                while self._read(_BURST):  # what it said before it went
                    pass
                log.warning("the connection to the core is lost")
                gone = "the scheduler core is gone"
                self._lose(UnavailableError(gone, reason="CORE_LOST", retry_after_ns=_CORE_AGAIN_NS))

    def _lose(self, error: UnavailableError) -> None:
        self.facts = None
        self.facts_changed.set()
        self._credits = {}
        outlets, self._outlets = self._outlets, {}
        watchers, self._watchers = self._watchers, set()
        for outlet in outlets.values():
            outlet.stream.fail(error)
        for watcher in watchers:
            watcher.fail(error)
        for answer in self._queries.values():
            if not answer.done():
                answer.set_exception(error)
        for resuming in self._resuming.values():
            if not resuming.opened.done():
                resuming.opened.set_exception(error)
