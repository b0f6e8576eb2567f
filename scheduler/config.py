"""What the scheduler service is told at its start: frozen, checked once, handed to each of its processes as JSON."""

from __future__ import annotations

import msgspec

from scheduler.core import CoreConfig
from scheduler.frontend.config import TlsFiles


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The core process."""

    core: CoreConfig
    frontend_endpoint: str  # ZeroMQ endpoint that it binds for front ends
    worker_endpoint: str  # … and for workers
    status_fd: int  # where it tells the supervisor that it is ready
    drain_timeout_s: float
    log_level: str
    record: str = ""  # file for the core's inputs and plans; empty: none
    record_limit_mib: float = 0.0  # its largest size; 0: no limit
    dump_folder: str = ""  # for what led to a failure of the core; empty: the system's folder for temporary files


class ServeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`python -m scheduler`, which is also `carousel serve`."""

    core: CoreConfig
    model: str
    revision: str | None = None
    served_model_name: str
    host: str = "127.0.0.1"
    port: int = 50051
    frontends: int = 1
    tls: TlsFiles | None = None
    key_file: str = ""  # hashed keys of those who may call; empty: everybody may
    drain_timeout_s: float = 30.0
    log_level: str = "info"
    record: str = ""
    record_limit_mib: float = 0.0
    worker_options: tuple[str, ...] = ()  # handed to `python -m worker` as they are
