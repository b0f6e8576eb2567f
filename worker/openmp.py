"""How torch's threads wait for each other. To be put into the environment before torch is loaded; what is there already holds.

Between two operations a thread spins for about a tenth of a millisecond (GOMP_SPINCOUNT, of GNU's OpenMP), then sleeps. A step
is some thousand short operations: threads that sleep at once take 30 to 50 µs to wake up for each, and steps took up to twice
as long. Threads that spin for as long as they like keep the processor from the front end and the callers, and then steps took
ten times as long."""

from __future__ import annotations

import os

SETTINGS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}


def set_defaults() -> None:
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
