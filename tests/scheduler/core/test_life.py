"""The life of a request: how it ends, what is said of it, and what its counts and times are."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from scheduler.core import CoreConfig
from scheduler.core import core as core_module
from scheduler.core.request import TRANSITIONS, Request, Sequence, State
from tests.helpers.core_driver import CoreDriver
from tests.helpers.fake_worker import GREEDY, undisturbed, worker_facts
from wire import AddHeader, CancelOutcome, EndReason, OutputEnded, RequestStats

PROMPT = [1, 2, 3]
VOCAB = 1000


def driver(*, tick: int = 10, num_blocks: int = 64, budget: int = 32, policy: str = "continuous") -> CoreDriver:
    facts = worker_facts(num_blocks=num_blocks, vocab_size=VOCAB)
    return CoreDriver(CoreConfig(policy=policy, max_batch_rows=8, max_step_tokens=budget), facts, tick=tick)


def end_of(core: CoreDriver, number: int = 0) -> OutputEnded:
    end = core.requests[number].end
    assert end is not None
    return end


# ------------------------------------------------------------------------------------------------------------ ending


def test_at_max_tokens_it_ends_with_length() -> None:
    core = driver()
    core.accepted(PROMPT, 5)
    core.finish()
    end = end_of(core)
    assert (end.reason, end.stop_token_id, end.stats.output_tokens) == (EndReason.LENGTH, -1, 5)
    assert core.requests[0].got == undisturbed(PROMPT, 5, VOCAB)


@pytest.mark.parametrize("num_others", [0, 3, 9, 500])
def test_an_end_token_is_the_last_of_the_tokens(num_others: int) -> None:
    """However many end tokens the request has."""
    outputs = undisturbed(PROMPT, 5, VOCAB)
    others = [token for token in range(VOCAB) if token not in outputs][:num_others]
    core = driver()
    core.accepted(PROMPT, 30, stop=[*others, outputs[4]])
    core.accepted(PROMPT, 6)
    core.finish()
    end = end_of(core)
    assert (end.reason, end.stop_token_id, end.stats.output_tokens) == (EndReason.STOP, outputs[4], 5)
    assert core.requests[0].got == outputs
    assert end_of(core, 1).reason is EndReason.LENGTH, "another's end token is none of its own"


def test_an_end_token_at_max_tokens_is_a_stop() -> None:
    outputs = undisturbed(PROMPT, 3, VOCAB)
    core = driver()
    core.accepted(PROMPT, 3, stop=[outputs[2]])
    core.finish()
    assert end_of(core).reason is EndReason.STOP


def test_end_tokens_are_forgotten_with_their_request() -> None:
    outputs = undisturbed(PROMPT, 6, VOCAB)
    core = driver()
    core.accepted(PROMPT, 30, stop=[outputs[1]])
    core.finish()
    core.accepted(PROMPT, 6)
    core.finish()
    assert core.requests[1].got == outputs


@pytest.mark.parametrize("policy", ["continuous", "static"])
def test_an_end_token_costs_at_most_one_wasted_row_which_is_never_shown(policy: str) -> None:
    outputs = undisturbed(PROMPT, 4, VOCAB)
    core = driver(policy=policy)
    core.accepted(PROMPT, 30, stop=[outputs[3]])
    worker = core.worker
    assert worker is not None
    core.finish()
    assert worker.num_computed_tokens == len(PROMPT) + 3 + 1, "one more than a run that knew"
    assert core.requests[0].got == outputs


def test_the_length_limit_costs_no_wasted_row() -> None:
    core = driver()
    core.accepted(PROMPT, 4)
    worker = core.worker
    assert worker is not None
    core.finish()
    assert worker.num_computed_tokens == len(PROMPT) + 3


def test_min_tokens_travel_to_the_worker_which_masks_the_end_tokens() -> None:
    outputs = undisturbed(PROMPT, 1, VOCAB)
    core = driver()
    core.accepted(PROMPT, 9, stop=outputs, min_tokens=4)
    core.finish()
    assert len(core.requests[0].got) >= 4


def test_tokens_and_ends_go_to_the_front_end_they_belong_to() -> None:
    core = driver()
    for frontend in (2, 0, 1):
        core.accepted([frontend], 1, frontend=frontend, handle=5)
    core.plan()
    assert core.worker is not None
    outputs = core.core.apply(core.worker.answer(), core.now)
    assert [output.frontend for output in outputs] == [0, 1, 2]
    for output in outputs:
        assert output.batch.handles.tolist() == [5] and output.batch.handles.dtype == np.uint32
        assert output.batch.tokens.tolist() == undisturbed([output.frontend], 1, VOCAB)
        assert [end.reason for end in output.batch.header.ended] == [EndReason.LENGTH]
        assert output.batch.header.step_id == 0


# -------------------------------------------------------------------------------------------------- cancel, truncate


def test_cancel_says_what_it_found() -> None:
    core = driver()
    core.accepted(PROMPT, 5, request_id="a")
    assert core.cancel("nobody") is CancelOutcome.NOT_FOUND
    assert core.cancel("a") is CancelOutcome.CANCELLED
    assert core.cancel("a") is CancelOutcome.ALREADY_FINISHED
    assert end_of(core).reason is EndReason.CANCELLED


def test_what_is_forgotten_is_gone_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when the collector comes, which is seldom: memory would grow meanwhile."""
    monkeypatch.setattr(core_module, "_REMEMBERED_IDS", 2)
    core = driver()

    def living() -> int:
        return sum(isinstance(each, Request) for each in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = living()
        for _ in range(20):
            core.accepted(PROMPT, 2)
            core.finish()
        assert living() - before <= 3
    finally:
        gc.enable()


def test_cancel_knows_the_ids_of_the_last_ended_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_module, "_REMEMBERED_IDS", 2)
    core = driver()
    for name in "abc":
        core.accepted(PROMPT, 1, request_id=name)
        core.cancel(name)
    assert [core.cancel(name) for name in "abc"] == [CancelOutcome.NOT_FOUND, *[CancelOutcome.ALREADY_FINISHED] * 2]


