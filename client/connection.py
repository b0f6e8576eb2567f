"""How a client reaches its server: the channel's options, TLS by files, the token that goes with each call. Knows grpc only."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import grpc

MESSAGE_LIMIT = 64 << 20  # bytes of one message, either way; the server's too
_LOOPBACK = ("127.", "localhost", "[::1]", "unix:")

File: TypeAlias = str | PathLike[str]


def open_channel(
    target: str, tls_ca: File | None, tls_cert: File | None, tls_key: File | None, token: str | None
) -> grpc.Channel:
    """In the clear unless a file is given. Raises OSError for a file that can't be read, ValueError for what can't be used."""
    options: list[tuple[str, int]] = [
        ("grpc.max_send_message_length", MESSAGE_LIMIT),
        ("grpc.max_receive_message_length", MESSAGE_LIMIT),
        ("grpc.initial_reconnect_backoff_ms", 100),  # a server that is just starting is found at once
        ("grpc.max_reconnect_backoff_ms", 2000),
        # The transport takes 64 KiB of a stream that nobody reads, instead of up to some MB by probing: so the server
        # hears soon that a reader has stopped, and computes for others.
        ("grpc.http2.bdp_probe", 0),
    ]
    if target.startswith(_LOOPBACK):
        options.append(("grpc.enable_http_proxy", 0))  # http_proxy is not meant for this machine
    with_token = [] if token is None else [_WithToken(token)]
    if tls_ca or tls_cert or tls_key:
        channel = grpc.secure_channel(target, _credentials(tls_ca, tls_cert, tls_key), options)
    else:
        channel = grpc.insecure_channel(target, options)
    return grpc.intercept_channel(channel, *with_token)


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


class _CallDetails(NamedTuple):
    """grpc.ClientCallDetails, with metadata added."""

    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


class _WithToken(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Not grpc's own credentials of a call: those refuse a connection in the clear, loopback too."""

    def __init__(self, token: str) -> None:
        if not token or not token.isascii() or not token.isprintable() or " " in token:
            raise ValueError("a token is printable ASCII characters, without spaces")
        self._metadata = ("authorization", f"Bearer {token}")

    def _call(self, continuation: Any, details: Any, request: Any) -> Any:
        metadata = (*(details.metadata or ()), self._metadata)
        ready, compression = details.wait_for_ready, details.compression
        return continuation(
            _CallDetails(details.method, details.timeout, metadata, details.credentials, ready, compression), request
        )

    intercept_unary_unary = intercept_unary_stream = intercept_stream_stream = _call  # type: ignore[assignment]
