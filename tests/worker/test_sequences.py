"""The mirror: plans add up to what a plain dictionary of lists would hold, and a plan that does not fit is refused by name."""

import dataclasses

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.plans import GREEDY, PlanMaker
from wire.messages import PlanHeader, SamplingSpec, StepPlan
from worker.sequences import PlanError, Sequences
from worker.sim_executor import sim_facts

FACTS = sim_facts(
    vocab_size=100, max_model_len=40, block_size=4, num_blocks=30, num_host_blocks=10, max_batch_rows=5, max_step_tokens=64
)


def mirror() -> tuple[Sequences, PlanMaker]:
    return Sequences(FACTS), PlanMaker(FACTS)


def change(plan: StepPlan, **fields: object) -> StepPlan:
    return dataclasses.replace(plan, **fields)


def change_start(plan: StepPlan, **fields: object) -> StepPlan:
    start = msgspec.structs.replace(plan.header.starts[0], **fields)
    header = PlanHeader(plan.header.group, plan.header.epoch, plan.header.step_id, (start, *plan.header.starts[1:]))
    return change(plan, header=header)


def test_rows_continue_where_the_last_step_ended_and_sample_once_all_is_computed() -> None:
    sequences, maker = mirror()
    maker.start(3, range(7))
    first = sequences.apply(maker.plan({3: 5}))
    assert (first.slots.tolist(), first.first.tolist(), first.count.tolist()) == ([3], [0], [5])
    assert first.num_sampled == 0 and sequences.num_computed[3] == 5 and sequences.num_tokens[3] == 7
    second = sequences.apply(maker.plan({3: 2}))
    assert second.first.tolist() == [5] and second.sampled_slots.tolist() == [3]
    sequences.feed(second, np.array([42], np.int32))
    assert sequences.tokens[3, :8].tolist() == [0, 1, 2, 3, 4, 5, 6, 42]
    third = sequences.apply(maker.plan({3: 1}))
    assert third.first.tolist() == [7] and third.num_sampled == 1


def test_a_slot_is_taken_again_in_the_plan_that_ends_its_sequence() -> None:
    sequences, maker = mirror()
    maker.start(0, range(9), spare_blocks=4)
    sequences.apply(maker.plan({0: 9}))
    maker.end(0)
    maker.start(0, [50, 51])
    rows = sequences.apply(maker.plan({0: 2}))
    assert rows.first.tolist() == [0] and sequences.tokens[0, :2].tolist() == [50, 51]
    assert np.count_nonzero(sequences.block_tables) == 1 and sequences.blocks.refs.sum() == 1


def test_one_plan_appends_several_blocks_to_one_table_in_order() -> None:
    sequences, maker = mirror()
    maker.start(1, range(10))
    maker.start(2, range(10))
    plan = maker.plan({1: 1, 2: 1})
    sequences.apply(change(plan, grow_slots=np.array([2, 1, 2], np.uint16), grow_blocks=np.array([20, 21, 22], np.int32)))
    assert sequences.block_tables[2, 1:4].tolist() == [20, 22, 0] and sequences.block_tables[1, 1:3].tolist() == [21, 0]


def test_padding_rows_recompute_the_last_known_token_and_change_nothing() -> None:
    sequences, maker = mirror()
    maker.start(0, range(4))
    maker.start(1, range(6))
    sequences.feed(sequences.apply(maker.plan({0: 4, 1: 3})), np.array([77], np.int32))
    rows = sequences.apply(maker.plan({1: 3}, padding=[0]))
    assert rows.slots.tolist() == [1, 0] and rows.first.tolist() == [3, 4] and rows.count.tolist() == [3, 1]
    assert rows.num_padding == 1 and rows.sampled_slots.tolist() == [1] and rows.drawing.tolist() == [0, 1]
    assert sequences.num_tokens[0] == 5 and sequences.num_computed[0] == 4


def test_a_plan_may_end_sequences_and_compute_nothing() -> None:
    sequences, maker = mirror()
    maker.start(4, range(3))
    sequences.apply(maker.plan())
    maker.end(4)
    rows = sequences.apply(maker.plan())
    assert len(rows.slots) == 0 and rows.num_sampled == 0 and not sequences.live.any()


