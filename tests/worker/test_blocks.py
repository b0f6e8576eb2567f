"""Swaps and copies in a plan: what does not fit is refused by name, before any table or block has gone wrong unseen."""

import dataclasses

import numpy as np
import pytest

from tests.helpers.plans import PlanMaker
from wire.messages import StepPlan
from worker.sequences import PlanError, Sequences
from worker.sim_executor import sim_facts

FACTS = sim_facts(
    vocab_size=100, max_model_len=40, block_size=4, num_blocks=30, num_host_blocks=10, max_batch_rows=6, max_step_tokens=64
)


def i32(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


def moving() -> tuple[Sequences, StepPlan]:
    """A mirror, and a plan that it would take: slot 0 decodes, slot 1 forks from it, slot 2 is swapped out, slot 3 comes back,
    partly to the blocks that slot 2 leaves. The first test below says which blocks."""
    sequences, maker = Sequences(FACTS), PlanMaker(FACTS)
    maker.start(0, range(6))
    maker.start(2, range(20, 26))
    maker.start(3, range(30, 37))
    sequences.apply(maker.plan())
    swapped = maker.swap_out(3)
    sequences.apply(maker.plan({0: 1}))
    maker.swap_out(2)
    maker.start(3, range(30, 38), num_prompt_tokens=7, swapped=swapped)
    maker.start(1, range(6), prefix_of=0, num_computed=5)
    return sequences, maker.plan()


def test_the_plan_of_these_tests_is_taken_as_it_is() -> None:
    sequences, plan = moving()
    assert sequences.block_tables[:4, :2].tolist() == [[1, 4], [0, 0], [2, 5], [0, 0]]
    assert (plan.swap_out_blocks.tolist(), plan.swap_out_host_blocks.tolist()) == ([2, 5], [3, 4])
    assert (plan.swap_in_host_blocks.tolist(), plan.swap_in_blocks.tolist()) == ([1, 2], [5, 2])
    assert (plan.copy_from.tolist(), plan.copy_to.tolist()) == ([4], [6])
    rows = sequences.apply(plan)
    assert rows.slots.tolist() == [0, 3, 1] and rows.first.tolist() == [7, 7, 5]
    assert sequences.block_tables[:4, :2].tolist() == [[1, 4], [1, 6], [0, 0], [5, 2]]
    assert sequences.blocks.refs[:8].tolist() == [0, 2, 1, 0, 1, 1, 1, 0]
    assert sequences.blocks.filled[:8].tolist() == [0, 4, 4, 4, 4, 4, 2, 0], "3: what slot 3 left there"
    assert sequences.blocks.host_filled[:6].tolist() == [0, 0, 0, 4, 2, 0]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"swap_out_blocks": i32(2)}, "swap out: 1 blocks to 2"),
        ({"swap_out_blocks": i32()}, "swap out: 0 blocks to 2"),
        ({"swap_in_blocks": i32(5, 2, 9)}, "swap in: 2 blocks to 3"),
        ({"copy_to": i32()}, "copy: 1 blocks to 0"),
        ({"copy_from": i32()}, "copy: 0 blocks to 1"),
        ({"swap_out_blocks": i32(2, 0)}, r"block 0 is not in 1\.\.30"),
        ({"swap_out_blocks": i32(2, 31)}, r"block 31 is not in 1\.\.30"),
        ({"swap_out_blocks": i32(2, -1)}, r"block -1 is not in 1\.\.30"),
        ({"swap_out_host_blocks": i32(0, 4)}, r"host block 0 is not in 1\.\.10"),
        ({"swap_out_host_blocks": i32(3, 11)}, r"host block 11 is not in 1\.\.10"),
        ({"swap_in_host_blocks": i32(1, 11)}, r"host block 11 is not in 1\.\.10"),
        ({"swap_in_host_blocks": i32(0, 1)}, r"host block 0 is not in 1\.\.10"),
        ({"swap_in_blocks": i32(0, 2)}, r"block 0 is not in 1\.\.30"),
        ({"copy_from": i32(31)}, r"block 31 is not in 1\.\.30"),
        ({"copy_to": i32(0)}, r"block 0 is not in 1\.\.30"),
        ({"swap_out_host_blocks": i32(3, 3)}, "host block 3 is swapped out to twice"),
        ({"swap_in_host_blocks": i32(1, 1)}, "host block 1 is swapped in twice"),
        ({"swap_in_blocks": i32(5, 5)}, "block 5 is swapped in or copied to twice"),
        ({"copy_to": i32(5)}, "block 5 is swapped in or copied to twice"),
        ({"copy_from": i32(4, 4), "copy_to": i32(6, 6)}, "block 6 is swapped in or copied to twice"),
        ({"copy_from": i32(6)}, "block 6 is copied from and copied to"),
        ({"copy_from": i32(4, 6), "copy_to": i32(6, 9)}, "block 6 is copied from and copied to"),
        ({"swap_in_blocks": i32(5, 1)}, "block 1 is swapped in or copied to while a table holds it"),
        ({"copy_to": i32(4), "copy_from": i32(1)}, "block 4 is swapped in or copied to while a table holds it"),
        ({"swap_in_blocks": i32(5, 9)}, "block 9 is swapped in or copied to and no table holds it"),
        ({"copy_to": i32(9)}, "block 9 is swapped in or copied to and no table holds it"),
        ({"swap_out_blocks": i32(2, 20)}, "block 20 is swapped out and holds nothing"),
        ({"swap_in_host_blocks": i32(1, 9)}, "host block 9 is swapped in and holds nothing"),
        ({"copy_from": i32(20)}, "block 20 is copied and holds nothing"),
        # What a start says is computed is not there without its swap or copy.
        ({"swap_in_host_blocks": i32(2), "swap_in_blocks": i32(2)}, "in slot 3: 4 of its computed tokens are to be in block 5"),
        ({"copy_from": i32(), "copy_to": i32(), "start_blocks": i32(5, 2, 1, 7)}, "slot 1: 1 of its .* block 7, which holds 0"),
        ({"start_blocks": i32(5, 5, 1, 6)}, "in slot 3: block 5 stands twice in its table"),
        ({"ended": np.empty(0, np.uint16)}, "block 5 is swapped in or copied to while a table holds it"),
    ],
)
def test_swaps_and_copies_that_do_not_fit_are_refused(fields: dict[str, np.ndarray], message: str) -> None:
    sequences, plan = moving()
    with pytest.raises(PlanError, match=message):
        sequences.apply(dataclasses.replace(plan, **fields))


