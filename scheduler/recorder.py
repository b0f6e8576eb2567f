"""The flight recorder: notes every call of the core's verbs, for a file that replays to the byte, and in a bounded ring.

`Recorded` stands before the core with the same verbs; engine, simulator and tests use it alike. It decides nothing, and costs a
few references a step as long as there is no file. What it keeps is never changed afterwards: messages and plans.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

from scheduler.core import Core, CoreConfig, Output
from scheduler.core.arrival import NOTHING_ELSEWHERE, Elsewhere
from scheduler.core.core import ProtocolError
from scheduler.recording import Event, RecordingHeader, RecordingWriter, Verb, pack
from wire import (
    AbortRequest,
    AddRequest,
    CancelOutcome,
    CancelQuery,
    Credit,
    MovedRequest,
    Refused,
    RestoreRequest,
    SetPolicyQuery,
    StepPlan,
    StepResult,
    TruncateRequest,
    WorkerFacts,
    WorkerHello,
)
from wire.messages import I32, U32

log = logging.getLogger(__name__)

RING_BYTES = 16 << 20
RING_NS = 120 * 1_000_000_000
_PLAN_BYTES = 2500  # of a plan's or a result's objects without their arrays' contents, about
_EVENT_BYTES = 250

_PLAN, _APPLY = Verb.PLAN, Verb.APPLY  # what every step notes; looking up an enumeration's member takes as long as all the rest

P = ParamSpec("P")
R = TypeVar("R")


class Sink(Protocol):
    """Whoever takes the events."""

    def note(self, event: Event) -> None: ...


class CoreFailureError(Exception):
    """The core of this group raised what it must never raise: its state can't be trusted any more. The cause says what."""

    def __init__(self, words: str, group: int) -> None:
        super().__init__(words)
        self.group = group


