"""Whose log-probabilities they are: the reader's of each row, nobody's where none waits; what does not add up is refused."""

from __future__ import annotations

import numpy as np
import pytest

from scheduler.core.core import ProtocolError
from scheduler.logprobs import by_frontend
from wire import LogprobRun, Logprobs, LogprobsHeader

READERS = {0: (1, 70), 1: (2, 71), 3: (1, 73)}  # of row 2 nobody waits


def message(*runs: LogprobRun, size: int | None = None) -> Logprobs:
    size = sum(run.num_tokens * (1 + run.num_best) for run in runs) if size is None else size
    return Logprobs(
        LogprobsHeader(0, 3, 17, runs), np.arange(size, dtype=np.float32), np.arange(100, 100 + size, dtype=np.int32)
    )


def test_each_front_end_gets_its_own_runs_with_its_handles() -> None:
    runs = (LogprobRun(0, 5, 2, 1), LogprobRun(1, 6, 1, 2), LogprobRun(2, 7, 1, 4), LogprobRun(3, 8, 1, 0))
    told = by_frontend(message(*runs), READERS.get, 4)
    assert told[1].header == LogprobsHeader(0, 3, 17, (LogprobRun(70, 5, 2, 1), LogprobRun(73, 8, 1, 0)))
    assert told[1].logprobs.tolist() == [0, 1, 2, 3, 12] and told[1].token_ids.tolist() == [100, 101, 102, 103, 112]
    assert told[2].header.runs == (LogprobRun(71, 6, 1, 2),) and told[2].logprobs.tolist() == [4, 5, 6]
    assert set(told) == {1, 2}


@pytest.mark.parametrize(
    "wrong",
    [
        message(LogprobRun(0, 5, 2, 1), size=3),
        message(LogprobRun(0, 5, 2, 1), size=5),
        message(LogprobRun(4, 5, 1, 1)),
        message(LogprobRun(-1, 5, 1, 1)),
        message(LogprobRun(0, 5, 0, 1)),
        message(LogprobRun(0, 5, -1, 1), LogprobRun(1, 5, 1, 1), size=0),
        message(LogprobRun(0, 5, 1, -1)),
    ],
)
def test_what_does_not_add_up_is_refused(wrong: Logprobs) -> None:
    with pytest.raises(ProtocolError, match="log-probabilities of step 17"):
        by_frontend(wrong, READERS.get, 4)
