"""Policies: who computes how many tokens in the next step. One short file each; a new one never adds an `if` to an old one.

A policy sees the batch through the verbs of `Batch` and keeps no state of its own, so that plans depend on the core's
inputs only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

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
        """Slots that have tokens to compute, by admission; not those whose last token is being sampled already, nor those whose
        reader is too far behind."""

    def padding(self) -> Slots:
        """Slots of ended requests that the policy keeps in the batch."""

    def is_empty(self) -> bool:
        """Whether no row is held, not even by what has left and waits for its last plan to return."""

    def missing(self, slots: Slots) -> I32:
        """Tokens known and not computed yet: 1 for a decode, more for a prompt."""

    def priority(self, slots: Slots) -> NDArray[np.int8]:
        """Class of each row: 1 BATCH, 2 NORMAL, 3 INTERACTIVE."""

    def make_room(self) -> None:
        """When the next request in the queue finds no place, preempts rows for it, if that suffices: those whose readers have
        stopped reading, and but for policies that reserve outputs those of lower classes. To be asked before anything else:
        nobody may be preempted who is in the selection already."""

    def with_blocks(self, slots: Slots) -> Slots:
        """Those of `slots` (by admission) that have a block for their next token, after giving out free ones in that order.
        When they do not suffice, the row is preempted that loses least, and again, until they will. To be asked before
        `admit`: nobody is preempted in the step that admits him."""

    def chunk_budget(self, decodes: Slots, prompts: Slots) -> int:
        """Most tokens of prompts for a step with these decodes, when `prompts[0]`, or somebody new, goes first: what the token
        budget leaves, and what keeps the step's predicted time to the configured inter-token time."""

    def is_oldest_turn(self) -> bool:
        """Whether the prompt admitted first goes first this time, whatever its class, so that nobody starves."""

    def next_priority(self) -> int:
        """Class of the head of the queue; 0 when nobody waits or there is no place for him."""

    def admit(self) -> int | None:
        """Takes the head of the queue into the batch, with blocks for all its known tokens, less what the prefix cache has, or
        (policy.reserves_outputs) with blocks of its own for all that it may yet produce. Its slot, or None when nobody waits or
        rows or blocks do not suffice."""

    def release_padding(self) -> None:
        """Lets go of all ended requests that the policy kept."""


class Policy(Protocol):
    """The verbs of a policy."""

    name: str
    keeps_ended_rows: bool  # an ended request's row stays, as padding, until the policy releases it
    reserves_outputs: bool  # admission takes blocks for all tokens that a request may have, and shares none

    def select(self, batch: Batch) -> Selection: ...


def by_name(name: str) -> Policy:
    """Raises ValueError for an unknown name."""
    from scheduler.core.policies.continuous import Continuous
    from scheduler.core.policies.prefill_first import PrefillFirst
    from scheduler.core.policies.static import Static

    policies: dict[str, Policy] = {policy.name: policy for policy in (Continuous(), PrefillFirst(), Static())}
    if name not in policies:
        raise ValueError(f"unknown policy {name!r}: choose one of {', '.join(policies)}")
    return policies[name]


def chunked(missing: I32, budget: int) -> I32:
    """How much of each row's missing tokens fits a budget that is served in order: [min(missing, what is left), …]."""
    before = np.cumsum(missing) - missing
    takes: I32 = np.clip(budget - before, 0, missing).astype(np.int32)
    return takes
