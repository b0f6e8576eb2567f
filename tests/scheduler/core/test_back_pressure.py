"""Readers that stop reading, and a queue that is full: who is held back, exactly when, and how it goes on."""

from __future__ import annotations

import numpy as np
import pytest

from scheduler.core import CoreConfig
from scheduler.core.request import State
from tests.helpers.core_driver import CoreDriver, Tracked
from tests.helpers.fake_worker import worker_facts
from wire import EndReason, Refused

SECOND = 1_000_000_000
BATCH, NORMAL, INTERACTIVE = 1, 2, 3


def driver(
    *,
    unread: int = 4,
    rows: int = 8,
    num_blocks: int = 64,
    num_host_blocks: int = 0,
    **config: object,
) -> CoreDriver:
    facts = worker_facts(
        num_blocks=num_blocks, block_size=4, max_batch_rows=rows, num_host_blocks=num_host_blocks, swap_block_ns=1
    )
    settings = CoreConfig(max_batch_rows=rows, max_step_tokens=32, max_unread_tokens=unread, **config)  # type: ignore[arg-type]
    return CoreDriver(settings, facts)


def state(core: CoreDriver, request: Tracked) -> State:
    found = core.core.request(request.request_id)
    assert found is not None
    return found.sequences[request.output_index].state


def steps(core: CoreDriver, count: int) -> list[dict[str, int]]:
    """So many plans, each answered before the next; {} where nothing was to be planned."""
    made = []
    for _ in range(count):
        made.append(core.next_rows())
        while core.core.in_flight:
            core.answer()
    return made


def raw_credit(core: CoreDriver, handle: int, count: int, frontend: int = 0) -> None:
    core.core.credit(frontend, np.array([handle], np.uint32), np.array([count], np.int32), core.now)
    core.check()


# ------------------------------------------------------------------------------------------- the bound, token by token


@pytest.mark.parametrize("unread", [1, 2, 4, 7])
def test_a_reader_that_takes_nothing_gets_exactly_the_bound(unread: int) -> None:
    core = driver(unread=unread)
    request = core.accepted([1, 2], 20, request_id="a")
    made = steps(core, unread + 3)
    assert made == [{"a": 2}, *[{"a": 1}] * (unread - 1), {}, {}, {}]
    assert len(request.got) == unread
    core.finish()


def test_tokens_that_are_sampled_and_have_not_arrived_count() -> None:
    core = driver(unread=2)
    request = core.accepted([1, 2], 20, request_id="a")
    assert core.next_rows() == {"a": 2} and core.next_rows() == {"a": 1}
    core.answer()
    assert len(request.got) == 1 and core.next_rows() == {}, "one has arrived, the second is on its way"
    core.credit((request, 1))
    assert core.next_rows() == {"a": 1} and core.next_rows() == {}
    core.finish()


def test_each_token_that_is_taken_lets_one_more_come() -> None:
    core = driver(unread=3)
    request = core.accepted([1, 2], 20, request_id="a")
    steps(core, 4)
    for taken in (1, 2, 3):
        before = len(request.got)
        core.credit((request, taken))
        assert steps(core, taken + 1) == [{"a": 1}] * taken + [{}]
        assert len(request.got) == before + taken
    core.finish()


def test_a_reader_that_keeps_up_never_waits() -> None:
    core = driver(unread=2)
    request = core.accepted([1, 2], 20, request_id="a")
    for _ in range(19):
        assert "a" in core.next_rows()
        core.answer()
        core.credit((request, 1))
    core.finish()
    assert core.core.counters.steps == 20


def test_the_bound_is_of_outputs_and_never_of_the_prompt() -> None:
    core = driver(unread=1, num_blocks=64)
    core.accepted(range(70), 5, request_id="a")
    assert steps(core, 4) == [{"a": 32}, {"a": 32}, {"a": 6}, {}]
    core.finish()


def test_a_request_no_longer_than_the_bound_ends_though_nobody_reads() -> None:
    core = driver(unread=4)
    request = core.accepted([1, 2], 4)
    steps(core, 4)
    assert request.end is not None and request.end.reason is EndReason.LENGTH and len(request.got) == 4
    assert core.core.is_idle


