"""Starts the core process, the front ends and the worker, watches them, restarts what may be restarted, stops them all.

Knows processes, the public port and signals; nothing of requests. Children are started by exec, never forked after grpc was
imported, stay in this process's session, and die with it.
"""

from __future__ import annotations

import importlib.metadata
import ipaddress
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from scheduler.config import EngineConfig, ExporterConfig, ServeConfig
from scheduler.curve import CoreKeys
from scheduler.errors import StartError
from scheduler.frontend import tls
from scheduler.frontend.callers import Callers
from scheduler.frontend.config import FrontendConfig
from scheduler.inner_folder import InnerFolder
from scheduler.journal_files import claim
from scheduler.model_files import fingerprint, resolve
from scheduler.process import SUPERVISOR_PID, log_to_stderr, take_lifeline

if TYPE_CHECKING:
    from scheduler.metrics import RestartMetrics

log = logging.getLogger(__name__)

_KILL_AFTER_S = 5.0  # a child that was asked to stop is killed after this
_BACK_OFF_S = (0.2, 0.5, 1, 2, 5, 10, 30)  # before the n-th restart in a row
_SHORT_BACK_OFF_S = (0.1, 0.2, 0.5, 1, 2)  # of the core and the front ends: callers wait for them, and windows run out
_WORKER_BACK_OFF_S = (0.2, 0.5, 1, 2, 2, 2, 2, 2, 2, 5, 10, 30)  # so often it may crash before the core knows for which request
_LOST_S = 1.0  # what a worker gets to end by itself after its connection has closed
_STEADY_S = 20  # a child that ran this long starts again at the first back-off


@dataclass(slots=True)
class Child:
    """One process of the service. Only those with `restarts` come back after they die."""

    role: str
    command: list[str]
    may_restart: bool
    pass_fds: tuple[int, ...] = ()
    back_off_s: tuple[float, ...] = _BACK_OFF_S
    replaces: bool = False  # a worker that has been started to take another one's place, and has not yet
    retired: bool = False  # another one has taken its place: it ends
    kill_at_s: float | None = None  # unless it has ended by itself
    process: subprocess.Popen[bytes] | None = None
    started_s: float = 0.0
    restarts: int = 0
    restart_at_s: float | None = field(default=None)

    def start(self) -> None:
        self.started_s, self.restart_at_s, self.kill_at_s = time.monotonic(), None, None
        self.process = subprocess.Popen(
            self.command,
            pass_fds=self.pass_fds,
            stdin=subprocess.DEVNULL,
            env=os.environ | {SUPERVISOR_PID: str(os.getpid())},
        )

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, number: int) -> None:
        if self.process is not None and self.alive:
            self.process.send_signal(number)


class ReservedPort:
    """The public port, held for the front ends. gRPC shares a port silently (SO_REUSEPORT), so it is first bound without
    sharing, which fails if somebody listens there, and then held by a socket that shares and does not listen."""

    def __init__(self, host: str, port: int) -> None:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind, protocol) as alone:
                alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                alone.bind(address)
                self.port: int = alone.getsockname()[1]
            self._shared = socket.socket(family, kind, protocol)
            self._shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            self._shared.bind((address[0], self.port, *address[2:]))
        except OSError as error:
            why = "is in use: stop what listens there or choose another --port" if error.errno == 98 else f": {error}"
            raise StartError(f"port {port} of {host} {why}") from None

    def close(self) -> None:
        self._shared.close()


def reserve_recording(path: str) -> None:
    """Makes the file that the core process will write, so that what is wrong with it is said before anything starts."""
    if not path:
        return
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        raise StartError(f"--record {path}: there is such a file already, and a recording is never overwritten") from None
    except OSError as error:
        raise StartError(f"--record {path}: {error.strerror}") from None


def check_security(config: ServeConfig) -> None:
    """Reads what the front ends will read. Raises StartError."""
    if config.tls is not None:
        tls.read(config.tls)
    if config.key_file:
        Callers.load(config.key_file)
    if config.inner_keys:
        CoreKeys.read(Path(config.inner_keys))


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def exposure(config: ServeConfig) -> str:
    """What is open to others than this machine's users; empty: nothing."""
    if is_loopback(config.host):
        return ""
    opens = []
    if config.tls is None:
        opens.append("without TLS (--tls-cert, --tls-key): everything can be read on the way, tokens too")
    if not config.key_file and not (config.tls is not None and config.tls.client_ca):
        opens.append("without authentication (--tokens, --tls-client-ca): anybody who reaches it can use it")
    return f"listening on {config.host} {'; '.join(opens)}" if opens else ""