def test_a_waiting_request_is_cancelled_without_ever_running() -> None:
    core = driver()
    core.accepted(PROMPT, 5)
    core.abort(core.requests[0])
    assert core.plan() is None
    assert end_of(core).stats == RequestStats(prompt_tokens=3, queued_ns=10)


def test_a_cancelled_request_is_in_no_plan_made_afterwards_and_its_blocks_come_back_two_steps_later() -> None:
    core = driver()
    core.accepted(PROMPT, 9, request_id="a")
    core.accepted([7], 9, request_id="b")
    core.next_rows(), core.next_rows()
    core.cancel("a")
    assert (core.core.load(0).held_blocks, core.core.load(0).retiring_blocks) == (1, 1)
    core.answer()
    assert core.core.load(0).retiring_blocks == 1, "step 1 names it too"
    plan = core.plan()
    assert plan is not None and plan.slots.tolist() == [1] and plan.ended.tolist() == [0]
    core.answer()
    assert core.core.load(0).retiring_blocks == 0
    assert core.requests[0].got == [], "the tokens of steps in flight are not shown any more"
    core.finish()


def test_a_slot_is_not_taken_again_while_a_plan_in_flight_names_it() -> None:
    core = CoreDriver(CoreConfig(max_batch_rows=1), worker_facts())
    core.accepted(PROMPT, 9, request_id="a")
    core.accepted([7], 9, request_id="b")
    core.next_rows(), core.next_rows()
    core.cancel("a")
    core.answer()
    assert core.next_rows() == {}
    core.answer()
    assert core.next_rows() == {"b": 1}


@pytest.mark.parametrize(("asked", "counted"), [(0, 0), (2, 2), (3, 3), (99, 3)])
def test_truncate_ends_with_stop_at_so_many_tokens(asked: int, counted: int) -> None:
    core = driver()
    core.accepted(PROMPT, 9)
    for _ in range(3):
        core.step()
    core.truncate(core.requests[0], asked)
    end = end_of(core)
    assert (end.reason, end.stop_token_id, end.stats.output_tokens) == (EndReason.STOP, -1, counted)
    core.finish()


def test_words_about_a_handle_that_has_ended_change_nothing() -> None:
    core = driver()
    core.accepted(PROMPT, 1)
    core.finish()
    assert core.core.abort(0, 0, 0) == core.core.truncate(0, 0, 1, 0) == core.core.abort(3, 99, 0) == []
    assert core.core.counters.cancelled == 0 and core.core.counters.finished == 1


def test_a_lost_front_ends_requests_end_and_others_go_on() -> None:
    core = driver()
    for i in range(4):
        core.accepted([i], 4, frontend=i % 2)
    core.step()
    core.frontend_lost(1)
    core.finish()
    assert [request.gone for request in core.requests] == [False, True, False, True]
    assert core.core.counters.cancelled == 2 and core.core.counters.finished == 2


def test_drop_all_ends_every_request_with_unavailable() -> None:
    core = driver()
    core.accepted(PROMPT, 9), core.accepted(PROMPT, 9, frontend=1)
    core.step()
    core.accepted(PROMPT, 9)
    core._hear(core.core.drop_all("the server stops", core.now))
    assert {(end_of(core, i).reason, end_of(core, i).message) for i in range(3)} == {
        (EndReason.UNAVAILABLE, "the server stops")
    }


# -------------------------------------------------------------------------------------------------- counts and times


def at(core: CoreDriver, now: int) -> CoreDriver:
    core.now = now
    return core