def test_others_go_on_beside_a_reader_that_has_stopped() -> None:
    core = driver(unread=2)
    slow, quick = core.accepted([1], 20, request_id="slow"), core.accepted([2], 20, request_id="quick")
    made = []
    for _ in range(8):
        made.append(core.next_rows())
        core.answer()
        core.credit((quick, 1))
    assert made == [{"slow": 1, "quick": 1}] * 2 + [{"quick": 1}] * 6
    assert (len(slow.got), len(quick.got)) == (2, 8)
    core.finish()


def test_it_keeps_its_row_and_its_blocks_and_takes_no_more() -> None:
    core = driver(unread=4)
    core.accepted([1, 2, 3], 20, request_id="a")
    made = steps(core, 4)
    held = core.core.load(0).held_blocks
    assert made[-1] == {"a": 1} and held == 2, "3 + 3 computed tokens"
    for _ in range(3):
        assert core.next_rows() == {} and core.core.load(0).held_blocks == held
    assert core.core.rows.num_free == core.core.rows.max_rows - 1
    core.finish()
    assert core.core.counters.preemptions == 0 and core.core.counters.recomputed_tokens == 0


@pytest.mark.parametrize("policy", ["continuous", "prefill_first", "static"])
def test_the_bound_holds_under_every_policy(policy: str) -> None:
    core = driver(unread=3, policy=policy)
    request = core.accepted([1, 2], 9, request_id="a")
    assert steps(core, 4) == [{"a": 2}, {"a": 1}, {"a": 1}, {}]
    core.credit((request, 2))
    assert steps(core, 3) == [{"a": 1}, {"a": 1}, {}]
    core.finish()


# --------------------------------------------------------------------------------------------------- odd credits


@pytest.mark.parametrize("count", [0, -1, -1000])
def test_credit_for_nothing_changes_nothing(count: int) -> None:
    core = driver(unread=2)
    request = core.accepted([1, 2], 20, request_id="a")
    steps(core, 2)
    raw_credit(core, request.handle, count)
    assert steps(core, 2) == [{}, {}]
    core.finish()


@pytest.mark.parametrize("count", [3, 1000, 2**31 - 1])
def test_credit_for_more_than_has_arrived_is_cut_to_it(count: int) -> None:
    core = driver(unread=2)
    request = core.accepted([1, 2], 20, request_id="a")
    steps(core, 2)
    raw_credit(core, request.handle, count)
    assert steps(core, 4) == [{"a": 1}, {"a": 1}, {}, {}], "two were there to be taken, two more may come"
    core.finish()


def test_credit_before_the_first_token_counts_for_nothing() -> None:
    core = driver(unread=2, rows=1)
    core.accepted([1, 2], 20, request_id="a")
    waiting = core.accepted([3], 20, request_id="b")
    core.next_rows()
    for request in core.requests:
        raw_credit(core, request.handle, 50)
    assert core.next_rows() == {"a": 1} and core.next_rows() == {}
    core.answer(), core.answer()
    assert steps(core, 3) == [{"b": 1}, {"b": 1}, {}] and len(waiting.got) == 2
    core.finish()


@pytest.mark.parametrize("policy", ["continuous", "prefill_first", "static"])
def test_stopped_readers_of_the_same_class_make_room_for_who_waits_for_a_row(policy: str) -> None:
    core = driver(unread=2, rows=2, policy=policy)
    for name in "ab":
        core.accepted([1, 2], 9, request_id=name)
    steps(core, 4)
    waiting = core.accepted([3], 2, request_id="new")
    steps(core, 6)
    assert waiting.end is not None and len(waiting.got) == 2
    core.finish()
    assert all(len(request.got) == 9 for request in core.requests[:2])


@pytest.mark.parametrize("policy", ["continuous", "prefill_first", "static"])
def test_stopped_readers_make_room_for_whoever_is_next_by_age(policy: str) -> None:
    """They came before it, and stand aside all the same: else the batch would stand still until one of them reads."""
    core = driver(unread=2, rows=2, policy=policy, oldest_every=1)
    for name in "ab":
        core.accepted([1, 2], 9, request_id=name)
    steps(core, 4)
    crowd = [core.accepted([number], 9, request_id=f"new{number}") for number in range(3, 9)]
    steps(core, 20)
    assert [len(waiting.got) for waiting in crowd] == [2] * 6
    core.finish()
    assert all(len(request.got) == 9 for request in core.requests)


