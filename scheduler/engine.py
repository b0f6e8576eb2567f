"""The core process: the loop around the core. Waits for messages, hands them to the core, sends what it says.

Blocks in one poll; no asyncio, no thread, no spinning. Knows sockets, the clock and signals; decides nothing. Whatever goes to
the core goes through the recorder.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import msgspec
import zmq

from scheduler.config import EngineConfig
from scheduler.core import Core, Output
from scheduler.core.core import ProtocolError
from scheduler.core.explain import explain
from scheduler.core.observe import block_tables, list_requests, step_record
from scheduler.core.request import State
from scheduler.links import Peer, PeerSocket
from scheduler.logprobs import by_frontend
from scheduler.process import log_to_stderr, obey_the_supervisor
from scheduler.recorder import CoreFailureError, Recorded, RecordingFile, Ring
from scheduler.resumption import Key, Resumption
from wire import (
    AbortRequest,
    AddRequest,
    BlockTablesQuery,
    CancelQuery,
    CancelReply,
    Credit,
    DrainQuery,
    DrainReply,
    EndReason,
    ExplainQuery,
    ExplainReply,
    Facts,
    FrontendHello,
    ListQuery,
    LoadQuery,
    Logprobs,
    Message,
    OutputEnded,
    Refused,
    ResumeQuery,
    SetPolicyQuery,
    SetPolicyReply,
    StepFailed,
    StepRecord,
    StepResult,
    TokenBatch,
    TokenBatchHeader,
    TruncateRequest,
    WatchSteps,
    Welcome,
    WorkerFacts,
    WorkerHello,
)
from wire.messages import I32

log = logging.getLogger(__name__)

_REPROBE_MS = 50  # a closed connection can show a moment before its peer is known to be gone
_REPROBES = 20
_QUICK_CHECK_NS = 2_000_000
_FRONTENDS_LEAVE_S = 2.0  # so long the front ends may take to read what they were told last
_MOST_DUMPS = 16  # files of the ring that one process writes …
_DUMP_EVERY_NS = 60 * 1_000_000_000  # … at least so far apart
_OWN_FAULT = "the scheduler failed and began anew"


class Engine:
    """One core, its front ends and its worker."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self._ring = Ring()
        self._file = _recording_file(config)
        self._inputs = Recorded(Core(config.core), self._ring, *([self._file] if self._file else []))
        self.started_ns = time.monotonic_ns()
        self.worker: Peer | None = None
        self._context = zmq.Context()
        self._frontends = PeerSocket(self._context, config.frontend_endpoint)
        self._workers = PeerSocket(self._context, config.worker_endpoint)
        self._watching: dict[int, Peer] = {}
        self._by_number: dict[int, Peer] = {}
        self._resumption = Resumption(config.core.max_unread_tokens)
        self._ready_told = False
        self._checked_idle = True
        self._check_after_ns = 0
        self._reprobes = 0
        self._stop_at_ns: int | None = None  # draining: when to give up
        self._dumped_ns: list[int] = []  # when the ring was written
        self._wakeup, writer = socket.socketpair()
        for end in (self._wakeup, writer):
            end.setblocking(False)
        signal.set_wakeup_fd(writer.fileno())
        self._writer = writer
        signal.signal(signal.SIGTERM, lambda *_: None)  # the wake-up socket tells

    @property
    def core(self) -> Core:
        """To be asked; its verbs are called through the recorder."""
        return self._inputs.core

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
                self._drain(self.config.drain_timeout_s)
            outputs = self._hear_frontends() + self._hear_workers()
            if self._frontends.monitor in ready or self._workers.monitor in ready:
                self._reprobes = _REPROBES
            outputs += self._notice_losses()
            outputs += self._send_plans()
            self._deliver(outputs)
            self._deliver(self._look_after_detached())
            self._deliver(self._check_when_idle())
        try:
            self._deliver(self._inputs.drop_all("the server is shutting down", time.monotonic_ns()))
        except CoreFailureError as failure:
            self._deliver(self._begin_anew(failure))
        if self._file is not None:
            self._file.close()
        self._tell_supervisor("drained")
        self._let_frontends_leave()
        self._frontends.close(linger_ms=1000)
        self._workers.close(linger_ms=0)
        self._context.term()

    def _let_frontends_leave(self) -> None:
        """They close their ends first: a socket that is closed with unread messages in it takes along what was sent."""
        until = time.monotonic() + _FRONTENDS_LEAVE_S
        while self._frontends.peers and time.monotonic() < until:
            self._frontends.socket.poll(20)
            self._frontends.receive()
            self._frontends.lost()

    def _tell_supervisor(self, word: str) -> None:
        os.write(self.config.status_fd, f"{word}\n".encode())

    # ------------------------------------------------------------------------------------------------ front ends

    def _hear_frontends(self) -> list[Output]:
        outputs: list[Output] = []
        for peer, message in self._frontends.receive():
            self._by_number.setdefault(peer.number, peer)
            if isinstance(message, ResumeQuery):
                self._deliver(outputs)  # of these tokens it gets all that the core knows
                outputs = []
            if message is not None:
                try:
                    outputs += self._from_frontend(peer, message)
                except CoreFailureError as failure:
                    if isinstance(message, AddRequest):
                        self._frontends.send(peer, Refused(message.header.handle, "INTERNAL", _OWN_FAULT))
                    outputs += self._begin_anew(failure)
        return outputs

    def _from_frontend(self, peer: Peer, message: Message) -> list[Output]:
        inputs, now = self._inputs, time.monotonic_ns()
        match message:
            case AddRequest():
                self._add(peer, message, now)
            case Credit(handles=handles, num_tokens=num_tokens):
                for frontend, (mine, counts) in self._resumption.core_credits(peer.number, handles, num_tokens).items():
                    inputs.credit(frontend, mine, counts, now)
            case AbortRequest(handle=handle):
                key = self._resumption.core_key(peer.number, handle)
                if key is not None and not self._resumption.detach(key, now):
                    return inputs.abort(*key, now)
            case TruncateRequest(handle=handle, num_output_tokens=count):
                key = self._resumption.core_key(peer.number, handle)
                return inputs.truncate(*key, count, now) if key is not None else []
            case ResumeQuery():
                self._resume(peer, message, now)
            case CancelQuery(query_id=query_id, request_id=request_id):
                outcome, outputs = inputs.cancel(request_id, now)
                self._frontends.send(peer, CancelReply(query_id, outcome))
                return outputs
            case SetPolicyQuery(query_id=query_id, policy=policy):
                self._set_policy(peer, query_id, policy)
            case DrainQuery(query_id=query_id, timeout_ms=timeout_ms):
                self._drain_asked(peer, query_id, timeout_ms)
            case WatchSteps(on=on):
                if on:
                    self._watching[peer.number] = peer
                else:
                    self._watching.pop(peer.number, None)
            case FrontendHello(pid=pid):
                log.info("front end %d (pid %d) has joined", peer.number, pid)
                self._frontends.send(peer, self._facts())
            case _:
                self._answer(peer, message)
        return []

    def _add(self, peer: Peer, add: AddRequest, now: int) -> None:
        """The core does not need what only front ends read."""
        header = msgspec.structs.replace(add.header, resume_state=b"") if add.header.resume_state else add.header
        refused = self._inputs.add(AddRequest(header, add.prompt, add.prefix_hashes), peer.number, now)
        if refused is not None:
            self._frontends.send(peer, refused)
        else:
            self._resumption.added(add, peer.number)

    def _resume(self, peer: Peer, query: ResumeQuery, now: int) -> None:
        def live_tokens(key: Key) -> I32:
            return self.core.output_tokens(self.core.sequence(*key))

        reply, displaced = self._resumption.resume(query, peer.number, live_tokens, now)
        self._frontends.send(peer, reply)
        if displaced is not None and (other := self._by_number.get(displaced[0])) is not None:
            self._frontends.send(other, displaced[1])
        self._credit_unread()  # before anything more comes: the reader has that to take

    def _answer(self, peer: Peer, message: Message) -> None:
        """Questions about the core, which change nothing in it. Our own fault in an answer leaves the question open."""
        try:
            reply = self._reply(message)
        except Exception:
            log.exception("%s could not be answered", type(message).__name__)
            return
        if reply is None:
            log.warning("front end %d sent %s, which is not for the core", peer.number, type(message).__name__)
        else:
            self._frontends.send(peer, reply)

    def _reply(self, message: Message) -> Message | None:
        match message:
            case LoadQuery(query_id=query_id):
                return self.core.load(query_id)
            case ExplainQuery(query_id=query_id, request_id=request_id):
                return ExplainReply(query_id, explain(self.core, request_id, time.monotonic_ns()))
            case ListQuery(query_id=query_id, after=after, limit=limit):
                return list_requests(self.core, query_id, after, limit)
            case BlockTablesQuery(query_id=query_id):
                return block_tables(self.core, query_id)
        return None

    def _set_policy(self, peer: Peer, query_id: int, name: str) -> None:
        error = self._inputs.set_policy(name, time.monotonic_ns())
        self._frontends.send(peer, SetPolicyReply(query_id, self.core.policy.name, error))
        if not error:
            log.info("the policy is %s now", name)
            self._tell_facts()

    def _deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            if not self._resumption.concerns(output):
                self._send_batch(output)
                continue
            for part in self._resumption.route(output, time.monotonic_ns()):
                self._send_batch(part)

    def _send_batch(self, output: Output) -> None:
        peer = self._by_number.get(output.frontend)
        if peer is not None:
            self._frontends.send(peer, output.batch)

    def _look_after_detached(self) -> list[Output]:
        """What came for nobody is taken, and whoever nobody has resumed in time ends."""
        outputs: list[Output] = []
        try:
            news = self._credit_unread()
            for key in self._resumption.expired(time.monotonic_ns()):
                outputs += self._inputs.abort(*key, time.monotonic_ns())
                news = True
        except CoreFailureError as failure:
            return outputs + self._begin_anew(failure)
        return outputs + self._send_plans() if news else outputs

    def _credit_unread(self) -> bool:
        """For readers that were not there, or not until now. Whether there was anything to say."""
        credits = self._resumption.take_credits()
        for frontend, (handles, num_tokens) in credits.items():
            self._inputs.credit(frontend, handles, num_tokens, time.monotonic_ns())
        return bool(credits)

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
            max_unread_tokens=core.config.max_unread_tokens,
        )

    def _tell_facts(self) -> None:
        facts = self._facts()
        for peer in self._by_number.values():
            self._frontends.send(peer, facts)

    # --------------------------------------------------------------------------------------------------- worker

    def _hear_workers(self) -> list[Output]:
        outputs: list[Output] = []
        for peer, message in self._workers.receive():
            try:
                outputs += self._from_worker(peer, message)
            except CoreFailureError as failure:
                outputs += self._begin_anew(failure)
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
            case Logprobs():
                return self._logprobs(message)
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
        outputs = self._inputs.worker_joined(facts, time.monotonic_ns())
        self._workers.send(self.worker, Welcome(self.core.config.group, self.core.epoch))
        self._tell_facts()
        if not self._ready_told:
            self._warn_of_quotas(facts.num_blocks)
            self._tell_supervisor("ready")
            self._ready_told = True
        return outputs

    def _warn_of_quotas(self, num_blocks: int) -> None:
        """Of those that bound nothing: only now it is known how many blocks there are."""
        for tenant in self.config.core.tenants:
            if tenant.max_blocks > num_blocks:
                log.warning(
                    "--tenant %s:blocks=%d has no effect: the KV cache has %d blocks",
                    tenant.name,
                    tenant.max_blocks,
                    num_blocks,
                )

    def _resync(self) -> list[Output]:
        """The worker's mirror is void: everything that ran waits again, and a new epoch begins with the same worker."""
        assert self.core.facts is not None
        outputs = self._inputs.worker_lost(time.monotonic_ns())
        return outputs + self._begin_epoch(self.core.facts)

    def _result(self, result: StepResult) -> list[Output]:
        core, record = self.core, None
        if self._watching:
            record = self._record_of(result)
        try:
            outputs = self._inputs.apply(result, time.monotonic_ns())
        except ProtocolError as error:
            log.error("the worker's mirror is out of step: %s", error)
            self._dump(f"the worker's mirror is out of step: {error}")
            return self._resync()
        leaves, core.leaves = core.leaves, []
        if record is not None:
            self._tell_watchers(msgspec.structs.replace(record, leaves=tuple(leaves)))
        return outputs

    def _logprobs(self, message: Logprobs) -> list[Output]:
        """They go out before the tokens of their step do."""
        core, header = self.core, message.header
        if header.epoch != core.epoch or not core.in_flight:
            return []
        try:
            if header.step_id != core.in_flight[0].step_id:
                raise ProtocolError(f"log-probabilities of step {header.step_id}, which was not the next one in flight")
            told = by_frontend(message, core.reader, core.rows.max_rows)
        except ProtocolError as error:
            log.error("the worker's mirror is out of step: %s", error)
            return self._resync()
        for frontend, part in told.items():
            if (peer := self._by_number.get(frontend)) is not None:
                self._frontends.send(peer, part)
        return []

    def _record_of(self, result: StepResult) -> StepRecord | None:
        """Before the result is applied; who leaves is added afterwards."""
        core = self.core
        if not core.in_flight or core.in_flight[0].step_id != result.header.step_id:
            return None
        return step_record(core, core.in_flight[0], self.started_ns, result.header.duration_ns)

    def _tell_watchers(self, record: StepRecord) -> None:
        for peer in self._watching.values():
            self._frontends.send(peer, record)

    def _send_plans(self) -> list[Output]:
        """As many as the pipeline takes. Returns what the clock has ended."""
        try:
            while (plan := self._inputs.plan(time.monotonic_ns())) is not None:
                assert self.worker is not None
                self._checked_idle = False
                self._workers.send(self.worker, plan)
        except CoreFailureError as failure:
            return self._begin_anew(failure)
        return self.core.take_outputs()

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
            try:
                outputs += self._lose_frontend(peer.number)
            except CoreFailureError as failure:
                outputs += self._begin_anew(failure)
        for peer in self._workers.lost():
            if peer is self.worker:
                log.error("the worker is gone; its requests wait for the next one")
                self.worker = None
                try:
                    outputs += self._inputs.worker_lost(time.monotonic_ns())
                    self._tell_facts()
                except CoreFailureError as failure:
                    outputs += self._begin_anew(failure)
        return outputs

    def _lose_frontend(self, number: int) -> list[Output]:
        """Its requests end, but for those that may be resumed."""
        now, outputs = time.monotonic_ns(), list[Output]()
        going_on = self._resumption.frontend_lost(number, now)
        if not going_on:
            self._inputs.frontend_lost(number, now)
            return []
        for request in list(self.core.live_requests()):
            if request.frontend == number and request.header.handle not in going_on:
                outputs += self._inputs.abort(number, request.header.handle, now)
        return outputs

    def _drain(self, timeout_s: float) -> None:
        """Called again, it can only leave less time."""
        stop_at_ns = time.monotonic_ns() + int(timeout_s * 1e9)
        if self._stop_at_ns is not None:
            self._stop_at_ns = min(self._stop_at_ns, stop_at_ns)
            return
        log.info("draining: no new requests, %d to finish", self.core.num_requests)
        self._stop_at_ns = stop_at_ns
        self._inputs.drain()
        self._tell_facts()
        self._tell_supervisor("draining")

    def _drain_asked(self, peer: Peer, query_id: int, timeout_ms: int) -> None:
        configured_s = self.config.drain_timeout_s
        self._drain(min(configured_s, timeout_ms / 1000) if timeout_ms >= 0 else configured_s)
        assert self._stop_at_ns is not None
        left_ns = max(0, self._stop_at_ns - time.monotonic_ns())
        self._frontends.send(peer, DrainReply(query_id, self.core.num_requests, left_ns))

    def _is_done(self) -> bool:
        return self._stop_at_ns is not None and (self.core.is_idle or time.monotonic_ns() >= self._stop_at_ns)

    def _timeout_ms(self) -> int | None:
        """Until something is due by the clock alone; at least 1, so that nothing overdue makes the loop spin."""
        now, due = time.monotonic_ns(), []
        if self._reprobes:
            due.append(now + _REPROBE_MS * 1_000_000)
        if self._stop_at_ns is not None:
            due.append(self._stop_at_ns)
        if wakeup_ns := self.core.next_wakeup_ns:
            due.append(wakeup_ns)
        if until_ns := self._resumption.next_due_ns():
            due.append(until_ns)
        return max(1, -(-(min(due) - now) // 1_000_000)) if due else None

    # ---------------------------------------------------------------------------------------------------- our own faults

    def _check_when_idle(self) -> list[Output]:
        """Blocks, rows and requests must agree. A violation is said with its trace and does not end the service: nothing runs,
        so a new core costs the prefix cache only."""
        began = time.monotonic_ns()
        if self._checked_idle or not self.core.is_idle or began < self._check_after_ns:
            return []
        self._checked_idle = True
        if self._file is not None:
            self._file.flush()
        try:
            self.core.check_invariants()
        except AssertionError as error:
            log.exception("the core's invariants are violated")
            return self._begin_anew(error)
        took = time.monotonic_ns() - began
        if took > _QUICK_CHECK_NS:  # a large cache: one part in a hundred of the time at most, as somebody may come meanwhile
            self._check_after_ns = began + 100 * took
        return []

    def _begin_anew(self, failure: Exception) -> list[Output]:
        """The core has failed: what it did last is written down, its requests end with ERROR, and a new one goes on with the
        same worker, unless that is what it failed with."""
        if isinstance(failure, CoreFailureError):
            log.error("the core failed; %d requests are lost", self.core.num_requests, exc_info=failure.__cause__)
        self._dump(str(failure))
        now, facts = time.monotonic_ns(), self.core.facts
        outputs = self._resumption.core_failed(_last_words(self.core, now), now)
        self._inputs.renew()
        if self.worker is not None and facts is not None:
            try:
                return outputs + self._begin_epoch(facts)
            except CoreFailureError as again:
                log.error("no core can take this worker", exc_info=again.__cause__)
                self.worker = None
                self._inputs.renew()
        self._tell_facts()
        return outputs

    def _dump(self, why: str) -> None:
        """Writes the last minutes to a file, but not time and again."""
        now = time.monotonic_ns()
        if len(self._dumped_ns) >= _MOST_DUMPS or (self._dumped_ns and now < self._dumped_ns[-1] + _DUMP_EVERY_NS):
            return
        self._dumped_ns.append(now)
        folder = Path(self.config.dump_folder or tempfile.gettempdir())
        try:
            path = self._ring.dump(folder, self.config.core, why)
            log.error("what the core did in the last minutes is in %s; `carousel replay` reads it", path)
        except OSError as error:
            log.error("what the core did in the last minutes could not be written to %s: %s", folder, error.strerror)


def _last_words(core: Core, now: int) -> list[Output]:
    """For the readers of everything alive in a core that has failed. Asks it for as little as possible."""
    outputs, ended = core.take_outputs(), dict[int, list[OutputEnded]]()
    for request in core.live_requests():
        for sequence in request.sequences:
            if sequence.state is not State.ENDED:
                stats = sequence.stats(core.num_outputs(sequence), now)
                ended.setdefault(request.frontend, []).append(
                    OutputEnded(sequence.handle, EndReason.ERROR, stats, message=_OWN_FAULT)
                )
    return outputs + [Output(frontend, TokenBatch(TokenBatchHeader(-1, tuple(ends)))) for frontend, ends in ended.items()]


def _recording_file(config: EngineConfig) -> RecordingFile | None:
    if not config.record:
        return None
    log.info("recording to %s", config.record)
    return RecordingFile(Path(config.record), config.core, int(config.record_limit_mib * 2**20))


def main(config: EngineConfig) -> int:
    """The process `python -m scheduler engine`."""
    obey_the_supervisor()
    log_to_stderr("scheduler", config.log_level)
    Engine(config).run()
    return 0
