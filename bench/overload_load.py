"""`python -m bench.overload_load '{"port": …}'`: one load on one server, in a niced process of its own, so that it takes
nothing from the server. Figures as JSON on stdout; before that a line when the first and one when the last request is sent, or
when a crowd is held.
"""

from __future__ import annotations

import json
import math
import os
import select
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np

from bench.draws import Uniform
from bench.generator import GENERATE, Asking, Offered, offer
from bench.http2 import Answer, Call, Caller, CallError
from bench.jobs import Job
from bench.overload_figures import Phase, Span, phase
from bench.workloads import Independent
from carousel.v1 import generation_pb2 as pb
from wire.messages import I32

BEGUN, SENT, HELD = "begun", "sent", "held"  # the first words of lines, a time behind them
_NICE = 10
_WORDS = "the of to and in is for that it was on are as with be by this from or have an they which one you all"
_TURN_S = 0.05
_PATIENCE_S = 120.0  # without any news
_CLOSED_PER_S = 250  # requests made ready for a closed loop


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked. Lengths in words or tokens, drawn evenly between the two."""

    port: int
    seconds: float = 10.0
    rate: float = 0.0  # requests a second, by a Poisson process; 0: a closed loop of `at_once`
    at_once: int = 1
    deadline_s: float = 0.0  # of each request; 0: none
    ramp_s: float = 2.0  # left out of figures over time
    window_s: float = 1.0
    words: tuple[int, int] = (64, 64)
    tokens: tuple[int, int] = (2, 2)
    connections: int = 8
    seed: int = 0
    crowd: int = 0  # so many streams that nobody reads until a line comes on stdin; nothing else then


@dataclass(frozen=True)
class Came:
    """Times by CLOCK_MONOTONIC, in nanoseconds."""

    phase: Phase
    begun_ns: int
    sent_ns: int  # the last one
    cpu_share: float  # of a core, that this process took


@dataclass(frozen=True)
class Crowd:
    streams: int
    served: int  # with all their tokens
    statuses: dict[str, int]
    held_s: float  # until all were open with their first tokens there


@dataclass(frozen=True)
class Texts(Asking):
    """Prompts are words, so that the server has them to tokenize: with the demo's tokenizer a token each."""

    def request(self, job: Job, reply: I32 | None = None) -> pb.GenerateRequest:
        asked = super().request(job, reply)
        words = _WORDS.split()
        picks = np.random.default_rng(job.prompt[0].key).integers(len(words), size=job.prompt_tokens)
        asked.text = " ".join(words[pick] for pick in picks.tolist())
        return asked


def asking() -> Asking:
    return Texts(vocab_size=2, text=True)


def jobs(load: Load) -> list[Job]:
    workload = Independent("overload", Uniform(*load.words), Uniform(*load.tokens))
    deadline_ns = round(load.deadline_s * 1e9)
    count = round(load.seconds * (load.rate or _CLOSED_PER_S))
    made = workload.jobs(load.rate or math.inf, count, load.seed)
    return [replace(job, deadline_ns=deadline_ns) for job in made]


def run(load: Load) -> Came:
    """Raises OSError, CallError."""
    caller, made = Caller(load.port, load.connections), jobs(load)
    until_ns = made[-1].arrival_ns if load.rate else round(load.seconds * 1e9)
    begun_ns = 0  # when the first request was
    is_told = False

    def tell(ended: int, tokens: int) -> None:
        nonlocal begun_ns, is_told
        now = time.monotonic_ns()
        if not begun_ns:
            begun_ns = now
            print(BEGUN, now, flush=True)
        if now >= begun_ns + until_ns and not is_told:
            is_told = True
            print(SENT, now, flush=True)

    try:
        is_over = (lambda: False) if load.rate else (lambda: is_told)
        offered = offer(caller, asking(), made, at_once=None if load.rate else load.at_once, stop=is_over, tell=tell)
    finally:
        caller.close()
    if offered.broke:
        raise CallError(offered.broke)
    if not load.rate and not offered.unsent:
        raise CallError(f"the server took more than {_CLOSED_PER_S} requests a second, and there were no more")
    return _came(load, offered, until_ns)


def _came(load: Load, offered: Offered, until_ns: int) -> Came:
    """A closed loop is cut off with requests under way, whose tokens are not known: its figures over time end before."""
    end_ns = offered.began_ns + until_ns
    if not load.rate:
        end_ns -= max((heard.ended_ns - heard.sent_ns for heard in offered.heard), default=0)
    span = Span(offered.began_ns + round(load.ramp_s * 1e9), end_ns, round(load.window_s * 1e9))
    found = phase(offered.heard, round(load.deadline_s * 1e9), span)
    sent_ns = max((heard.sent_ns for heard in offered.heard), default=0)
    return Came(found, offered.began_ns, sent_ns, offered.cpu_s / max(1e-9, offered.seconds))


def hold(load: Load) -> Crowd:
    """Raises OSError, CallError."""
    tokens = load.tokens[1]
    made = Independent("crowd", Uniform(*load.words), Uniform(tokens, tokens)).jobs(math.inf, load.crowd, load.seed)
    calls = [Call(GENERATE, (asking().request(job).SerializeToString(),)) for job in made]
    caller, began_ns = Caller(load.port, load.connections, holds=True), time.monotonic_ns()
    try:
        for call in calls:
            caller.start(call)
        answers = list(_until_told(caller, load.crowd))
        held_s = (time.monotonic_ns() - began_ns) / 1e9
        print(HELD, time.monotonic_ns(), flush=True)
        while not select.select([sys.stdin], [], [], 0)[0]:
            answers += caller.turn(_TURN_S) or ()
        caller.release()
        while len(answers) < load.crowd:
            news = caller.turn(_PATIENCE_S)
            if news is None:
                raise CallError(f"nothing came for {_PATIENCE_S:g} s")
            answers += news
    finally:
        caller.close()
    statuses = [str(answer.status) for answer in answers]
    return Crowd(
        streams=load.crowd,
        served=sum(_tokens(answer) == tokens for answer in answers),
        statuses={status: statuses.count(status) for status in sorted(set(statuses))},
        held_s=held_s,
    )


def _until_told(caller: Caller, count: int) -> Iterator[Answer]:
    """Those that end before all are open: none should."""
    while caller.num_heard < count:
        news = caller.turn(_PATIENCE_S)
        if news is None:
            raise CallError(f"of {count} streams {caller.num_heard} were heard of, and then nothing for {_PATIENCE_S:g} s")
        yield from news


def _tokens(answer: Answer) -> int:
    """Output tokens that came in order; −1: one was missing."""
    count = 0
    for message in answer.messages:
        event = pb.GenerateResponse.FromString(message)
        if event.WhichOneof("event") == "delta":
            if event.delta.token_offset != count:
                return -1
            count += len(event.delta.token_ids)
    return count


def main() -> None:
    os.nice(_NICE)
    load = Load(**json.loads(sys.argv[1]))
    try:
        found: Came | Crowd = hold(load) if load.crowd else run(load)
    except (CallError, OSError) as error:
        sys.exit(str(error))
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
