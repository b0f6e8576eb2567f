"""What the head of the queue would take if it were admitted, and whether there is room. Reads the core and changes nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from scheduler.core.request import Sequence, State
from wire.messages import I32

if TYPE_CHECKING:
    from scheduler.core.core import Core


@dataclass(slots=True)
class Place:
    """What an admission takes."""

    num_tokens: int  # to have blocks for
    num_computed: int = 0  # of its tokens, already in the cache or in swapped blocks
    shared: I32 = field(default_factory=lambda: np.empty(0, np.int32))  # blocks that it finds there
    copies_last: bool = False  # the last of them is not full: it is copied before the first write
    num_hits: int = 0  # blocks found by the prefix index


@dataclass(slots=True)
class Hindered:
    """The head of the queue when it was last tried, and too few blocks were there."""

    sequence: Sequence
    missing_blocks: int
    needed_blocks: int
    available: int  # blocks then
    num_known: int  # blocks in the prefix index then


def place_of(core: Core, sequence: Sequence) -> Place | None:
    """What the sequence would take; None: it waits for a sibling to compute the prompt that they share."""
    request, kv = sequence.request, core.kv
    num_tokens, num_prompt = sequence.num_tokens, request.num_prompt_tokens
    place = Place(tokens_to_place(core, sequence))
    if sequence.host_blocks is not None:
        place.num_computed = sequence.lost_tokens
    if core.policy.reserves_outputs:
        return place
    if sequence.digests:
        most = (place.num_computed or num_tokens - 1) // kv.block_size
        place.shared = kv.lookup(sequence.digests, most)
        place.num_hits = len(place.shared)
    if sequence.host_blocks is not None:
        return place
    place.num_computed = place.num_hits * kv.block_size
    wanted = min(num_prompt, num_tokens - 1)
    if len(request.sequences) > 1 and request.num_running and place.num_computed < wanted:
        siblings = [
            sibling.slot
            for sibling in request.sequences
            if sibling.state is State.RUNNING and not core.starts_now(sibling.slot)
        ]
        source = next((slot for slot in siblings if core.rows.num_computed[slot] >= wanted), -1)
        if source >= 0:
            place.shared = kv.tables.row(source)[: kv.blocks_for(wanted)].copy()
            place.num_computed, place.copies_last = wanted, wanted % kv.block_size != 0
            place.num_hits = wanted // kv.block_size
        elif sequence.state is State.WAITING:
            return None
    return place


def tokens_to_place(core: Core, sequence: Sequence) -> int:
    """Tokens that it gets blocks for: those known, or where they are reserved all that it may yet have."""
    reserves = core.policy.reserves_outputs or sequence.preemptions >= core.config.max_preemptions > 0
    return sequence.num_prompt_tokens + sequence.request.max_outputs - 1 if reserves else sequence.num_tokens


def spare_blocks(core: Core) -> int:
    """Blocks that stay available at an admission, for the growth of those running: in this step and the next, so that nobody is
    admitted who would be preempted at once, and half a block for each row, which is what they grow by in the steps of half a
    block: by then somebody may have ended."""
    slots = core.rows.in_order()
    if not len(slots) or core.policy.reserves_outputs:
        return 0
    growing = int(np.count_nonzero(core.kv.full(slots, core.rows.num_computed[slots] + 1)))
    return max(1 + growing, len(slots) // 2)


def passes_quota(core: Core, tenant: int, num_blocks: int) -> bool:
    quota = int(core.tenants.max_blocks[tenant])
    return quota > 0 and int(core.tenants.held_blocks[tenant]) + num_blocks > quota
