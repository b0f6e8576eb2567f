"""What a front end is told at its start; the supervisor hands it over as JSON on the command line, so it holds no secret."""

from __future__ import annotations

import msgspec


class TlsFiles(msgspec.Struct, frozen=True, kw_only=True):
    """Paths of PEM files."""

    certificate: str  # the server's, and after it those that vouch for it
    key: str  # its private key, without a password
    client_ca: str = ""  # who vouches for clients, all of which must show a certificate then; empty: none need one


class FrontendConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One front-end process."""

    core_endpoint: str  # ZeroMQ endpoint of the core
    host: str  # address to listen on
    port: int  # shared by all front ends (SO_REUSEPORT)
    model_dir: str  # holds config.json and the tokenizer
    served_model_name: str
    log_level: str = "info"
    log_format: str = "text"  # or json
    request_log: bool = False  # a line for each request that ends
    metrics: bool = False  # requests are measured, in the folder that the environment names for prometheus_client
    otlp_endpoint: str = ""  # where the traces of requests go; empty: there are none
    tls: TlsFiles | None = None  # None: in the clear
    key_file: str = ""  # path of the hashed keys of those who may call (callers.py); empty: everybody may
    max_message_bytes: int = 64 << 20  # of one gRPC message, either way
    max_streams: int = 20_000  # calls at once on one connection, and calls that wait to be looked at
    tokenizer_threads: int = 2  # long prompts are tokenized beside the event loop
    drain_timeout_s: float = 4.0  # what streams get after SIGTERM; the supervisor kills after 5