@pytest.mark.parametrize("policy", ["continuous", "prefill_first", "static"])
def test_stopped_readers_of_the_same_class_make_room_for_who_waits_for_blocks(policy: str) -> None:
    core = driver(unread=2, rows=4, num_blocks=8, policy=policy)
    for name in "ab":
        core.accepted([1, 2], 13, request_id=name)
    steps(core, 4)
    waiting = core.accepted([3] * 9, 8, request_id="new", priority=1)
    for _ in range(8):
        steps(core, 2)
        core.credit((waiting, len(waiting.got)))
    assert waiting.end is not None and len(waiting.got) == 8
    core.finish()


def test_credit_for_unknown_ended_and_other_front_ends_handles_is_ignored() -> None:
    core = driver(unread=2)
    over = core.accepted([5], 1, request_id="over")
    request = core.accepted([1, 2], 20, request_id="a")
    steps(core, 2)
    assert over.end is not None
    raw_credit(core, 999, 2)
    raw_credit(core, over.handle, 1)
    raw_credit(core, request.handle, 2, frontend=1)
    assert steps(core, 1) == [{}]
    core.finish()


def test_one_credit_speaks_of_many_outputs_and_the_unknown_among_them_do_no_harm() -> None:
    core = driver(unread=1)
    a, b = core.accepted([1], 9, request_id="a"), core.accepted([2], 9, request_id="b")
    steps(core, 1)
    handles, counts = np.array([a.handle, 999, b.handle], np.uint32), np.array([1, 1, 1], np.int32)
    core.core.credit(0, handles, counts, core.now)
    assert steps(core, 2) == [{"a": 1, "b": 1}, {}]
    core.finish()


# ---------------------------------------------------------------------------------------------- preempted first


def stalled_and_two(unread: int = 4, **options: object) -> tuple[CoreDriver, Tracked, Tracked, Tracked]:
    """A reader that stopped, admitted first and of the highest class, beside two that read; 5 blocks of 4 tokens.

    The stalled one has 3 prompt tokens and 4 outputs, of which 3 are computed: 2 blocks."""
    core = driver(unread=unread, num_blocks=5, **options)
    slow = core.accepted([1, 2, 3], 12, request_id="slow", priority=INTERACTIVE)
    steps(core, 4)
    assert len(slow.got) == 4 and core.core.load(0).held_blocks == 2
    a = core.accepted([5, 6, 7], 12, request_id="a", priority=BATCH)
    b = core.accepted([8, 9, 10], 12, request_id="b", priority=BATCH)
    return core, slow, a, b


def turn(core: CoreDriver, *readers: Tracked) -> dict[str, int]:
    rows = core.next_rows()
    while core.core.in_flight:
        core.answer()
    core.credit(*[(reader, 1) for reader in readers if reader.got and not reader.over])
    return rows


def test_it_is_the_first_victim_whatever_its_class_its_age_and_its_work() -> None:
    core, slow, a, b = stalled_and_two()
    assert turn(core, a, b) == {"a": 3, "b": 3}
    assert turn(core, a, b) == {"a": 1, "b": 1}
    assert core.core.load(0).held_blocks == 4 and state(core, slow) is State.RUNNING
    assert turn(core, a, b) == {"a": 1, "b": 1}, "both need a block, one is free: those of the slow reader are taken"
    assert state(core, slow) is State.PARKED and core.core.counters.preemptions == 1
    assert (state(core, a), state(core, b)) == (State.RUNNING, State.RUNNING)
    core.finish()


def test_parked_it_waits_in_no_queue_and_stands_in_nobodys_way() -> None:
    core, slow, a, b = stalled_and_two()
    for _ in range(3):
        turn(core, a, b)
    assert state(core, slow) is State.PARKED and core.core.queue.head() is None
    core.cancel("a"), core.cancel("b")
    core.accepted([1], 3, request_id="late", priority=BATCH)
    assert [turn(core) for _ in range(4)] == [{"late": 1}, {"late": 1}, {"late": 1}, {}]
    assert state(core, slow) is State.PARKED
    core.finish()


def test_after_credit_it_comes_back_and_goes_on_with_the_same_tokens() -> None:
    core, slow, a, b = stalled_and_two()
    for _ in range(3):
        turn(core, a, b)
    core.cancel("a"), core.cancel("b")
    assert turn(core) == {} and len(slow.got) == 4
    core.credit((slow, 2))
    assert state(core, slow) is State.PREEMPTED
    assert [turn(core) for _ in range(4)] == [{"slow": 7}, {"slow": 1}, {}, {}], "its 3 + 4 tokens are computed again"
    assert slow.got == slow.expected[:6]
    core.finish()
    assert slow.got == slow.expected and slow.end is not None
    assert (slow.end.stats.preemptions, slow.end.stats.recomputed_tokens) == (1, 6)


