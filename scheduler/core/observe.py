"""A step as a watcher sees it. Read only; called for steps that somebody watches."""

from __future__ import annotations

from scheduler.core.core import Core, InFlight
from wire import RowRecord, StepRecord


def step_record(core: Core, step: InFlight, started_ns: int, duration_ns: int) -> StepRecord:
    """The record of a step in flight, before its result is applied; who leaves is added by the caller afterwards."""
    plan = step.plan
    joined = set(step.joined.tolist())
    sampled = set(step.sampled.tolist())

    def row(slot: int, num_tokens: int, padding: bool) -> RowRecord:
        request = core.request_of(slot)
        assert request is not None, "a row named by a plan in flight has a request"
        return RowRecord(request.request_id, slot, num_tokens, slot in sampled, slot in joined, padding)

    rows = [row(slot, tokens, False) for slot, tokens in zip(plan.slots.tolist(), plan.num_tokens.tolist(), strict=True)]
    rows += [row(slot, 1, True) for slot in plan.padding.tolist()]
    return StepRecord(
        step_id=step.step_id,
        group=core.config.group,
        planned_ns=step.planned_ns - started_ns,
        duration_ns=duration_ns,
        rows=tuple(rows),
        leaves=(),
        held_blocks=step.held_blocks,
        total_blocks=core.kv.pool.num_blocks,
        kv_tokens=step.kv_tokens,
        waiting_requests=step.num_waiting,
    )
