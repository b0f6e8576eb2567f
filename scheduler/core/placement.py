"""Which worker group computes a request: by prefix affinity, then load. Pure: the groups' own words in, one of them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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


def place(prompt_tokens: int, loads: Sequence[GroupLoad]) -> int | None:
    """The group that has the least to compute until this prompt is done, in prompt tokens: what waits there, and of the prompt
    what its cache lacks. So a hit counts as many tokens as it saves, no more: a big hit outweighs a somewhat longer queue, a
    very long queue outweighs a small hit. Where no row is free the request has to wait for one: as if half its prompt more
    waited there. Between equals: the smaller share of rows in use, then of blocks, then the lowest group. None: no group has a
    worker."""
    connected = [load for load in loads if load.connected]
    if not connected:
        return None
    return min(connected, key=lambda load: _effort(prompt_tokens, load)).group


def _effort(prompt_tokens: int, load: GroupLoad) -> tuple[int, int, int, int]:
    lacking = max(1, prompt_tokens - load.hit_tokens)  # the last token is computed in any case
    full = prompt_tokens // 2 if load.running_rows >= load.max_rows else 0
    rows = load.running_rows * 1000 // max(1, load.max_rows)
    blocks = (load.num_blocks - load.available_blocks) * 1000 // max(1, load.num_blocks)
    return load.waiting_tokens + lacking + full, rows, blocks, load.group
