"""What every process of the scheduler does at its start. No sockets, no children here."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
from datetime import UTC, datetime
from typing import Any

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


class Fields(dict[str, str | int | float]):
    """The one argument of a log line whose parts have names: `log.info("request %s", Fields(…))`. What others have chosen is
    quoted."""

    def __str__(self) -> str:
        return " ".join(f"{key}={value!r}" if isinstance(value, str) else f"{key}={value}" for key, value in self.items())


class JsonFormatter(logging.Formatter):
    """An object a line: time (UTC), role, pid, level, message; Fields each by its name."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        told: dict[str, Any] = {"time": at, "role": self._role, "pid": record.process, "level": record.levelname.lower()}
        if isinstance(record.args, Fields):
            told |= {"message": record.msg.removesuffix(" %s"), **record.args}
        else:
            told["message"] = record.getMessage()
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False)


def log_to_stderr(role: str, level: str, form: str = "text") -> None:
    """One line an event: time, role, level, text; or as JSON."""
    handler = logging.StreamHandler()
    text = logging.Formatter(f"%(asctime)s {role}[%(process)d] %(levelname)s %(message)s", datefmt="%H:%M:%S")
    handler.setFormatter(JsonFormatter(role) if form == "json" else text)
    logging.basicConfig(level=level.upper(), handlers=[handler])
