"""Workers come, answer wrongly, fail and go; requests and their tokens stay."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from scheduler.core import CoreConfig
from scheduler.core.core import ProtocolError
from tests.helpers.core_driver import CoreDriver
from tests.helpers.fake_worker import undisturbed, worker_facts
from wire import EndReason, ResultHeader, StepResult

PROMPT = [1, 2, 3]


def driver(*, num_blocks: int = 64) -> CoreDriver:
    config = CoreConfig(max_batch_rows=8, max_step_tokens=32)
    return CoreDriver(config, worker_facts(num_blocks=num_blocks))


def result(core: CoreDriver, *, step: int = 0, epoch: int | None = None, tokens: list[int], slots: list[int]) -> StepResult:
    header = ResultHeader(0, core.core.epoch if epoch is None else epoch, step, 1)
    return StepResult(header, np.array(tokens, np.int32), np.array(slots, np.uint16))


# ----------------------------------------------------------------------------------------------------------- limits


def test_the_smaller_of_config_and_worker_counts() -> None:
    core = CoreDriver(
        CoreConfig(max_batch_rows=10, max_step_tokens=20), worker_facts(max_batch_rows=6, max_step_tokens=50)
    ).core
    assert (core.rows.max_rows, core.token_budget, core.static_batch_size) == (6, 20, 6)
    core.worker_joined(worker_facts(max_batch_rows=40, max_step_tokens=7), 0)
    assert (core.rows.max_rows, core.token_budget, core.static_batch_size) == (7, 7, 7)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_batch_rows": 0},
        {"max_batch_rows": 65_536},
        {"max_step_tokens": 0},
        {"max_queue_requests": 0},
        {"max_queue_tokens": 0},
        {"static_batch_size": -1},
        {"max_crashes": 0},
    ],
)
def test_a_limit_that_makes_no_sense_is_an_error_that_names_it(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CoreConfig(**wrong)


def test_an_unknown_policy_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'fastest': choose one of continuous, prefill_first, static"):
        CoreDriver(CoreConfig(policy="fastest"))


# ----------------------------------------------------------------------------------------------------------- epochs


def test_every_worker_begins_an_epoch_and_its_steps_count_from_zero() -> None:
    core = driver()
    core.accepted(PROMPT, 9)
    ids = []
    for _ in range(2):
        for _ in range(3):
            plan = core.step()
            assert plan is not None
            ids.append((plan.header.epoch, plan.header.step_id))
        core.lost()
        core.joined()
    assert ids == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]


def test_after_a_loss_everything_running_starts_again_with_the_tokens_it_had() -> None:
    core = driver()
    core.accepted(PROMPT, 9, request_id="a")
    core.accepted([4], 9, request_id="b")
    core.step(), core.step()
    core.plan()  # its result never comes
    core.lost()
    load = core.core.load(0)
    assert (load.held_blocks, load.retiring_blocks, load.kv_tokens, len(core.core.in_flight)) == (0, 0, 0, 0)
    core.joined()
    plan = core.plan()
    assert plan is not None
    starts = [(start.sequence_id, start.num_prompt_tokens, start.num_tokens) for start in plan.header.starts]
    assert starts == [(0, 3, 5), (1, 1, 3)], "by admission; prompt and two outputs each"
    assert plan.start_tokens.tolist() == [*PROMPT, *undisturbed(PROMPT, 2, 1000), 4, *undisturbed([4], 2, 1000)]
    core.finish()
    for request in core.requests:
        assert request.end is not None
        assert (request.end.reason, request.end.stats.preemptions) == (EndReason.LENGTH, 0)


def test_nothing_is_planned_while_the_worker_is_away() -> None:
    core = driver()
    core.accepted(PROMPT, 9)
    core.lost()
    assert core.plan() is None
    core.joined()
    assert core.plan() is not None


def test_losing_the_worker_twice_is_losing_it_once() -> None:
    core = driver()
    core.accepted(PROMPT, 9)
    core.step()
    core.lost(), core.lost()
    assert len(core.crashes) == 1
    core.finish()


def test_a_late_result_of_an_old_epoch_is_ignored() -> None:
    core = driver()
    core.accepted(PROMPT, 9)
    core.plan()
    late = result(core, tokens=[5], slots=[0])
    core.lost()
    assert core.core.apply(late, 0) == []
    core.joined()
    core.plan()
    assert core.core.apply(late, 0) == [] and len(core.core.in_flight) == 1
    core.finish()


def test_cancelled_while_the_worker_is_away() -> None:
    core = driver()
    core.accepted(PROMPT, 9)
    core.step()
    core.lost()
    core.cancel("r0")
    end = core.requests[0].end
    assert end is not None and end.stats.output_tokens == 1
    core.finish()


# ------------------------------------------------------------------------------------------------ a different worker


def test_what_does_not_fit_the_new_workers_pool_ends_with_error() -> None:
    core = driver(num_blocks=16)
    core.accepted([1] * 30, 20, request_id="large")
    core.accepted([1] * 3, 9, request_id="small")
    core.step()
    core.lost()
    core.joined(worker_facts(num_blocks=12))
    end = core.requests[0].end
    assert end is not None and end.reason is EndReason.ERROR
    assert end.message == "the new worker's KV cache is too small for this request"
    core.finish()
    assert core.requests[1].end is not None and core.requests[1].end.reason is EndReason.LENGTH


def test_a_request_without_a_limit_of_its_own_gets_as_long_as_the_new_pool_allows() -> None:
    core = driver(num_blocks=16)
    core.accepted([1] * 30)
    core.step()
    core.joined(worker_facts(num_blocks=12))
    core.finish()
    request = core.requests[0]
    assert request.end is not None and request.end.reason is EndReason.LENGTH and len(request.got) == 12 * 4 + 1 - 30


def test_a_worker_with_another_vocabulary_ends_what_was_accepted_for_the_old_one() -> None:
    core = driver()
    core.accepted([999], 9)
    core.step()
    core.requests[0].doomed = True
    core.joined(worker_facts(vocab_size=500))
    assert core.requests[0].end is not None and core.requests[0].end.message == "the new worker has another model"


# --------------------------------------------------------------------------------------------------------- protocol


@pytest.mark.parametrize(
    ("step", "tokens", "slots", "words"),
    [
        (1, [5, 6], [0, 1], "result of step 1, which was not the next one in flight"),
        (0, [5], [0], "sampled other rows"),
        (0, [5, 6], [1, 0], "sampled other rows"),
        (0, [5, 6, 7], [0, 1, 2], "sampled other rows"),
        (0, [5], [0, 1], "sampled other rows"),
        (0, [5, 1000], [0, 1], "outside the vocabulary"),
        (0, [-1, 5], [0, 1], "outside the vocabulary"),
    ],
)
def test_a_result_that_does_not_fit_its_plan_is_a_protocol_error_and_changes_nothing(
    step: int, tokens: list[int], slots: list[int], words: str
) -> None:
    core = driver()
    core.accepted(PROMPT, 9), core.accepted(PROMPT, 9)
    core.plan(), core.plan()
    before = core.core.load(0)
    with pytest.raises(ProtocolError, match=words):
        core.core.apply(result(core, step=step, tokens=tokens, slots=slots), core.now)
    assert core.core.load(0) == before and len(core.core.in_flight) == 2
    core.lost()
    core.finish()


def test_a_result_that_nobody_asked_for_is_a_protocol_error() -> None:
    core = driver()
    with pytest.raises(ProtocolError, match="not the next one in flight"):
        core.core.apply(result(core, tokens=[], slots=[]), 0)


def test_a_result_of_another_group_is_a_protocol_error() -> None:
    core = driver()
    core.accepted(PROMPT, 9)
    core.plan()
    good = result(core, tokens=undisturbed(PROMPT, 1, 1000), slots=[0])
    with pytest.raises(ProtocolError, match="group 7"):
        core.core.apply(StepResult(msgspec.structs.replace(good.header, group=7), good.tokens, good.slots), 0)


def test_a_step_that_samples_nothing_is_answered_with_nothing() -> None:
    core = driver()
    core.accepted(range(40), 2)
    core.plan()
    assert core.core.apply(result(core, tokens=[], slots=[]), 0) == []
