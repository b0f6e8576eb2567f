"""The link's own book-keeping, without a core: which handles it gives out, and what it gathers to tell."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from scheduler.frontend.core_link import CoreLink
from scheduler.frontend.output import Output
from scheduler.frontend.streams import Stream
from wire import AbortRequest, AddHeader, AddRequest, Credit, Message, SamplingSpec

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
