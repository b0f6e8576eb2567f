"""The link's own book-keeping, without a core: which handles it gives out, and what it gathers to tell."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
import zmq

from scheduler.errors import RequestError, UnavailableError
from scheduler.frontend.core_link import CoreLink
from scheduler.frontend.output import Output
from scheduler.frontend.resumption import resumed_stream
from scheduler.frontend.streams import ResumedStream, Stream
from wire import (
    AbortRequest,
    AddHeader,
    AddRequest,
    Credit,
    EndReason,
    FrontendHello,
    Message,
    OutputEnded,
    Refused,
    RequestStats,
    ResumeHeader,
    ResumeQuery,
    ResumeReply,
    SamplingSpec,
    TokenBatch,
    TokenBatchHeader,
    decode,
    encode,
)

LAST = 2**32 - 1


def with_link(tmp_path: Path, act: Callable[[CoreLink, list[Message]], object]) -> None:
    """`act` gets a link that nobody answers, and all that it says."""

    async def run() -> None:
        link, said = CoreLink(f"ipc://{tmp_path}/core"), []
        link._send = said.append  # type: ignore[method-assign]
        try:
            act(link, said)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        finally:
            link.close()

    asyncio.run(run())


def submit(link: CoreLink, num_outputs: int) -> Stream:
    stream = Stream([Output(None) for _ in range(num_outputs)], include_stop=False)
    sampling = SamplingSpec(0.0, 0, 1.0, 0.0, 0)
    handle = link.new_handle(num_outputs)
    link.submit(AddRequest(AddHeader(handle, "r", 0, 2, 0, sampling, num_outputs=num_outputs)), stream)
    return stream


def handles(stream: Stream) -> list[int]:
    return [outlet.handle for outlet in stream.outlets]


@pytest.mark.parametrize(
    ("last", "num_outputs", "expected"),
    [(0, 1, 1), (LAST - 4, 4, LAST - 3), (LAST - 3, 4, 0), (LAST - 1, 1, LAST), (LAST, 1, 0), (LAST, 64, 0)],
)
def test_handles_go_up_and_begin_anew_without_a_gap_in_a_request(
    last: int, num_outputs: int, expected: int, tmp_path: Path
) -> None:
    def act(link: CoreLink, said: list[Message]) -> None:
        link._last_handle = last
        assert handles(submit(link, num_outputs)) == list(range(expected, expected + num_outputs))

    with_link(tmp_path, act)


def test_handles_in_use_are_passed_over(tmp_path: Path) -> None:
    def act(link: CoreLink, said: list[Message]) -> None:
        link._last_handle = LAST
        old = submit(link, 3)  # 0, 1, 2
        link._last_handle = LAST - 1
        assert handles(submit(link, 2)) == [3, 4]
        link.drop(old)
        link._last_handle = LAST
        assert handles(submit(link, 3)) == [0, 1, 2]

    with_link(tmp_path, act)


def test_credits_of_one_turn_are_one_message(tmp_path: Path) -> None:
    def act(link: CoreLink, said: list[Message]) -> None:
        loop = asyncio.get_running_loop()
        link.credit(5, 10)
        link.credit(7, 1)
        link.credit(5, 4)
        assert not said
        loop.call_soon(lambda: check(said))

    def check(said: list[Message]) -> None:
        [credit] = said
        assert isinstance(credit, Credit)
        assert dict(zip(credit.handles.tolist(), credit.num_tokens.tolist(), strict=True)) == {5: 14, 7: 1}

    with_link(tmp_path, act)


def test_a_request_is_aborted_once_by_its_first_handle(tmp_path: Path) -> None:
    def act(link: CoreLink, said: list[Message]) -> None:
        stream = submit(link, 3)
        link.drop(stream)
        link.drop(stream)
        assert said[1:] == [AbortRequest(stream.outlets[0].handle)]

    with_link(tmp_path, act)


# ---------------------------------------------------------------------------------------------------------- connection


class BreakingSocket:
    """Its connection breaks while a message is sent: after the first part, or before it."""

    def __init__(self, socket: zmq.Socket[bytes], break_it: Callable[[], None], after_first: bool) -> None:
        self._socket, self._break_it, self._after_first = socket, break_it, after_first

    def __getattr__(self, name: str) -> object:
        return getattr(self._socket, name)

    def send_multipart(self, parts: list[bytes], flags: int, copy: bool) -> None:
        if self._after_first:
            self._socket.send(parts[0], flags | zmq.SNDMORE)
            parts = parts[1:]
        self._break_it()
        self._socket.send_multipart(parts, flags, copy=copy)


@pytest.mark.parametrize("after_first", [False, True])
def test_a_connection_that_breaks_while_something_is_sent_is_unavailable_and_the_next_core_hears_all(
    after_first: bool, tmp_path: Path
) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    endpoint = f"ipc://{tmp_path}/core"

    def core() -> zmq.Socket[bytes]:
        socket = context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, 10_000)
        socket.bind(endpoint)
        return socket

    async def heard(socket: zmq.Socket[bytes]) -> list[bytes]:
        return (await asyncio.to_thread(socket.recv_multipart))[1:]

    async def run() -> None:
        first, link = core(), CoreLink(endpoint)
        try:
            assert await heard(first) == encode(FrontendHello(os.getpid()))
            whole = link._socket

            def wait_until_broken() -> None:
                """Its thread tells the socket a moment after the monitor. In the middle of a message it would not say."""
                until = time.monotonic() + 10
                while int(whole.getsockopt(zmq.EVENTS)) & zmq.POLLOUT and time.monotonic() < until:
                    time.sleep(0.01)

            def break_it() -> None:
                first.close()
                assert link._monitor.poll(10_000)
                if not after_first:
                    wait_until_broken()

            link._socket = BreakingSocket(whole, break_it, after_first)  # type: ignore[assignment]
            with contextlib.suppress(UnavailableError) if after_first else pytest.raises(UnavailableError):
                submit(link, 1)  # in the middle of it: refused, or lost with the connection, which tells its stream
            link._socket = whole
            wait_until_broken()
            with pytest.raises(UnavailableError):
                submit(link, 1)
            asyncio.get_running_loop().call_soon(link._hear_monitor)  # break_it has taken the wake-up
            second = core()
            try:
                assert await heard(second) == encode(FrontendHello(os.getpid()))
                submit(link, 1)
                assert isinstance(decode(await heard(second)), AddRequest)
            finally:
                second.close()
        finally:
            link.close()

    try:
        asyncio.run(run())
    finally:
        context.destroy(linger=0)


# -------------------------------------------------------------------------------------------------------------- Resume


def made(reply: ResumeReply) -> ResumedStream:
    return resumed_stream(reply, [Output(None) for _ in reply.num_tokens], include_stop=False)


def known(query: ResumeQuery) -> ResumeReply:
    """Two outputs, the first of which has ended."""
    end = OutputEnded(query.handle, EndReason.LENGTH, RequestStats())
    header = ResumeHeader(query.query_id, query.handle, True, b"", (end, None))
    return ResumeReply(header, tokens=np.array([5, 6, 7], np.int32), num_tokens=np.array([1, 2], np.int32))


def asking(
    tmp_path: Path, act: Callable[[CoreLink, list[Message], asyncio.Task[object], ResumeQuery], Awaitable[None]]
) -> None:
    """`act` gets a link, what it says, a Resume that waits for the core's answer, and its question."""

    async def run() -> None:
        link, said = CoreLink(f"ipc://{tmp_path}/core"), list[Message]()
        link._send = said.append  # type: ignore[method-assign]
        try:
            asked = asyncio.create_task(link.resume("r", 64, 0, made))
            await asyncio.sleep(0)
            query = said.pop()
            assert isinstance(query, ResumeQuery) and query.request_id == "r"
            await act(link, said, asked, query)
        finally:
            link.close()

    asyncio.run(run())


