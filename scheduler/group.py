"""One worker group beside its core: the worker that computes its plans, what becomes of results, losses and failures, and the
recorder in front of the core.

Knows one core, the workers' socket and the clock; nothing of front ends, of the journal and of the other groups but what
`Around` says.
"""

from __future__ import annotations

import logging
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import msgspec

from scheduler.config import EngineConfig
from scheduler.core import Core, Output
from scheduler.core.arrival import fits
from scheduler.core.core import ProtocolError
from scheduler.core.observe import step_record
from scheduler.core.placement import GroupLoad, load_of
from scheduler.core.request import Request, State
from scheduler.links import Peer, PeerSocket
from scheduler.logprobs import by_frontend
from scheduler.recorder import CoreFailureError, Recorded, RecordingFile, Ring
from scheduler.roster import STANDS_BY, Known, Roster
from scheduler.step_meter import StepMeter
from wire import (
    AddRequest,
    EndReason,
    Logprobs,
    Message,
    OutputEnded,
    StepFailed,
    StepRecord,
    StepResult,
    TokenBatch,
    TokenBatchHeader,
    Welcome,
    WorkerFacts,
)

log = logging.getLogger(__name__)

_QUICK_CHECK_NS = 2_000_000
_MOST_DUMPS = 16  # files of the ring that one group writes …
_DUMP_EVERY_NS = 60 * 1_000_000_000  # … at least so far apart
OWN_FAULT = "the scheduler failed and began anew"


class Around(Protocol):
    """The process around a group."""

    def epoch_began(self, group: Group) -> None:
        """The group's worker is welcome: whoever wants to know who computes is to be told."""

    def facts_changed(self) -> None:
        """The same, when a group has lost its worker."""

    def tell_frontend(self, number: int, message: Message) -> None:
        """Does nothing when it is gone."""

    @property
    def is_watched(self) -> bool:
        """Whether somebody wants records of steps."""

    def tell_watchers(self, record: StepRecord) -> None: ...


