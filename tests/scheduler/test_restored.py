"""Requests that a core has left to the next one, beside that: who may attach to them, how long, what is known of them."""

from __future__ import annotations

import numpy as np

from scheduler.core import Output
from scheduler.links import NOBODY
from scheduler.resumption import Key, Resumption
from wire import (
    AddHeader,
    EndReason,
    OutputEnded,
    RequestStats,
    RestoreHeader,
    RestoreRequest,
    ResumeQuery,
    SamplingSpec,
    TokenBatch,
    TokenBatchHeader,
)

WINDOW_NS = 1_000_000_000
GREEDY = SamplingSpec(0.0, 0, 1.0, 0.0, 0)


def i32(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


def left(*outputs: list[int], ended: tuple[bool, ...] = (), handle: int = 1, request_id: str = "r") -> RestoreRequest:
    add = AddHeader(handle, request_id, 0, 2, 9, GREEDY, len(outputs), resume_window_ms=1000, resume_state=b"state")
    ends = [
        OutputEnded(handle + i, EndReason.LENGTH, RequestStats(output_tokens=len(tokens))) if ended and ended[i] else None
        for i, tokens in enumerate(outputs)
    ]
    tokens = i32(*(token for output in outputs for token in output))
    return RestoreRequest(RestoreHeader(add, tuple(ends)), prompt=i32(7, 8), tokens=tokens, num_tokens=i32(*map(len, outputs)))


def live_tokens(key: Key) -> np.ndarray:
    return i32(100 + key[1])


def test_the_window_begins_anew() -> None:
    resumption = Resumption(64)
    resumption.restored(left([1, 2]), NOBODY, now=5_000)
    assert resumption.next_due_ns() == 5_000 + WINDOW_NS
    assert resumption.expired(5_000 + WINDOW_NS - 1) == []
    assert resumption.expired(5_000 + WINDOW_NS) == [(NOBODY, 1)]


def test_who_attaches_gets_all_of_every_output_and_what_comes_from_then_on() -> None:
    resumption = Resumption(64)
    resumption.restored(left([1, 2, 3], [4], ended=(True, False)), NOBODY, now=0)
    reply, displaced = resumption.resume(ResumeQuery(1, "r", 50), 3, live_tokens, now=10)
    assert displaced is None and reply.header.is_known and reply.header.resume_state == b"state"
    assert reply.tokens.tolist() == [1, 2, 3, 102] and reply.num_tokens.tolist() == [3, 1]
    ended, alive = reply.header.ended
    assert ended is not None and ended.handle == 50 and alive is None
    assert resumption.expired(10 * WINDOW_NS) == [], "it is read"
    batch = TokenBatch(TokenBatchHeader(1), np.array([2], np.uint32), i32(9))
    [part] = resumption.route(Output(NOBODY, batch), 20)
    assert (part.frontend, part.batch.handles.tolist(), part.batch.tokens.tolist()) == (3, [51], [9])


def test_what_had_ended_is_kept_for_its_window_and_unknown_to_the_core() -> None:
    told: list[Key] = []
    resumption = Resumption(64, forgotten=told.append)
    resumption.restored(left([1, 2], ended=(True,)), NOBODY, now=0)
    assert not resumption.detach((NOBODY, 1), 0), "it does not go on"
    reply, _ = resumption.resume(ResumeQuery(1, "r", 50), 3, live_tokens, now=10)
    assert reply.tokens.tolist() == [1, 2]
    assert resumption.expired(10 + WINDOW_NS) == [] and told == [(NOBODY, 1)]


def test_a_snapshot_is_what_the_next_one_begins_with() -> None:
    resumption = Resumption(64)
    was = left([1, 2, 3], [4], ended=(True, False))
    resumption.restored(was, NOBODY, now=0)
    now = resumption.snapshot((NOBODY, 1), live_tokens)
    assert now is not None and now.header == was.header and now.prompt.tolist() == [7, 8]
    assert now.tokens.tolist() == [1, 2, 3, 102] and now.num_tokens.tolist() == [3, 1]
    assert resumption.snapshot((NOBODY, 2), live_tokens) is None, "it is not its first handle"


def test_an_id_names_the_newest() -> None:
    told: list[Key] = []
    resumption = Resumption(64, forgotten=told.append)
    resumption.restored(left([1], ended=(True,)), NOBODY, now=0)
    resumption.restored(left([2], handle=5), NOBODY, now=0)
    assert told == [(NOBODY, 1)]
    reply, _ = resumption.resume(ResumeQuery(1, "r", 50), 3, live_tokens, now=10)
    assert reply.tokens.tolist() == [105]