def test_one_token_taken_is_enough_to_come_back() -> None:
    core, slow, a, b = stalled_and_two()
    for _ in range(3):
        turn(core, a, b)
    core.cancel("a"), core.cancel("b")
    raw_credit(core, slow.handle, 0)
    assert state(core, slow) is State.PARKED
    core.credit((slow, 1))
    assert [turn(core) for _ in range(2)] == [{"slow": 7}, {}] and len(slow.got) == 5
    core.finish()


def test_credit_that_comes_while_it_runs_spares_it() -> None:
    core, slow, a, b = stalled_and_two()
    turn(core, a, b), turn(core, a, b)
    core.credit((slow, 1))
    rows = turn(core, a, b)
    assert rows["slow"] == 1 and state(core, slow) is State.RUNNING and len(rows) == 2, "now the lowest class gives way"
    assert state(core, b) is State.PREEMPTED
    core.finish()


def test_of_two_stopped_readers_the_lower_class_goes_first() -> None:
    core = driver(unread=1, num_blocks=5)
    high = core.accepted([1, 2], 9, request_id="high", priority=INTERACTIVE)
    low = core.accepted([3, 4, 5], 9, request_id="low", priority=NORMAL)
    steps(core, 1)
    reads = core.accepted([6, 7, 8, 9], 16, request_id="reads", priority=BATCH)
    for _ in range(12):
        turn(core, reads)
        if State.PARKED in (state(core, high), state(core, low)):
            break
    assert (state(core, high), state(core, low)) == (State.RUNNING, State.PARKED)
    core.finish()


def test_a_swapped_reader_comes_back_from_host_memory_and_computes_nothing_twice() -> None:
    core, slow, a, b = stalled_and_two(num_host_blocks=8)
    for _ in range(3):
        turn(core, a, b)
    assert state(core, slow) is State.PARKED and core.core.load(0).held_host_blocks == 2
    core.cancel("a"), core.cancel("b")
    for _ in range(3):
        turn(core)
    assert core.core.load(0).held_host_blocks == 2, "they stay while nobody reads"
    core.credit((slow, 4))
    assert turn(core) == {"slow": 1}
    core.finish()
    assert slow.end is not None and slow.end.stats.recomputed_tokens == 0 and slow.got == slow.expected


@pytest.mark.parametrize("how", ["cancel", "abort", "truncate", "frontend_lost", "deadline"])
def test_a_parked_request_can_end(how: str) -> None:
    core = driver(unread=4, num_blocks=5, num_host_blocks=8)
    slow = core.accepted([1, 2, 3], 12, request_id="slow", frontend=1, deadline_ns=SECOND if how == "deadline" else 0)
    steps(core, 4)
    a, b = (core.accepted(prompt, 9) for prompt in ([5, 6, 7], [8, 9, 10]))
    for _ in range(3):
        turn(core, a, b)
    assert state(core, slow) is State.PARKED
    match how:
        case "cancel":
            core.cancel("slow")
        case "abort":
            core.abort(slow)
        case "truncate":
            core.truncate(slow, 2)
        case "frontend_lost":
            core.frontend_lost(1)
        case "deadline":
            assert core.core.next_wakeup_ns == SECOND
            core.now = SECOND
            core.plan()
    assert slow.over and core.core.load(0).held_host_blocks == 0
    core.finish()


def test_a_row_about_to_end_is_no_stopped_reader() -> None:
    """Its last token is being sampled: it stands at its limit, and that limit is its length."""
    core = driver(unread=4, num_blocks=3)
    a = core.accepted([1, 2, 3], 3, request_id="a")
    b = core.accepted([5, 6, 7], 9, request_id="b")
    core.next_rows(), core.next_rows()
    core.answer(), core.answer()
    core.finish()
    assert a.end is not None and a.end.stats.preemptions == 0
    assert b.end is not None and b.end.reason is EndReason.LENGTH


# ------------------------------------------------------------------------------------------------- a lost worker


