"""The executor that remembers contents: right plans pass, and each way of reading something else's keys and values is found."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.content_executor import ContentExecutor, prefix_hashes, undisturbed
from tests.helpers.plans import GREEDY, PlanMaker, Swapped
from wire import SamplingSpec, StepFailed, StepPlan, StepResult, decode, encode
from worker.executor import Executor
from worker.sim_executor import Latency, sim_facts

FACTS = sim_facts(
    vocab_size=50, max_model_len=40, block_size=4, num_blocks=24, num_host_blocks=24, max_batch_rows=5, max_step_tokens=64
)


def i32(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


def executor() -> tuple[ContentExecutor, PlanMaker]:
    return ContentExecutor.of(FACTS), PlanMaker(FACTS)


def run(to: Executor, plan: StepPlan) -> dict[int, int]:
    """Slot → token."""
    answers: list[StepResult | StepFailed] = []
    again = decode(encode(plan))
    assert isinstance(again, StepPlan)
    to.submit(again, answers.append)
    (answer,) = answers
    assert isinstance(answer, StepResult)
    return dict(zip(answer.slots.tolist(), answer.tokens.tolist(), strict=True))


def test_a_prefix_hash_depends_on_all_tokens_up_to_it_and_on_their_order() -> None:
    base = prefix_hashes(i32(1, 2, 3, 4))
    other = prefix_hashes(i32(1, 3, 2, 4))
    assert base[0] == other[0] and not np.isin(base[1:], other[1:]).any()
    assert prefix_hashes(i32(1, 2))[1] == base[1] and len(set(prefix_hashes(np.zeros(100, np.int32)).tolist())) == 100


def test_tokens_are_those_of_the_simulated_executor() -> None:
    content, maker = executor()
    maker.start(0, [1, 2, 3])
    assert [run(content, maker.plan())[0] for _ in range(9)] == undisturbed([1, 2, 3], 9, 50, GREEDY)
    assert content.num_checked == sum(range(3, 11))


def test_a_step_lasts_what_the_formula_says_to_the_nanosecond() -> None:
    content, maker = ContentExecutor.of(FACTS, Latency(base_ns=7, per_token_ns=100)), PlanMaker(FACTS)
    maker.start(0, [1, 2, 3])
    answers: list[StepResult | StepFailed] = []
    content.submit(maker.plan(), answers.append)
    (answer,) = answers
    assert isinstance(answer, StepResult) and answer.header.duration_ns == 307


def test_another_prompts_block_is_found() -> None:
    content, maker = executor()
    maker.start(0, [1, 2, 3, 4, 5])
    run(content, maker.plan())
    maker.start(1, [1, 2, 3, 9, 5], prefix_of=0, num_computed=4)
    with pytest.raises(AssertionError, match="step 1: slot 1 reads something else at position 3"):
        run(content, maker.plan({1: 1}))


def test_the_same_tokens_after_another_prefix_are_found() -> None:
    content, maker = executor()
    maker.start(0, [9, 9, 9, 9, 1, 2, 3, 4, 5])
    run(content, maker.plan())
    maker.start(1, [8, 8, 8, 8, 1, 2, 3, 4, 5], spare_blocks=1)
    run(content, maker.plan({1: 4}))
    maker.end(1)
    mine = maker.sequences[0].blocks
    maker.start(2, [8, 8, 8, 8, 1, 2, 3, 4, 5], prefix_of=0, num_computed=8)
    plan = maker.plan({2: 1})
    blocks = plan.start_blocks.copy()
    assert blocks[1] == mine[1]
    blocks[0] = 4  # of slot 1, rightly
    with pytest.raises(AssertionError, match="slot 2 reads something else at position 4"):
        run(content, dataclasses.replace(plan, start_blocks=blocks))


def test_a_block_that_was_given_to_somebody_else_meanwhile_is_found() -> None:
    content, maker = executor()
    maker.start(0, range(9))
    run(content, maker.plan())
    maker.end(0)
    maker.start(1, range(20, 29))
    run(content, maker.plan())
    maker.start(2, range(9), prefix_of=1, num_computed=8)
    with pytest.raises(AssertionError, match="slot 2 reads something else at position 0"):
        run(content, maker.plan({2: 1}))


def test_a_copy_of_the_wrong_block_is_found() -> None:
    content, maker = executor()
    maker.start(0, range(6))
    run(content, maker.plan())
    maker.start(1, range(6), prefix_of=0, num_computed=5)
    plan = maker.plan({1: 1})
    assert plan.copy_from.tolist() == [2]
    with pytest.raises(AssertionError, match=r"slot 1 reads something else at position 4 \(block 3, offset 0\)"):
        run(content, dataclasses.replace(plan, copy_from=i32(1)))


def test_a_missing_copy_is_found_where_the_mirror_can_not_see_it() -> None:
    content, maker = executor()
    maker.start(0, range(6))
    maker.start(1, range(30, 34))
    run(content, maker.plan())
    maker.end(1)
    maker.start(1, range(6), prefix_of=0, num_computed=5)
    plan = maker.plan({1: 1})
    with pytest.raises(AssertionError, match="slot 1 reads something else at position 4"):
        run(content, dataclasses.replace(plan, copy_from=i32(), copy_to=i32()))


def test_swapped_blocks_in_the_wrong_order_are_found() -> None:
    content, maker = executor()
    maker.start(0, range(9))
    run(content, maker.plan())
    swapped = maker.swap_out(0)
    run(content, maker.plan())
    maker.start(0, range(10), swapped=Swapped(8, swapped.host_blocks[:2]))
    plan = maker.plan()
    with pytest.raises(AssertionError, match="slot 0 reads something else at position 0"):
        run(content, dataclasses.replace(plan, swap_in_host_blocks=plan.swap_in_host_blocks[::-1]))


def test_a_plan_that_the_mirror_refuses_is_an_assertion_error() -> None:
    content, maker = executor()
    maker.start(0, range(6))
    with pytest.raises(AssertionError, match="step 0: PlanError: slot 0 computes more tokens than it knows"):
        run(content, dataclasses.replace(maker.plan(), num_tokens=i32(7)))


def test_after_a_reset_nothing_is_left_in_any_block() -> None:
    content, maker = executor()
    maker.start(0, range(6))
    run(content, maker.plan())
    content.reset()
    fresh = PlanMaker(FACTS, epoch=2)
    fresh.start(0, [7, 7])
    run(content, fresh.plan())
    assert np.count_nonzero(content._device) == 2


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_whatever_is_shared_copied_and_swapped_rightly_passes_and_gives_the_tokens_of_runs_alone(data: st.DataObject) -> None:
    """Slots live and end at random; new ones begin from nothing, fork from a live one, or come back from the host."""
    content, maker = executor()
    sampling = SamplingSpec(1.0, 0, 1.0, 0.0, 3)
    live: dict[int, tuple[list[int], int, list[int]]] = {}  # slot → prompt, output index, outputs
    away: list[tuple[Swapped, list[int], int, list[int]]] = []

    def start(slot: int, prompt: list[int], index: int, outputs: list[int], **how: object) -> None:
        maker.start(slot, prompt + outputs, sampling, num_prompt_tokens=len(prompt), output_index=index, **how)
        live[slot] = (prompt, index, outputs)

    for number in range(data.draw(st.integers(5, 40), "steps")):
        for slot in range(FACTS.max_batch_rows):
            settled = [other for other in live if maker.sequences[other].computed]
            fate = data.draw(st.sampled_from(["stay"] * 6 + ["end", "swap", "fresh", "fork", "fork", "back", "back"]))
            if slot in live and fate == "end" and slot in settled:
                maker.end(slot)
                del live[slot]
            elif slot in live and (fate == "swap" or len(maker.free) < 8) and slot in settled:
                blocks = -(-maker.sequences[slot].computed // FACTS.block_size)
                if blocks <= len(maker.free_host):
                    away.append((maker.swap_out(slot), *live.pop(slot)))
            elif slot not in live and fate == "fresh" and len(maker.free) > 12:
                start(slot, data.draw(st.lists(st.integers(0, 49), min_size=1, max_size=9)), 0, [])
            elif slot not in live and fate == "fork" and settled and len(maker.free) > 12:
                source = data.draw(st.sampled_from(sorted(settled)))
                prompt = live[source][0]
                most = min(len(prompt) - 1, maker.sequences[source].computed)
                if most > 0 and all(s[0].slot != source for s in maker._starts):
                    start(slot, prompt, number + 1, [], prefix_of=source, num_computed=data.draw(st.integers(1, most)))
            elif slot not in live and fate == "back" and away and len(maker.free) > 12:
                swapped, prompt, index, outputs = away.pop(0)
                start(slot, prompt, index, outputs, swapped=swapped)
        counts = {}
        for slot in live:
            missing = maker.sequences[slot].known - maker.sequences[slot].computed
            if maker.sequences[slot].known < FACTS.max_model_len and data.draw(st.booleans()):
                counts[slot] = data.draw(st.integers(1, missing))
        for slot, token in run(content, maker.plan(counts)).items():
            live[slot][2].append(token)
        assert content._sim.sequences.blocks.refs.tolist() == maker.refs
    for prompt, index, outputs in live.values():
        assert outputs == undisturbed(prompt, len(outputs), FACTS.vocab_size, sampling, index)
