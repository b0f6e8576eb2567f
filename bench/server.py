"""`carousel serve` as a process of its own, for measurements: started, waited for, stopped."""

from __future__ import annotations

from collections.abc import Sequence

from client.server import OwnServer, ServerFailedError

__all__ = ["Server", "ServerFailedError"]

_READY_S = 180.0


class Server(OwnServer):
    """Runs while it is entered, on a free port of loopback. module: what `python -m` runs."""

    def __init__(self, options: Sequence[str], module: str = "scheduler") -> None:
        super().__init__(options, ready_s=_READY_S, module=module)