class Recorded:
    """The core's verbs, each noted. Everything else that is asked of it is asked of the core."""

    def __init__(self, core: Core, *sinks: Sink) -> None:
        self.core = core
        self._sinks = sinks

    def __getattr__(self, name: str) -> Any:
        return getattr(self.core, name)

    def renew(self) -> None:
        """A new core in place of one that can't be trusted: the same configuration, no requests, no worker. Epochs go on
        counting, so that late words to the old one are known as such."""
        self._note(Event(Verb.RENEWED))
        self.core = renewed(self.core)

    # ------------------------------------------------------------------------------------------------ the core's verbs

    def add(self, add: AddRequest, frontend: int, now: int, elsewhere: Elsewhere = NOTHING_ELSEWHERE) -> Refused | None:
        self._note(Event(Verb.ADD, now, frontend, " ".join(map(str, elsewhere)) if any(elsewhere) else "", add))
        return self._do(self.core.add, add, frontend, now, elsewhere)

    def restore(self, restored: RestoreRequest, frontend: int, now: int) -> str:
        self._note(Event(Verb.RESTORE, now, frontend, message=restored))
        return self._do(self.core.restore, restored, frontend, now)

    def give(self, frontend: int, handle: int, now: int) -> MovedRequest:
        self._note(Event(Verb.GIVE, now, frontend, message=AbortRequest(handle)))
        return self._do(self.core.give, frontend, handle, now)

    def take(self, moved: MovedRequest, frontend: int, now: int) -> None:
        self._note(Event(Verb.TAKE, now, frontend, message=moved))
        self._do(self.core.take, moved, frontend, now)

    def abort(self, frontend: int, handle: int, now: int) -> list[Output]:
        self._note(Event(Verb.ABORT, now, frontend, message=AbortRequest(handle)))
        return self._do(self.core.abort, frontend, handle, now)

    def cancel(self, request_id: str, now: int) -> tuple[CancelOutcome, list[Output]]:
        self._note(Event(Verb.CANCEL, now, message=CancelQuery(0, request_id)))
        return self._do(self.core.cancel, request_id, now)

    def truncate(self, frontend: int, handle: int, num_outputs: int, now: int) -> list[Output]:
        self._note(Event(Verb.TRUNCATE, now, frontend, message=TruncateRequest(handle, num_outputs)))
        return self._do(self.core.truncate, frontend, handle, num_outputs, now)

    def credit(self, frontend: int, handles: U32, num_tokens: I32, now: int) -> None:
        self._note(Event(Verb.CREDIT, now, frontend, message=Credit(num_tokens=num_tokens, handles=handles)))
        self._do(self.core.credit, frontend, handles, num_tokens, now)

    def frontend_lost(self, frontend: int, now: int) -> None:
        self._note(Event(Verb.FRONTEND_LOST, now, frontend))
        self._do(self.core.frontend_lost, frontend, now)

    def worker_joined(self, facts: WorkerFacts, now: int) -> list[Output]:
        self._note(Event(Verb.WORKER_JOINED, now, message=WorkerHello(self.core.config.group, facts)))
        return self._do(self.core.worker_joined, facts, now)

    def worker_lost(self, now: int) -> list[Output]:
        self._note(Event(Verb.WORKER_LOST, now))
        return self._do(self.core.worker_lost, now)

    def set_policy(self, name: str, now: int) -> str:
        self._note(Event(Verb.SET_POLICY, now, message=SetPolicyQuery(0, name)))
        return self._do(self.core.set_policy, name, now)

    def drop_all(self, message: str, now: int) -> list[Output]:
        self._note(Event(Verb.DROP_ALL, now, text=message))
        return self._do(self.core.drop_all, message, now)

    def drain(self) -> None:
        self._note(Event(Verb.DRAIN))
        self._do(self.core.drain)

    def plan(self, now: int) -> StepPlan | None:
        try:
            plan = self.core.plan(now)
        except Exception as error:
            self._note(Event(_PLAN, now, text="failed"))
            raise self._failure(error) from error
        event = Event(_PLAN, now, -1, "", plan)
        for sink in self._sinks:
            sink.note(event)
        return plan

    def take_outputs(self) -> list[Output]:
        """What plan() ended; no input."""
        return self.core.take_outputs()

    def apply(self, result: StepResult, now: int) -> list[Output]:
        """Raises ProtocolError, as the core does."""
        event = Event(_APPLY, now, -1, "", result)
        for sink in self._sinks:
            sink.note(event)
        return self._do(self.core.apply, result, now)

    # --------------------------------------------------------------------------------------------------------- small

    def _note(self, event: Event) -> None:
        for sink in self._sinks:
            sink.note(event)

    def _do(self, verb: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return verb(*args, **kwargs)
        except ProtocolError:
            raise
        except Exception as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> CoreFailureError:
        words = f"{type(error).__name__}: {error}"
        self._note(Event(Verb.FAILED, text=words))
        return CoreFailureError(words, self.core.config.group)


def renewed(core: Core) -> Core:
    """A new core with the old one's configuration, policy and epoch, and nothing else of it."""
    new = Core(core.config)
    new.policy, new.epoch, new.draining = core.policy, core.epoch, core.draining
    return new


class RecordingFile:
    """The file of `--record`. A full disk or a reached limit ends the recording with a line in the log, and nothing else."""

    def __init__(self, path: Path, config: CoreConfig, max_bytes: int = 0) -> None:
        """max_bytes: of the file; 0: no limit. Raises OSError when the file can't be made. Only its owner can read it: prompts
        stand in it."""
        self._path, self._max_bytes = path, max_bytes
        file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")
        self._writer: RecordingWriter | None = RecordingWriter(file, _header(config))

    def note(self, event: Event) -> None:
        if self._writer is None:
            return
        record = pack(event)
        if self._max_bytes and self._writer.most_bytes + len(record) + 200 > self._max_bytes:  # 200: of END
            log.warning("the recording has reached its limit of %.3g MiB and ends here", self._max_bytes / 2**20)
            self.close("the limit of its size was reached")
            return
        try:
            self._writer.write(record, event.now)
        except OSError as error:
            self._give_up(error)

    def flush(self) -> None:
        try:
            if self._writer is not None:
                self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def close(self, why: str = "") -> None:
        try:
            if self._writer is not None:
                self._writer.close(why)
            self._writer = None
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._writer = None
        log.error("the recording %s ends here: %s", self._path, error.strerror)


class Ring:
    """The last events, bounded in bytes and in time. Holds references; encodes only when it is dumped."""

    def __init__(self, max_bytes: int = RING_BYTES, max_ns: int = RING_NS) -> None:
        self._max_bytes, self._max_ns = max_bytes, max_ns
        self._events: deque[tuple[Event, int]] = deque()  # with their sizes
        self._bytes = 0
        self._first = 0  # number of the oldest event that is still here

    def note(self, event: Event) -> None:
        events, size, oldest = self._events, _size(event), event.now - self._max_ns
        events.append((event, size))
        self._bytes += size
        while events and (self._bytes > self._max_bytes or events[0][0].now < oldest):
            self._bytes -= events.popleft()[1]
            self._first += 1

    def dump(self, folder: Path, config: CoreConfig, why: str) -> Path:
        """Writes a recording into a new file in this folder. Raises OSError."""
        handle, name = tempfile.mkstemp(".rec", f"carousel-{os.getpid()}-", folder)
        with os.fdopen(handle, "wb") as file:
            writer = RecordingWriter(file, _header(config, self._first, why))
            for event, _ in self._events:
                writer.write(pack(event), event.now)
            writer.close()
        return Path(name)


def _size(event: Event) -> int:
    """Bytes of memory that the event holds, about."""
    message = event.message
    if message is None:
        return _EVENT_BYTES
    if isinstance(message, StepPlan):
        return _PLAN_BYTES + 6 * len(message.slots) + 4 * (len(message.start_tokens) + len(message.start_blocks))
    if isinstance(message, StepResult):
        return 3 * _EVENT_BYTES + 6 * len(message.slots)
    if isinstance(message, RestoreRequest | MovedRequest):
        return _PLAN_BYTES + 4 * (len(message.prompt) + len(message.tokens))
    if isinstance(message, AddRequest):
        return _PLAN_BYTES + 4 * len(message.prompt) + len(message.prefix_hashes)
    return 2 * _EVENT_BYTES


def _header(config: CoreConfig, first_event: int = 0, why: str = "") -> RecordingHeader:
    date = datetime.now(UTC).isoformat(timespec="seconds")
    carousel = version("carousel-serve")
    return RecordingHeader(carousel_version=carousel, date=date, core=config, first_event=first_event, why=why)
