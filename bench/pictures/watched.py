"""Steps for pictures out of WatchSteps' messages, which say when a step was planned and how long it took. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bench.pictures.steps import Memory, Step
from carousel.v1 import inspect_pb2


class Sharing(NamedTuple):
    """What GetBlockTables said of sharing in between."""

    num_steps: int  # that had come by then
    shared_blocks: int  # in two tables or more
    extra: int  # references beyond the first, of all blocks


def steps_of(
    told: Sequence[inspect_pb2.WatchStepsResponse], block_size: int = 1, sharing: Sequence[Sharing] = ()
) -> list[Step]:
    """A step begins when it was planned and the one before has ended. It has ended when the next but one is planned: two plans
    are in flight, and that one is made with its result."""
    steps: list[Step] = []
    known, following = Sharing(0, 0, 0), 0
    for index, step in enumerate(told):
        while following < len(sharing) and sharing[following].num_steps <= index:
            known, following = sharing[following], following + 1
        begin_ns = max(step.planned_ns, steps[-1].end_ns if steps else 0)
        end_ns = begin_ns + max(1, step.duration_ns)
        if index + 2 < len(told):
            end_ns = max(begin_ns + 1, min(end_ns, told[index + 2].planned_ns))
        # Held blocks are told as of the step's plan, the others as of its result: what was taken in between is not both.
        rest = step.total_blocks - step.held_blocks
        cached = min(step.cached_blocks, rest - min(step.free_blocks, rest))
        # A shared block's tokens are told for each table that holds it.
        used = max(0, step.kv_tokens - known.extra * block_size)
        memory = Memory(
            total=step.total_blocks,
            held=step.held_blocks,
            shared=min(known.shared_blocks, step.held_blocks),
            cached=cached,
            free=min(step.free_blocks, rest),
            used_tokens=used,
            block_size=block_size,
        )
        leaves = [(leave.request_id, leave.reason) for leave in step.leaves]
        steps.append(Step(begin_ns, end_ns, step.rows, leaves, step.waiting_requests, step.policy, memory))
    return steps
