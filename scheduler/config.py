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
    log_format: str = "text"  # or json
    metrics: bool = False  # whether steps are measured for whoever asks with MetricsQuery
    journal: str = ""  # folder of what outlives this process; empty: nothing does
    journal_model: str = ""  # the model's name and fingerprint, which must be those of the journal
    journal_fsync: str = "never"  # never, always or interval:MS
    journal_limit_mib: float = 128.0
    worker_timeout_s: float = 2.0  # without a heartbeat of a worker, or of a step that uses no processor time
    step_timeout_s: float = 0.0  # that one step may take; 0: any time
    max_groups: int = 1  # workers that compute at a time, each with a core and a pool of its own; further ones stand by
    trial_patience_s: float = 30.0  # that requests under suspicion wait for their group's next worker, before another one's
    control_fd: int = -1  # where the supervisor tells what became of a new worker; -1: nowhere
    worker_keys: str = ""  # folder of the keys of an encrypted worker_endpoint
    dump_folder: str = ""  # for what led to a failure of the core; empty: the system's folder for temporary files


class ExporterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The process that serves metrics."""

    core_endpoint: str
    host: str
    port: int
    folder: str  # of the other processes' files
    served_model_name: str
    log_level: str
    log_format: str


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
    log_format: str = "text"
    request_log: bool = True
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = None  # None: nothing is measured
    otlp_endpoint: str = ""  # of an OpenTelemetry collector; empty: no tracing
    chosen: tuple[str, ...] = ()  # options that were set, each with its value and where it was set; for the log
    record: str = ""
    record_limit_mib: float = 0.0
    journal: str = ""  # folder; empty: a core that dies ends the server
    journal_fsync: str = "never"
    journal_limit_mib: float = 128.0
    workers: int = 1  # that are started here and compute, each for a group of its own
    max_groups: int = 1  # workers that compute at a time; further ones stand by
    standby: int = 0  # workers that have loaded the model and wait for the loss of the one that computes
    worker_timeout_s: float = 2.0
    step_timeout_s: float = 0.0
    inner_address: str = ""  # tcp:// address where workers on other machines join; then none is started here
    inner_keys: str = ""  # folder of its keys
    worker_options: tuple[str, ...] = ()  # handed to `python -m worker` as they are