def test_reset_forgets_everything() -> None:
    sequences, maker = mirror()
    maker.start(2, range(12), spare_blocks=3)
    sequences.apply(maker.plan())
    sequences.reset()
    assert not sequences.live.any() and not sequences.block_tables.any() and not sequences.blocks.refs.any()
    again = PlanMaker(FACTS, epoch=2)
    again.start(2, [9])
    assert sequences.apply(again.plan()).first.tolist() == [0]


def test_sampling_columns_follow_the_drawing_rows() -> None:
    sequences, maker = mirror()
    maker.start(0, range(3), SamplingSpec(0.5, 7, 0.9, 0.1, -1, 2, (5, 99, 1000)), output_index=3)
    maker.start(1, range(5))
    maker.start(2, range(4), SamplingSpec(1.0, 0, 1.0, 0.0, 2**64 - 1))
    rows = sequences.apply(maker.plan({2: 4, 1: 2, 0: 3}))
    columns = sequences.sampling(rows)
    assert columns.temperature.tolist() == [1.0, 0.5] and columns.top_k.tolist() == [0, 7]
    assert columns.seed.tolist() == [2**64 - 1, 2**64 - 1] and columns.output_index.tolist() == [0, 3]
    assert columns.position.tolist() == [4, 3]
    assert [part.tolist() for part in columns.masked] == [[1, 1], [5, 99]], "1000 is no token of this vocabulary"


def test_stop_tokens_are_masked_until_min_tokens_are_out() -> None:
    sequences, maker = mirror()
    many = tuple(range(20, 31))
    maker.start(0, range(3), SamplingSpec(0.0, 0, 1.0, 0.0, 0, 2, many), num_prompt_tokens=2)
    masked = []
    for _ in range(3):
        rows = sequences.apply(maker.plan())
        masked.append(sequences.sampling(rows).masked[1].tolist())
        sequences.feed(rows, np.array([8], np.int32))
    assert masked == [list(many), [], []], "one output token was known, the second was masked, the third is free"


def test_bias_and_what_penalties_count_are_those_of_the_drawing_rows() -> None:
    sequences, maker = mirror()
    many = tuple((token, 0.5 * token) for token in range(10, 16))
    penalized = SamplingSpec(
        0.0, 0, 1.0, 0.0, 0, repetition_penalty=1.5, frequency_penalty=0.5, logit_bias=((7, 2.0), (1000, 9.0))
    )
    maker.start(0, [4, 5, 4, 6], penalized, num_prompt_tokens=2)
    maker.start(1, range(5))
    maker.start(2, [9, 9], SamplingSpec(0.0, 0, 1.0, 0.0, 0, logit_bias=many))
    maker.start(3, [8, 8, 3], SamplingSpec(0.0, 0, 1.0, 0.0, 0, presence_penalty=-1.0), num_prompt_tokens=1)
    columns = sequences.sampling(sequences.apply(maker.plan({3: 3, 2: 2, 1: 4, 0: 4})))
    bias, seen = columns.bias, columns.seen
    assert bias.rows.tolist() == [1] * 6 + [2] and bias.tokens.tolist() == [*range(10, 16), 7], "1000 is no token"
    assert bias.values.tolist() == [value for _, value in many] + [2.0]
    found = sorted(zip(seen.rows.tolist(), seen.tokens.tolist(), seen.values.tolist(), strict=True))
    assert found == [(0, 3, 1.0), (0, 8, 1.0), (2, 4, 1.0), (2, 5, 0.0), (2, 6, 1.0)], "row 1 has no penalty"
    assert columns.repetition_penalty.tolist() == [1.0, 1.0, 1.5] and columns.presence_penalty.tolist() == [-1.0, 0.0, 0.0]
    assert columns.frequency_penalty.tolist() == [0.0, 0.0, 0.5]


