"""Workloads by name: seeded, drawn lazily, with the statistics of published traces where there are any.

For the simulator and for the load generator alike; knows neither. Sources: Azure LLM inference traces 2023 (Splitwise), the
Mooncake trace (FAST 2025), Anyscale's "How continuous batching enables 23x throughput" (2023).
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from bench.draws import Exponential, Generator, Ints, Lengths, Uniform, arrivals_ns, gamma_gaps, generators, stream
from bench.jobs import REPLY, Job, Part


class WorkloadError(Exception):
    """No such workload, or one that can't be made as asked; the text is one line."""


class RateError(WorkloadError):
    """No rate at which requests can come."""


class Lengthy(Protocol):
    def draw(self, random: Generator, count: int) -> Ints: ...


class Workload(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def shares_prefixes(self) -> bool:
        """Whether several prompts begin alike."""

    def jobs(self, rate: float, count: int, seed: int) -> Iterator[Job]:
        """`count` requests at `rate` a second in the mean (infinite: all at once), by arrival; following turns hang on the
        first of their session and count too."""


@dataclass(frozen=True)
class Independent:
    """Requests that have nothing to do with one another."""

    name: str
    prompt: Lengthy
    output: Lengthy
    variation: float = 1.0  # coefficient of variation of the times between arrivals
    max_tokens: int = 0  # what each asks for; 0: as many as it gets
    shares_prefixes: bool = False

    def jobs(self, rate: float, count: int, seed: int) -> Iterator[Job]:
        times, prompts, outputs = generators(seed, 3)
        drawn = zip(
            arrivals_ns(gamma_gaps(self.variation), rate, times),
            stream(self.prompt.draw, prompts),
            stream(self.output.draw, outputs),
            strict=False,
        )
        for number, (arrival_ns, prompt, output) in enumerate(islice(drawn, count), _first_key(seed)):
            yield Job(arrival_ns, (Part(number, prompt),), output, self.max_tokens)


@dataclass(frozen=True)
class Continuing:
    """Lengths as given, and `repeated` of all prompt tokens were in an earlier prompt: many requests continue one of the latest
    sessions, whose whole text begins their prompt. Every arrival has its own time, as in a trace."""

    name: str
    prompt: Lengthy
    output: Lengthy
    variation: float
    repeated: float
    shares_prefixes: bool = True
    sessions: int = 256  # that may still go on

    def jobs(self, rate: float, count: int, seed: int) -> Iterator[Job]:
        times, prompts, outputs, choices = generators(seed, 4)
        drawn = zip(
            arrivals_ns(gamma_gaps(self.variation), rate, times),
            stream(self.prompt.draw, prompts),
            stream(self.output.draw, outputs),
            strict=False,
        )
        picks = stream(Uniform(0, self.sessions - 1).draw, choices)
        latest: deque[tuple[int, int, tuple[Part, ...]]] = deque(maxlen=self.sessions)  # (tokens, of the reply, text)
        seen = all_tokens = 0
        for number, (arrival_ns, length, output) in enumerate(islice(drawn, count), _first_key(seed)):
            text: tuple[Part, ...] = ()
            before = reply = 0
            if latest and seen < self.repeated * all_tokens:
                before, reply, text = max(
                    (latest[pick % len(latest)] for pick in islice(picks, 8)),
                    key=lambda session: session[0] if session[0] < length else -1,
                )
                if before >= length:
                    before, reply, text = 0, 0, ()
                else:
                    latest.remove((before, reply, text))
            prompt = (*text, Part(number, length - before))
            seen, all_tokens = seen + before - reply, all_tokens + length
            latest.append((length + output, output, (*prompt, Part(REPLY, output))))
            yield Job(arrival_ns, prompt, output)


@dataclass(frozen=True)
class Conversations:
    """Sessions of several turns under one of a few system prompts. A turn's prompt is all that was said before and a new
    question; it is asked some time after the answer to the one before has ended."""

    name: str
    turns: Lengthy = field(default=Uniform(2, 8))
    system: Lengthy = field(default=Uniform(200, 800))
    question: Lengthy = field(default=Lengths(mean=120, median=70, p99=700, log_sd=0.9))
    answer: Lengthy = field(default=Lengths(mean=211, median=129, p99=601, log_sd=0.86))
    think_s: float = 5.0  # mean, exponential
    system_prompts: int = 8
    shares_prefixes: bool = True

    def jobs(self, rate: float, count: int, seed: int) -> Iterator[Job]:
        times, shapes, questions, answers, thinking, systems = generators(seed, 6)
        turns, question, answer = (
            stream(lengths.draw, random)
            for lengths, random in ((self.turns, shapes), (self.question, questions), (self.answer, answers))
        )
        lengths = self.system.draw(systems, self.system_prompts).tolist()
        system = [Part(_first_key(seed) - 1 - number, length) for number, length in enumerate(lengths)]
        mean_turns = float(self.turns.draw(systems, 100_000).mean())
        keys = itertools.count(_first_key(seed))
        for arrival_ns in arrivals_ns(gamma_gaps(1.0), rate / mean_turns, times):
            num_turns = min(next(turns), count)
            if not num_turns:
                return
            count -= num_turns
            text: tuple[Part, ...] = (system[int(systems.integers(self.system_prompts))],)
            asked: list[tuple[tuple[Part, ...], int]] = []
            for _ in range(num_turns):
                text = (*text, Part(next(keys), next(question)))
                asked.append((text, next(answer)))
                text = (*text, Part(REPLY, asked[-1][1]))
            pauses = (thinking.exponential(self.think_s, num_turns) * 1e9).astype(int).tolist()
            job: Job | None = None
            for at in range(num_turns - 1, -1, -1):
                job = Job(pauses[at] if at else arrival_ns, *asked[at], then=job)
            assert job is not None
            yield job


def _first_key(seed: int) -> int:
    """Keys of one seed's parts are not those of another's."""
    return (seed + 1) << 40


ANYSCALE_CAPS = (32, 128, 512, 1536)
ANYSCALE_KV_TOKENS = {32: 8_700, 128: 7_500, 512: 8_100, 1536: 8_100}  # budgets of the continuous engines
ANYSCALE_STATIC_ROWS = {32: 16, 128: 12, 512: 8, 1536: 4}
ANYSCALE_REQUESTS = 1000

# Mean, median, p99 of prompts and outputs, and the variation of the times between arrivals, as published.
AZURE_CONVERSATION = (Lengths(1155, 1020, 4142, 0.99), Lengths(211, 129, 601, 0.86), 1.09)
AZURE_CODE = (Lengths(2048, 1469, 7436, 1.36), Lengths(28, 13, 252, 0.85), 13.2)
MOONCAKE_CONVERSATION = (Lengths(12_035, 6_909, 85_401, 1.0), Lengths(343, 350, 1120, 1.0), 3.0)
MOONCAKE_REPEATED = 0.37


def _anyscale(cap: int) -> Independent:
    return Independent(f"anyscale-{cap}", Uniform(512, 512), Exponential(128, cap), max_tokens=cap)


_NAMED: tuple[Workload, ...] = (
    Independent("azure-conv-like", *AZURE_CONVERSATION),
    Independent("azure-code-like", *AZURE_CODE),
    Continuing("mooncake-like", *MOONCAKE_CONVERSATION, MOONCAKE_REPEATED),
    Conversations("conversations"),
    *(_anyscale(cap) for cap in ANYSCALE_CAPS),
    Independent("anyscale-latency", Uniform(1, 512), Exponential(128, 1536)),
)
NAMES = tuple(workload.name for workload in _NAMED)


def by_name(name: str) -> Workload:
    """Raises WorkloadError."""
    for workload in _NAMED:
        if workload.name == name:
            return workload
    raise WorkloadError(f"unknown workload {name!r}: choose one of {', '.join(NAMES)}, or a file of JSON lines")


def check_rate(rate: float) -> None:
    """Raises RateError."""
    if math.isnan(rate) or rate <= 0:
        raise RateError(f"the rate must be above 0 requests a second, not {rate:g}")
