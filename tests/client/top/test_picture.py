"""The picture of `carousel top`: it fits whatever terminal it is given, and leaves nothing out without saying so."""

from __future__ import annotations

import dataclasses
import re

import pytest

from carousel.v1 import control_pb2, inspect_pb2
from client.top.picture import ASCII, picture
from client.top.seen import Seen, Snapshot, as_json

MS = 1_000_000
HELD, FREE, CACHED = inspect_pb2.BLOCK_STATE_HELD, inspect_pb2.BLOCK_STATE_FREE, inspect_pb2.BLOCK_STATE_CACHED
SIZES = [(80, 24), (120, 40), (60, 16), (40, 12), (20, 4), (300, 90), (1, 1)]


def seen(num_rows: int, waiting: int = 0, num_blocks: int = 40, tenant: str = "alice", name: str = "request-{}") -> Snapshot:
    """Each row has two blocks of 16 tokens, the first one shared by all; every other row still computes its prompt."""
    server = control_pb2.GetServerInfoResponse(served_model_name="tiny", policy="continuous", max_batch_rows=max(8, num_rows))
    model = control_pb2.GetModelInfoResponse(block_size=16)
    state = Seen("127.0.0.1:50051", server, model)
    running = [
        control_pb2.RequestSummary(
            request_id=name.format(i),
            state=control_pb2.REQUEST_STATE_RUNNING,
            tenant=tenant,
            prompt_tokens=30 if i % 2 else 20,
            output_tokens=5,
            num_outputs=1,
        )
        for i in range(num_rows)
    ]
    queued = [
        control_pb2.RequestSummary(
            request_id=f"later-{i}", state=control_pb2.REQUEST_STATE_WAITING, prompt_tokens=7, priority=3
        )
        for i in range(waiting)
    ]
    state.take_requests(control_pb2.ListRequestsResponse(requests=[*running, *queued][:100], now_ns=90_000 * MS))
    tables = [
        inspect_pb2.BlockTable(request_id=name.format(i), slot=i, computed_tokens=25, blocks=[1, 2 + i])
        for i in range(num_rows)
    ]
    held = num_rows + 1 if num_rows else 0
    states = [HELD] * held + [CACHED] * 2 + [FREE] * max(0, num_blocks - held - 2)
    counts = [num_rows] * (held > 0) + [1] * num_rows + [0] * (len(states) - held)
    state.take_tables(
        inspect_pb2.GetBlockTablesResponse(
            block_size=16, num_blocks=len(states), tables=tables, states=states, ref_counts=counts
        )
    )
    for second in range(70):
        load = control_pb2.GetLoadResponse(
            running_requests=num_rows,
            waiting_requests=waiting,
            waiting_tokens=7 * waiting,
            total_blocks=len(states),
            held_blocks=held,
            output_tokens=100 * second,
        )
        state.take_load(load, float(second))
    return state.snapshot()


def lines(snapshot: Snapshot, width: int, height: int) -> list[str]:
    return [line.plain for line in picture(snapshot, width, height)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_rows", [0, 1, 8, 4096])
def test_it_fits_every_terminal(size: tuple[int, int], num_rows: int) -> None:
    width, height = size
    for glyphs in ({}, {"glyphs": ASCII}):
        drawn = picture(seen(num_rows, waiting=50, num_blocks=9000), width, height, **glyphs)
        assert len(drawn) <= max(4, height)
        assert all(line.cell_len <= max(20, width) for line in drawn)


def test_a_row_says_whose_it_is_and_how_far() -> None:
    text = "\n".join(lines(seen(4), 100, 24))
    assert "a    0 request-0" in text and "alice" in text
    assert "20+6" in text and "decode" in text, "5 output tokens are computed, a sixth is made of the fifth"
    assert "prompt" in text.splitlines()[6], "25 of 30 tokens of a prompt"
    bars = [line[line.index("alice") + 5 :] for line in text.splitlines() if "request-" in line]
    assert "▓" in bars[0] and "░" not in bars[0] and "░" in bars[1] and "▓" not in bars[1]


def test_the_block_map_has_owners_and_marks_what_is_shared() -> None:
    drawn = lines(seen(4, num_blocks=12), 80, 24)
    assert drawn[-1] == "◆abcd::....."
    assert [line for line in drawn if "4 shared" in line] == [] and [line for line in drawn if "1 shared" in line]


def test_a_large_pool_is_folded_to_the_lines_that_there_are() -> None:
    drawn = lines(seen(8, num_blocks=50_000), 80, 24)
    heading = next(i for i, line in enumerate(drawn) if line.startswith("blocks,"))
    assert "in a cell" in drawn[heading] and 1 <= len(drawn) - heading - 1 <= 4


def test_rows_without_a_line_are_counted() -> None:
    drawn = lines(seen(4096, num_blocks=9000), 80, 24)
    shown = sum(re.match(r"\S +\d+ request-", line) is not None for line in drawn)
    [more] = [line for line in drawn if "more rows" in line]
    assert int(more.split()[2]) + shown == 4096
    assert len(lines(seen(4096, num_blocks=9000), 80, 0)) > 4096, "a still of no given height shows all of them"


def test_an_empty_server_says_so() -> None:
    drawn = lines(seen(0), 80, 24)
    assert "no request is in the batch" in drawn and "queue: nobody waits" in drawn
    assert "TTFT -" in drawn[1] and "ITL -" in drawn[1]


def test_the_queue_is_told_with_its_oldest() -> None:
    drawn = lines(seen(2, waiting=500), 80, 24)
    at = next(i for i, line in enumerate(drawn) if line.startswith("queue:"))
    assert drawn[at] == "queue: 500 waiting, 3500 prompt tokens; the oldest 2:"
    assert drawn[at + 1].startswith("  later-0: waiting for") and drawn[at + 1].endswith("7 tokens, interactive")


def test_names_can_neither_harm_a_terminal_nor_break_a_column() -> None:
    drawn = lines(seen(2, name="\x1b[2J\nevil漢字-{}", tenant="\x07bell"), 90, 24)
    assert not any(ord(char) < 32 for line in drawn for char in line)
    assert len({line.index("decode") for line in drawn if line.endswith("decode")} | {0}) == 2


def test_ascii_is_ascii() -> None:
    assert all(line.plain.isascii() for line in picture(seen(9, waiting=9), 80, 24, ASCII))


def test_json_holds_the_same() -> None:
    told = as_json(seen(4, waiting=3, num_blocks=12))
    assert (told["running"], told["waiting"], told["tokens_per_s"], told["ttft_ms"]) == (4, 3, 100.0, None)
    assert told["blocks"]["shared"] == 1 and [row["slot"] for row in told["rows"]] == [0, 1, 2, 3]
    assert told["rows"][0] | {"state": "decode", "prompt_tokens": 20, "blocks": 2, "shared_blocks": 1} == told["rows"][0]
    assert told["blocks"]["waste"] == round(1 - (4 * 25 - 3 * 16) / (5 * 16), 6), "a shared block's tokens count once"


def test_the_group_is_named_where_there_are_several() -> None:
    one = seen(4)
    assert "group" not in lines(one, 100, 24)[0]
    assert lines(dataclasses.replace(one, group=1, num_groups=3), 100, 24)[0].endswith("group 1 of 0-2")
