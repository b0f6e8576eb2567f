"""The core process: the loop around the core. Waits for messages, hands them to the core, sends what it says.

Blocks in one poll; no asyncio, no thread, no spinning. Knows sockets, the clock and signals; decides nothing.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from importlib.metadata import version

import msgspec
import zmq

from scheduler.config import EngineConfig
from scheduler.core import Core, Output
from scheduler.core.core import ProtocolError
from scheduler.core.observe import step_record
from scheduler.links import Peer, PeerSocket
from scheduler.process import log_to_stderr, obey_the_supervisor
from wire import (
    AbortRequest,
    AddRequest,
    CancelQuery,
    CancelReply,
    Facts,
    FrontendHello,
    LoadQuery,
    Message,
    StepFailed,
    StepRecord,
    StepResult,
    TruncateRequest,
    WatchSteps,
    Welcome,
    WorkerFacts,
    WorkerHello,
)

log = logging.getLogger(__name__)

_REPROBE_MS = 50  # a closed connection can show a moment before its peer is known to be gone
_REPROBES = 20


class Engine:
    """One core, its front ends and its worker."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.core = Core(config.core)
        self.started_ns = time.monotonic_ns()
        self.worker: Peer | None = None
        self._context = zmq.Context()
        self._frontends = PeerSocket(self._context, config.frontend_endpoint)
        self._workers = PeerSocket(self._context, config.worker_endpoint)
        self._watching: dict[int, Peer] = {}
        self._by_number: dict[int, Peer] = {}
        self._ready_told = False
        self._checked_idle = True
        self._reprobes = 0
        self._stop_at_ns: int | None = None  # draining: when to give up
        self._wakeup, writer = socket.socketpair()
        for end in (self._wakeup, writer):
            end.setblocking(False)
        signal.set_wakeup_fd(writer.fileno())
        self._writer = writer
        signal.signal(signal.SIGTERM, lambda *_: None)  # the wake-up socket tells

    def run(self) -> None:
        """Until it was told to stop and has nothing left to do, or the drain timeout is over."""
        poller = zmq.Poller()
        for readable in (self._frontends.socket, self._frontends.monitor, self._workers.socket, self._workers.monitor):
            poller.register(readable, zmq.POLLIN)
        poller.register(self._wakeup.fileno(), zmq.POLLIN)
        while not self._is_done():
            ready = dict(poller.poll(self._timeout_ms()))
            if self._wakeup.fileno() in ready:
                self._wakeup.recv(64)
                self._drain()
            outputs = self._hear_frontends() + self._hear_workers()
            if self._frontends.monitor in ready or self._workers.monitor in ready:
                self._reprobes = _REPROBES
            outputs += self._notice_losses()
            self._send_plans()
            self._deliver(outputs)
            self._check_when_idle()
        self._deliver(self.core.drop_all("the server is shutting down", time.monotonic_ns()))
        self._frontends.close(linger_ms=1000)
        self._workers.close(linger_ms=0)
        self._context.term()

    # ------------------------------------------------------------------------------------------------ front ends

    def _hear_frontends(self) -> list[Output]:
        outputs: list[Output] = []
        for peer, message in self._frontends.receive():
            self._by_number.setdefault(peer.number, peer)
            if message is not None:
                outputs += self._from_frontend(peer, message)
        return outputs

    def _from_frontend(self, peer: Peer, message: Message) -> list[Output]:
        core, now = self.core, time.monotonic_ns()
        match message:
            case AddRequest():
                refused = core.add(message, peer.number, now)
                if refused is not None:
                    self._frontends.send(peer, refused)
            case AbortRequest(handle=handle):
                return core.abort(peer.number, handle, now)
            case TruncateRequest(handle=handle, num_output_tokens=count):
                return core.truncate(peer.number, handle, count, now)
            case CancelQuery(query_id=query_id, request_id=request_id):
                outcome, outputs = core.cancel(request_id, now)
                self._frontends.send(peer, CancelReply(query_id, outcome))
                return outputs
            case LoadQuery(query_id=query_id):
                self._frontends.send(peer, core.load(query_id))
            case WatchSteps(on=on):
                if on:
                    self._watching[peer.number] = peer
                else:
                    self._watching.pop(peer.number, None)
            case FrontendHello(pid=pid):
                log.info("front end %d (pid %d) has joined", peer.number, pid)
                self._frontends.send(peer, self._facts())
            case _:
                log.warning("front end %d sent %s, which is not for the core", peer.number, type(message).__name__)
        return []

    def _deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            peer = self._by_number.get(output.frontend)
            if peer is not None:
                self._frontends.send(peer, output.batch)

    def _facts(self) -> Facts:
        core = self.core
        reason = "the server is draining" if core.draining else "" if core.connected else "waiting for a worker with its model"
        workers = ((core.config.group, core.epoch, core.facts),) if core.connected and core.facts is not None else ()
        return Facts(
            version=version("carousel-serve"),
            policy=core.policy.name,
            started_ns=self.started_ns,
            ready=core.connected and not core.draining,
            draining=core.draining,
            reason=reason,
            max_step_tokens=core.token_budget,
            max_batch_rows=core.rows.max_rows,
            max_queue_requests=core.config.max_queue_requests,
            max_queue_tokens=core.config.max_queue_tokens,
            workers=workers,
        )

    def _tell_facts(self) -> None:
        facts = self._facts()
        for peer in self._by_number.values():
            self._frontends.send(peer, facts)

    # --------------------------------------------------------------------------------------------------- worker

    def _hear_workers(self) -> list[Output]:
        outputs: list[Output] = []
        for peer, message in self._workers.receive():
            outputs += self._from_worker(peer, message)
        return outputs

    def _from_worker(self, peer: Peer, message: Message | None) -> list[Output]:
        match message:
            case None:  # it may have been the result that the plans in flight wait for
                return self._resync() if peer is self.worker and self.core.in_flight else []
            case WorkerHello(group=group) if group != self.core.config.group:
                log.warning("a worker of group %d came to the core of group %d", group, self.core.config.group)
            case WorkerHello(facts=facts):
                log.info("worker (pid %d) has joined: %s", facts.pid, facts.description)
                self.worker = peer
                return self._begin_epoch(facts)
            case _ if peer is not self.worker:
                log.warning("peer %d is not the worker of this group: dropped %s", peer.number, type(message).__name__)
            case StepResult():
                return self._result(message)
            case StepFailed(epoch=epoch) if epoch == self.core.epoch and self.core.connected:
                log.error("step %d failed: %s", message.step_id, message.message)
                return self._resync()
            case StepFailed():
                pass
            case _:
                log.warning("the worker sent %s, which is not for the core", type(message).__name__)
        return []

    def _begin_epoch(self, facts: WorkerFacts) -> list[Output]:
        assert self.worker is not None
        outputs = self.core.worker_joined(facts, time.monotonic_ns())
        self._workers.send(self.worker, Welcome(self.core.config.group, self.core.epoch))
        self._tell_facts()
        if not self._ready_told:
            os.write(self.config.status_fd, b"ready\n")
            self._ready_told = True
        return outputs

    def _resync(self) -> list[Output]:
        """The worker's mirror is void: everything that ran waits again, and a new epoch begins with the same worker."""
        assert self.core.facts is not None
        outputs = self.core.worker_lost(time.monotonic_ns())
        return outputs + self._begin_epoch(self.core.facts)

    def _result(self, result: StepResult) -> list[Output]:
        core = self.core
        record = None
        if self._watching and core.in_flight and core.in_flight[0].step_id == result.header.step_id:
            record = step_record(core, core.in_flight[0], self.started_ns, result.header.duration_ns)
        try:
            outputs = core.apply(result, time.monotonic_ns())
        except ProtocolError as error:
            log.error("the worker's mirror is out of step: %s", error)
            return self._resync()
        leaves, core.leaves = core.leaves, []
        if record is not None:
            self._tell_watchers(msgspec.structs.replace(record, leaves=tuple(leaves)))
        return outputs

    def _tell_watchers(self, record: StepRecord) -> None:
        for peer in self._watching.values():
            self._frontends.send(peer, record)

    def _send_plans(self) -> None:
        while (plan := self.core.plan(time.monotonic_ns())) is not None:
            assert self.worker is not None
            self._checked_idle = False
            self._workers.send(self.worker, plan)

    # ---------------------------------------------------------------------------------------------- life and death

    def _notice_losses(self) -> list[Output]:
        if not self._reprobes:
            return []
        self._reprobes -= 1
        outputs: list[Output] = []
        for peer in self._frontends.lost():
            self._by_number.pop(peer.number, None)
            self._watching.pop(peer.number, None)
            log.warning("front end %d is gone", peer.number)
            self.core.frontend_lost(peer.number, time.monotonic_ns())
        for peer in self._workers.lost():
            if peer is self.worker:
                log.error("the worker is gone; its requests wait for the next one")
                self.worker = None
                outputs += self.core.worker_lost(time.monotonic_ns())
                self._tell_facts()
        return outputs

    def _drain(self) -> None:
        if self._stop_at_ns is None:
            log.info("draining: no new requests, %d to finish", self.core.num_requests)
            self._stop_at_ns = time.monotonic_ns() + int(self.config.drain_timeout_s * 1e9)
            self.core.drain()
            self._tell_facts()

    def _is_done(self) -> bool:
        return self._stop_at_ns is not None and (self.core.is_idle or time.monotonic_ns() >= self._stop_at_ns)

    def _timeout_ms(self) -> int | None:
        if self._reprobes:
            return _REPROBE_MS
        if self._stop_at_ns is not None:
            return max(0, (self._stop_at_ns - time.monotonic_ns()) // 1_000_000) + 1
        return None

    def _check_when_idle(self) -> None:
        """Blocks, rows and requests must agree; a violation is said with its place and does not end the service."""
        if self._checked_idle or not self.core.is_idle:
            return
        self._checked_idle = True
        try:
            self.core.check_invariants()
        except AssertionError:
            log.exception("the core's invariants are violated")


def main(config: EngineConfig) -> int:
    """The process `python -m scheduler engine`."""
    obey_the_supervisor()
    log_to_stderr("scheduler", config.log_level)
    Engine(config).run()
    return 0
