"""Why a request waits, or where its time went: the core's own columns put into words. Reads the core and changes nothing."""

from __future__ import annotations

import numpy as np

from scheduler.core import admission
from scheduler.core.core import Core
from scheduler.core.preemption import is_reading
from scheduler.core.request import QUEUED, Request, Sequence, State
from wire import Explanation, Hindrance, RequestStats

_SHOWN = {State.PARKED: State.PREEMPTED.value, State.HELD: State.WAITING.value}


def explain(core: Core, request_id: str, now: int) -> Explanation | None:
    """Of a request that is alive or ended not long ago; None: of no such request. For several outputs it speaks of the one that
    is furthest from computing, and sums their tokens."""
    request = core.request(request_id)
    if request is None:
        return None
    sequence = _slowest(request)
    why, missing_rows, missing_blocks, needed = _hindrance(core, sequence)
    least = core.queue.least_tenant(request.header.priority) if sequence.state is State.WAITING else None
    rank = core.queue.rank(sequence) if sequence.state in QUEUED else 0
    explanation = Explanation(
        request_id=request_id,
        state=_SHOWN.get(sequence.state, sequence.state.value),
        tenant=request.header.tenant,
        priority=request.header.priority,
        arrival_ns=request.header.arrival_ns,
        now_ns=now,
        hindrance=why,
        rank=rank,
        missing_rows=missing_rows,
        missing_blocks=missing_blocks,
        needed_blocks=needed,
        tenant_tokens=core.tenants.tokens_of(request.tenant) if request.num_live else 0,
        least_tenant_tokens=core.tenants.tokens_of(request.tenant if least is None else least) if request.num_live else 0,
        predicted_start_ns=_predicted_start(core, sequence, rank, now),
        num_prompt_tokens=request.num_prompt_tokens,
        num_output_tokens=sum(core.num_outputs(each) for each in request.sequences),
        num_computed_tokens=int(core.rows.num_computed[sequence.slot]) if sequence.state is State.RUNNING else 0,
        preemptions=tuple(preemption for each in request.sequences for preemption in each.preempted_by),
        stats=_stats(core, request, now),
        end_reason=sequence.end_reason,
        first_step=request.sequences[0].first_step,
        last_step=max(each.last_step for each in request.sequences),
        group=core.config.group,
    )
    explanation.text = _in_words(explanation)
    if len(request.sequences) > 1 and sequence.state is not State.ENDED:
        all_outputs, live = len(request.sequences), request.num_live
        explanation.text += f" (This is output_index {sequence.output_index} of {all_outputs} outputs, {live} of them alive.)"
    return explanation


def _slowest(request: Request) -> Sequence:
    order = (State.PARKED, State.PREEMPTED, State.WAITING, State.HELD, State.RUNNING, State.ENDED)
    return min(request.sequences, key=lambda sequence: order.index(sequence.state))


def _hindrance(core: Core, sequence: Sequence) -> tuple[Hindrance, int, int, int]:
    """(why, rows missing, blocks missing, blocks needed)."""
    if sequence.state is State.ENDED:
        return Hindrance.NONE, 0, 0, 0
    if not core.connected:
        return Hindrance.WORKER, 0, 0, 0
    if sequence.state is State.RUNNING:
        slot = np.array([sequence.slot])
        return (Hindrance.NONE if is_reading(core.rows, slot)[0] else Hindrance.READER), 0, 0, 0
    if sequence.state is State.PARKED:
        return Hindrance.READER, 0, 0, 0
    if sequence.state is State.HELD:
        return Hindrance.SIBLING, 0, 0, 0
    place = admission.place_of(core, sequence)
    if place is None:
        return Hindrance.SIBLING, 0, 0, 0
    num_blocks, needed = core.kv.blocks_for(place.num_tokens), core.kv.cost(place.num_tokens, place.shared, place.copies_last)
    quota, held = int(core.tenants.max_blocks[sequence.tenant]), int(core.tenants.held_blocks[sequence.tenant])
    if admission.passes_quota(core, sequence.tenant, num_blocks):
        return Hindrance.QUOTA, 0, held + num_blocks - quota, num_blocks
    hindered = core.hindered
    if core.queue.head() is not sequence:
        return Hindrance.ORDER, 0, 0, needed
    if core.policy.reserves_outputs and not core.is_empty() and core.policy.keeps_ended_rows:
        return Hindrance.POLICY, 0, 0, needed
    if not core.rows.num_free:
        return Hindrance.ROWS, 1, 0, needed
    if hindered is None or hindered.sequence is not sequence:
        return Hindrance.ORDER, 0, 0, needed
    return Hindrance.BLOCKS, 0, hindered.missing_blocks, hindered.needed_blocks


