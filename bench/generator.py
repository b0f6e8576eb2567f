"""A load generator: offers jobs to a running server, at their times or so many at once, and keeps when every token came.

One thread over bench.http2, so that it takes a small part of a core where the server takes all; what came is looked into once
its request has ended. Knows jobs, the public protos and the clock; nothing of workloads, figures or printing.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import grpc
import numpy as np

from bench.http2 import Answer, Call, Caller, CallError
from bench.jobs import BATCH, INTERACTIVE, NORMAL, Job, token_ids
from carousel.v1 import generation_pb2 as pb
from wire.messages import I32

GENERATE = "/carousel.v1.Generation/Generate"
_PRIORITIES = {
    BATCH: pb.PRIORITY_CLASS_BATCH,
    NORMAL: pb.PRIORITY_CLASS_NORMAL,
    INTERACTIVE: pb.PRIORITY_CLASS_INTERACTIVE,
}
_STATUS = {code.value[0]: code.name for code in grpc.StatusCode}
_OK = "OK"
RESET = "reset"
_TELL_EVERY_S = 0.1
_SURE = 100.0  # of a bias: the token is drawn, whatever the others' logits


@dataclass(frozen=True)
class Asking:
    """How a job becomes a request."""

    vocab_size: int
    text: bool = False  # text comes with the ids
    cache_salt: str = ""  # requests of another salt share no blocks with these
    temperature: float = 0.0

    def request(self, job: Job, reply: I32 | None = None) -> pb.GenerateRequest:
        """reply: all that the session's earlier turns were answered. One that asks for more than it gets is ended by a stop
        token that is forbidden before its last token and sure to be drawn then: so the server can't know its length. (A
        simulated worker has no logits; there it gets all that it asks for.)"""
        asked = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=token_ids(job.prompt, self.vocab_size, reply).tolist()),
            sampling=pb.SamplingParams(temperature=self.temperature, num_outputs=job.num_outputs),
            stopping=pb.StoppingParams(max_tokens=max(job.max_tokens, job.output_tokens), ignore_eos=True),
            output=pb.OutputParams(text=self.text),
            scheduling=pb.SchedulingParams(priority=_PRIORITIES[job.priority]),
        )
        if job.max_tokens > job.output_tokens:
            stop = self.vocab_size - 1
            asked.stopping.min_tokens = job.output_tokens - 1
            asked.stopping.include_stop = True
            asked.stopping.stop_token_ids.append(stop)
            asked.sampling.logit_bias[stop] = _SURE
        if job.tenant:
            asked.scheduling.tenant = job.tenant
        if job.deadline_ns:
            asked.scheduling.max_time_ms = max(1, job.deadline_ns // 1_000_000)
        if self.cache_salt:
            asked.scheduling.cache_salt = self.cache_salt
        return asked


@dataclass(slots=True)
class Heard:
    """One request, as its caller saw it. Nanoseconds by CLOCK_MONOTONIC."""

    job: Job
    due_ns: int  # when it was to be sent; how long it takes counts from here
    sent_ns: int = 0
    ended_ns: int = 0
    status: str = ""  # gRPC's, or RESET
    tokens: list[tuple[int, int]] = field(default_factory=list)  # (time, how many came then)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    details: bytes = b""  # a google.rpc.Status: what else was told of a failure
    reply: I32 | None = None  # with those of the turns before; only where a turn follows

    @property
    def is_served(self) -> bool:
        """It ended by itself with a token at least."""
        return self.status == _OK and bool(self.tokens)

    @property
    def output_tokens(self) -> int:
        return sum(count for _, count in self.tokens)

    @property
    def first_ns(self) -> int:
        return self.tokens[0][0]

    @property
    def last_ns(self) -> int:
        return self.tokens[-1][0]


@dataclass(frozen=True)
class Offered:
    """All that ended, in that order."""

    heard: list[Heard]
    began_ns: int
    seconds: float  # from the first one's time to the last one's end
    cpu_s: float  # of this process meanwhile: sending, receiving and looking into it
    unfinished: int  # sent and not ended when it was stopped, or the connection broke
    unsent: int  # first turns
    broke: str = ""  # why the connection did


Tell = Callable[[int, int], None]  # requests ended, output tokens that came


@dataclass(slots=True)
class _Turn:
    job: Job
    reply: I32 | None = None


class _Offer:
    """One run. `alive` holds what was sent and has not ended, by key."""

    def __init__(self, caller: Caller, asking: Asking, jobs: Sequence[Job], at_once: int | None) -> None:
        self.caller, self.asking = caller, asking
        self.at_once = at_once
        self.alive: dict[int, Heard] = {}
        self.heard: list[Heard] = []
        self.tokens = 0
        # First turns are ready before the clock starts, so that a burst is one.
        self.calls = [self._call(number, job, None) for number, job in enumerate(jobs)]
        self.jobs: list[_Turn] = [_Turn(job) for job in jobs]
        self.due: list[tuple[int, int]] = []  # (time, key), a heap

    def _call(self, key: int, job: Job, reply: I32 | None) -> Call:
        return Call(GENERATE, (self.asking.request(job, reply).SerializeToString(),), key)

    def run(self, stop: Callable[[], bool], tell: Tell) -> Offered:
        began, cpu_s = time.monotonic_ns(), time.process_time()
        self.due = [(began + turn.job.arrival_ns, key) for key, turn in enumerate(self.jobs)]
        heapq.heapify(self.due)
        first, tell_at, broke = self.due[0][0] if self.due else began, began, ""
        try:
            while (self.due or self.alive) and not stop():
                now = time.monotonic_ns()
                self._start_due(now)
                for answer in self.caller.turn(self._wait_s(now)) or ():
                    self._end(answer)
                if now >= tell_at:
                    tell(len(self.heard), self.tokens)
                    tell_at = now + int(_TELL_EVERY_S * 1e9)
        except CallError as error:
            broke = str(error)
        cpu_s = time.process_time() - cpu_s
        tell(len(self.heard), self.tokens)
        last = max((heard.ended_ns for heard in self.heard), default=first)
        return Offered(self.heard, began, max(0, last - first) / 1e9, cpu_s, len(self.alive), len(self.due), broke)

    def _start_due(self, now: int) -> None:
        while self.due and self.due[0][0] <= now and (self.at_once is None or len(self.alive) < self.at_once):
            at, key = heapq.heappop(self.due)
            # With a place for so many at once, a request comes into being when there is one.
            due = at if self.at_once is None else time.monotonic_ns()
            self.alive[key] = Heard(self.jobs[key].job, due, time.monotonic_ns())
            self.caller.start(self.calls[key])
            self.calls[key] = Call("", ())  # its bytes are the connection's now

    def _wait_s(self, now: int) -> float:
        is_full = self.at_once is not None and len(self.alive) >= self.at_once
        if not self.due or is_full:
            return _TELL_EVERY_S
        return min(_TELL_EVERY_S, max(0.0, (self.due[0][0] - now) / 1e9))

    def _end(self, answer: Answer) -> None:
        heard, turn = self.alive.pop(answer.key), self.jobs[answer.key]
        heard.ended_ns = answer.ended_ns
        heard.status = _STATUS.get(answer.status, RESET if answer.status < 0 else str(answer.status))
        heard.details = answer.details
        ids = _look_into(heard, answer)
        self.heard.append(heard)
        self.tokens += len(ids)
        then = turn.job.then
        if then is None or not heard.is_served:
            return
        new = np.array(ids, np.int32)
        reply = new if turn.reply is None else np.concatenate((turn.reply, new))
        key = len(self.jobs)
        self.jobs.append(_Turn(then, reply))
        self.calls.append(self._call(key, then, reply))
        heapq.heappush(self.due, (heard.ended_ns + then.arrival_ns, key))


def _look_into(heard: Heard, answer: Answer) -> list[int]:
    """Times and counts into `heard`; the token ids."""
    ids: list[int] = []
    for message, at in zip(answer.messages, answer.at_ns, strict=True):
        event = pb.GenerateResponse.FromString(message)
        match event.WhichOneof("event"):
            case "delta" if event.delta.token_ids and not event.delta.is_prompt:
                heard.tokens.append((at, len(event.delta.token_ids)))
                ids += event.delta.token_ids
            case "summary":
                heard.prompt_tokens = event.summary.usage.prompt_tokens
                heard.cached_tokens = event.summary.usage.cached_tokens
    return ids


def _nobody(ended: int, tokens: int) -> None:
    pass


def offer(
    caller: Caller,
    asking: Asking,
    jobs: Iterable[Job],
    *,
    at_once: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    tell: Tell = _nobody,
) -> Offered:
    """Every job at its time, or with `at_once` as soon as fewer than so many run; a session's next turn some time after the end
    of the one before. A session whose turn fails ends. stop: asked all the time; true: what ended so far is all. Never raises
    for what the server does."""
    return _Offer(caller, asking, list(jobs), at_once).run(stop, tell)
