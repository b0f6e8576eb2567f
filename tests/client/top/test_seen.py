"""What `carousel top` makes of a server's messages: rates, times of first tokens, times between tokens."""

from __future__ import annotations

from carousel.v1 import control_pb2, inspect_pb2
from client.top.seen import HISTORY, Seen

MS = 1_000_000


def step(number: int, *rows: inspect_pb2.StepRow, planned_ms: int = 0) -> inspect_pb2.WatchStepsResponse:
    return inspect_pb2.WatchStepsResponse(
        step_id=number,
        planned_ns=(planned_ms or 20 * number) * MS,
        duration_ns=15 * MS,
        rows=rows,
        token_budget=64,
        policy="static",
    )


def row(request_id: str, num_tokens: int = 1, joined: bool = False, sampled: bool = True) -> inspect_pb2.StepRow:
    return inspect_pb2.StepRow(request_id=request_id, num_tokens=num_tokens, joined=joined, sampled=sampled, tenant="t")


def load(tokens: int) -> control_pb2.GetLoadResponse:
    return control_pb2.GetLoadResponse(output_tokens=tokens)


def test_tokens_a_second_are_between_two_answers() -> None:
    seen = Seen("x")
    for at_s, tokens in ((10.0, 500), (12.0, 700), (12.5, 700), (13.5, 650)):
        seen.take_load(load(tokens), at_s)
    assert seen.snapshot().tokens_per_s == [100.0, 0.0, 0.0], "a server that was started anew counts from 0 again"


def test_time_between_tokens_is_that_between_plans_where_steps_follow() -> None:
    seen = Seen("x")
    seen.take_load(load(0), 0.0)
    for number in (1, 2, 3):
        seen.take_step(step(number, row("a")))
    seen.take_load(load(1), 1.0)
    assert seen.snapshot().itl_ms == [20.0]
    seen.take_step(step(9, row("a")))
    seen.take_load(load(2), 2.0)
    assert seen.snapshot().itl_ms == [20.0, 15.0], "after steps that were not looked at: how long it took"
    seen.take_step(step(10, row("b", 30, joined=True)))
    seen.take_load(load(3), 3.0)
    assert len(seen.snapshot().itl_ms) == 2, "a prompt alone has no time between tokens"


def test_some_first_tokens_are_asked_about_and_their_times_are_the_servers_own() -> None:
    seen = Seen("x")
    seen.take_load(load(0), 0.0)
    seen.take_step(
        step(1, *(row(f"r{i}", 30, joined=True) for i in range(20)), row("old"), row("chunk", 9, joined=True, sampled=False))
    )
    asked = seen.firsts()
    assert 1 <= len(asked) <= 4 and ("r19", "t") in asked and "old" not in dict(asked) and "chunk" not in dict(asked)
    assert seen.firsts() == []
    for ms in (10, 30, 80):
        seen.take_first(control_pb2.ExplainRequestResponse(timing={"time_to_first_token_ns": ms * MS}))
    seen.take_first(control_pb2.ExplainRequestResponse())
    seen.take_load(load(1), 1.0)
    assert seen.snapshot().ttft_ms == [30.0]


def test_histories_are_bounded() -> None:
    seen = Seen("x")
    for number in range(10 * HISTORY):
        seen.take_load(load(number), float(number))
        seen.take_step(step(number, row(f"r{number}", 5, joined=True), row("a")))
    told = seen.snapshot()
    assert {len(told.tokens_per_s), len(told.step_tokens)} == {HISTORY} and len(seen.firsts()) <= 4
    assert told.step_tokens[-1] == (6, 64) and told.policy == "static"


def test_steps_of_other_groups_are_left_out() -> None:
    seen = Seen("x", group=1)
    seen.take_load(load(0), 0.0)
    for number in (1, 2):
        for group in (0, 1):
            told = step(number, row("a"), planned_ms=20 * number + 5 * group)
            told.group = group
            seen.take_step(told)
    seen.take_load(load(1), 1.0)
    found = seen.snapshot()
    assert len(found.step_tokens) == 2 and found.itl_ms == [17.5], "the first is how long it took, the second 20 ms"
