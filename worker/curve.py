"""The keys of a worker's encrypted link to a core on another machine: read here, set on each socket before it connects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.auth import load_certificate

from worker.config import ConfigError


@dataclass(frozen=True, slots=True)
class Keys:
    """CURVE keys as ZeroMQ wants them, 40 characters of Z85 each."""

    own_public: bytes
    own_secret: bytes
    core_public: bytes

    @staticmethod
    def read(folder: Path) -> Keys:
        """From `worker.key_secret` and `core.key`, as `carousel keys` makes them. Raises ConfigError."""
        public, secret = _certificate(folder / "worker.key_secret")
        if secret is None:
            raise ConfigError(f"--keys: {folder / 'worker.key_secret'} holds no secret key")
        return Keys(public, secret, _certificate(folder / "core.key")[0])

    def set(self, socket: zmq.Socket[bytes]) -> None:
        socket.curve_publickey, socket.curve_secretkey = self.own_public, self.own_secret
        socket.curve_serverkey = self.core_public


def keys_for(address: str, folder: str) -> Keys | None:
    """None: a socket in the file system, which its folder's permissions guard. Raises ConfigError."""
    if address.startswith("ipc://"):
        if folder:
            raise ConfigError("--keys encrypts a link by tcp://: this one is a socket in the file system")
        return None
    if not folder:
        raise ConfigError(f"--connect {address}: a link that leaves this machine is encrypted: --keys DIR (`carousel keys`)")
    return Keys.read(Path(folder))


def _certificate(path: Path) -> tuple[bytes, bytes | None]:
    try:
        return load_certificate(str(path))
    except OSError as error:
        raise ConfigError(f"--keys: {path}: {error.strerror or 'there is no such file'}") from None
    except ValueError:
        raise ConfigError(f"--keys: {path} is not a key file of `carousel keys`") from None
