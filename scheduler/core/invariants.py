"""What must always be true of the core's columns and requests, beside the blocks' own rules. AssertionError when it is not."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kvcache.manager import KVCacheManager
from scheduler.core.queue import Queue
from scheduler.core.request import QUEUED, Request, Sequence, State
from scheduler.core.rows import PADDING, PREEMPTED, RUNNING, Rows
from scheduler.core.tenants import Tenants


def check_rows(rows: Rows, kv: KVCacheManager, kv_tokens: int) -> None:
    """Rows against their sequences and blocks. kv_tokens: computed tokens of all that run."""
    counted = 0
    for slot in range(rows.max_rows):
        sequence, state = rows.sequences[slot], int(rows.state[slot])
        assert (sequence is None) == (state == 0), f"slot {slot}"
        assert state in (RUNNING, PADDING) or kv.tables.num_blocks[slot] == 0, f"slot {slot} left with blocks"
        if sequence is not None and state in (RUNNING, PREEMPTED):
            assert sequence.slot == slot and (sequence.state is State.RUNNING) == (state == RUNNING), f"slot {slot}"
        if sequence is not None and state == RUNNING:
            _check_running(rows, kv, slot, sequence)
            counted += int(rows.num_computed[slot])
    assert counted == kv_tokens, "computed tokens are miscounted"


def _check_running(rows: Rows, kv: KVCacheManager, slot: int, sequence: Sequence) -> None:
    request, computed, num_tokens = sequence.request, int(rows.num_computed[slot]), int(rows.num_tokens[slot])
    num_prompt, arrived = request.num_prompt_tokens, int(rows.num_outputs[slot])
    room = int(kv.tables.num_blocks[slot]) * kv.block_size
    assert computed <= min(room, num_tokens), f"slot {slot} computed too much"
    assert arrived <= num_tokens - num_prompt <= rows.max_outputs[slot], f"slot {slot} miscounts outputs"
    assert rows.max_tokens[slot] == num_prompt + request.max_outputs, f"slot {slot}"
    assert num_tokens <= max(int(rows.limit[slot]), num_prompt + arrived), f"slot {slot} is ahead of its reader"
    writable = kv.tables.row(slot)[computed // kv.block_size :]
    assert (kv.pool.ref_counts[writable] == 1).all(), f"slot {slot} would write to a shared block"


def check_requests(
    requests: Mapping[str, Request], holding: Mapping[int, Request], queue: Queue[Sequence], num_running: int
) -> None:
    """Requests against the queue and their own counts."""
    for request in requests.values():
        live = request.live()
        running = [sequence for sequence in live if sequence.state is State.RUNNING]
        assert request.num_live == len(live) > 0 and request.num_running == len(running), request.request_id
        held = [sequence for sequence in live if sequence.state is State.HELD]
        assert bool(held) == (request.number in holding), request.request_id
        assert not held or len(held) < len(live), f"{request.request_id} waits for siblings that have ended"
        for sequence in live:
            assert (sequence in queue) == (sequence.state in QUEUED), request.request_id
    assert num_running == sum(request.num_running > 0 for request in requests.values())


def check_tenants(tenants: Tenants, rows: Rows, kv: KVCacheManager) -> None:
    """Blocks held against the tables."""
    held = np.zeros_like(tenants.held_blocks)
    for slot in np.flatnonzero(kv.tables.num_blocks * (rows.state == RUNNING)).tolist():
        held[rows.tenant[slot]] += kv.tables.num_blocks[slot]
    assert (held == tenants.held_blocks).all(), "the tenants' blocks are miscounted"