def _predicted_start(core: Core, sequence: Sequence, rank: int, now: int) -> int:
    """When it should be admitted if requests go on ending as the last ones did; -1: not known, or nothing to wait for."""
    if sequence.admitted_ns >= 0 and sequence.state not in QUEUED:
        return sequence.admitted_ns
    interval = core.mean_end_interval()
    return now + (rank + 1) * interval if interval and sequence.state in QUEUED else -1


def _stats(core: Core, request: Request, now: int) -> RequestStats:
    """Counts summed over the outputs; times of the first one."""
    outputs = [sequence.stats(core.num_outputs(sequence), now) for sequence in request.sequences]
    stats = outputs[0]
    for other in outputs[1:]:
        stats.output_tokens += other.output_tokens
        stats.recomputed_tokens += other.recomputed_tokens
        stats.preemptions += other.preemptions
        stats.block_ns += other.block_ns
    return stats


def _in_words(facts: Explanation) -> str:
    stats, ms = facts.stats, 1_000_000
    if facts.state == "ended":
        text = (
            f"Ended ({facts.end_reason}): queued {stats.queued_ns // ms} ms, prefill {stats.prefill_ns // ms} ms, "
            f"decode {stats.decode_ns // ms} ms, preempted {stats.preempted_ns // ms} ms; "
            f"{stats.cached_tokens} of {facts.num_prompt_tokens} prompt tokens came from the prefix cache."
        )
    elif facts.hindrance is Hindrance.NONE:
        text = f"Running: {facts.num_computed_tokens} tokens computed, {facts.num_output_tokens} put out."
    else:
        text = f"{facts.state.capitalize()}: {_why(facts)}."
        if facts.predicted_start_ns > facts.now_ns:
            text += f" It should start in about {round((facts.predicted_start_ns - facts.now_ns) / ms)} ms."
    for preemption in facts.preemptions:
        how = "swapped out" if preemption.swapped else "gave up"
        whom = f"for {preemption.by_request_id!r}" if preemption.by_request_id else "as the worker was lost"
        text += f" Preempted {whom}, {how} {preemption.lost_tokens} tokens."
    return text


def _why(facts: Explanation) -> str:
    match facts.hindrance:
        case Hindrance.ORDER:
            share = ""
            if facts.tenant_tokens > facts.least_tenant_tokens:
                share = f"; tenant {facts.tenant!r} was served {facts.tenant_tokens} weighted tokens, the next one's "
                share += f"{facts.least_tenant_tokens}"
            return f"{facts.rank} go first{share}" if facts.rank else f"it is next{share}"
        case Hindrance.ROWS:
            return "it is next, and no row of the batch is free"
        case Hindrance.BLOCKS:
            return f"it is next, needs {facts.needed_blocks} blocks, and {facts.missing_blocks} too few are free"
        case Hindrance.QUOTA:
            return f"tenant {facts.tenant!r} is at its quota: {facts.missing_blocks} blocks of it must come back first"
        case Hindrance.READER:
            return "its reader does not take the tokens that there are"
        case Hindrance.SIBLING:
            return "its first output computes the prompt that they share"
        case Hindrance.WORKER:
            return "no worker is connected"
        case _:
            return "the batch takes nobody before all of it has ended"
