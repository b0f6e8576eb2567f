"""Requests with a resume window, beside the core: who reads each of them now, what is kept of those that ended, until when.

The core knows a request by the front end and the handles that it came with, all its life. Here stands where its tokens go once
its stream has dropped: to nobody, and the request is detached, or to whoever resumed it. Says what is to be done, by values and
the time; calls no verb of the core and knows no socket. The tokens of what is alive are the core's, and are copied at Resume.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import msgspec
import numpy as np

from scheduler.core import Output
from wire import (
    AddHeader,
    AddRequest,
    OutputEnded,
    Refused,
    RestoreHeader,
    RestoreRequest,
    ResumeHeader,
    ResumeQuery,
    ResumeReply,
    TokenBatch,
    TokenBatchHeader,
)
from wire.messages import I32, U32

Key: TypeAlias = tuple[int, int]  # number of a front end, handle

_MOST_KEPT = 10_000  # requests that have ended
_MOST_KEPT_TOKENS = 8_000_000  # of their prompts, outputs and states, 4 bytes each
_ALL = np.iinfo(np.int32).max  # tokens: more than an output has
_MILLISECOND = 1_000_000


@dataclass(slots=True, eq=False)
class _Resumable:
    """A request with a resume window: alive, or kept after its end."""

    header: AddHeader  # with what the front ends must know
    key: Key  # of its first output, as the core knows it
    prompt: I32
    reader: Key | None  # who gets its tokens, and as which handle the first output's; None: nobody
    tokens: list[I32 | None]  # of each output that has ended
    ends: list[OutputEnded | None]
    num_live: int  # outputs
    resumed_ns: int = 0  # arrival of the call that reads it, if that is a Resume
    until_ns: int = 0  # when it is given up; 0: never, as it is read
    is_lost: bool = False  # an output has ended without its tokens

    @property
    def request_id(self) -> str:
        return self.header.request_id

    @property
    def window_ns(self) -> int:
        return self.header.resume_window_ms * _MILLISECOND

    @property
    def weight(self) -> int:
        """Tokens' worth of memory, once it has ended."""
        state = len(self.header.resume_state) // 4
        return len(self.prompt) + sum(len(tokens) for tokens in self.tokens if tokens is not None) + state

    def all_tokens(self, live_tokens: Callable[[Key], I32]) -> list[I32]:
        """Of each output. live_tokens: of one that has not ended."""
        return [live_tokens(key) if mine is None else mine for key, mine in zip(_keys(self), self.tokens, strict=True)]


