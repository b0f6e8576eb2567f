"""The worker in memory catches every kind of wrong plan: what the other tests rest on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.helpers.fake_worker import GREEDY, FakeWorker, prefix_hashes, undisturbed, worker_facts
from wire import PlanHeader, SequenceStart, StepPlan


def i32(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


def u16(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint16)


def started() -> FakeWorker:
    """Slots 0 and 1 hold five known tokens each on blocks 1, 2 and 3, 4; slot 0 has computed all, slot 1 two. Step 0 is
    answered, step 1 is not."""
    worker = FakeWorker(worker_facts(num_blocks=8, block_size=4), epoch=1)
    starts = (SequenceStart(0, 70, 0, 5, 5, 0, 2, GREEDY), SequenceStart(1, 71, 0, 5, 5, 0, 2, GREEDY))
    plan = StepPlan(
        PlanHeader(0, 1, 0, starts),
        slots=u16(0, 1),
        num_tokens=i32(5, 1),
        start_tokens=i32(*range(10)),
        start_blocks=i32(1, 2, 3, 4),
    )
    worker.submit(plan)
    assert worker.answer().slots.tolist() == [0]
    worker.submit(good(step=1))
    return worker


def good(step: int = 2) -> StepPlan:
    return StepPlan(PlanHeader(0, 1, step), slots=u16(0, 1), num_tokens=i32(1, 1))


def test_a_good_plan_is_computed() -> None:
    worker = started()
    worker.submit(good())
    assert worker.answer().tokens.tolist() == undisturbed(range(5), 2, 1000)[1:]
    assert worker.num_computed_tokens == 6 + 2 + 2


def test_its_tokens_depend_on_every_token_before_and_on_their_order() -> None:
    hashes = {prefix_hashes(tokens)[-1] for tokens in ([1, 2, 3], [1, 3, 2], [2, 3], [1, 2, 3, 3], [1, 2], [0, 1, 2, 3])}
    assert len(hashes) == 6


def start(slot: int = 2, sequence_id: int = 72, num_tokens: int = 1, num_blocks: int = 1) -> SequenceStart:
    return SequenceStart(slot, sequence_id, 0, 1, num_tokens, 0, num_blocks, GREEDY)


def with_start(one: SequenceStart, block: int = 5) -> Callable[[StepPlan], None]:
    def spoil(plan: StepPlan) -> None:
        plan.header = PlanHeader(0, 1, 2, (one,))
        plan.start_tokens, plan.start_blocks = i32(9), i32(block)

    return spoil


def fields(**arrays: np.ndarray) -> Callable[[StepPlan], None]:
    def spoil(plan: StepPlan) -> None:
        for name, array in arrays.items():
            setattr(plan, name, array)

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda plan: setattr(plan, "header", PlanHeader(0, 1, 3)), id="a gap in the steps"),
        pytest.param(lambda plan: setattr(plan, "header", PlanHeader(0, 2, 2)), id="another epoch"),
        pytest.param(lambda plan: setattr(plan, "header", PlanHeader(1, 1, 2)), id="another group"),
        pytest.param(fields(slots=u16(), num_tokens=i32()), id="no rows"),
        pytest.param(fields(slots=u16(0, 0)), id="a slot twice"),
        pytest.param(fields(padding=u16(0)), id="a row that is padding too"),
        pytest.param(fields(slots=u16(0, 5)), id="an unknown slot"),
        pytest.param(fields(padding=u16(5)), id="unknown padding"),
        pytest.param(fields(ended=u16(5)), id="an unknown slot ended"),
        pytest.param(fields(ended=u16(0)), id="an ended slot computes"),
        pytest.param(fields(num_tokens=i32(1)), id="lengths that differ"),
        pytest.param(fields(num_tokens=i32(1, 0)), id="a row without tokens"),
        pytest.param(fields(num_tokens=i32(2, 1)), id="more tokens than are known"),
        pytest.param(fields(num_tokens=i32(1, 40)), id="more tokens than a step may have"),
        pytest.param(fields(grow_slots=u16(5), grow_blocks=i32(5)), id="an unknown slot grows"),
        pytest.param(fields(grow_slots=u16(0), grow_blocks=i32(3)), id="a block of another sequence"),
        pytest.param(fields(grow_slots=u16(0), grow_blocks=i32(2)), id="a block it has already"),
        pytest.param(fields(grow_slots=u16(0), grow_blocks=i32(0)), id="block 0"),
        pytest.param(fields(grow_slots=u16(0), grow_blocks=i32(9)), id="a block beyond the pool"),
        pytest.param(fields(grow_slots=u16(0, 0), grow_blocks=i32(5, 6)), id="a slot grows twice"),
        pytest.param(with_start(start(slot=1)), id="a known slot starts"),
        pytest.param(with_start(start(slot=8)), id="a slot beyond the batch"),
        pytest.param(with_start(start(sequence_id=70)), id="a sequence in two slots"),
        pytest.param(with_start(start(num_tokens=2)), id="fewer tokens than announced"),
        pytest.param(with_start(start(num_blocks=0)), id="more blocks than announced"),
        pytest.param(with_start(start(), block=4), id="a start on a held block"),
    ],
)
def test_a_wrong_plan_is_caught(spoil: Callable[[StepPlan], None]) -> None:
    worker, plan = started(), good()
    spoil(plan)
    with pytest.raises(AssertionError):
        worker.submit(plan)


def test_a_block_that_a_plan_in_flight_names_is_not_given_on() -> None:
    worker = started()
    plan = StepPlan(PlanHeader(0, 1, 2), slots=u16(0), num_tokens=i32(1), ended=u16(1))
    plan.grow_slots, plan.grow_blocks = u16(0), i32(4)
    with pytest.raises(AssertionError, match="block 4 is still named"):
        worker.submit(plan)
    worker = started()
    worker.answer()
    worker.submit(plan)


def test_more_than_two_plans_in_flight_are_caught() -> None:
    worker = started()
    worker.submit(good())
    with pytest.raises(AssertionError, match="deep"):
        worker.submit(good(3))


def test_keys_that_somebody_else_has_overwritten_are_noticed() -> None:
    worker = started()
    worker._store[1, 2] = 5
    with pytest.raises(AssertionError, match="slot 0 reads something else's keys at position 2"):
        worker.submit(good())


def test_a_table_that_is_too_short_is_caught() -> None:
    worker = started()
    for step in range(2, 4):
        worker.submit(StepPlan(PlanHeader(0, 1, step), slots=u16(0), num_tokens=i32(1)))
        worker.answer()
    with pytest.raises(AssertionError, match="computes 9 tokens on 2 blocks"):
        worker.submit(StepPlan(PlanHeader(0, 1, 4), slots=u16(0), num_tokens=i32(1)))
