"""The part that all drivers share: reads the job, times it, writes what came of it. Runs in a peer's own environment: standard
library only, nothing of ours.

    python DRIVER.py JOB.json RESULT.json

The job is read by `job`; the result is written by `measure`, which then waits until standard input is closed, so that whoever
started the driver can look at its memory while all of it still lives.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

Request = tuple[list[int], int]  # prompt ids, and how many tokens it makes: greedy, the end-of-sequence token ignored
Generate = Callable[[Sequence[Request]], list[list[float]]]  # all offered at once → when their tokens came, seconds since then


def job() -> dict[str, Any]:
    """model: the folder or file to load. dtype, threads, max_len (prompt + output), max_rows, kv_gib, options: how to run it.
    warm_up, single, requests: lists of Requests, to be made in this order."""
    with open(sys.argv[1]) as file:
        return json.load(file)  # type: ignore[no-any-return]


def measure(job: dict[str, Any], generate: Generate, versions: dict[str, str]) -> None:
    """To be called as soon as a request could be taken."""
    result: dict[str, Any] = {"ready_at": time.time(), "versions": versions}
    generate(job["warm_up"])
    result["single_token_s"] = generate(job["single"])
    result["token_s"] = generate(job["requests"])
    unfinished = sys.argv[2] + ".part"
    with open(unfinished, "w") as file:
        json.dump(result, file)
    os.replace(unfinished, sys.argv[2])
    sys.stdin.read()
