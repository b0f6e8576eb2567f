"""Which worker group computes a request: by prefix affinity, then load. `place` is pure, the groups' own words in, one of them
out; `load_of` asks a core for its word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scheduler.core.arrival import unfinished_prompts
from scheduler.core.core import Core


@dataclass(frozen=True, slots=True)
class GroupLoad:
    """What one group has to do at the moment of asking, and what it has of one request."""

    group: int
    connected: bool  # its worker is there
    hit_tokens: int  # of the request's prompt, in the group's prefix cache
    waiting_tokens: int  # prompt tokens that wait, or are admitted and not computed
    running_rows: int
    max_rows: int
    available_blocks: int  # free and cached ones
    num_blocks: int
    fits: bool = True  # the request, if it had the whole pool for itself
    is_tried: bool = False  # the group looks for a request that crashes workers, and lets nobody else in meanwhile


def load_of(core: Core, num_tokens: int, digests: bytes, fits: bool = True) -> GroupLoad:
    """The core's word about itself, for a request of so many tokens. digests: of its full blocks, of the core's block size."""
    size = core.kv.block_size
    hits = core.kv.lookup(digests, (num_tokens - 1) // size) if digests else ()
    again = sum(sequence.num_tokens for sequence in core.queue.returning() if sequence.host_blocks is None)
    return GroupLoad(
        group=core.config.group,
        connected=core.connected,
        hit_tokens=len(hits) * size,
        waiting_tokens=core.queue.num_tokens + again + unfinished_prompts(core),
        running_rows=core.rows.max_rows - core.rows.num_free,
        max_rows=core.rows.max_rows,
        available_blocks=core.kv.pool.num_available,
        num_blocks=core.kv.pool.num_blocks,
        fits=fits,
        is_tried=bool(core.trials.trials),
    )


def place(prompt_tokens: int, loads: Sequence[GroupLoad]) -> int | None:
    """The group that has the least to compute until this prompt is done, in prompt tokens: what waits there, and of the prompt
    what its cache lacks. So a hit counts as many tokens as it saves, no more: a big hit outweighs a somewhat longer queue, a
    very long queue outweighs a small hit. Where no row is free the request has to wait for one: as if half its prompt more
    waited there. Between equals: the smaller share of rows in use, then of blocks, then the lowest group. One that looks for a
    request that crashes workers comes last. None: no group that it fits has a worker."""
    possible = [load for load in loads if load.connected and load.fits]
    if not possible:
        return None
    return min(possible, key=lambda load: _effort(prompt_tokens, load)).group


def _effort(prompt_tokens: int, load: GroupLoad) -> tuple[bool, int, int, int, int]:
    lacking = max(1, prompt_tokens - load.hit_tokens)  # the last token is computed in any case
    full = prompt_tokens // 2 if load.running_rows >= load.max_rows else 0
    rows = load.running_rows * 1000 // max(1, load.max_rows)
    blocks = (load.num_blocks - load.available_blocks) * 1000 // max(1, load.num_blocks)
    return load.is_tried, load.waiting_tokens + lacking + full, rows, blocks, load.group