def test_what_one_sequence_asked_for_does_not_stay_for_the_next() -> None:
    sequences, maker = mirror()
    asked = SamplingSpec(0.0, 0, 1.0, 0.0, 0, 9, (5, 6), 1.5, 1.0, 0.5, ((7, 2.0), (8, 1.0)))
    maker.start(0, range(3), asked)
    sequences.apply(maker.plan())
    maker.end(0)
    maker.start(0, range(3), SamplingSpec(0.0, 0, 1.0, 0.0, 0))
    columns = sequences.sampling(sequences.apply(maker.plan()))
    assert not len(columns.bias) and not len(columns.seen) and not len(columns.masked[0])


def test_a_prefix_that_is_already_computed_may_be_shared() -> None:
    sequences, maker = mirror()
    maker.start(0, range(10))
    sequences.apply(maker.plan())
    maker.start(1, range(9), prefix_of=0, num_computed=8, spare_blocks=1)
    rows = sequences.apply(maker.plan({1: 1}))
    assert rows.first.tolist() == [8] and sequences.num_computed[1] == 9
    assert sequences.block_tables[0, :2].tolist() == sequences.block_tables[1, :2].tolist()
    assert sequences.blocks.refs[sequences.block_tables[1, :3]].tolist() == [2, 2, 1]
    maker.end(0)
    sequences.apply(maker.plan())
    assert sequences.blocks.refs[sequences.block_tables[1, :3]].tolist() == [1, 1, 1]


def test_a_block_that_two_tables_hold_is_not_written() -> None:
    sequences, maker = mirror()
    maker.start(0, range(8), spare_blocks=1)
    sequences.apply(maker.plan({0: 8}))
    maker.start(1, range(9), prefix_of=0, num_computed=8, spare_blocks=1)
    plan = maker.plan({1: 5})
    with pytest.raises(PlanError, match="slot 1 writes block 1, which 2 tables hold"):
        sequences.apply(change_start(plan, num_computed_tokens=3))


def test_after_a_copy_each_table_writes_to_its_own_block() -> None:
    sequences, maker = mirror()
    maker.start(0, range(6))
    sequences.feed(sequences.apply(maker.plan()), np.array([42], np.int32))
    maker.start(1, range(6), prefix_of=0, num_computed=5, output_index=1)
    plan = maker.plan()
    assert plan.copy_from.tolist() == [2] and plan.copy_to.tolist() == [3]
    rows = sequences.apply(plan)
    assert rows.first.tolist() == [6, 5] and rows.sampled_slots.tolist() == [0, 1]
    assert sequences.block_tables[:2, :2].tolist() == [[1, 2], [1, 3]]
    assert sequences.blocks.filled[1:4].tolist() == [4, 3, 2], "what slot 0 had drawn was copied, and does not count"


def test_swapped_blocks_come_back_to_other_places() -> None:
    sequences, maker = mirror()
    maker.start(0, range(6))
    maker.start(1, range(7))
    rows = sequences.apply(maker.plan())
    sequences.feed(rows, np.array([40, 41], np.int32))
    swapped = maker.swap_out(0)
    sequences.apply(maker.plan({1: 1}))
    assert sequences.blocks.host_filled.tolist() == [0, 4, 2, *[0] * 8] and not sequences.live[0]
    maker.start(3, [*range(6), 40], num_prompt_tokens=6, swapped=swapped)
    rows = sequences.apply(maker.plan({3: 1}))
    assert rows.first.tolist() == [6] and rows.sampled_slots.tolist() == [3]
    assert not sequences.blocks.host_filled.any(), "what came back is gone there"


def test_one_plan_may_swap_out_to_make_room_for_what_it_swaps_in() -> None:
    facts = sim_facts(vocab_size=100, max_model_len=40, block_size=4, num_blocks=2, num_host_blocks=4, max_batch_rows=2)
    sequences, maker = Sequences(facts), PlanMaker(facts)
    maker.start(0, range(6))
    sequences.apply(maker.plan())
    first = maker.swap_out(0)
    maker.start(1, range(50, 56))
    sequences.apply(maker.plan())
    second = maker.swap_out(1)
    maker.start(0, range(7), num_prompt_tokens=6, swapped=first)
    assert sequences.apply(maker.plan()).first.tolist() == [6]
    maker.end(0)
    maker.start(0, range(50, 57), num_prompt_tokens=6, swapped=second)
    assert sequences.apply(maker.plan()).first.tolist() == [6]