def test_without_host_memory_every_host_block_is_refused() -> None:
    facts = sim_facts(vocab_size=100, max_model_len=40, block_size=4, num_blocks=30)
    sequences, maker = Sequences(facts), PlanMaker(facts)
    maker.start(0, range(6))
    sequences.apply(maker.plan())
    plan = dataclasses.replace(maker.plan(), swap_out_blocks=i32(1), swap_out_host_blocks=i32(1))
    with pytest.raises(PlanError, match="host block 1: there are none"):
        sequences.apply(plan)


def test_a_host_block_comes_back_once() -> None:
    sequences, maker = Sequences(FACTS), PlanMaker(FACTS)
    maker.start(0, range(6))
    sequences.apply(maker.plan())
    swapped = maker.swap_out(0)
    maker.start(1, range(7), swapped=swapped)
    sequences.apply(maker.plan())
    maker.start(2, range(7), swapped=swapped)
    with pytest.raises(PlanError, match="host block 1 is swapped in and holds nothing"):
        sequences.apply(maker.plan({2: 1}))


def test_two_tables_that_share_a_block_are_swapped_out_each_with_a_copy_of_it() -> None:
    sequences, maker = Sequences(FACTS), PlanMaker(FACTS)
    maker.start(0, range(6))
    sequences.apply(maker.plan())
    maker.start(1, range(6), prefix_of=0, num_computed=5)
    sequences.apply(maker.plan())
    maker.swap_out(0)
    maker.swap_out(1)
    plan = maker.plan()
    assert plan.swap_out_blocks.tolist() == [1, 2, 1, 3]
    sequences.apply(plan)
    assert sequences.blocks.host_filled[:6].tolist() == [0, 4, 3, 4, 2, 0] and not sequences.blocks.refs.any()


def test_a_block_that_comes_back_may_be_shared_and_copied_in_the_same_plan() -> None:
    """Swaps are done before copies, and both before anything is computed."""
    sequences, maker = Sequences(FACTS), PlanMaker(FACTS)
    maker.start(0, range(6))
    sequences.apply(maker.plan())
    swapped = maker.swap_out(0)
    sequences.apply(maker.plan())
    maker.start(1, range(7), num_prompt_tokens=6, swapped=swapped)
    maker.start(2, range(7), num_prompt_tokens=6, output_index=1, prefix_of=1, num_computed=6)
    plan = maker.plan()
    assert set(plan.copy_from.tolist()) <= set(plan.swap_in_blocks.tolist())
    assert sequences.apply(plan).first.tolist() == [6, 6]


def test_reset_empties_all_blocks() -> None:
    sequences, plan = moving()
    sequences.apply(plan)
    sequences.reset()
    blocks = sequences.blocks
    assert not blocks.refs.any() and not blocks.filled.any() and not blocks.host_filled.any()