def test_a_lost_worker_does_not_park_a_reader_that_has_taken_all_that_came() -> None:
    core = driver(unread=2)
    request = core.accepted([1, 2], 9, request_id="a")
    core.next_rows(), core.next_rows()
    assert core.core.in_flight and not request.got
    core.lost()
    assert state(core, request) is State.PREEMPTED, "two tokens were on their way, and do not come"
    core.joined()
    assert core.next_rows() == {"a": 2} and core.next_rows() == {"a": 1}
    core.finish()


def test_a_lost_worker_parks_a_reader_that_is_behind_and_the_next_one_waits_for_him() -> None:
    core = driver(unread=2)
    request = core.accepted([1, 2], 9, request_id="a")
    steps(core, 2)
    core.lost()
    assert state(core, request) is State.PARKED
    core.joined()
    assert steps(core, 2) == [{}, {}]
    core.credit((request, 1))
    assert steps(core, 2) == [{"a": 4}, {}] and request.got == request.expected[:3]
    core.finish()


def test_credit_while_the_worker_is_away_counts() -> None:
    core = driver(unread=2)
    request = core.accepted([1, 2], 9, request_id="a")
    steps(core, 2)
    core.lost()
    core.credit((request, 2))
    core.joined()
    assert steps(core, 3) == [{"a": 4}, {"a": 1}, {}]
    core.finish()


def test_what_was_taken_before_the_worker_was_lost_stays_taken() -> None:
    core = driver(unread=3)
    request = core.accepted([1, 2], 9, request_id="a")
    steps(core, 3)
    core.credit((request, 2))
    core.lost(), core.joined()
    assert steps(core, 3) == [{"a": 5}, {"a": 1}, {}], "3 outputs, 2 of them taken: 2 more may come"
    core.finish()


# --------------------------------------------------------------------------------------------- several outputs


def test_one_slow_outlet_does_not_hold_its_siblings() -> None:
    core = driver(unread=2)
    first, second, third = core.accepted([1, 2, 3], 6, num_outputs=3).siblings
    for _ in range(12):
        core.next_rows()
        while core.core.in_flight:
            core.answer()
        core.credit(*[(output, 1) for output in (first, third) if output.got and not output.over])
    assert first.end is not None and third.end is not None and second.end is None
    assert [len(output.got) for output in (first, second, third)] == [6, 2, 6]
    assert core.core.num_requests == 1
    core.credit((second, 2))
    assert [len(core.next_rows()), len(core.next_rows()), core.next_rows()] == [1, 1, {}]
    core.finish()
    assert second.got == second.expected


def test_siblings_start_though_the_first_outputs_reader_has_stopped() -> None:
    core = driver(unread=1)
    first, second = core.accepted([1, 2, 3], 6, num_outputs=2).siblings
    steps(core, 3)
    assert [len(first.got), len(second.got)] == [1, 1]
    core.credit((second, 1))
    steps(core, 2)
    assert [len(first.got), len(second.got)] == [1, 2]
    core.finish()


# -------------------------------------------------------------------------------------------------- the full queue


def refused(core: CoreDriver, prompt: list[int]) -> Refused:
    answer = core.add(prompt, 1)
    assert isinstance(answer, Refused)
    return answer


def ended(core: CoreDriver, gap: int, count: int) -> None:
    """So many requests end, one each `gap` nanoseconds."""
    for _ in range(count):
        request = core.accepted([1], 1)
        core.now += gap - 2 * core.tick
        core.cancel(request.request_id)


def test_who_is_refused_learns_how_many_wait() -> None:
    core = driver(max_queue_requests=2)
    core.accepted([1] * 5, 1), core.accepted([2] * 6, 1)
    answer = refused(core, [3])
    assert (answer.code, answer.details) == ("RESOURCE_EXHAUSTED", {"waiting_requests": "2", "waiting_tokens": "11"})
    assert answer.message == "2 requests with 11 prompt tokens wait already"
    core.finish()