def test_a_block_counts_as_filled_as_far_as_its_last_holder_came() -> None:
    sequences, maker = mirror()
    maker.start(0, range(4))
    sequences.apply(maker.plan())
    maker.end(0)
    maker.start(1, range(50, 60))
    plan = maker.plan({1: 2})
    assert plan.start_blocks.tolist() == [1], "the block of slot 0 is taken again"
    sequences.apply(plan)
    maker.start(2, range(50, 60), prefix_of=1, num_computed=4)
    with pytest.raises(PlanError, match="in slot 2: 4 of its computed tokens are to be in block 1, which holds 2"):
        sequences.apply(maker.plan({2: 1}))


@pytest.mark.parametrize(
    "what, fields, message",
    [
        ("step", {"header": PlanHeader(0, 1, 5)}, "step 5 came where step 1 was expected"),
        ("unknown slot", {"slots": np.array([2], np.uint16)}, "slot 2 holds no sequence"),
        ("slot out of range", {"slots": np.array([9], np.uint16)}, "slot 9 of 5"),
        ("twice", {"slots": np.array([0, 0], np.uint16), "num_tokens": np.array([1, 1], np.int32)}, "slot 0 stands twice"),
        ("padded too", {"padding": np.array([0], np.uint16)}, "slot 0 stands twice"),
        ("too many tokens", {"num_tokens": np.array([4], np.int32)}, "computes more tokens than it knows"),
        ("no token", {"num_tokens": np.array([0], np.int32)}, "computes no token"),
        ("lengths", {"num_tokens": np.array([1, 1], np.int32)}, "1 slots, 2 counts"),
        ("huge step", {"num_tokens": np.array([65], np.int32)}, "65 tokens in a step"),
        ("missing block", {"num_tokens": np.array([3], np.int32), "grow_slots": np.empty(0, np.uint16),
                           "grow_blocks": np.empty(0, np.int32)}, "lacks a block"),
        ("block 0", {"grow_blocks": np.array([0], np.int32)}, "block 0 is not in 1..30"),
        ("block beyond", {"grow_blocks": np.array([31], np.int32)}, "block 31 is not in 1..30"),
        ("growth lengths", {"grow_slots": np.empty(0, np.uint16)}, "0 slots grow by 1 blocks"),
        ("growth of nothing", {"grow_slots": np.array([3], np.uint16)}, "slot 3 holds no sequence"),
        ("end of nothing", {"ended": np.array([3], np.uint16)}, "slot 3 holds no sequence"),
        ("ended twice", {"ended": np.array([0, 0], np.uint16)}, "slot 0 stands twice"),
        ("computed after its end", {"ended": np.array([0], np.uint16)}, "slot 0 holds no sequence"),
        ("tokens of no start", {"start_tokens": np.array([1], np.int32)}, "do not add up to start_tokens"),
        ("blocks of no start", {"start_blocks": np.array([1], np.int32)}, "do not add up to start_blocks"),
    ],
)  # fmt: skip
def test_a_plan_that_does_not_fit_is_refused(what: str, fields: dict[str, object], message: str) -> None:
    sequences, maker = mirror()
    maker.start(0, range(6))
    sequences.apply(maker.plan({0: 3}))
    with pytest.raises(PlanError, match=message):
        sequences.apply(change(maker.plan({0: 3}), **fields))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"slot": 5}, r"slots are 0\.\.4"),
        ({"slot": 0}, "the slot is taken"),
        ({"num_computed_tokens": 7}, "7 of 6 tokens computed"),
        ({"num_computed_tokens": 6}, "6 of 6 tokens computed; one at least is to be"),
        ({"num_computed_tokens": -1}, "-1 of 6 tokens computed"),
        ({"num_computed_tokens": 5}, "1 blocks do not hold 5 computed tokens"),
        ({"num_computed_tokens": 3}, "3 of its computed tokens are to be in block 3, which holds 0"),
        ({"num_prompt_tokens": 7}, "7 of 6 tokens are its prompt"),
        ({"num_tokens": 5}, "do not add up to start_tokens"),
        ({"num_blocks": 2}, "do not add up to start_blocks"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(fields: dict[str, int], message: str) -> None:
    sequences, maker = mirror()
    maker.start(0, range(6))
    sequences.apply(maker.plan())
    maker.start(1, range(6))
    with pytest.raises(PlanError, match=message):
        sequences.apply(change_start(maker.plan({1: 1}), **fields))


@pytest.mark.parametrize("tokens", [[100], [-1]])
def test_a_token_beyond_the_vocabulary_is_refused(tokens: list[int]) -> None:
    sequences, maker = mirror()
    maker.start(0, tokens)
    with pytest.raises(PlanError, match=r"not in 0\.\.99"):
        sequences.apply(maker.plan())


def test_a_sequence_longer_than_the_model_is_refused() -> None:
    sequences, maker = mirror()
    maker.start(0, [1] * 41)
    with pytest.raises(PlanError, match=r"41 tokens, allowed are 1\.\.40"):
        sequences.apply(maker.plan())
    sequences, maker = mirror()
    maker.start(0, [1] * 40)
    with pytest.raises(PlanError, match="would exceed max_model_len 40"):
        sequences.apply(maker.plan())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_plans_add_up_to_what_a_dictionary_would_hold(data: st.DataObject) -> None:
    sequences, maker = mirror()
    tokens: dict[int, list[int]] = {}
    computed: dict[int, int] = {}
    sampled_so_far = 0
    for _ in range(data.draw(st.integers(1, 12), "steps")):
        for slot in range(FACTS.max_batch_rows):
            fate = data.draw(st.sampled_from(["stay", "stay", "end", "start"]))
            if slot in tokens and (fate == "end" or len(tokens[slot]) > 30):
                maker.end(slot)
                del tokens[slot], computed[slot]
            elif slot not in tokens and fate == "start":
                tokens[slot] = data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=9))
                computed[slot] = 0
                maker.start(slot, tokens[slot])
        counts, padding = {}, []
        for slot in data.draw(st.permutations(sorted(tokens))):
            match data.draw(st.sampled_from(["all", "some", "pad", "rest"])):
                case "all":
                    counts[slot] = len(tokens[slot]) - computed[slot]
                case "some":
                    counts[slot] = data.draw(st.integers(1, len(tokens[slot]) - computed[slot]))
                case "pad":
                    padding.append(slot)
        rows = sequences.apply(maker.plan(counts, padding))
        assert rows.slots.tolist() == [*counts, *padding]
        assert rows.first.tolist() == [computed[s] for s in counts] + [len(tokens[s]) - 1 for s in padding]
        assert rows.count.tolist() == [*counts.values()] + [1] * len(padding)
        samplers = [slot for slot in counts if computed[slot] + counts[slot] == len(tokens[slot])]
        assert rows.sampled_slots.tolist() == samplers
        drawn = [(sampled_so_far + i) % 100 for i in range(len(samplers))]
        sampled_so_far += len(samplers)
        sequences.feed(rows, np.array(drawn, np.int32))
        for slot, count in counts.items():
            computed[slot] += count
        for slot, token in zip(samplers, drawn, strict=True):
            tokens[slot].append(token)
        assert np.flatnonzero(sequences.live).tolist() == sorted(tokens)
        for slot in tokens:
            assert sequences.tokens[slot, : sequences.num_tokens[slot]].tolist() == tokens[slot]
            assert sequences.num_computed[slot] == computed[slot]
            table = maker.sequences[slot].blocks
            assert sequences.block_tables[slot, : len(table)].tolist() == table
            assert not sequences.block_tables[slot, len(table) :].any()
        held = [block for one in maker.sequences.values() for block in one.blocks]
        assert np.flatnonzero(sequences.blocks.refs).tolist() == sorted(held)


def test_the_default_sampling_is_greedy() -> None:
    sequences, maker = mirror()
    maker.start(0, [1], GREEDY)
    assert sequences.sampling(sequences.apply(maker.plan())).temperature.tolist() == [0.0]
