"""Log-probabilities on their way from the worker to the front ends: whose they are. They decide nothing, so the core, which
keeps who reads which row, never sees them. Pure; no socket."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np

from scheduler.core.core import ProtocolError
from wire import LogprobRun, Logprobs, LogprobsHeader


def by_frontend(message: Logprobs, reader: Callable[[int], tuple[int, int] | None], num_rows: int) -> dict[int, Logprobs]:
    """What each front end gets: the runs that it waits for, with its handles for rows. reader: (front end, handle) of a slot,
    None if nobody waits. Raises ProtocolError when the message does not fit itself."""
    sizes = [run.num_tokens * (1 + run.num_best) for run in message.header.runs]
    sound = all(0 <= run.row < num_rows and run.num_tokens > 0 <= run.num_best for run in message.header.runs)
    if not sound or not len(message.logprobs) == len(message.token_ids) == sum(sizes):
        raise ProtocolError(f"the log-probabilities of step {message.header.step_id} do not add up")
    runs: dict[int, list[tuple[LogprobRun, slice]]] = {}
    at = 0
    for run, size in zip(message.header.runs, sizes, strict=True):
        whose = reader(run.row)
        if whose is not None:
            frontend, handle = whose
            runs.setdefault(frontend, []).append((msgspec.structs.replace(run, row=handle), slice(at, at + size)))
        at += size
    return {frontend: _part(message, mine) for frontend, mine in runs.items()}


def _part(message: Logprobs, mine: list[tuple[LogprobRun, slice]]) -> Logprobs:
    old = message.header
    header = LogprobsHeader(old.group, old.epoch, old.step_id, tuple(run for run, _ in mine))
    logprobs, token_ids = ([array[part] for _, part in mine] for array in (message.logprobs, message.token_ids))
    return Logprobs(header, np.concatenate(logprobs), np.concatenate(token_ids))