class Group:
    """One core, and the worker that computes for it; None while there is none."""

    def __init__(self, config: EngineConfig, around: Around, workers: PeerSocket, roster: Roster, started_ns: int) -> None:
        """config: its core's says the group's number."""
        self.config = config
        self.number = config.core.group
        self.started_ns = started_ns
        self._around, self._workers, self._roster = around, workers, roster
        self._ring = Ring()
        self._file = _recording_file(config)
        self.inputs = Recorded(Core(config.core), self._ring, *([self._file] if self._file else []))
        self.worker: Peer | None = None
        self.handover: Known | None = None  # takes over once the plans in flight have returned
        self.makes_way = False  # begins a new epoch once the plans in flight have returned, for requests to be tried alone
        self.lost_ns = 0  # when it lost its worker
        self._heard_ns = 0  # when the worker's last result came
        self.meter = StepMeter(config.core.max_batch_rows) if config.metrics else None
        self._checked_idle = True
        self._check_after_ns = 0
        self._dumped_ns: list[int] = []  # when the ring was written

    @property
    def core(self) -> Core:
        """To be asked; its verbs are called through the recorder."""
        return self.inputs.core

    @property
    def known(self) -> Known | None:
        """Its worker."""
        return self._roster.get(self.worker) if self.worker is not None else None

    @property
    def worker_pid(self) -> int:
        """0: there is none."""
        known = self.known
        return known.facts.pid if known is not None else 0

    @property
    def step_due_ns(self) -> int:
        """When the step under way must have ended; 0: at any time."""
        if not self.config.step_timeout_s or not self.core.in_flight:
            return 0
        return max(self.core.in_flight[0].planned_ns, self._heard_ns) + round(self.config.step_timeout_s * 1e9)

    @property
    def wakeup_ns(self) -> int:
        """When `send_plans` is to be called by the clock alone; 0: never."""
        return 0 if self.handover is not None or self.makes_way else self.core.next_wakeup_ns

    def knows(self, request_id: str) -> bool:
        """Whether such a request is alive here."""
        request = self.core.request(request_id)
        return request is not None and request.num_live > 0

    def load_for_new(self, add: AddRequest) -> GroupLoad:
        core, header = self.core, add.header
        digests = add.prefix_hashes.tobytes() if header.hash_block_size == core.kv.block_size else b""
        return load_of(core, len(add.prompt), digests, fits(core, len(add.prompt), header.max_tokens))

    def load_for_moved(self, request: Request, block_size: int) -> GroupLoad:
        """Of a request of another core. block_size: of its digests."""
        core, num_outputs = self.core, num_known_outputs(request)
        digests = request.digests if block_size == core.kv.block_size else b""
        has_room = fits(core, request.num_prompt_tokens, request.header.max_tokens, num_outputs)
        return load_of(core, request.num_prompt_tokens + num_outputs, digests, has_room)

    # ------------------------------------------------------------------------------------------------------ its worker

    def join(self, known: Known, of_group: str) -> list[Output]:
        """of_group: words for the log."""
        log.info("worker (pid %d)%s has joined: %s", known.facts.pid, of_group, known.facts.description)
        self._take(known)
        return self.begin_epoch(known.facts)

    def _take(self, known: Known) -> None:
        known.group, self.worker, self.makes_way = self.number, known.peer, False

    def begin_epoch(self, facts: WorkerFacts) -> list[Output]:
        assert self.worker is not None
        outputs = self.inputs.worker_joined(facts, time.monotonic_ns())
        self._workers.send(self.worker, Welcome(self.number, self.core.epoch))
        self._around.epoch_began(self)
        return outputs

    def hand_over(self, known: Known) -> list[Output]:
        """Nothing is in flight: nobody is to blame, and nothing but keys and values is lost. The worker before it does not hear
        of it yet."""
        pid = self.worker_pid
        self.handover = None
        self._take(known)
        outputs = self.begin_epoch(known.facts)
        log.info("worker (pid %d) computes in place of pid %d", known.facts.pid, pid)
        return outputs

    def lose_worker(self) -> list[Output]:
        """Everything that ran waits again."""
        if (known := self.known) is not None:
            known.group = STANDS_BY
        self.worker, self.makes_way, self.lost_ns = None, False, time.monotonic_ns()
        return self._lose_core_worker()

    def _lose_core_worker(self) -> list[Output]:
        outputs = self.inputs.worker_lost(time.monotonic_ns())
        if groups := self.core.trials.groups:
            some = ", ".join(groups[0][:8])
            log.error("the same requests crashed it again: %d run by themselves now, %s", len(groups[0]), some)
        return outputs

    def why_too_small(self, facts: WorkerFacts) -> str:
        """Why a worker can't take all that is alive here; empty: it can."""
        num_blocks = max((request.most_blocks(facts.block_size) for request in self.core.live_requests()), default=0)
        if num_blocks > facts.num_blocks:
            return f"its KV cache has {facts.num_blocks} blocks, and a request needs {num_blocks}"
        return ""

    # ------------------------------------------------------------------------------------------------- plans and results

    def send_plans(self) -> list[Output]:
        """As many as the pipeline takes. Returns what the clock has ended."""
        while (plan := self.inputs.plan(time.monotonic_ns())) is not None:
            assert self.worker is not None
            self._checked_idle = False
            self._workers.send(self.worker, plan)
            if self.meter is not None and plan.header.starts:
                self.meter.planned(self.core, plan)
        return self.core.take_outputs()

    def hear(self, message: Message | None) -> list[Output]:
        """From its worker. None: what can't be read; it may have been the result that the plans in flight wait for."""
        match message:
            case None:
                return self._resync() if self.core.in_flight else []
            case StepResult():
                return self._result(message)
            case Logprobs():
                return self._logprobs(message)
            case StepFailed(group=group, epoch=epoch):
                if (group, epoch) == (self.number, self.core.epoch) and self.core.connected:
                    log.error("step %d failed: %.400s", message.step_id, message.message)
                    return self._resync()
            case _:
                log.warning("the worker sent %s, which is not for the core", type(message).__name__)
        return []

    def _resync(self) -> list[Output]:
        """The worker's mirror is void: everything that ran waits again, and a new epoch begins with the same worker."""
        assert self.core.facts is not None
        outputs = self._lose_core_worker()
        return outputs + self.begin_epoch(self.core.facts)

    def _result(self, result: StepResult) -> list[Output]:
        core, header, record = self.core, result.header, None
        if header.group != self.number:
            log.warning("dropped a result of group %d, for which this worker does not compute any more", header.group)
            return []
        if header.epoch == core.epoch and header.step_id <= core.returned_step:
            log.warning("dropped a second result of step %d", header.step_id)
            return []
        if self._around.is_watched:
            record = self._record_of(result)
        step, now = core.in_flight[0] if core.in_flight else None, time.monotonic_ns()
        try:
            outputs = self.inputs.apply(result, now)
        except ProtocolError as error:
            log.error("the worker's mirror is out of step: %s", error)
            self.dump(f"the worker's mirror is out of step: {error}")
            return self._resync()
        self._heard_ns = now
        if self.meter is not None and step is not None:
            self.meter.result(step, result, now)
        leaves, core.leaves = core.leaves, []
        if record is not None:
            self._around.tell_watchers(msgspec.structs.replace(record, leaves=tuple(leaves)))
        return outputs

    def _record_of(self, result: StepResult) -> StepRecord | None:
        """Before the result is applied; who leaves is added afterwards."""
        core = self.core
        if not core.in_flight or core.in_flight[0].step_id != result.header.step_id:
            return None
        return step_record(core, core.in_flight[0], self.started_ns, result.header.duration_ns)

    def _logprobs(self, message: Logprobs) -> list[Output]:
        """They go out before the tokens of their step do."""
        core, header = self.core, message.header
        if (header.group, header.epoch) != (self.number, core.epoch) or not core.in_flight:
            return []
        try:
            if header.step_id != core.in_flight[0].step_id:
                raise ProtocolError(f"log-probabilities of step {header.step_id}, which was not the next one in flight")
            told = by_frontend(message, core.reader, core.rows.max_rows)
        except ProtocolError as error:
            log.error("the worker's mirror is out of step: %s", error)
            return self._resync()
        for frontend, part in told.items():
            self._around.tell_frontend(frontend, part)
        return []

    # ---------------------------------------------------------------------------------------------------- our own faults

    def is_sound(self) -> bool:
        """Once it is idle: whether blocks, rows and requests agree. False: the violation has been said with its trace."""
        began = time.monotonic_ns()
        if self._checked_idle or not self.core.is_idle or began < self._check_after_ns:
            return True
        self._checked_idle = True
        if self._file is not None:
            self._file.flush()
        try:
            self.core.check_invariants()
        except AssertionError as error:
            log.exception("the core's invariants are violated")
            self.dump(str(error))
            return False
        took = time.monotonic_ns() - began
        if took > _QUICK_CHECK_NS:  # a large cache: one part in a hundred of the time at most, as somebody may come meanwhile
            self._check_after_ns = began + 100 * took
        return True

    def renew(self) -> list[Output]:
        """A new core goes on with the same worker, unless that is what the old one failed with."""
        known = self.known
        self.inputs.renew()
        if known is not None:
            try:
                return self.begin_epoch(known.facts)
            except CoreFailureError as again:
                log.error("no core can take this worker", exc_info=again.__cause__)
                self._roster.go(known.peer)
                self.worker = None
                self.inputs.renew()
        return []

    def last_words(self, now: int) -> list[Output]:
        """For the readers of everything alive in a core that has failed. Asks it for as little as possible."""
        core = self.core
        outputs, ended = core.take_outputs(), dict[int, list[OutputEnded]]()
        for request in core.live_requests():
            for sequence in request.sequences:
                if sequence.state is not State.ENDED:
                    stats = sequence.stats(core.num_outputs(sequence), now)
                    end = OutputEnded(sequence.handle, EndReason.ERROR, stats, message=OWN_FAULT)
                    ended.setdefault(request.frontend, []).append(end)
        return outputs + [Output(to, TokenBatch(TokenBatchHeader(-1, tuple(ends)))) for to, ends in ended.items()]

    def dump(self, why: str) -> None:
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

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def num_known_outputs(request: Request) -> int:
    """Tokens of the longest output that goes on, of a request without a row."""
    return max(len(sequence.outputs) for sequence in request.live())


def group_config(config: EngineConfig, number: int, policy: str) -> EngineConfig:
    """Of a group that is made while the server runs; the first one's is the server's own."""
    core = replace(config.core, group=number, policy=policy)
    record = f"{config.record}.group{number}" if config.record and number else config.record
    return msgspec.structs.replace(config, core=core, record=record)


def _recording_file(config: EngineConfig) -> RecordingFile | None:
    """The supervisor has made the first group's file; where a core has written to it already, the next one goes beside it."""
    if not config.record:
        return None
    path, number = Path(config.record), 1
    while path.exists() and path.stat().st_size:
        number += 1
        path = Path(f"{config.record}.{number}")
    log.info("recording to %s", path)
    return RecordingFile(path, config.core, int(config.record_limit_mib * 2**20))
