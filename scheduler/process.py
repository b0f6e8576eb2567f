"""What every process of the scheduler does at its start. No sockets, no children here."""

from __future__ import annotations

import ctypes
import logging
import os
import signal

SUPERVISOR_PID = "CAROUSEL_SUPERVISOR_PID"  # in the environment of every process that the supervisor starts
# In the environment of a supervisor that a program starts for itself: the read end of a pipe whose other end is that program's.
LIFELINE_FD = "CAROUSEL_LIFELINE_FD"
_PR_SET_PDEATHSIG = 1


def obey_the_supervisor() -> None:
    """For a process that the supervisor started; does nothing in any other.

    The kernel kills this process when the supervisor dies, however that happens (Linux; elsewhere nothing is done), so no
    orphan remains. Ctrl-C, which a terminal sends to all processes of the foreground, is left to the supervisor.
    """
    supervisor = os.environ.get(SUPERVISOR_PID)
    if supervisor is None:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        return
    if os.getppid() != int(supervisor):  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)


def take_lifeline() -> int | None:
    """The descriptor that is at its end once the program is gone that started this one for itself, however that happens; None:
    nobody did. Taken out of the environment, since children have it no more."""
    number = os.environ.pop(LIFELINE_FD, "")
    return int(number) if number else None


def log_to_stderr(role: str, level: str) -> None:
    """One line an event: time, role, level, text."""
    logging.basicConfig(
        level=level.upper(), format=f"%(asctime)s {role}[%(process)d] %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
