"""The core process: the loop around the cores. Waits for messages, hands them to the cores, sends what these say.

Blocks in one poll; no asyncio, no thread (but the one in which ZeroMQ asks whose key may come in), no spinning. Knows sockets,
the clock and signals; decides nothing. Which group has a request, or gets a worker, is groups.py's.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import msgspec
import zmq

from scheduler.config import EngineConfig
from scheduler.core import Output
from scheduler.core.explain import explain
from scheduler.core.observe import block_tables
from scheduler.curve import CoreKeys
from scheduler.errors import StartError
from scheduler.group import OWN_FAULT, Group
from scheduler.groups import Groups
from scheduler.journal import Fsync, Journal
from scheduler.journal_files import read
from scheduler.links import NOBODY, Peer, PeerSocket
from scheduler.process import log_to_stderr, obey_the_supervisor
from scheduler.recorder import CoreFailureError
from scheduler.resumption import Key, Resumption
from scheduler.roster import Known, Roster, why_another, why_unfit
from scheduler.startup import limits
from scheduler.totals import listed, total_load, total_metrics
from wire import (
    AbortRequest,
    AddRequest,
    BlockTablesQuery,
    CancelQuery,
    CancelReply,
    Credit,
    DrainQuery,
    DrainReply,
    ExplainQuery,
    ExplainReply,
    Facts,
    FrontendHello,
    Heartbeat,
    ListQuery,
    LoadQuery,
    Message,
    MetricsQuery,
    Refused,
    ReplaceQuery,
    ReplaceReply,
    RestoreRequest,
    ResumeQuery,
    Retired,
    SetPolicyQuery,
    SetPolicyReply,
    StepRecord,
    TruncateRequest,
    WatchSteps,
    WorkerHello,
)
from wire.messages import I32

log = logging.getLogger(__name__)

_REPROBE_MS = 50  # a closed connection can show a moment before its peer is known to be gone
_REPROBES = 20
_FRONTENDS_LEAVE_S = 2.0  # so long the front ends may take to read what they were told last
_JOURNAL_AGAIN_NS = 1_000_000_000  # when who was refused for the journal's sake may come again
_EPOCH_NS = 100_000_000  # no core that follows another one begins as soon after it


class Engine:
    """The groups, the front ends and the workers."""

    def __init__(self, config: EngineConfig) -> None:
        if config.journal:  # the worker outlives a core, and what it says to the last one must not be taken for an answer
            core = replace(config.core, first_epoch=time.monotonic_ns() // _EPOCH_NS)
            config = msgspec.structs.replace(config, core=core)
        self.config = config
        self.started_ns = time.monotonic_ns()
        self._context = zmq.Context()
        self._frontends = PeerSocket(self._context, config.frontend_endpoint)
        keys = CoreKeys.read(Path(config.worker_keys)) if config.worker_keys else None
        self._guard = keys.guard(self._context) if keys is not None else None
        self._workers = PeerSocket(self._context, config.worker_endpoint, keys)
        self._roster = Roster(round(config.worker_timeout_s * 1e9))
        self._asked_to_replace: tuple[Peer, int, Group] | None = None  # the front end, its query, whose worker
        self._watching: dict[int, Peer] = {}
        self._by_number: dict[int, Peer] = {}
        self._journal = _journal(config)
        forgotten = self._journal.forget if self._journal is not None else lambda key: None
        self._resumption = Resumption(config.core.max_unread_tokens, forgotten=forgotten)
        self._groups = Groups(config, self, self._workers, self._roster, self._resumption, self.started_ns)
        self._ready_told = False
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
            self._groups.free_suspects()
            outputs += self._send_plans()
            self._deliver(outputs)
            self._deliver(self._look_after_detached())
            self._deliver(self._check_when_idle())
            if self._journal is not None:
                self._journal.tidy(self._snapshot)
        if self._journal is not None:  # what is cut off now is in it, for the next start
            self._journal.close()
        now, why = time.monotonic_ns(), "the server is shutting down"
        self._deliver(self._groups.each(lambda group: group.inputs.drop_all(why, now)))
        for group in self._groups:
            group.close()
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
                        self._frontends.send(peer, Refused(message.header.handle, "INTERNAL", OWN_FAULT))
                    outputs += self._groups.begin_anew(failure)
        return outputs

    def _from_frontend(self, peer: Peer, message: Message) -> list[Output]:
        now = time.monotonic_ns()
        match message:
            case AddRequest():
                self._add(peer, message, now)
            case Credit(handles=handles, num_tokens=num_tokens):
                outputs: list[Output] = []
                for frontend, (mine, counts) in self._resumption.core_credits(peer.number, handles, num_tokens).items():
                    outputs += self._groups.credit(frontend, mine, counts, now)
                return outputs
            case AbortRequest(handle=handle):
                key = self._resumption.core_key(peer.number, handle)
                if key is not None and not self._resumption.detach(key, now):
                    return self._groups.of(key).inputs.abort(*key, now)
            case TruncateRequest(handle=handle, num_output_tokens=count):
                key = self._resumption.core_key(peer.number, handle)
                return self._groups.of(key).inputs.truncate(*key, count, now) if key is not None else []
            case ResumeQuery():
                return self._resume(peer, message, now)
            case CancelQuery(query_id=query_id, request_id=request_id):
                outcome, outputs = self._groups.that_knows(request_id).inputs.cancel(request_id, now)
                self._frontends.send(peer, CancelReply(query_id, outcome))
                return outputs
            case SetPolicyQuery(query_id=query_id, policy=policy):
                return self._set_policy(peer, query_id, policy)
            case DrainQuery(query_id=query_id, timeout_ms=timeout_ms):
                self._drain_asked(peer, query_id, timeout_ms)
            case ReplaceQuery():
                self._replace_asked(peer, message)
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
        refused = self._groups.add(AddRequest(header, add.prompt, add.prefix_hashes), peer.number, now)
        if refused is not None:
            self._frontends.send(peer, refused)
        elif journal is not None and not journal.added(add, peer.number):
            key = peer.number, header.handle
            self._groups.of(key).inputs.abort(*key, now)  # nobody has heard of it
            self._frontends.send(peer, _not_journalled(add, journal.refusal))
        else:
            self._resumption.added(add, peer.number)

    def _resume(self, peer: Peer, query: ResumeQuery, now: int) -> list[Output]:
        reply, displaced = self._resumption.resume(query, peer.number, self._live_tokens, now)
        self._frontends.send(peer, reply)
        if displaced is not None and (other := self._by_number.get(displaced[0])) is not None:
            self._frontends.send(other, displaced[1])
        return self._credit_unread()[1]  # before anything more comes: the reader has that to take

    def _live_tokens(self, key: Key) -> I32:
        core = self._groups.of(key).core
        return core.output_tokens(core.sequence(*key))

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
        cores = self._groups.cores
        match message:
            case LoadQuery(query_id=query_id):
                return total_load(cores, query_id)
            case MetricsQuery(query_id=query_id) if self.config.metrics:
                facts = self._facts()
                replies = [group.meter.reply(group.core, facts, query_id) for group in self._groups if group.meter is not None]
                return total_metrics(replies, total_load(cores, query_id))
            case ExplainQuery(query_id=query_id, request_id=request_id):
                core = self._groups.that_knows(request_id).core
                return ExplainReply(query_id, explain(core, request_id, time.monotonic_ns()))
            case ListQuery(query_id=query_id, after=after, limit=limit):
                return listed(cores, query_id, after, limit)
            case BlockTablesQuery(query_id=query_id, group=number):
                return block_tables(cores[number if 0 <= number < len(cores) else 0], query_id)
        return None

    def _set_policy(self, peer: Peer, query_id: int, name: str) -> list[Output]:
        errors: list[str] = []
        outputs = self._groups.each(lambda group: errors.append(group.inputs.set_policy(name, time.monotonic_ns())))
        error = next(filter(None, errors), "")
        self._frontends.send(peer, SetPolicyReply(query_id, self._groups.first.core.policy.name, error))
        if not error:
            log.info("the policy is %s now", name)
            self.facts_changed()
        return outputs

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
        self.tell_frontend(output.frontend, output.batch)

    def tell_frontend(self, number: int, message: Message) -> None:
        peer = self._by_number.get(number)
        if peer is not None:
            self._frontends.send(peer, message)

    @property
    def is_watched(self) -> bool:
        return bool(self._watching)

    def tell_watchers(self, record: StepRecord) -> None:
        for peer in self._watching.values():
            self._frontends.send(peer, record)

    def _look_after_detached(self) -> list[Output]:
        """What came for nobody is taken, and whoever nobody has resumed in time ends."""
        news, outputs = self._credit_unread()
        try:
            for key in self._resumption.expired(time.monotonic_ns()):
                outputs += self._groups.of(key).inputs.abort(*key, time.monotonic_ns())
                news = True
        except CoreFailureError as failure:
            return outputs + self._groups.begin_anew(failure)
        return outputs + self._send_plans() if news else outputs

    def _credit_unread(self) -> tuple[bool, list[Output]]:
        """For readers that were not there, or not until now. (Whether there was anything to say, what came of it)."""
        credits, outputs = self._resumption.take_credits(), list[Output]()
        for frontend, (handles, num_tokens) in credits.items():
            outputs += self._groups.credit(frontend, handles, num_tokens, time.monotonic_ns())
        return bool(credits), outputs

    def _facts(self) -> Facts:
        connected = [group.core for group in self._groups if group.core.connected]
        core = connected[0] if connected else self._groups.first.core
        reason = "the server is draining" if core.draining else "" if connected else "waiting for a worker with its model"
        return Facts(
            version=version("carousel-serve"),
            policy=core.policy.name,
            started_ns=self.started_ns,
            ready=bool(connected) and not core.draining,
            draining=core.draining,
            reason=reason,
            max_step_tokens=core.token_budget,
            max_batch_rows=core.rows.max_rows,
            max_queue_requests=core.config.max_queue_requests,
            max_queue_tokens=core.config.max_queue_tokens,
            workers=tuple((each.config.group, each.epoch, each.facts) for each in connected if each.facts is not None),
            max_unread_tokens=core.config.max_unread_tokens,
        )

    def facts_changed(self) -> None:
        facts = self._facts()
        for peer in self._by_number.values():
            self._frontends.send(peer, facts)

    # --------------------------------------------------------------------------------------------------- workers

    def _hear_workers(self) -> list[Output]:
        outputs: list[Output] = []
        for peer, message in self._workers.receive():
            try:
                outputs += self._from_worker(peer, message)
            except CoreFailureError as failure:
                outputs += self._groups.begin_anew(failure)
        return outputs

    def _from_worker(self, peer: Peer, message: Message | None) -> list[Output]:
        match message:
            case WorkerHello():
                return self._hello(peer, message)
            case Heartbeat():
                known = self._roster.beat(message, time.monotonic_ns())
                return self._welcome_back(known) if known is not None else []
        if (group := self._computing_for(peer)) is not None:
            return group.hear(message)
        if message is not None:
            log.warning("peer %d is not the worker of a group: dropped %s", peer.number, type(message).__name__)
        return []

    def _hello(self, peer: Peer, hello: WorkerHello) -> list[Output]:
        """It computes for a group that has no worker, else for a new one; else it takes over if it came for that, or stands
        by."""
        facts, now = hello.facts, time.monotonic_ns()
        if self._roster.get(peer) is not None:
            log.warning("peer %d said hello twice: dropped", peer.number)
            return []
        if why := why_unfit(facts):
            log.warning("dropped the hello of peer %d: %s", peer.number, why)
            return []
        served = next((group.known for group in self._groups if group.known is not None), None)
        replaced = self._to_be_replaced() if hello.replaces else None
        why = why_another(facts, served.facts) if served is not None else ""
        if not why and replaced is not None:  # only this one must take all that is alive
            why = replaced.why_too_small(facts)
        if why:
            log.error("worker (pid %d) can't join: %s", facts.pid, why)
            self._workers.send(peer, Retired(why))
            if hello.replaces:
                self._answer_replace(f"the new worker can't take over: {why}")
            return []
        known = self._roster.come(peer, hello, now)
        if replaced is None:
            return self._assign(known)
        log.info("worker (pid %d) has loaded its model and takes over from pid %d", facts.pid, replaced.worker_pid)
        known.group, replaced.handover = replaced.number, known
        return []

    def _to_be_replaced(self) -> Group | None:
        """The group whose worker somebody asked to replace, else the first that has one."""
        if self._asked_to_replace is not None:
            asked = self._asked_to_replace[2]
            return asked if asked.worker is not None else None
        return next((group for group in self._groups if group.worker is not None), None)

    def _assign(self, known: Known) -> list[Output]:
        """To whom a worker is of most use."""
        group = self._groups.in_need(known)
        if group is not None:
            return self._groups.join(group, known)
        log.info("worker (pid %d) stands by: %s", known.facts.pid, known.facts.description)
        return []

    def _welcome_back(self, known: Known) -> list[Output]:
        """It had been given up, and lives."""
        log.info("worker (pid %d) is heard of again", known.facts.pid)
        return self._groups.join(group, known) if (group := self._groups.in_need(known)) is not None else []

    def epoch_began(self, group: Group) -> None:
        self.facts_changed()
        if not self._ready_told:
            for line in limits(group.core):
                log.info(line)
            assert group.core.facts is not None
            self._warn_of_quotas(group.core.facts.num_blocks)
            self._tell_supervisor("ready")
            self._ready_told = True

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

    def _send_plans(self) -> list[Output]:
        """As many as the pipelines take. Returns what the clock has ended."""
        return self._groups.each(self._send_plans_of)

    def _send_plans_of(self, group: Group) -> list[Output]:
        outputs: list[Output] = []
        if group.handover is not None or group.makes_way:
            if group.core.in_flight:
                return []  # the last plans of the worker that goes, or of the epoch
            outputs = self._groups.make_way(group) if group.handover is None else self._hand_over(group, group.handover)
        try:
            return outputs + group.send_plans()
        except CoreFailureError as failure:
            return outputs + self._groups.begin_anew(failure)

    # ------------------------------------------------------------------------------------------ a change of the worker

    def _replace_asked(self, peer: Peer, query: ReplaceQuery) -> None:
        query_id = query.query_id
        computing = (group for group in self._groups if group.worker is not None)
        group = next((group for group in computing if query.group in (group.number, -1)), None)
        busy = self._asked_to_replace is not None or any(group.handover is not None for group in self._groups)
        why = "a worker is being replaced already" if busy else "there is no worker to replace" if group is None else ""
        why = "the server is draining" if self._groups.first.core.draining else why
        if self.config.control_fd < 0:
            why = "workers are not started here: start one with --replaces"
        if why or group is None:
            told = group or self._groups.first
            self._frontends.send(peer, ReplaceReply(query_id, told.core.epoch, told.worker_pid, why))
            return
        self._asked_to_replace = peer, query_id, group
        self._tell_supervisor(f"replace {query.device}")

    def _hand_over(self, group: Group, known: Known) -> list[Output]:
        before, pid = group.worker, group.worker_pid
        assert before is not None
        outputs = group.hand_over(known)
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
            peer, query_id, group = self._asked_to_replace
            self._asked_to_replace = None
            self._frontends.send(peer, ReplaceReply(query_id, group.core.epoch, group.worker_pid, error))

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
            outputs += self._lose_frontend(peer.number)
        for peer in self._workers.lost():
            known, group = self._roster.get(peer), self._computing_for(peer)
            self._roster.go(peer)
            if known is not None:
                self._tell_supervisor(f"lost {known.facts.pid}")  # its process may be there still, and stand
                self._forget_handover(known, "the new worker is gone before it took over")
            if group is not None:
                outputs += self._lose_worker(group, "its connection is closed")
            elif known is not None and not known.is_silent:
                log.info("worker (pid %d), which did not compute, is gone", known.facts.pid)
        return outputs

    def _computing_for(self, peer: Peer) -> Group | None:
        return next((group for group in self._groups if group.worker is peer), None)

    def _forget_handover(self, known: Known, why: str) -> None:
        for group in self._groups:
            if group.handover is known:
                group.handover = None
                self._answer_replace(why)

    def _give_up_hanging(self) -> list[Output]:
        """Workers that are not heard of, or whose step does not move. Their processes are ended where they are ours."""
        now, outputs = time.monotonic_ns(), list[Output]()
        gone = self._roster.lost(now)
        for group in self._groups:
            known = group.known
            if known is not None and not known.is_silent and 0 < group.step_due_ns <= now:
                known.is_silent = True
                gone.append((known, f"a step takes longer than {self.config.step_timeout_s:g} s"))
        for known, why in gone:
            self._tell_supervisor(f"hangs {known.facts.pid}")
            self._forget_handover(known, f"the new worker hangs: {why}")
            if (losing := self._computing_for(known.peer)) is not None:
                outputs += self._lose_worker(losing, why)
            else:
                log.error("worker (pid %d), which does not compute, is given up: %s", known.facts.pid, why)
        return outputs

    def _lose_worker(self, group: Group, why: str) -> list[Output]:
        """Whoever comes to replace it or stands by takes over at once; else its requests go to the groups that have one."""
        following = group.handover or self._roster.next_standby()
        others = any(other.worker is not None for other in self._groups if other is not group)
        waits = "its requests go to other groups" if others else "its requests wait for the next one"
        log.error("the worker%s is lost, %s%s", self._groups.words(group), why, "" if following is not None else f"; {waits}")
        outputs: list[Output] = []
        try:
            outputs += group.lose_worker()
            if following is None:
                outputs += self._groups.move_away(group)
                self.facts_changed()
                return outputs
            outputs += self._groups.join(group, following)
        except CoreFailureError as failure:
            return outputs + self._groups.begin_anew(failure)
        if following is group.handover:
            group.handover = None
            self._tell_supervisor(f"replaced 0 {following.facts.pid}")
            self._answer_replace("")
        return outputs

    def _lose_frontend(self, number: int) -> list[Output]:
        """Its requests end, but for those that may be resumed."""
        now = time.monotonic_ns()
        going_on = self._resumption.frontend_lost(number, now)

        def lose(group: Group) -> list[Output]:
            outputs: list[Output] = []
            if not going_on:
                group.inputs.frontend_lost(number, now)
                return outputs
            for request in list(group.core.live_requests()):
                if request.frontend == number and request.header.handle not in going_on:
                    outputs += group.inputs.abort(number, request.header.handle, now)
            return outputs

        return self._groups.each(lose)

    def _drain(self, timeout_s: float) -> None:
        """Called again, it can only leave less time."""
        stop_at_ns = time.monotonic_ns() + int(timeout_s * 1e9)
        if self._stop_at_ns is not None:
            self._stop_at_ns = min(self._stop_at_ns, stop_at_ns)
            return
        log.info("draining: no new requests, %d to finish", self._groups.num_requests)
        self._stop_at_ns = stop_at_ns
        for group in self._groups:
            group.inputs.drain()
        self.facts_changed()
        self._tell_supervisor("draining")

    def _drain_asked(self, peer: Peer, query_id: int, timeout_ms: int) -> None:
        configured_s = self.config.drain_timeout_s
        self._drain(min(configured_s, timeout_ms / 1000) if timeout_ms >= 0 else configured_s)
        assert self._stop_at_ns is not None
        left_ns = max(0, self._stop_at_ns - time.monotonic_ns())
        self._frontends.send(peer, DrainReply(query_id, self._groups.num_requests, left_ns))

    def _is_done(self) -> bool:
        if self._stop_at_ns is None:
            return False
        return all(group.core.is_idle for group in self._groups) or time.monotonic_ns() >= self._stop_at_ns

    def _timeout_ms(self) -> int | None:
        """Until something is due by the clock alone; at least 1, so that nothing overdue makes the loop spin."""
        now, due = time.monotonic_ns(), []
        if self._reprobes:
            due.append(now + _REPROBE_MS * 1_000_000)
        if self._stop_at_ns is not None:
            due.append(self._stop_at_ns)
        for group in self._groups:
            due += [at_ns for at_ns in (group.wakeup_ns, group.step_due_ns) if at_ns]
        if suspects_ns := self._groups.suspects_due_ns():
            due.append(suspects_ns)
        if look_ns := self._roster.next_look_ns(now):
            due.append(look_ns)
        if until_ns := self._resumption.next_due_ns():
            due.append(until_ns)
        if self._journal is not None and (tidy_ns := self._journal.next_due_ns()):
            due.append(tidy_ns)
        return max(1, -(-(min(due) - now) // 1_000_000)) if due else None

    def _restore(self) -> None:
        """What the core before this one has left in the journal. It waits in the first group for the first worker."""
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
            alive, num_tokens = self._groups.num_requests, sum(len(request.tokens) for request in going_on)
            words = "restored %d requests that go on and %d that had ended, %d tokens"
            log.info(words, alive, len(going_on) - alive, num_tokens)

    def _is_restored(self, request: RestoreRequest, now: int) -> bool:
        header = request.header
        if None not in header.ended:
            return True  # the core need not know
        known = msgspec.structs.replace(header, add=msgspec.structs.replace(header.add, resume_state=b""))
        why = self._groups.first.inputs.restore(replace(request, header=known), NOBODY, now)
        if why:
            log.warning("request %r can't go on: %s", header.add.request_id, why)
        return not why

    # ---------------------------------------------------------------------------------------------------- our own faults

    def _check_when_idle(self) -> list[Output]:
        """Blocks, rows and requests must agree. A violation is said with its trace and does not end the service: nothing runs,
        so a new core costs the prefix cache only."""
        outputs: list[Output] = []
        for group in self._groups:
            if not group.is_sound():
                outputs += self._groups.replace_core(group)
        return outputs


def _not_journalled(add: AddRequest, why: str) -> Refused:
    words = f"{why}; a request without a resume window is served all the same"
    return Refused(add.header.handle, "RESOURCE_EXHAUSTED", words, "", _JOURNAL_AGAIN_NS, {"reason": "JOURNAL_FULL"})


def _journal(config: EngineConfig) -> Journal | None:
    if not config.journal:
        return None
    most = int(config.journal_limit_mib * 2**20)
    return Journal(Path(config.journal), config.journal_model, fsync=Fsync(config.journal_fsync), max_bytes=most)


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