@pytest.mark.parametrize(("prompt", "places"), [(1, 1), (20, 1), (21, 2), (40, 2), (41, 3), (100, 5)])
def test_the_delay_is_for_as_many_ends_as_make_room_for_its_tokens(prompt: int, places: int) -> None:
    core = driver(max_queue_tokens=100)
    ended(core, SECOND // 4, 3)
    for _ in range(5):
        core.accepted([1] * 20, 1)
    assert refused(core, [1] * prompt).retry_after_ns == pytest.approx(places * SECOND // 4, rel=1e-6)
    core.finish()


def test_the_delay_follows_the_last_ends_only() -> None:
    core = driver(max_queue_requests=1)
    ended(core, 2 * SECOND, 10)
    ended(core, SECOND // 2, 64)
    core.accepted([1], 1)
    assert refused(core, [1]).retry_after_ns == pytest.approx(SECOND // 2, rel=1e-6)
    core.finish()


def test_the_delay_is_a_second_while_no_rate_is_known() -> None:
    core = driver(max_queue_requests=1)
    ended(core, SECOND // 4, 1)
    core.accepted([1], 1)
    assert refused(core, [1]).retry_after_ns == SECOND
    core.finish()


def test_the_delay_is_at_most_a_minute_however_many_must_end() -> None:
    core = driver(max_queue_tokens=100)
    ended(core, 10 * SECOND, 3)
    for _ in range(100):
        core.accepted([1], 1)
    assert refused(core, [1] * 60).retry_after_ns == 60 * SECOND
    core.finish()


def test_all_outputs_of_a_request_take_one_place_in_the_queue() -> None:
    core = driver(max_queue_requests=2, rows=1)
    core.accepted([1, 2], 3, request_id="a", num_outputs=4)
    core.accepted([3], 3, request_id="b", num_outputs=4)
    assert refused(core, [4]).details["waiting_requests"] == "2"
    core.next_rows()
    core.accepted([4], 3, request_id="c", num_outputs=4)
    core.finish()


def test_those_that_were_running_already_take_no_place_from_new_ones() -> None:
    core = driver(max_queue_requests=1, max_queue_tokens=8)
    for name in "abc":
        core.accepted([1, 2, 3, 4], 9, request_id=name)
        core.next_rows()
        while core.core.in_flight:
            core.answer()
    core.lost()
    assert len(core.core.queue) == 3 and core.core.queue.num_tokens == 0
    core.accepted([5], 3, request_id="new")
    assert isinstance(core.add([6], 3), Refused)
    core.joined()
    core.finish()


def test_a_full_queue_refuses_alike_whatever_the_class() -> None:
    core = driver(max_queue_requests=1)
    core.accepted([1], 1, priority=BATCH)
    answer = core.add([1], 1, priority=INTERACTIVE)
    assert isinstance(answer, Refused) and answer.code == "RESOURCE_EXHAUSTED"
    core.finish()


def test_what_is_asked_for_wrongly_is_no_matter_of_the_full_queue() -> None:
    """An error that retrying does not mend is named, not hidden behind RESOURCE_EXHAUSTED."""
    core = driver(max_queue_requests=1, num_blocks=4)
    core.accepted([1], 1)
    answers = [core.add([], 1), core.add([1] * 99, 1), core.add([5000], 1)]
    codes = [answer.code for answer in answers if isinstance(answer, Refused)]
    assert codes == ["INVALID_ARGUMENT", "FAILED_PRECONDITION", "INVALID_ARGUMENT"]
    core.finish()


def parked_in_flight(unread: int) -> tuple[CoreDriver, Tracked]:
    core = driver(unread=unread)
    slow = core.accepted([5, 6, 7], 6, request_id="slow")
    for _ in range(unread):
        core.next_rows()
    sequence = core.core.rows.sequence(0)
    core.core._preempt(0, core.now, sequence)
    assert sequence.state is State.PARKED and not slow.got
    return core, slow


@pytest.mark.parametrize("unread", [1, 2])
def test_who_is_aside_for_tokens_that_a_lost_worker_does_not_bring_comes_back(unread: int) -> None:
    core, _ = parked_in_flight(unread)
    core.lost(), core.joined()
    assert core.next_rows() == {"slow": 3}
    core.finish()


@pytest.mark.parametrize("unread", [1, 2])
def test_credit_for_tokens_on_their_way_does_not_bring_a_parked_one_back(unread: int) -> None:
    core, slow = parked_in_flight(unread)
    raw_credit(core, slow.handle, 5)
    assert state(core, slow) is State.PARKED
    while core.core.in_flight:
        core.answer()
    assert core.next_rows() == {}
    core.credit((slow, 1))
    assert core.next_rows() == {"slow": 3 + unread} and core.next_rows() == {}
    core.finish()
