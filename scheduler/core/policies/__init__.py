"""Policies: who computes how many tokens in the next step. One short file each; a new one never adds an `if` to an old one.

A policy sees the batch through the verbs of `Batch` and keeps no state of its own, so that plans depend on the core's
inputs only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from kvcache.block_table import Slots
from wire.messages import I32


@dataclass(slots=True)
class Selection:
    """What a step computes: num_tokens[i] tokens of slots[i]; padding rows compute their last token again."""

    slots: Slots
    num_tokens: I32
    padding: Slots = field(default_factory=lambda: np.empty(0, np.intp))


class Batch(Protocol):
    """What a policy may ask and do."""

    token_budget: int  # tokens of one step, at least one for every row
    static_batch_size: int  # rows of a static batch

    def running(self) -> Slots:
        """Slots that have tokens to compute, by admission; not those whose last token is being sampled already."""

    def padding(self) -> Slots:
        """Slots of ended requests that the policy keeps in the batch."""

    def is_empty(self) -> bool:
        """Whether no row is held, not even by what has left and waits for its last plan to return."""

    def missing(self, slots: Slots) -> I32:
        """Tokens known and not computed yet: 1 for a decode, more for a prompt."""

    def with_blocks(self, slots: Slots) -> Slots:
        """Those of `slots` (by admission) that have a block for their next token, after giving out free ones in that order.
        When they do not suffice, the request admitted last is preempted, and again, until they will. To be asked before
        `admit`: nobody is preempted in the step that admits him."""

    def admit(self, reserve_outputs: bool) -> int | None:
        """Takes the head of the queue into the batch with blocks for all its known tokens (and for all that it may yet
        produce); its slot, or None when nobody waits or rows or blocks do not suffice."""

    def release_padding(self) -> None:
        """Lets go of all ended requests that the policy kept."""


class Policy(Protocol):
    """The verbs of a policy."""

    name: str
    keeps_ended_rows: bool  # an ended request's row stays, as padding, until the policy releases it

    def select(self, batch: Batch) -> Selection: ...


def by_name(name: str) -> Policy:
    """Raises ValueError for an unknown name."""
    from scheduler.core.policies.continuous import Continuous
    from scheduler.core.policies.static import Static

    policies: dict[str, Policy] = {policy.name: policy for policy in (Continuous(), Static())}
    if name not in policies:
        raise ValueError(f"unknown policy {name!r}: choose one of {', '.join(policies)}")
    return policies[name]


def chunked(missing: I32, budget: int) -> I32:
    """How much of each row's missing tokens fits a budget that is served in order: [min(missing, what is left), …]."""
    before = np.cumsum(missing) - missing
    takes: I32 = np.clip(budget - before, 0, missing).astype(np.int32)
    return takes
