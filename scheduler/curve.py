"""The keys of an encrypted link between the core and workers on other machines: made, read, set on a socket. No decisions."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.auth import create_certificates, load_certificate
from zmq.auth.thread import ThreadAuthenticator

from scheduler.errors import StartError

_DOMAIN = "workers"  # of ZeroMQ's authentication: sockets that ask this guard
CORE, WORKER = "core", "worker"  # NAME.key is public, NAME.key_secret is not


@dataclass(frozen=True, slots=True)
class CoreKeys:
    """The core's own key pair, and the public key of the workers that it lets in."""

    public: bytes
    secret: bytes
    worker_public: bytes

    @staticmethod
    def read(folder: Path) -> CoreKeys:
        """Raises StartError."""
        public, secret = _certificate(folder / f"{CORE}.key_secret")
        if secret is None:
            raise StartError(f"{folder / f'{CORE}.key_secret'} holds no secret key")
        return CoreKeys(public, secret, _certificate(folder / f"{WORKER}.key")[0])

    def guard(self, context: zmq.Context[zmq.Socket[bytes]]) -> ThreadAuthenticator:
        """Lets only the workers' key in to the sockets of this context that speak CURVE. To be stopped before its end."""
        guard = ThreadAuthenticator(context)
        guard.start()
        guard.configure_curve_callback(_DOMAIN, _Only(self.worker_public))
        return guard

    def set(self, socket: zmq.Socket[bytes]) -> None:
        socket.curve_publickey, socket.curve_secretkey = self.public, self.secret
        socket.curve_server = True
        socket.zap_domain = _DOMAIN.encode()


@dataclass(frozen=True, slots=True)
class _Only:
    """What zmq.auth asks about each key."""

    public: bytes

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self.public


def make(folder: Path) -> list[Path]:
    """Both key pairs, readable by their owner only, in a folder that may not hold any yet. Raises StartError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        taken = [path for name in (CORE, WORKER) for path in _paths(folder, name) if path.exists()]
        if taken:
            raise StartError(f"{taken[0]} is there already: keys are never overwritten")
        for name in (CORE, WORKER):
            create_certificates(str(folder), name)
            os.chmod(_paths(folder, name)[1], 0o600)
    except OSError as error:
        raise StartError(f"{folder}: {error.strerror}") from None
    return [path for name in (CORE, WORKER) for path in _paths(folder, name)]


def _paths(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / f"{name}.key", folder / f"{name}.key_secret"


def _certificate(path: Path) -> tuple[bytes, bytes | None]:
    try:
        return load_certificate(str(path))
    except OSError as error:
        raise StartError(f"{path}: {error.strerror or 'there is no such file'}") from None
    except ValueError:
        raise StartError(f"{path} is not a key file of `carousel keys`") from None


def main(folder: str) -> int:
    """`python -m scheduler keys DIR`."""
    try:
        print("\n".join(str(path) for path in make(Path(folder))))
    except StartError as error:
        print(f"carousel: {error}", file=sys.stderr)
        return 1
    return 0
