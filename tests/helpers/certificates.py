"""Certificates of a test's own, made by the openssl command: authorities, and certificates that they vouch for."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from scheduler.frontend.config import TlsFiles

_REQUEST = ("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", "2")


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, PEM files."""

    certificate: Path
    key: Path


class Authority:
    def __init__(self, folder: Path, name: str) -> None:
        if shutil.which("openssl") is None:
            pytest.skip("the openssl command makes the certificates")
        self._folder, self._name = folder, name
        self.own = self._make(name, "-addext", "keyUsage=critical,keyCertSign")

    @property
    def file(self) -> Path:
        return self.own.certificate

    def vouch_for(self, name: str, password: str | None = None) -> Pair:
        """Good for a server on 127.0.0.1, and for a client."""
        signed = ("-CA", str(self.own.certificate), "-CAkey", str(self.own.key))
        names = ("-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE")
        return self._make(f"{self._name}-{name}", *signed, *names, password=password)

    def _make(self, name: str, *options: str, password: str | None = None) -> Pair:
        pair = Pair(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        protected = ("-passout", f"pass:{password}") if password else ("-nodes",)
        files = ("-out", str(pair.certificate), "-keyout", str(pair.key))
        subprocess.run([*_REQUEST, "-subj", f"/CN={name}", *files, *protected, *options], check=True, capture_output=True)
        return pair


def tls(server: Pair, client_ca: Path | None = None) -> TlsFiles:
    return TlsFiles(certificate=str(server.certificate), key=str(server.key), client_ca=str(client_ca or ""))


def credentials(authority: Authority, own: Pair | None = None) -> grpc.ChannelCredentials:
    key, certificate = (own.key.read_bytes(), own.certificate.read_bytes()) if own else (None, None)
    return grpc.ssl_channel_credentials(authority.file.read_bytes(), key, certificate)
