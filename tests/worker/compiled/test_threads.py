"""Parts are computed once each by whoever is free, an error reaches the caller, and one thread needs nobody."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from worker.compiled import threads


@pytest.fixture(params=[1, 2, 3])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_every_part_is_computed_once(num_threads: int) -> None:
    done: list[int] = []
    for size in (0, 1, 2, 50):
        done.clear()
        threads.share(done.append, range(size))
        assert sorted(done) == list(range(size))


def test_parts_run_at_the_same_time(num_threads: int) -> None:
    meeting = threading.Barrier(min(num_threads, 4))
    threads.share(lambda _: meeting.wait(timeout=30), range(num_threads))


def test_a_slow_part_holds_up_no_other() -> None:
    torch.set_num_threads(2)
    release, done = threading.Event(), []

    def compute(part: int) -> None:
        if part == 0:
            assert release.wait(timeout=30)
        done.append(part)
        if len(done) == 9:
            release.set()

    threads.share(compute, range(10))
    assert done[-1] == 0 and sorted(done) == list(range(10))


def test_an_error_reaches_the_caller_after_all_parts_have_ended(num_threads: int) -> None:
    done: list[int] = []

    def compute(part: int) -> None:
        if part == 3:
            raise ValueError("part 3")
        time.sleep(0)
        done.append(part)

    with pytest.raises(ValueError, match="part 3"):
        threads.share(compute, range(8))
    threads.share(done.append, [100])
    assert done[-1] == 100


ENDING = """
import time
from worker.compiled import threads
threads._call(lambda: (time.sleep(1), print("and came back", flush=True)), 1)
print("ended", flush=True)
"""


def test_a_process_ends_when_its_helpers_have() -> None:
    """One that came back from compiled code later found an interpreter that was gone, and ended the process with SIGABRT."""
    done = subprocess.run(
        [sys.executable, "-c", ENDING], cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\nand came back\n", "")