def check_extras(config: ServeConfig) -> None:
    """Whether what the options need is there. Raises StartError."""
    if config.otlp_endpoint:
        try:
            importlib.metadata.version("opentelemetry-exporter-otlp-proto-grpc")
        except importlib.metadata.PackageNotFoundError:
            raise StartError("--otlp-endpoint needs OpenTelemetry: pip install 'carousel-serve[tracing]'") from None
    if config.metrics_port is not None:
        try:
            address = socket.getaddrinfo(config.metrics_host, config.metrics_port, type=socket.SOCK_STREAM)[0]
            with socket.socket(*address[:3]) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address[4])
        except OSError as error:
            raise StartError(f"--metrics-port {config.metrics_port} of {config.metrics_host}: {error.strerror}") from None


class Supervisor:
    """The process `python -m scheduler`."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self._model_dir = resolve(config.model, config.revision)
        self._port = ReservedPort(config.host, config.port)
        reserve_recording(config.record)
        self._journal = Path(config.journal).absolute() if config.journal else None
        self._journal_model = f"{config.served_model_name} ({fingerprint(self._model_dir)})" if config.journal else ""
        self._journal_lock = claim(self._journal, self._journal_model) if self._journal else -1
        self._inner = InnerFolder()  # the sockets are ours alone
        self._folder = self._inner.path
        self._status, self._status_writer = os.pipe()
        os.set_blocking(self._status, False)
        self._status_rest = b""  # of a line that has not come to its end
        self._control, self._control_writer = os.pipe()  # to the core: what became of a new worker
        self.ready = False
        self._stopping = self._drained = False
        self._exit_code = 0
        self._signals: list[int] = []
        self._engine = self._engine_child()
        self._frontends = [self._frontend_child() for _ in range(config.frontends)]
        num_workers = 0 if config.inner_address else config.workers + config.standby
        self._children = [self._engine, *self._frontends, *(self._worker_child() for _ in range(num_workers))]
        self._restarts: RestartMetrics | None = None
        if config.metrics_port is not None:
            self._restarts = self._measure()

    # ------------------------------------------------------------------------------------------------- commands

    def _endpoint(self, name: str) -> str:
        return f"ipc://{self._folder}/{name}"

    def _engine_child(self) -> Child:
        config = EngineConfig(
            core=self.config.core,
            frontend_endpoint=self._endpoint("core"),
            worker_endpoint=self._worker_endpoint,
            worker_keys=self.config.inner_keys,
            worker_timeout_s=self.config.worker_timeout_s,
            step_timeout_s=self.config.step_timeout_s,
            max_groups=self.config.max_groups,
            control_fd=-1 if self.config.inner_address else self._control,
            status_fd=self._status_writer,
            drain_timeout_s=self.config.drain_timeout_s,
            log_level=self.config.log_level,
            log_format=self.config.log_format,
            metrics=self.config.metrics_port is not None,
            record=os.path.abspath(self.config.record) if self.config.record else "",
            record_limit_mib=self.config.record_limit_mib,
            journal=str(self._journal or ""),
            journal_model=self._journal_model,
            journal_fsync=self.config.journal_fsync,
            journal_limit_mib=self.config.journal_limit_mib,
        )
        command = [sys.executable, "-m", "scheduler", "engine", msgspec.json.encode(config).decode()]
        may_restart = self._journal is not None  # without one everything is lost with it
        return Child("core", command, may_restart, (self._status_writer, self._control), _SHORT_BACK_OFF_S)

    def _frontend_child(self) -> Child:
        config = FrontendConfig(
            core_endpoint=self._endpoint("core"),
            host=self.config.host,
            port=self._port.port,
            model_dir=str(self._model_dir),
            served_model_name=self.config.served_model_name,
            log_level=self.config.log_level,
            log_format=self.config.log_format,
            request_log=self.config.request_log,
            metrics=self.config.metrics_port is not None,
            otlp_endpoint=self.config.otlp_endpoint,
            tls=self.config.tls,
            key_file=self.config.key_file,
        )
        command = [sys.executable, "-m", "scheduler", "frontend", msgspec.json.encode(config).decode()]
        return Child("frontend", command, may_restart=True, back_off_s=_SHORT_BACK_OFF_S)

    def _measure(self) -> RestartMetrics:
        """Metrics are on: all processes started from now on know the folder, and one more serves what is in it."""
        config, folder = self.config, self._folder / "metrics"
        assert config.metrics_port is not None
        folder.mkdir()
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
        from scheduler.metrics import RestartMetrics  # the library looks for the folder when it is imported

        exporter = ExporterConfig(
            core_endpoint=self._endpoint("core"),
            host=config.metrics_host,
            port=config.metrics_port,
            folder=str(folder),
            served_model_name=config.served_model_name,
            log_level=config.log_level,
            log_format=config.log_format,
        )
        command = [sys.executable, "-m", "scheduler", "exporter", msgspec.json.encode(exporter).decode()]
        self._children.append(Child("exporter", command, may_restart=True))
        return RestartMetrics({child.role for child in self._children if child.may_restart})

    @property
    def _worker_endpoint(self) -> str:
        return self.config.inner_address or self._endpoint("workers")

    def _worker_child(self, device: str = "") -> Child:
        """device: another than the one that the options name."""
        revision = ("--revision", self.config.revision) if self.config.revision else ()
        model = ("--model", self.config.model, *revision)
        connect = ("--connect", self._worker_endpoint)
        other = ("--device", device) if device else ()  # the last one counts
        command = [sys.executable, "-m", "worker", *connect, *model, *self.config.worker_options, *other]
        return Child("worker", command, may_restart=True, back_off_s=_WORKER_BACK_OFF_S)

    # ----------------------------------------------------------------------------------------------------- life

    def run(self) -> int:
        """Until it is told to stop, or a part that can't be restarted is gone. Returns the exit code."""
        wakeup, writer = socket.socketpair()
        for end in (wakeup, writer):
            end.setblocking(False)
        signal.set_wakeup_fd(writer.fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda received, _: self._signals.append(received))
        signal.signal(signal.SIGCHLD, lambda *_: None)
        selector = selectors.DefaultSelector()
        selector.register(wakeup, selectors.EVENT_READ)
        selector.register(self._status, selectors.EVENT_READ)
        if (lifeline := take_lifeline()) is not None:
            selector.register(lifeline, selectors.EVENT_READ)
        try:
            for child in self._children:
                child.start()
            while not self._stopping:
                self._hear(selector, wakeup, self._timeout())
                self._watch()
                self._stopping = self._stopping or bool(self._signals)
            self._stop(selector, wakeup)
        finally:
            for child in self._children:
                child.signal(signal.SIGKILL)
            for child in self._children:
                if child.process is not None:
                    child.process.wait()
            self._port.close()
            self._inner.remove()
        return self._exit_code

    def _hear(self, selector: selectors.BaseSelector, wakeup: socket.socket, timeout_s: float | None) -> None:
        """Waits for a word of the core, a signal, a child's end, or the end of whoever started this process for itself."""
        for key, _ in selector.select(timeout_s):
            if key.fileobj == self._status:
                self._hear_status()
            elif key.fileobj == wakeup:
                wakeup.recv(64)
            else:
                selector.unregister(key.fileobj)
                log.info("the program that this server was started for is gone")
                self._signals += [signal.SIGTERM] * 2  # nobody is left who would read: end at once

    def _hear_status(self) -> None:
        *lines, self._status_rest = (self._status_rest + os.read(self._status, 4096)).split(b"\n")
        for line in lines:
            match line.decode().split():
                case ["drained"]:
                    self._drained = True
                case ["draining"]:
                    self._stopping = True  # somebody has called Drain
                case ["ready"]:
                    self.ready = True
                    host = "127.0.0.1" if self.config.host in ("0.0.0.0", "::") else self.config.host
                    log.info("%s is served on %s:%d", self.config.served_model_name, host, self._port.port)
                case ["lost", pid]:
                    self._end_lost(int(pid), _LOST_S)
                case ["hangs", pid]:
                    self._end_lost(int(pid), 0)
                case ["replace", *device]:
                    self._start_replacement(*device)
                case ["replaced", old, new]:
                    self._replaced(int(old), int(new))

    def _workers(self) -> list[Child]:
        return [child for child in self._children if child.role == "worker"]

    def _end_lost(self, pid: int, grace_s: float) -> None:
        """The core has given this worker up: if it is one of ours and is there still after the grace, it hangs."""
        for child in self._workers():
            if child.process is not None and child.process.pid == pid and child.alive:
                child.kill_at_s = time.monotonic() + grace_s

    def _start_replacement(self, device: str = "") -> None:
        child = self._worker_child(device)
        child.command.append("--replaces")
        child.replaces, child.may_restart = True, False
        log.info("starting a new worker, to replace the one that computes")
        self._children.append(child)
        child.start()

    def _replaced(self, old: int, new: int) -> None:
        """old: the worker that goes; 0: it is dead already."""
        workers = self._workers()
        coming = [child for child in workers if child.replaces and child.process is not None and child.process.pid == new]
        for child in coming:
            child.replaces, child.may_restart = False, True
            child.command.remove("--replaces")
        for child in workers:
            gone = not child.alive if not old else child.process is not None and child.process.pid == old
            if coming and gone and child not in coming:
                child.retired, child.restart_at_s = True, None
                child.signal(signal.SIGTERM)
                return

    def _watch(self) -> None:
        now = time.monotonic()
        for child in list(self._children):
            if child.restart_at_s is not None:
                if now >= child.restart_at_s:
                    child.start()
            elif not child.alive:
                self._died(child, now)
            elif child.kill_at_s is not None and now >= child.kill_at_s:
                log.error("the %s hangs and is killed", child.role)
                child.kill_at_s = None
                child.signal(signal.SIGKILL)

    def _died(self, child: Child, now: float) -> None:
        assert child.process is not None
        code = child.process.returncode
        how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
        if child.retired or child.replaces:
            self._children.remove(child)
            if child.replaces:
                log.error("the new worker %s before it took over: the one that computes stays", how)
                os.write(self._control_writer, b"failed\n")
            return
        if not child.may_restart or not self.ready:
            log.error("the %s %s: the server stops", child.role, how)
            self._stopping, self._exit_code = True, 1
            return
        if now - child.started_s > _STEADY_S:
            child.restarts = 0
        pause = child.back_off_s[min(child.restarts, len(child.back_off_s) - 1)]
        child.restarts += 1
        child.restart_at_s = now + pause
        if self._restarts is not None:
            self._restarts.restarted(child.role)
        log.error("the %s %s: it starts again in %g s", child.role, how, pause)

    def _timeout(self) -> float | None:
        due = [at_s for child in self._children for at_s in (child.restart_at_s, child.kill_at_s) if at_s is not None]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _stop(self, selector: selectors.BaseSelector, wakeup: socket.socket) -> None:
        """Drain: the core finishes what was accepted, then the front ends and the worker go, and it after them. A second signal
        ends at once."""
        self._engine.signal(signal.SIGTERM)
        if self._engine.alive:
            log.info("draining for at most %g s; once more to stop at once", self.config.drain_timeout_s)
        self._wait(
            selector, wakeup, lambda: self._drained or not self._engine.alive, self.config.drain_timeout_s + _KILL_AFTER_S
        )
        for child in self._children:
            child.signal(signal.SIGTERM)
        self._wait(selector, wakeup, lambda: not any(child.alive for child in self._children), _KILL_AFTER_S)

    def _wait(self, selector: selectors.BaseSelector, wakeup: socket.socket, over: Callable[[], bool], grace_s: float) -> None:
        until = time.monotonic() + grace_s
        while not over() and time.monotonic() < until and len(self._signals) < 2:
            self._hear(selector, wakeup, until - time.monotonic())


def serve(config: ServeConfig) -> int:
    """Runs the whole service in the foreground; returns the exit code."""
    log_to_stderr("carousel", config.log_level, config.log_format)
    warning = exposure(config)
    if warning:
        log.warning(warning)
    if config.metrics_port is not None and not is_loopback(config.metrics_host):
        log.warning(
            "metrics are open to everybody who reaches %s:%d; they name tenants", config.metrics_host, config.metrics_port
        )
    try:
        check_security(config)
        check_extras(config)
        supervisor = Supervisor(config)
    except StartError as error:
        print(f"carousel: {error}", file=sys.stderr)
        return 1
    log.info("options: %s; defaults for all others", ", ".join(config.chosen) or "none")
    return supervisor.run()
