"""The files of TLS: read, and checked to belong together before anything listens. Knows no gRPC and no sockets."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NamedTuple

from scheduler.errors import StartError
from scheduler.frontend.config import TlsFiles


class TlsMaterial(NamedTuple):
    """What the files hold, PEM."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None


def read(files: TlsFiles) -> TlsMaterial:
    """Raises StartError."""
    material = TlsMaterial(
        _read("--tls-cert", files.certificate),
        _read("--tls-key", files.key),
        _read("--tls-client-ca", files.client_ca) if files.client_ca else None,
    )
    _check_pair(files)
    if files.client_ca:
        _check_authority(files.client_ca)
    return material


def _read(option: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise StartError(f"{option} {path}: {error.strerror}") from None


def _check_pair(files: TlsFiles) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(files.certificate, files.key, password=lambda: b"none")  # else it would ask the terminal
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise StartError(f"--tls-key {files.key} is not the key of --tls-cert {files.certificate}") from None
        what = f"--tls-cert {files.certificate} and --tls-key {files.key}"
        raise StartError(f"{what} must be a certificate and its private key, PEM files without a password") from None


def _check_authority(path: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(path)
    except ssl.SSLError:
        raise StartError(f"--tls-client-ca {path} must hold certificates, as PEM") from None
