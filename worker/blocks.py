"""What the mirror knows of blocks: how many tables hold each, how many tokens each is filled with. No torch, no sequences.

A block is filled from its first token on, by rows that compute, by a swap or by a copy. What is counted is what the last of
them put there; what an earlier holder left behind that is not.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wire.messages import I32, StepPlan


class PlanError(Exception):
    """A plan that does not fit the mirror; the text says what and where. The mirror is void after it, until reset()."""


class Blocks:
    """Columns indexed by block id, those of the device and those of the host. Ids count from 1."""

    def __init__(self, num_blocks: int, num_host_blocks: int) -> None:
        self.refs = np.zeros(1 + num_blocks, np.int32)  # tables that hold it
        self.filled = np.zeros(1 + num_blocks, np.int32)  # tokens, from its first on
        self.host_filled = np.zeros(1 + num_host_blocks, np.int32)  # 0: nothing was swapped out to it

    def reset(self) -> None:
        self.refs[:] = 0
        self.filled[:] = 0
        self.host_filled[:] = 0

    def check_ids(self, blocks: I32) -> None:
        _check_ids("block", blocks, len(self.refs) - 1)

    def check_moves(self, plan: StepPlan) -> None:
        """The plan's swaps and copies, once its ended tables are forgotten and before new ones are taken up: what they write to
        must be held by none."""
        _check_lengths("swap out", plan.swap_out_blocks, plan.swap_out_host_blocks)
        _check_lengths("swap in", plan.swap_in_host_blocks, plan.swap_in_blocks)
        _check_lengths("copy", plan.copy_from, plan.copy_to)
        for blocks in (plan.swap_out_blocks, plan.swap_in_blocks, plan.copy_from, plan.copy_to):
            self.check_ids(blocks)
        for host_blocks in (plan.swap_out_host_blocks, plan.swap_in_host_blocks):
            _check_ids("host block", host_blocks, len(self.host_filled) - 1)
        refuse(repeated(plan.swap_out_host_blocks), plan.swap_out_host_blocks, "host block {} is swapped out to twice")
        refuse(repeated(plan.swap_in_host_blocks), plan.swap_in_host_blocks, "host block {} is swapped in twice")
        refuse(np.isin(plan.copy_from, plan.copy_to), plan.copy_from, "block {} is copied from and copied to")
        written = _written(plan)
        refuse(repeated(written), written, "block {} is swapped in or copied to twice")
        refuse(self.refs[written] > 0, written, "block {} is swapped in or copied to while a table holds it")

    def move(self, plan: StepPlan) -> None:
        """Does the swaps and copies, which check_moves has seen, once the plan's tables are complete."""
        out, host_out = plan.swap_out_blocks, plan.swap_out_host_blocks
        refuse(self.filled[out] == 0, out, "block {} is swapped out and holds nothing")
        self.host_filled[host_out] = self.filled[out]
        host_in = plan.swap_in_host_blocks
        refuse(self.host_filled[host_in] == 0, host_in, "host block {} is swapped in and holds nothing")
        self.filled[plan.swap_in_blocks] = self.host_filled[host_in]
        self.host_filled[host_in] = 0
        refuse(self.filled[plan.copy_from] == 0, plan.copy_from, "block {} is copied and holds nothing")
        self.filled[plan.copy_to] = self.filled[plan.copy_from]
        written = _written(plan)
        refuse(self.refs[written] == 0, written, "block {} is swapped in or copied to and no table holds it")


def moves(plan: StepPlan) -> bool:
    """Whether the plan says anything about swaps and copies."""
    return bool(
        len(plan.swap_out_blocks)
        or len(plan.swap_out_host_blocks)
        or len(plan.swap_in_host_blocks)
        or len(plan.swap_in_blocks)
        or len(plan.copy_from)
        or len(plan.copy_to)
    )


def refuse(wrong: NDArray[np.bool_], blocks: I32, what: str) -> None:
    """Raises PlanError for the first of the blocks that is wrong, named where `what` has its braces."""
    if wrong.any():
        raise PlanError(what.format(blocks[wrong.argmax()]))


def repeated(blocks: I32) -> NDArray[np.bool_]:
    """Which entries have stood before in the array."""
    again = np.ones(len(blocks), np.bool_)
    again[np.unique(blocks, return_index=True)[1]] = False
    return again


def _written(plan: StepPlan) -> I32:
    return np.concatenate((plan.swap_in_blocks, plan.copy_to))


def _check_lengths(what: str, sources: I32, destinations: I32) -> None:
    if len(sources) != len(destinations):
        raise PlanError(f"{what}: {len(sources)} blocks to {len(destinations)}")


def _check_ids(kind: str, blocks: I32, highest: int) -> None:
    if len(blocks) and not 1 <= blocks.min() <= blocks.max() <= highest:
        wrong = blocks[(blocks < 1) | (blocks > highest)][0]
        raise PlanError(f"{kind} {wrong} is not in 1..{highest}" if highest else f"{kind} {wrong}: there are none")