def test_times_of_an_undisturbed_request() -> None:
    core = driver(tick=0)
    at(core, 100).accepted(PROMPT, 3)
    at(core, 150).plan()
    at(core, 200).answer()
    at(core, 210).plan()
    at(core, 260).answer()
    at(core, 300).plan()  # takes a second block
    at(core, 400).answer()
    assert end_of(core).stats == RequestStats(
        prompt_tokens=3,
        output_tokens=3,
        queued_ns=50,
        prefill_ns=50,
        decode_ns=200,
        first_token_ns=100,
        block_ns=(400 - 150) + (400 - 300),
    )


def test_a_single_step_holds_its_blocks_too() -> None:
    core = driver(tick=0)
    at(core, 0).accepted(range(9), 1)
    at(core, 10).plan()
    at(core, 17).answer()
    assert end_of(core).stats.block_ns == 3 * 7


def test_a_request_cancelled_while_it_waits_was_queued_until_then() -> None:
    core = driver(tick=0)
    at(core, 100).accepted(PROMPT, 3)
    at(core, 170).abort(core.requests[0])
    assert end_of(core).stats == RequestStats(prompt_tokens=3, queued_ns=70)


def test_a_request_cancelled_before_its_first_token_has_no_decode_time() -> None:
    core = driver(tick=0, budget=2)
    at(core, 100).accepted(PROMPT, 3)
    at(core, 150).plan()
    at(core, 250).abort(core.requests[0])
    assert end_of(core).stats == RequestStats(prompt_tokens=3, queued_ns=50, prefill_ns=100, block_ns=100)


def test_times_of_a_request_that_was_preempted_while_decoding() -> None:
    core = driver(tick=0, num_blocks=3)
    at(core, 0).accepted([1, 2, 3], 3, request_id="a")
    at(core, 0).accepted([5, 6, 7], 3, request_id="b")
    at(core, 10).plan()
    at(core, 20).answer()
    at(core, 20).plan()
    at(core, 30).answer()
    at(core, 40).plan()  # b gives way
    at(core, 50).answer()  # a has ended
    assert end_of(core).reason is EndReason.LENGTH
    at(core, 70).plan()  # b is back
    at(core, 100).answer()
    assert end_of(core, 1).stats == RequestStats(
        prompt_tokens=3,
        output_tokens=3,
        recomputed_tokens=4,
        preemptions=1,
        queued_ns=10,
        prefill_ns=10,
        decode_ns=100 - 20 - 30,
        preempted_ns=30,
        first_token_ns=20,
        block_ns=(40 - 10) + 2 * (100 - 70),
    )


def test_time_preempted_before_the_first_token_is_not_taken_off_the_decode_time() -> None:
    core = driver(tick=0, budget=8, num_blocks=4)
    at(core, 0).accepted([1, 2, 3], 3, request_id="a")
    at(core, 0).accepted(range(8), 3, request_id="b")
    at(core, 10).plan()  # a's prompt, 5 tokens of b's
    at(core, 20).answer()
    core.lost()
    at(core, 100).joined()
    at(core, 100).plan()
    at(core, 110).answer()
    at(core, 120).plan()
    at(core, 130).answer()  # b's first token
    while core.requests[1].end is None:
        at(core, core.now + 10).plan()
        at(core, core.now + 10).answer()
    stats = end_of(core, 1).stats
    assert (stats.first_token_ns, stats.prefill_ns, stats.preempted_ns) == (130, 120, 80)
    assert stats.decode_ns == core.now - 130


def test_load_counts_what_is_there() -> None:
    core = CoreDriver(CoreConfig(max_batch_rows=2), worker_facts(num_blocks=20))
    for i in range(3):
        core.accepted([i] * 5, 9)
    core.step()
    load = core.core.load(42)
    assert load.query_id == 42
    assert (load.running_requests, load.waiting_requests, load.waiting_tokens) == (2, 1, 5)
    assert (load.total_blocks, load.free_blocks, load.held_blocks, load.retiring_blocks) == (20, 16, 4, 0)
    assert (load.kv_tokens, load.steps, load.output_tokens) == (10, 1, 2)
    assert (load.accepted_requests, load.finished_requests, load.cancelled_requests) == (3, 0, 0)
    core.finish()


# ------------------------------------------------------------------------------------------------------ transitions


@pytest.mark.parametrize("before", list(State))
@pytest.mark.parametrize("after", list(State))
def test_the_table_of_transitions_is_the_only_way_to_another_state(before: State, after: State) -> None:
    request = Request(AddHeader(0, "r", 0, 2, 1, GREEDY), 0, 0, np.array([1], np.int32), 0, 1, b"", 0)
    sequence = Sequence(request, 0, 0, 0, state=before)
    if after in TRANSITIONS[before]:
        sequence.become(after)
        assert sequence.state is after
    else:
        with pytest.raises(AssertionError, match=f"{before.value} can't become {after.value}"):
            sequence.become(after)