def test_what_comes_right_behind_the_answer_is_not_missed(tmp_path: Path) -> None:
    async def act(link: CoreLink, said: list[Message], asked: asyncio.Task[object], query: ResumeQuery) -> None:
        batch = TokenBatch(TokenBatchHeader(1), np.array([query.handle + 1], np.uint32), np.array([8], np.int32))
        for message in (known(query), batch):
            link._hear(message)
        found = await asked
        assert isinstance(found, tuple)
        stream = found[1]
        for outlet in stream.outlets:
            await outlet.replay(link)
        link._hear(TokenBatch(TokenBatchHeader(2), batch.handles, np.array([9], np.int32)))
        pieces = [outlet.output.take() for outlet in stream.outlets]
        assert [piece and piece.tokens for piece in pieces] == [[5], [6, 7, 8, 9]]
        assert [outlet.ended is None for outlet in stream.outlets] == [False, True]
        link._hear(Refused(query.handle + 1, "ABORTED", "another call has resumed this request"))
        assert stream.error is not None and stream.error.status == "ABORTED"
        link.drop(stream)
        assert not said, "it is not its reader any more"

    asking(tmp_path, act)


@pytest.mark.parametrize("before", [True, False])
def test_an_answer_for_a_call_that_is_gone_is_given_back(before: bool, tmp_path: Path) -> None:
    async def act(link: CoreLink, said: list[Message], asked: asyncio.Task[object], query: ResumeQuery) -> None:
        if before:
            link._hear(known(query))  # the call is told in its next turn, which it does not get
        asked.cancel()
        await asyncio.wait([asked])
        if not before:
            link._hear(known(query))
        assert asked.cancelled() and said == [AbortRequest(query.handle)]

    asking(tmp_path, act)


def test_one_that_is_not_kept_is_none_and_leaves_nothing_behind(tmp_path: Path) -> None:
    async def act(link: CoreLink, said: list[Message], asked: asyncio.Task[object], query: ResumeQuery) -> None:
        link._hear(ResumeReply(ResumeHeader(query.query_id, query.handle, False)))
        assert await asked is None and not said and not link._resuming and not link._outlets

    asking(tmp_path, act)


def test_a_core_that_goes_is_said_to_whoever_waits_for_it(tmp_path: Path) -> None:
    async def act(link: CoreLink, said: list[Message], asked: asyncio.Task[object], query: ResumeQuery) -> None:
        link._lose(UnavailableError("the scheduler core is gone"))
        with pytest.raises(RequestError, match="core is gone"):
            await asked

    asking(tmp_path, act)
