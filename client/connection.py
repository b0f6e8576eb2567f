"""How a client reaches its server: the channel's options, TLS by files, the token that goes with each call. Knows grpc only."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TypeAlias

import grpc
import grpc.aio

MESSAGE_LIMIT = 64 << 20  # bytes of one message, either way; the server's too
_LOOPBACK = ("127.", "localhost", "[::1]", "unix:")

File: TypeAlias = str | PathLike[str]


@dataclass(frozen=True)
class Way:
    """How to reach a server; of either kind of channel. credentials None: in the clear."""

    target: str
    credentials: grpc.ChannelCredentials | None
    metadata: tuple[tuple[str, str], ...]  # of every call
    options: tuple[tuple[str, int], ...]

    def channel(self) -> grpc.Channel:
        """Connects with its first call."""
        if self.credentials is None:
            return grpc.insecure_channel(self.target, self.options)
        return grpc.secure_channel(self.target, self.credentials, self.options)

    def aio_channel(self) -> grpc.aio.Channel:
        """The same for asyncio."""
        if self.credentials is None:
            return grpc.aio.insecure_channel(self.target, self.options)
        return grpc.aio.secure_channel(self.target, self.credentials, self.options)


def way_to(target: str, tls_ca: File | None, tls_cert: File | None, tls_key: File | None, token: str | None) -> Way:
    """In the clear unless a file is given. Raises OSError for a file that can't be read, ValueError for what can't be used."""
    options = [
        ("grpc.max_send_message_length", MESSAGE_LIMIT),
        ("grpc.max_receive_message_length", MESSAGE_LIMIT),
        # gRPC lets all of a process share one connection to an address, and so one of several front ends.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", 100),  # a server that is just starting is found at once
        ("grpc.max_reconnect_backoff_ms", 2000),
        # The transport takes 64 KiB of a stream that nobody reads, instead of up to some MB by probing: so the server
        # hears soon that a reader has stopped, and computes for others.
        ("grpc.http2.bdp_probe", 0),
        # A server whose machine is gone is noticed within half a minute while calls run, the silent ones too: a stream in the
        # queue gets nothing for long. The server allows a ping every 10 s.
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    if target.startswith(_LOOPBACK):
        options.append(("grpc.enable_http_proxy", 0))  # http_proxy is not meant for this machine
    credentials = _credentials(tls_ca, tls_cert, tls_key) if tls_ca or tls_cert or tls_key else None
    return Way(target, credentials, _metadata(token), tuple(options))


def _metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """Not grpc's own credentials of a call: those refuse a connection in the clear, loopback too."""
    if token is None:
        return ()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("a token is printable ASCII characters, without spaces")
    return (("authorization", f"Bearer {token}"),)


def _credentials(tls_ca: File | None, tls_cert: File | None, tls_key: File | None) -> grpc.ChannelCredentials:
    """What is wrong with the files is found out here: grpc would say no more than that no server answers."""
    if bool(tls_cert) != bool(tls_key):
        raise ValueError("tls_cert and tls_key go together: a certificate and its private key")
    authority, certificate, key = (Path(file).read_bytes() if file else None for file in (tls_ca, tls_cert, tls_key))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if tls_ca:
        _check(lambda: context.load_verify_locations(tls_ca), f"{tls_ca} must hold certificates, as PEM")
    if tls_cert:
        what = f"{tls_cert} and {tls_key} must be a certificate and its private key, PEM files without a password"
        _check(lambda: context.load_cert_chain(tls_cert, tls_key, password=lambda: b"none"), what)
    return grpc.ssl_channel_credentials(authority, key, certificate)


def _check(load: Callable[[], None], what: str) -> None:
    try:
        load()
    except ssl.SSLError:
        raise ValueError(what) from None
