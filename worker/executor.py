"""What the link asks of whoever computes steps: one Protocol, with two implementations (model_executor, sim_executor).

Knows the messages of the wire; no socket, no tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from wire.messages import Logprobs, StepFailed, StepPlan, StepResult, WorkerFacts

Answer: TypeAlias = Logprobs | StepResult | StepFailed
Deliver: TypeAlias = Callable[[Answer], None]

_LONGEST_MESSAGE = 400  # characters of a StepFailed


class Executor(Protocol):
    facts: WorkerFacts

    def reset(self) -> None:
        """A new epoch: forget all sequences; the next plan is step 0. Results of the old one may still be delivered."""

    def submit(self, plan: StepPlan, deliver: Deliver) -> None:
        """Computes one step and hands its result, or why there is none, to `deliver`: once per plan, in the order of the
        plans, here and now or later from a thread of the executor's own; before the result, the log-probabilities that were
        asked for. After a StepFailed only reset() is of use."""

    def close(self) -> None:
        """Gives back memory and threads."""


def failure(plan: StepPlan, error: BaseException) -> StepFailed:
    """One line about the error for the scheduler; the trace stays in this process's log."""
    header = plan.header
    return StepFailed(header.group, header.epoch, header.step_id, one_line(error))


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    named = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return named if len(named) <= _LONGEST_MESSAGE else named[: _LONGEST_MESSAGE - 1] + "…"
