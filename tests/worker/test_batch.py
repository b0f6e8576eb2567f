"""Device inputs, built with vectors, equal those of a loop over rows and tokens."""

import numpy as np
import pytest
import torch

from tests.helpers.plans import PlanMaker
from worker.batch import Batch, build
from worker.sequences import Sequences, StepRows
from worker.sim_executor import sim_facts

FACTS = sim_facts(vocab_size=1000, max_model_len=100, block_size=4, num_blocks=200, max_batch_rows=12, max_step_tokens=400)


def build_slowly(sequences: Sequences, rows: StepRows) -> dict[str, list]:
    """Twin of build(): one row and one token after the other."""
    out: dict[str, list] = {
        name: [] for name in ("input_ids", "positions", "slot_mapping", "context_lens", "block_tables", "drawing")
    }
    out["query_start"] = [0]
    num_rows = len(rows.slots) - rows.num_padding
    width = max((-(-(f + c) // FACTS.block_size) for f, c in zip(rows.first, rows.count, strict=True)), default=0)
    for row, slot in enumerate(rows.slots):
        for position in range(rows.first[row], rows.first[row] + rows.count[row]):
            block = sequences.block_tables[slot][position // FACTS.block_size]
            out["input_ids"].append(int(sequences.tokens[slot][position]))
            out["positions"].append(int(position))
            in_dump = row >= num_rows
            out["slot_mapping"].append(
                (row - num_rows) % FACTS.block_size
                if in_dump
                else int(block) * FACTS.block_size + int(position) % FACTS.block_size
            )
        out["query_start"].append(len(out["input_ids"]))
        out["context_lens"].append(int(rows.first[row] + rows.count[row]))
        out["block_tables"].append(sequences.block_tables[slot][:width].tolist())
        if row in rows.drawing.tolist():
            out["drawing"].append(len(out["input_ids"]) - 1)
    return out


def assert_equal(batch: Batch, slow: dict[str, list]) -> None:
    attention = batch.attention
    for name in ("input_ids", "positions", "drawing"):
        assert getattr(batch, name).tolist() == slow[name], name
    for name in ("slot_mapping", "context_lens", "query_start", "block_tables"):
        assert getattr(attention, name).tolist() == slow[name], name
    assert attention.query_start_cpu.tolist() == slow["query_start"]
    assert attention.context_lens_cpu.tolist() == slow["context_lens"]
    assert attention.block_tables_cpu.tolist() == slow["block_tables"]
    assert attention.max_query_len == max(np.diff(slow["query_start"]), default=0)


@pytest.mark.parametrize("seed", range(6))
def test_a_batch_equals_its_slow_twin(seed: int) -> None:
    choose = np.random.default_rng(seed)
    sequences, maker = Sequences(FACTS), PlanMaker(FACTS, shuffle=seed)
    for _ in range(25):
        for slot in range(FACTS.max_batch_rows):
            one = maker.sequences.get(slot)
            if one is not None and (one.known > 60 or choose.random() < 0.1):
                maker.end(slot)
            elif one is None and choose.random() < 0.6:
                maker.start(slot, choose.integers(0, 1000, choose.integers(1, 30)), spare_blocks=int(choose.integers(0, 9)))
        counts, padding = {}, []
        for slot in choose.permutation(sorted(maker.sequences)).tolist():
            one = maker.sequences[slot]
            fate = choose.random()
            if fate < 0.5:
                counts[slot] = one.known - one.computed
            elif fate < 0.7:
                counts[slot] = int(choose.integers(1, one.known - one.computed + 1))
            elif fate < 0.85:
                padding.append(slot)
        rows = sequences.apply(maker.plan(counts, padding))
        batch = build(sequences, rows, "cpu")
        assert_equal(batch, build_slowly(sequences, rows))
        if padding:
            assert batch.attention.slot_mapping[-len(padding) :].max() < FACTS.block_size, "padding writes to block 0"
        sequences.feed(rows, choose.integers(0, 1000, rows.num_sampled).astype(np.int32))


def test_types_are_what_attention_and_embeddings_ask_for() -> None:
    sequences, maker = Sequences(FACTS), PlanMaker(FACTS)
    maker.start(3, range(9))
    batch = build(sequences, sequences.apply(maker.plan()), "cpu")
    attention = batch.attention
    assert {batch.input_ids.dtype, batch.positions.dtype, attention.slot_mapping.dtype} == {torch.int64}
    assert {attention.query_start.dtype, attention.context_lens.dtype, attention.block_tables.dtype} == {torch.int32}
    assert attention.block_tables.is_contiguous()


def test_the_table_is_as_wide_as_the_longest_context_not_as_the_reserve() -> None:
    sequences, maker = Sequences(FACTS), PlanMaker(FACTS)
    maker.start(0, range(5), spare_blocks=20)
    assert build(sequences, sequences.apply(maker.plan()), "cpu").attention.block_tables.shape == (1, 2)
