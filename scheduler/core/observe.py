"""What others may see of the core: steps, requests, block tables. Read only; called for those who watch or ask."""

from __future__ import annotations

from itertools import islice

import numpy as np

from scheduler.core.core import Core, InFlight
from scheduler.core.request import Request, State
from wire import (
    BlockTable,
    BlockTablesHeader,
    BlockTablesReply,
    ListReply,
    RequestSummary,
    RowRecord,
    StepRecord,
)

MOST_LISTED = 1000  # requests of one ListReply


def step_record(core: Core, step: InFlight, started_ns: int, duration_ns: int) -> StepRecord:
    """The record of a step in flight, before its result is applied; who leaves is added by the caller afterwards."""
    plan, rows, pool = step.plan, core.rows, core.kv.pool
    sampled = set(step.sampled.tolist())
    slots = plan.slots.astype(np.intp)
    joined = step.before == rows.start_computed[slots]

    def row(slot: int, num_tokens: int, joined: bool, padding: bool) -> RowRecord:
        sequence = rows.sequences[slot]
        assert sequence is not None, "a row named by a plan in flight has a sequence"
        return RowRecord(
            request_id=sequence.request_id,
            slot=slot,
            num_tokens=num_tokens,
            sampled=slot in sampled,
            joined=joined,
            padding=padding,
            output_index=sequence.output_index,
            tenant=sequence.header.tenant,
            num_cached_tokens=int(rows.start_computed[slot]) if joined else 0,
        )

    columns = zip(slots.tolist(), plan.num_tokens.tolist(), joined.tolist(), strict=True)
    records = [row(slot, tokens, has_joined, False) for slot, tokens, has_joined in columns]
    records += [row(slot, 1, False, True) for slot in plan.padding.tolist()]
    return StepRecord(
        step_id=step.step_id,
        group=core.config.group,
        planned_ns=step.planned_ns - started_ns,
        duration_ns=duration_ns,
        rows=tuple(records),
        leaves=(),
        held_blocks=step.held_blocks,
        total_blocks=pool.num_blocks,
        kv_tokens=step.kv_tokens,
        waiting_requests=step.num_waiting,
        cached_blocks=pool.num_cached,
        free_blocks=pool.num_free,
        token_budget=core.token_budget,
        num_copies=len(plan.copy_from),
        swapped_out_blocks=len(plan.swap_out_blocks),
        swapped_in_blocks=len(plan.swap_in_blocks),
        policy=core.policy.name,
    )


def list_requests(core: Core, query_id: int, after: int, limit: int) -> ListReply:
    """Those alive, by arrival; `after` is the `next` of the page before, 0 for the first."""
    live = [request for request in core.live_requests() if request.number > after]
    page = list(islice(live, max(1, min(limit, MOST_LISTED))))
    following = page[-1].number if len(page) < len(live) else 0
    return ListReply(query_id, tuple(_summary(core, request) for request in page), following, core.num_requests)


def _summary(core: Core, request: Request) -> RequestSummary:
    live = [sequence for sequence in request.sequences if sequence.state is not State.ENDED]
    slots = [sequence.slot for sequence in live if sequence.state is State.RUNNING]
    preempted = any(sequence.state in (State.PREEMPTED, State.PARKED) for sequence in live)
    return RequestSummary(
        request_id=request.request_id,
        state="running" if slots else "preempted" if preempted else "waiting",
        tenant=request.header.tenant,
        priority=request.header.priority,
        arrival_ns=request.header.arrival_ns,
        num_prompt_tokens=request.num_prompt_tokens,
        num_output_tokens=sum(core.num_outputs(sequence) for sequence in request.sequences),
        num_outputs=len(request.sequences),
        held_blocks=int(core.kv.tables.num_blocks[slots].sum()),
        group=core.config.group,
    )


def block_tables(core: Core, query_id: int) -> BlockTablesReply:
    """Who holds which block at this moment."""
    kv, rows = core.kv, core.rows
    tables = []
    for slot in np.flatnonzero(kv.tables.num_blocks).tolist():
        sequence = rows.sequences[slot]
        assert sequence is not None
        blocks = tuple(kv.tables.row(slot).tolist())
        tables.append(BlockTable(sequence.request_id, sequence.output_index, slot, int(rows.num_computed[slot]), blocks))
    header = BlockTablesHeader(
        query_id=query_id,
        group=core.config.group,
        block_size=kv.block_size,
        num_blocks=kv.pool.num_blocks,
        tables=tuple(tables),
        num_host_blocks=kv.host.num_blocks,
        held_host_blocks=kv.host.num_held,
    )
    return BlockTablesReply(header, kv.pool.ref_counts[1:].copy(), kv.pool.states())
