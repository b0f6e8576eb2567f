"""The core process: the loop around the core. Waits for messages, hands them to the core, sends what it says.

Blocks in one poll; no asyncio, no thread (but the one in which ZeroMQ asks whose key may come in), no spinning. Knows sockets,
the clock and signals; decides nothing. Whatever goes to the core goes through the recorder.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
import time
from dataclasses import replace
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
from scheduler.curve import CoreKeys
from scheduler.errors import StartError
from scheduler.journal import Fsync, Journal
from scheduler.journal_files import read
from scheduler.links import NOBODY, Peer, PeerSocket
from scheduler.logprobs import by_frontend
from scheduler.process import log_to_stderr, obey_the_supervisor
from scheduler.recorder import CoreFailureError, Recorded, RecordingFile, Ring
from scheduler.resumption import Key, Resumption
from scheduler.roster import Known, Roster, why_another, why_unfit
from scheduler.startup import limits
from scheduler.step_meter import StepMeter
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
    Heartbeat,
    ListQuery,
    LoadQuery,
    Logprobs,
    Message,
    MetricsQuery,
    OutputEnded,
    Refused,
    ReplaceQuery,
    ReplaceReply,
    RestoreRequest,
    ResumeQuery,
    Retired,
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
_JOURNAL_AGAIN_NS = 1_000_000_000  # when who was refused for the journal's sake may come again
_EPOCH_NS = 100_000_000  # no core that follows another one begins as soon after it
_OWN_FAULT = "the scheduler failed and began anew"


class Engine:
    """One core, its front ends and its worker."""

    def __init__(self, config: EngineConfig) -> None:
        if config.journal:  # the worker outlives a core, and what it says to the last one must not be taken for an answer
            core = replace(config.core, first_epoch=time.monotonic_ns() // _EPOCH_NS)
            config = msgspec.structs.replace(config, core=core)
        self.config = config
        self._ring = Ring()
        self._file = _recording_file(config)
        self._inputs = Recorded(Core(config.core), self._ring, *([self._file] if self._file else []))
        self.started_ns = time.monotonic_ns()
        self.worker: Peer | None = None
        self._context = zmq.Context()
        self._frontends = PeerSocket(self._context, config.frontend_endpoint)
        keys = CoreKeys.read(Path(config.worker_keys)) if config.worker_keys else None
        self._guard = keys.guard(self._context) if keys is not None else None
        self._workers = PeerSocket(self._context, config.worker_endpoint, keys)
        self._roster = Roster(round(config.worker_timeout_s * 1e9))
        self._handover: Known | None = None  # takes over once the plans in flight have returned
        self._asked_to_replace: tuple[Peer, int] | None = None  # the front end and its query
        self._heard_ns = 0  # when the worker's last result came
        self._watching: dict[int, Peer] = {}
        self._by_number: dict[int, Peer] = {}
        self._journal = _journal(config)
        forgotten = self._journal.forget if self._journal is not None else lambda key: None
        self._resumption = Resumption(config.core.max_unread_tokens, forgotten=forgotten)
        self._meter = StepMeter(config.core.max_batch_rows) if config.metrics else None
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
        if self.config.control_fd >= 0:
            poller.register(self.config.control_fd, zmq.POLLIN)
        self._restore()
        while not self._is_done():
            ready = dict(poller.poll(self._timeout_ms()))
            if self._wakeup.fileno() in ready:
                self._wakeup.recv(64)
                self._drain(self.config.drain_timeout_s)
            outputs = self._hear_frontends() + self._hear_workers()
            if self._frontends.monitor in ready or self._workers.monitor in ready:
                self._reprobes = _REPROBES
            if self.config.control_fd in ready:
                self._hear_supervisor()
            outputs += self._notice_losses()
            outputs += self._give_up_hanging()
            outputs += self._send_plans()
            self._deliver(outputs)
            self._deliver(self._look_after_detached())
            self._deliver(self._check_when_idle())
            if self._journal is not None:
                self._journal.tidy(self._snapshot)
        if self._journal is not None:  # what is cut off now is in it, for the next start
            self._journal.close()
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
        if self._guard is not None:
            self._guard.stop()
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
            case ReplaceQuery(query_id=query_id, device=device):
                self._replace_asked(peer, query_id, device)
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
        journal = self._journal if add.header.resume_window_ms else None
        if journal is not None and journal.refusal:
            self._frontends.send(peer, _not_journalled(add, journal.refusal))
            return
        header = msgspec.structs.replace(add.header, resume_state=b"") if add.header.resume_state else add.header
        refused = self._inputs.add(AddRequest(header, add.prompt, add.prefix_hashes), peer.number, now)
        if refused is not None:
            self._frontends.send(peer, refused)
        elif journal is not None and not journal.added(add, peer.number):
            self._inputs.abort(peer.number, header.handle, now)  # nobody has heard of it
            self._frontends.send(peer, _not_journalled(add, journal.refusal))
        else:
            self._resumption.added(add, peer.number)

    def _resume(self, peer: Peer, query: ResumeQuery, now: int) -> None:
        reply, displaced = self._resumption.resume(query, peer.number, self._live_tokens, now)
        self._frontends.send(peer, reply)
        if displaced is not None and (other := self._by_number.get(displaced[0])) is not None:
            self._frontends.send(other, displaced[1])
        self._credit_unread()  # before anything more comes: the reader has that to take

    def _live_tokens(self, key: Key) -> I32:
        return self.core.output_tokens(self.core.sequence(*key))

    def _snapshot(self, key: Key) -> RestoreRequest | None:
        return self._resumption.snapshot(key, self._live_tokens)

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
            case MetricsQuery(query_id=query_id) if self._meter is not None:
                return self._meter.reply(self.core, self._facts(), query_id)
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
        if outputs and self._journal is not None:
            self._journal.tokens(outputs)  # before anything of it leaves
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
            case WorkerHello():
                return self._hello(peer, message)
            case Heartbeat():
                known = self._roster.beat(message, time.monotonic_ns())
                return self._welcome_back(known) if known is not None else []
            case _ if peer is not self.worker:
                log.warning("peer %d is not the worker of this group: dropped %s", peer.number, type(message).__name__)
            case StepResult():
                return self._result(message)
            case Logprobs():
                return self._logprobs(message)
            case StepFailed(epoch=epoch) if epoch == self.core.epoch and self.core.connected:
                log.error("step %d failed: %.400s", message.step_id, message.message)
                return self._resync()
            case StepFailed():
                pass
            case _:
                log.warning("the worker sent %s, which is not for the core", type(message).__name__)
        return []

    def _hello(self, peer: Peer, hello: WorkerHello) -> list[Output]:
        """It computes if nobody does, takes over if it came for that, else stands by."""
        facts, now = hello.facts, time.monotonic_ns()
        if self._roster.get(peer) is not None:
            log.warning("peer %d said hello twice: dropped", peer.number)
            return []
        if why := why_unfit(facts):
            log.warning("dropped the hello of peer %d: %s", peer.number, why)
            return []
        other = self._roster.get(self.worker) if self.worker is not None else None
        if other is not None and (why := why_another(facts, other.facts) or self._why_too_small(hello)):
            log.error("worker (pid %d) can't join: %s", facts.pid, why)
            self._workers.send(peer, Retired(why))
            if hello.replaces:
                self._answer_replace(f"the new worker can't take over: {why}")
            return []
        known = self._roster.come(peer, hello, now)
        if other is None:
            return self._join(known)
        if hello.replaces:
            log.info("worker (pid %d) has loaded its model and takes over from pid %d", facts.pid, other.facts.pid)
            self._handover = known
        else:
            log.info("worker (pid %d) stands by: %s", facts.pid, facts.description)
        return []

    def _why_too_small(self, hello: WorkerHello) -> str:
        """Only whoever replaces must take all that is alive: one who stands by is better than none."""
        facts = hello.facts
        num_blocks = max((request.most_blocks(facts.block_size) for request in self.core.live_requests()), default=0)
        if hello.replaces and num_blocks > facts.num_blocks:
            return f"its KV cache has {facts.num_blocks} blocks, and a request needs {num_blocks}"
        return ""

    def _join(self, known: Known) -> list[Output]:
        log.info("worker (pid %d) has joined: %s", known.facts.pid, known.facts.description)
        self.worker = known.peer
        return self._begin_epoch(known.facts)

    def _welcome_back(self, known: Known) -> list[Output]:
        """It had been given up, and lives."""
        log.info("worker (pid %d) is heard of again", known.facts.pid)
        return self._join(known) if self.worker is None else []

    def _begin_epoch(self, facts: WorkerFacts) -> list[Output]:
        assert self.worker is not None
        outputs = self._inputs.worker_joined(facts, time.monotonic_ns())
        self._workers.send(self.worker, Welcome(self.core.config.group, self.core.epoch))
        self._tell_facts()
        if not self._ready_told:
            for line in limits(self.core):
                log.info(line)
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
        outputs = self._lose_core_worker()
        return outputs + self._begin_epoch(self.core.facts)

    def _result(self, result: StepResult) -> list[Output]:
        core, record = self.core, None
        if result.header.epoch == core.epoch and result.header.step_id <= core.returned_step:
            log.warning("dropped a second result of step %d", result.header.step_id)
            return []
        if self._watching:
            record = self._record_of(result)
        step, now = core.in_flight[0] if core.in_flight else None, time.monotonic_ns()
        try:
            outputs = self._inputs.apply(result, now)
        except ProtocolError as error:
            log.error("the worker's mirror is out of step: %s", error)
            self._dump(f"the worker's mirror is out of step: {error}")
            return self._resync()
        self._heard_ns = now
        if self._meter is not None and step is not None:
            self._meter.result(step, result, now)
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
        outputs: list[Output] = []
        try:
            if self._handover is not None:
                if self.core.in_flight:
                    return []  # the last plans of the worker that goes
                outputs = self._hand_over(self._handover)
            while (plan := self._inputs.plan(time.monotonic_ns())) is not None:
                assert self.worker is not None
                self._checked_idle = False
                self._workers.send(self.worker, plan)
                if self._meter is not None and plan.header.starts:
                    self._meter.planned(self.core, plan)
        except CoreFailureError as failure:
            return outputs + self._begin_anew(failure)
        return outputs + self.core.take_outputs()

    # ------------------------------------------------------------------------------------------ a change of the worker

    def _replace_asked(self, peer: Peer, query_id: int, device: str) -> None:
        busy = self._asked_to_replace is not None or self._handover is not None
        why = "a worker is being replaced already" if busy else "there is no worker to replace" if self.worker is None else ""
        why = "the server is draining" if self.core.draining else why
        if self.config.control_fd < 0:
            why = "workers are not started here: start one with --replaces"
        if why:
            self._frontends.send(peer, ReplaceReply(query_id, self.core.epoch, self._worker_pid(), why))
            return
        self._asked_to_replace = peer, query_id
        self._tell_supervisor(f"replace {device}")

    def _hand_over(self, known: Known) -> list[Output]:
        """Nothing is in flight: nobody is to blame, and nothing but keys and values is lost."""
        assert self.worker is not None
        before, pid = self.worker, self._worker_pid()
        self._handover, self.worker = None, known.peer
        outputs = self._begin_epoch(known.facts)
        log.info("worker (pid %d) computes in place of pid %d", known.facts.pid, pid)
        self._roster.go(before)
        self._tell_supervisor(f"replaced {pid} {known.facts.pid}")  # before it hears that it may go
        self._workers.send(before, Retired("another worker has taken its place"))
        self._answer_replace("")
        return outputs

    def _hear_supervisor(self) -> None:
        """Its only word: a new worker did not start."""
        if os.read(self.config.control_fd, 64):
            self._answer_replace("the new worker did not start: the server's log says why")

    def _answer_replace(self, error: str) -> None:
        if self._asked_to_replace is not None:
            peer, query_id = self._asked_to_replace
            self._asked_to_replace = None
            self._frontends.send(peer, ReplaceReply(query_id, self.core.epoch, self._worker_pid(), error))

    def _worker_pid(self) -> int:
        known = self._roster.get(self.worker) if self.worker is not None else None
        return known.facts.pid if known is not None else 0

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
            known = self._roster.get(peer)
            self._roster.go(peer)
            if known is not None:
                self._tell_supervisor(f"lost {known.facts.pid}")  # its process may be there still, and stand
            if known is not None and known is self._handover:
                self._handover = None
                self._answer_replace("the new worker is gone before it took over")
            if peer is self.worker:
                outputs += self._lose_worker("its connection is closed")
            elif known is not None and not known.is_silent:
                log.info("worker (pid %d), which did not compute, is gone", known.facts.pid)
        return outputs

    def _give_up_hanging(self) -> list[Output]:
        """Workers that are not heard of, or whose step does not move. Their processes are ended where they are ours."""
        now, outputs = time.monotonic_ns(), list[Output]()
        gone = self._roster.lost(now)
        known = self._roster.get(self.worker) if self.worker is not None else None
        if known is not None and not known.is_silent and 0 < self._step_due_ns() <= now:
            known.is_silent = True
            gone.append((known, f"a step takes longer than {self.config.step_timeout_s:g} s"))
        for known, why in gone:
            self._tell_supervisor(f"hangs {known.facts.pid}")
            if known is self._handover:
                self._handover = None
                self._answer_replace(f"the new worker hangs: {why}")
            if known.peer is self.worker:
                outputs += self._lose_worker(why)
            else:
                log.error("worker (pid %d), which does not compute, is given up: %s", known.facts.pid, why)
        return outputs

    def _step_due_ns(self) -> int:
        """When the step under way must have ended; 0: at any time."""
        if not self.config.step_timeout_s or not self.core.in_flight:
            return 0
        return max(self.core.in_flight[0].planned_ns, self._heard_ns) + round(self.config.step_timeout_s * 1e9)

    def _lose_worker(self, why: str) -> list[Output]:
        """Everything that ran waits again; whoever comes to replace it or stands by takes over at once."""
        self.worker = None
        following = self._handover or self._roster.next_standby()
        waits = "" if following is not None else "; its requests wait for the next one"
        log.error("the worker is lost, %s%s", why, waits)
        try:
            outputs = self._lose_core_worker()
            if following is None:
                self._tell_facts()
                return outputs
            outputs += self._join(following)
        except CoreFailureError as failure:
            return self._begin_anew(failure)
        if following is self._handover:
            self._handover = None
            self._tell_supervisor(f"replaced 0 {following.facts.pid}")
            self._answer_replace("")
        return outputs

    def _lose_core_worker(self) -> list[Output]:
        outputs = self._inputs.worker_lost(time.monotonic_ns())
        if groups := self.core.trials.groups:
            some = ", ".join(groups[0][:8])
            log.error("the same requests crashed it again: %d run by themselves now, %s", len(groups[0]), some)
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
        if (wakeup_ns := self.core.next_wakeup_ns) and self._handover is None:
            due.append(wakeup_ns)
        if look_ns := self._roster.next_look_ns(now):
            due.append(look_ns)
        if self._step_due_ns():
            due.append(self._step_due_ns())
        if until_ns := self._resumption.next_due_ns():
            due.append(until_ns)
        if self._journal is not None and (tidy_ns := self._journal.next_due_ns()):
            due.append(tidy_ns)
        return max(1, -(-(min(due) - now) // 1_000_000)) if due else None

    def _restore(self) -> None:
        """What the core before this one has left in the journal."""
        if self._journal is None:
            return
        now, config = time.monotonic_ns(), self.config
        found = read(Path(config.journal), config.journal_model, now, time.time_ns())
        for note in found.notes:
            log.log(logging.ERROR if found.damaged else logging.WARNING, note)
        going_on = [request for request in found.requests if self._is_restored(request, now)]
        for request in going_on:
            self._resumption.restored(request, NOBODY, now)
        self._journal.begin(going_on, NOBODY)
        if going_on:
            alive, num_tokens = self.core.num_requests, sum(len(request.tokens) for request in going_on)
            words = "restored %d requests that go on and %d that had ended, %d tokens"
            log.info(words, alive, len(going_on) - alive, num_tokens)

    def _is_restored(self, request: RestoreRequest, now: int) -> bool:
        header = request.header
        if None not in header.ended:
            return True  # the core need not know
        known = msgspec.structs.replace(header, add=msgspec.structs.replace(header.add, resume_state=b""))
        why = self._inputs.restore(replace(request, header=known), NOBODY, now)
        if why:
            log.warning("request %r can't go on: %s", header.add.request_id, why)
        return not why

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
        now, known = time.monotonic_ns(), self._roster.get(self.worker) if self.worker is not None else None
        outputs = self._resumption.core_failed(_last_words(self.core, now), now)
        self._inputs.renew()
        if known is not None:
            try:
                return outputs + self._begin_epoch(known.facts)
            except CoreFailureError as again:
                log.error("no core can take this worker", exc_info=again.__cause__)
                self._roster.go(known.peer)
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


def _not_journalled(add: AddRequest, why: str) -> Refused:
    words = f"{why}; a request without a resume window is served all the same"
    return Refused(add.header.handle, "RESOURCE_EXHAUSTED", words, "", _JOURNAL_AGAIN_NS, {"reason": "JOURNAL_FULL"})


def _journal(config: EngineConfig) -> Journal | None:
    if not config.journal:
        return None
    most = int(config.journal_limit_mib * 2**20)
    return Journal(Path(config.journal), config.journal_model, fsync=Fsync(config.journal_fsync), max_bytes=most)


def _recording_file(config: EngineConfig) -> RecordingFile | None:
    """The supervisor has made the file; where a core has written to it already, the next one goes beside it."""
    if not config.record:
        return None
    path, number = Path(config.record), 1
    while path.exists() and path.stat().st_size:
        number += 1
        path = Path(f"{config.record}.{number}")
    log.info("recording to %s", path)
    return RecordingFile(path, config.core, int(config.record_limit_mib * 2**20))


def main(config: EngineConfig) -> int:
    """The process `python -m scheduler engine`."""
    obey_the_supervisor()
    log_to_stderr("scheduler", config.log_level, config.log_format)
    try:
        Engine(config).run()
    except StartError as error:
        log.error("%s", error)
        return 1
    return 0
