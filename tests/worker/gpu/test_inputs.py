"""A step's numbers, packed for the device and prepared there, are what the host's batch holds, though the host never hears of
the tokens that were drawn."""

import numpy as np
import pytest
import torch

from tests.helpers.plans import PlanMaker
from worker.batch import build
from worker.gpu.graphs import sizes_up_to
from worker.gpu.inputs import Sizes, cut, put, put_padded, step_inputs
from worker.kernels.prepare import gather_tables, prepare_tokens, write_tables
from worker.sequences import Sequences
from worker.sim_executor import sim_facts

FACTS = sim_facts(vocab_size=1000, max_model_len=100, block_size=4, num_blocks=200, max_batch_rows=12, max_step_tokens=400)
DUMP, WIDTH = 12, 25
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Device:
    """What the device keeps from step to step."""

    def __init__(self) -> None:
        self.tables_SW = torch.zeros(DUMP + 1, WIDTH, dtype=torch.int32, device=DEVICE)
        self.last_tokens_S = torch.zeros(DUMP + 1, dtype=torch.int32, device=DEVICE)

    def prepare(self, inputs) -> tuple[torch.Tensor, ...]:  # type: ignore[no-untyped-def]
        """(ids, positions, slot mapping, block tables of the rows)."""
        write_tables(inputs.write_places, inputs.write_blocks, self.tables_SW)
        tokens = (inputs.ids, inputs.positions, inputs.token_slots)
        prepared = prepare_tokens(*tokens, self.last_tokens_S, self.tables_SW, FACTS.block_size)
        return *prepared, gather_tables(inputs.row_slots, self.tables_SW, WIDTH)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("padded", [False, True])
def test_the_device_finds_what_the_host_would_send(seed: int, padded: bool) -> None:
    choose = np.random.default_rng(seed)
    mirror, blind, maker, device = Sequences(FACTS), Sequences(FACTS), PlanMaker(FACTS, shuffle=seed), Device()
    for _ in range(20):
        for slot in range(FACTS.max_batch_rows):
            one = maker.sequences.get(slot)
            if one is None and choose.random() < 0.3:
                maker.start(slot, choose.integers(0, 1000, choose.integers(1, 20)))
            elif one is not None and (one.known > 60 or choose.random() < 0.1):
                maker.end(slot)
        left = {slot: one.known - one.computed for slot, one in maker.sequences.items()}
        decoding = [slot for slot, count in left.items() if count == 1]
        if padded:
            counts, padding = dict.fromkeys(decoding, 1), []
        else:
            padding = decoding[:2]
            counts = {slot: int(choose.integers(1, count + 1)) for slot, count in left.items() if slot not in padding}
        plan = maker.plan(counts, padding=padding)
        expected_rows, rows = mirror.apply(plan), blind.apply(plan)
        expected = build(mirror, expected_rows, "cpu")
        sizes, inputs = step_inputs(blind, rows)
        if not sizes.tokens:
            writes = (torch.from_numpy(each).to(DEVICE) for each in (inputs.write_places, inputs.write_blocks))
            write_tables(*writes, device.tables_SW)
            continue
        target = Sizes.of_decode(max(16, sizes.writes)) if padded else sizes
        numbers = np.full(target.total, -7, np.int32)
        if padded:
            put_padded(inputs, cut(numbers, target), DUMP, WIDTH)
        else:
            put(inputs, cut(numbers, target))
        sent = torch.from_numpy(numbers).to(DEVICE)
        ids, positions, slot_mapping, tables = (each.cpu() for each in device.prepare(cut(sent, target)))
        x = cut(torch.from_numpy(numbers), target)
        assert ids[: sizes.tokens].equal(expected.input_ids) and positions[: sizes.tokens].equal(expected.positions)
        real = sizes.tokens - len(padding)
        assert slot_mapping[:real].equal(expected.attention.slot_mapping[:real])
        assert (slot_mapping[real:] < FACTS.block_size).all(), "padding writes to block 0"
        assert x.query_start[: sizes.rows + 1].equal(expected.attention.query_start)
        assert x.context_lens[: sizes.rows].equal(expected.attention.context_lens) and not x.context_lens[sizes.rows :].any()
        width = expected.attention.block_tables.shape[1]
        for row, length in enumerate(x.context_lens[: sizes.rows].tolist()):
            # A padding row's last token may lack a block: what it reads there, nobody sees.
            blocks = min(-(-length // FACTS.block_size), blind.num_blocks[rows.slots[row]])
            assert tables[row, :blocks].equal(expected.attention.block_tables[row, :blocks]) and blocks <= width
        assert x.drawing[: sizes.draws].equal(expected.drawing.int())
        assert x.drawing.tolist()[sizes.draws :] == list(range(sizes.draws, len(x.drawing)))
        sampled = choose.integers(0, 1000, rows.num_sampled).astype(np.int32)
        mirror.feed(expected_rows, sampled)
        drawn = np.full(len(x.draw_slots), 999, np.int32)
        drawn[: rows.num_sampled] = sampled
        device.last_tokens_S[x.draw_slots.long().to(DEVICE)] = torch.from_numpy(drawn).to(DEVICE)
        assert not device.tables_SW[DUMP].any(), "the dump has block 0 only"


def test_parts_begin_at_multiples_of_16_bytes() -> None:
    sizes = Sizes(tokens=7, rows=3, draws=2, writes=0)
    parts = cut(np.zeros(sizes.total, np.int32), sizes)
    base = parts.ids.ctypes.data
    names = ("positions", "query_start", "context_lens", "draw_slots", "write_places")
    assert all((getattr(parts, name).ctypes.data - base) % 16 == 0 for name in names)
    assert len(parts.query_start) == 4 and len(parts.ids) == 7 and len(parts.write_blocks) == 0


@pytest.mark.parametrize("most", [1, 3, 8, 64, 100, 512, 1024, 5000])
def test_captured_sizes_waste_few_rows(most: int) -> None:
    sizes = sizes_up_to(most)
    assert sizes == sorted(set(sizes)) and sizes[-1] == most
    for rows in range(16, most + 1):
        size = next(size for size in sizes if size >= rows)
        assert size - rows < max(8, 0.25 * rows)
