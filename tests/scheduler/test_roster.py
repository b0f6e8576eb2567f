"""Who of the workers is lost, by the clock: an argument."""

from __future__ import annotations

import msgspec
import pytest

from scheduler.links import Peer
from scheduler.roster import Roster, why_another, why_unfit
from wire import Heartbeat, WorkerHello
from worker.sim_executor import sim_facts

MS = 1_000_000
FACTS = sim_facts()


def peer(number: int) -> Peer:
    return Peer(number, bytes([number]))


def roster(*links: str, timeout_ms: int = 2_000) -> Roster:
    """Workers that said hello at 0; an empty name: without heartbeats."""
    made = Roster(timeout_ms * MS)
    for number, link_id in enumerate(links, 1):
        made.come(peer(number), WorkerHello(0, FACTS, link_id, 250 if link_id else 0), 0)
    made.lost(0)
    return made


def look(made: Roster, *times_ms: int) -> list[str]:
    """Whom it gives up, looking at these times."""
    return [known.hello.link_id for at in times_ms for known, _ in made.lost(at * MS)]


def test_only_who_falls_silent_is_lost_and_only_once() -> None:
    made, gone = roster("a", "b"), []
    for at in range(250, 6_000, 250):
        made.beat(Heartbeat("a", 0), at * MS)
        gone += [(name, at) for name in look(made, at)]
    assert gone == [("b", 2_250)]


def test_one_without_heartbeats_is_never_silent() -> None:
    assert look(roster(""), *range(0, 60_000, 400)) == [] and roster("").next_look_ns(0) == 0


def test_when_this_process_stood_still_nobody_is_lost_for_it() -> None:
    made = roster("a")
    assert look(made, 500, 60_000, 60_500) == [], "it gets half the time from when we look again"
    assert look(made, 60_900, 61_300) == ["a"]


def test_a_beat_brings_back_who_was_given_up_but_not_one_that_hangs_still() -> None:
    made = roster("a")
    made.beat(Heartbeat("a", 2_500), 300 * MS)
    assert look(made, 400) == ["a"] and made.next_standby() is None
    assert made.beat(Heartbeat("a", 2_750), 550 * MS) is None
    known = made.beat(Heartbeat("a", 0), 800 * MS)
    assert known is not None and made.next_standby() is known and look(made, 900) == []


def test_the_first_that_came_takes_over() -> None:
    made = roster("a", "b", "c")
    made.go(peer(1))
    following = made.next_standby()
    assert following is not None and following.hello.link_id == "b"


def test_a_beat_under_no_name_or_a_strange_one_is_nobodys() -> None:
    made = roster("", "a")
    assert made.beat(Heartbeat("", 0), 1) is None and made.beat(Heartbeat("x", 9_999_999), 1) is None
    assert look(made, 100) == []


@pytest.mark.parametrize(("name", "value"), [("num_blocks", 0), ("max_model_len", 1), ("max_batch_rows", 65_536)])
def test_facts_that_make_no_sense_are_named(name: str, value: int) -> None:
    assert why_unfit(FACTS) == ""
    assert why_unfit(msgspec.structs.replace(FACTS, **{name: value})) == f"its {name} is {value}"


def test_the_same_model_on_another_device_may_follow_and_another_model_may_not() -> None:
    old = msgspec.structs.replace(FACTS, num_parameters=1000)
    assert why_another(msgspec.structs.replace(old, device="cuda", dtype="bfloat16", num_blocks=7), old) == ""
    assert why_another(msgspec.structs.replace(old, num_parameters=0), old) == "", "a simulated worker does not know"
    for name, value in (("architecture", "x"), ("vocab_size", 7), ("num_parameters", 7), ("max_model_len", 7)):
        assert str(value) in why_another(msgspec.structs.replace(old, **{name: value}), old)
