"""The folder of a server's inner sockets: private, its own, and gone with it.

Whoever is killed with -9 can't remove anything: so the next server of the same user removes what others have left. A folder is
in use as long as its lock is held, which the kernel lets go of with the process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from scheduler.errors import StartError

_PREFIX, _LOCK = "carousel-inner-", "lock"
_MOST_BYTES = 107  # of a socket's path (unix(7))
_LONGEST_NAME = "workers"


class InnerFolder:
    """Made at once, of mode 0700."""

    def __init__(self) -> None:
        """Raises StartError."""
        remove_left_ones()
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        if len(os.fsencode(self.path / _LONGEST_NAME)) > _MOST_BYTES:
            self.path.rmdir()
            raise StartError(f"{tempfile.gettempdir()} is too long a path for sockets: set TMPDIR to a shorter one")
        unnamed = self.path / f".{_LOCK}"  # nobody looks at it before it is held
        self._lock = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        unnamed.rename(self.path / _LOCK)

    def remove(self) -> None:
        """May be called again."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1


def remove_left_ones() -> None:
    """Folders of servers that are gone. Those of other users, and what can't be removed, stay."""
    for lock in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError):
            if lock.lstat().st_uid != os.getuid():
                continue
            file = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
            finally:
                os.close(file)