class Resumption:
    """All requests with a resume window of one core. Times are CLOCK_MONOTONIC nanoseconds."""

    def __init__(
        self,
        max_unread_tokens: int,
        most: int = _MOST_KEPT,
        most_tokens: int = _MOST_KEPT_TOKENS,
        forgotten: Callable[[Key], None] = lambda key: None,
    ) -> None:
        """most, most_tokens: of requests kept after their end; then those that ended first are forgotten. forgotten: is told
        the first key of each request that can't be resumed any more."""
        self._forgotten = forgotten
        self._credit_after = max(1, max_unread_tokens // 4)  # tokens that came for nobody
        self._most, self._most_tokens = most, most_tokens
        self._by_id: dict[str, _Resumable] = {}
        self._by_first: dict[Key, _Resumable] = {}  # the same, by their first keys
        self._live: dict[Key, _Resumable] = {}  # by each output, as the core knows it, until all of them have ended
        self._kept: OrderedDict[_Resumable, int] = OrderedDict()  # that have ended, in that order, with their weights
        self._kept_tokens = 0
        self._routes: dict[int, dict[int, Key | None]] = {}  # of outputs whose reader is another one now, or nobody
        self._came_from: dict[Key, Key] = {}  # a reader that resumed → how the core knows the output
        self._untaken: dict[Key, int] = {}  # tokens that came since the core was told that they are taken, for nobody
        self._to_credit: set[Key] = set()
        self._due: list[tuple[int, int, _Resumable]] = []  # a heap of (until, a number, whose); an entry may be out of date
        self._num_entries = 0

    # ------------------------------------------------------------------------------------------------------- requests

    def added(self, add: AddRequest, frontend: int) -> None:
        """The core has accepted a request; an id names the newest."""
        header = add.header
        if (old := self._by_id.get(header.request_id)) is not None:
            self._forget(old)
        if not header.resume_window_ms:
            return
        request = _Resumable(
            header=header,
            key=(frontend, header.handle),
            prompt=add.prompt,
            reader=(frontend, header.handle),
            tokens=[None] * header.num_outputs,
            ends=[None] * header.num_outputs,
            num_live=header.num_outputs,
        )
        self._by_id[header.request_id] = self._by_first[request.key] = request
        for key in _keys(request):
            self._live[key] = request

    def restored(self, restored: RestoreRequest, frontend: int, now: int) -> None:
        """A request of a core that is gone. Nobody reads it, and its window begins anew."""
        header, ends = restored.header.add, restored.header.ended
        if (old := self._by_id.get(header.request_id)) is not None:
            self._forget(old)
        parts = np.split(restored.tokens, np.cumsum(restored.num_tokens)[:-1])
        request = _Resumable(
            header=header,
            key=(frontend, header.handle),
            prompt=restored.prompt,
            reader=None,
            tokens=[None if end is None else tokens for tokens, end in zip(parts, ends, strict=True)],
            ends=list(ends),
            num_live=ends.count(None),
        )
        self._by_id[header.request_id] = self._by_first[request.key] = request
        if not request.num_live:
            self._set_until(request, now)
            self._keep(request)
            return
        for key in _keys(request):
            self._live[key] = request
        self._detach(request, now)

    def snapshot(self, key: Key, live_tokens: Callable[[Key], I32]) -> RestoreRequest | None:
        """All that is known of a request, by its first key. None: it is forgotten. O(1) but for its tokens."""
        request = self._by_first.get(key)
        if request is None:
            return None
        tokens = request.all_tokens(live_tokens)
        return RestoreRequest(
            RestoreHeader(request.header, tuple(request.ends)),
            prompt=request.prompt,
            tokens=np.concatenate(tokens),
            num_tokens=np.array([len(mine) for mine in tokens], np.int32),
        )

    def core_key(self, frontend: int, handle: int) -> Key | None:
        """How the core knows what a front end calls by this handle; None: it has lost it to another reader."""
        key = self._came_from.get((frontend, handle))
        if key is not None:
            return key
        return None if handle in self._routes.get(frontend, ()) else (frontend, handle)

    def core_credits(self, frontend: int, handles: U32, num_tokens: I32) -> dict[int, tuple[U32, I32]]:
        """The same for what was taken: by front end, as the core knows them."""
        if not self._came_from and frontend not in self._routes:
            return {frontend: (handles, num_tokens)}
        found: dict[int, tuple[list[int], list[int]]] = {}
        for handle, count in zip(handles.tolist(), num_tokens.tolist(), strict=True):
            key = self.core_key(frontend, handle)
            if key is not None:
                mine = found.setdefault(key[0], ([], []))
                mine[0].append(key[1])
                mine[1].append(count)
        return {number: (np.array(keys, np.uint32), np.array(counts, np.int32)) for number, (keys, counts) in found.items()}

    def detach(self, key: Key, now: int) -> bool:
        """Its reader is gone. Whether this request, any of whose outputs the core knows so, goes on without one."""
        request = self._live.get(key)
        if request is not None:
            self._detach(request, now)
        return request is not None

    def frontend_lost(self, frontend: int, now: int) -> set[int]:
        """A front end is gone. First handles of the requests that came from it and go on all the same."""
        alive = self._alive()
        for request in alive:
            if request.reader is not None and request.reader[0] == frontend:
                self._detach(request, now)
        return {request.key[1] for request in alive if request.key[0] == frontend}

    def core_failed(self, last_words: list[Output], now: int, had: Callable[[Key], bool] = lambda key: True) -> list[Output]:
        """Another core begins, and knows nothing of what was alive. Returns to whom the old one's last words go. had: whether a
        request, by its first key, was that core's."""
        parts = [part for output in last_words for part in self.route(output, now)]
        for request in self._alive():
            if had(request.key):
                self._forget(request)
        return parts

    def resume(
        self, query: ResumeQuery, frontend: int, live_tokens: Callable[[Key], I32], now: int
    ) -> tuple[ResumeReply, tuple[int, Refused] | None]:
        """(the answer, after which everything new goes to this front end; what to tell which one that had it until now). A call
        that came earlier than its reader's has been overtaken, perhaps by its own caller, whose front end died: it is the one
        that is told, after the answer."""
        request = self._by_id.get(query.request_id)
        if request is None:
            return ResumeReply(ResumeHeader(query.query_id, query.handle, is_known=False)), None
        reader = (frontend, query.handle)
        if request.num_live and request.reader is not None and query.arrival_ns < request.resumed_ns:
            return self._resume_reply(query, request, live_tokens), _displaced(request, reader)
        displaced = _displaced(request, request.reader)
        self._set_reader(request, reader)
        request.resumed_ns, request.until_ns = query.arrival_ns, 0
        if request.num_live:
            self._to_credit.update(_keys(request))
        else:
            self._set_until(request, now)
        return self._resume_reply(query, request, live_tokens), displaced

    @staticmethod
    def _resume_reply(query: ResumeQuery, request: _Resumable, live_tokens: Callable[[Key], I32]) -> ResumeReply:
        tokens = request.all_tokens(live_tokens)
        ended = tuple(
            None if end is None else msgspec.structs.replace(end, handle=query.handle + index)
            for index, end in enumerate(request.ends)
        )
        return ResumeReply(
            ResumeHeader(query.query_id, query.handle, True, request.header.resume_state, ended),
            prompt=request.prompt,
            tokens=np.concatenate(tokens),
            num_tokens=np.array([len(mine) for mine in tokens], np.int32),
        )

    # -------------------------------------------------------------------------------------------------- what comes out

    def concerns(self, output: Output) -> bool:
        """Whether `route` has anything to do."""
        return output.frontend in self._routes or bool(self._live and output.batch.header.ended)

    def route(self, output: Output, now: int) -> list[Output]:
        """To whom each part of it goes; what ended is kept."""
        parts = self._split(output) if output.frontend in self._routes else [output]
        kept = dict(output.kept)
        for end in output.batch.header.ended:
            request = self._live.get((output.frontend, end.handle))
            if request is not None:
                self._ended(request, end, kept.get(end.handle), now)
        return parts

    def take_credits(self) -> dict[int, tuple[U32, I32]]:
        """By front end, as the core knows them: outputs of which all that came is taken."""
        due, self._to_credit = self._to_credit, set()
        by_frontend: dict[int, list[int]] = {}
        for frontend, handle in sorted(due):
            by_frontend.setdefault(frontend, []).append(handle)
        return {
            frontend: (np.array(handles, np.uint32), np.full(len(handles), _ALL, np.int32))
            for frontend, handles in by_frontend.items()
        }

    def next_due_ns(self) -> int:
        """When `expired` may have something; 0: never."""
        return self._due[0][0] if self._due else 0

    def expired(self, now: int) -> list[Key]:
        """Forgets those whose window is over; of each that is alive, how the core knows its first output."""
        given_up = []
        while self._due and self._due[0][0] <= now:
            until_ns, _, request = heapq.heappop(self._due)
            if request.until_ns == until_ns:
                if request.num_live:
                    given_up.append(request.key)
                self._forget(request)
        return given_up

    # ---------------------------------------------------------------------------------------------------------- inside

    def _alive(self) -> list[_Resumable]:
        return list({request.key: request for request in self._live.values()}.values())

    def _detach(self, request: _Resumable, now: int) -> None:
        self._set_reader(request, None)
        self._set_until(request, now)
        self._to_credit.update(_keys(request))

    def _set_reader(self, request: _Resumable, reader: Key | None) -> None:
        self._remove_routes(request)
        request.reader = reader
        if not request.num_live:
            return
        for index, key in enumerate(_keys(request)):
            to = None if reader is None else (reader[0], reader[1] + index)
            self._routes.setdefault(key[0], {})[key[1]] = to
            if to is None:
                self._untaken[key] = 0
            else:
                self._came_from[to] = key

    def _remove_routes(self, request: _Resumable) -> None:
        for key in _keys(request):
            routes = self._routes.get(key[0], {})
            reader = routes.pop(key[1], None)
            if reader is not None:
                del self._came_from[reader]
            if not routes:
                self._routes.pop(key[0], None)
            self._untaken.pop(key, None)

    def _set_until(self, request: _Resumable, now: int) -> None:
        request.until_ns = now + request.window_ns
        self._num_entries += 1
        heapq.heappush(self._due, (request.until_ns, self._num_entries, request))
        if len(self._due) > 2 * len(self._by_id) + 64:  # most are out of date: of requests that were resumed or forgotten
            self._due = [entry for entry in self._due if entry[2].until_ns == entry[0]]
            heapq.heapify(self._due)

    def _split(self, output: Output) -> list[Output]:
        """The core's batch for one front end, by those who read it now."""
        batch, routes = output.batch, self._routes[output.frontend]
        moved = np.isin(batch.handles, np.fromiter(routes, np.uint32, len(routes)))
        parts: dict[int, tuple[list[int], list[int], list[OutputEnded]]] = {}
        for handle, token in zip(batch.handles[moved].tolist(), batch.tokens[moved].tolist(), strict=True):
            reader = routes[handle]
            if reader is None:
                self._count((output.frontend, handle))
            else:
                part = parts.setdefault(reader[0], ([], [], []))
                part[0].append(reader[1])
                part[1].append(token)
        stay = []
        for end in batch.header.ended:
            if end.handle not in routes:
                stay.append(end)
            elif (reader := routes[end.handle]) is not None:
                part = parts.setdefault(reader[0], ([], [], []))
                part[2].append(msgspec.structs.replace(end, handle=reader[1]))
        step_id = batch.header.step_id
        outputs = [Output(number, _batch(step_id, *part)) for number, part in parts.items()]
        if stay or not moved.all():
            header = TokenBatchHeader(step_id, tuple(stay))
            outputs.append(Output(output.frontend, TokenBatch(header, batch.handles[~moved], batch.tokens[~moved])))
        return outputs

    def _count(self, key: Key) -> None:
        """A token that nobody reads: the core goes on only if it is told that it was taken."""
        self._untaken[key] += 1
        if self._untaken[key] >= self._credit_after:
            self._untaken[key] = 0
            self._to_credit.add(key)

    def _ended(self, request: _Resumable, end: OutputEnded, tokens: I32 | None, now: int) -> None:
        """tokens None: the core has failed, and nobody knows them."""
        index = end.handle - request.key[1]
        request.ends[index], request.tokens[index] = end, tokens
        request.num_live -= 1
        request.is_lost |= tokens is None
        if request.num_live:
            return
        self._leave(request)
        if request.is_lost:
            self._forget(request)
            return
        if not request.until_ns:
            self._set_until(request, now)
        self._keep(request)

    def _keep(self, request: _Resumable) -> None:
        """All of its outputs have ended."""
        self._kept[request] = weight = request.weight
        self._kept_tokens += weight
        while len(self._kept) > self._most or self._kept_tokens > self._most_tokens:
            self._forget(next(iter(self._kept)))

    def _forget(self, request: _Resumable) -> None:
        """Its entry in the heap may stay for a while, so it is emptied."""
        self._leave(request)
        del self._by_id[request.request_id], self._by_first[request.key]
        self._kept_tokens -= self._kept.pop(request, 0)
        request.header = msgspec.structs.replace(request.header, resume_state=b"")
        request.until_ns, request.prompt, request.tokens = 0, np.empty(0, np.int32), []
        self._forgotten(request.key)

    def _leave(self, request: _Resumable) -> None:
        """The core does not have it any more."""
        self._remove_routes(request)
        for key in _keys(request):
            self._live.pop(key, None)


def _keys(request: _Resumable) -> list[Key]:
    frontend, first = request.key
    return [(frontend, first + index) for index in range(len(request.ends))]


def _displaced(request: _Resumable, reader: Key | None) -> tuple[int, Refused] | None:
    """What a reader is told that has lost it: by an output that goes on, else it has all that it needs."""
    live = [index for index, end in enumerate(request.ends) if end is None]
    if reader is None or not live:
        return None
    frontend, handle = reader
    refused = Refused(handle + live[0], "ABORTED", "another call has resumed this request")
    refused.details = {"reason": "RESUMED_ELSEWHERE"}
    return frontend, refused


def _batch(step_id: int, handles: Sequence[int], tokens: Sequence[int], ended: Sequence[OutputEnded]) -> TokenBatch:
    header = TokenBatchHeader(step_id, tuple(ended))
    return TokenBatch(header, np.array(handles, np.uint32), np.array(tokens, np.int32))
