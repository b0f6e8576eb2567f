"""A workload from a file: one JSON object a line. Reads it whole, and says which line is wrong.

    {"arrival_s": 0.25, "prompt_tokens": 900, "output_tokens": 120}

and, where wanted, "prefix" (a name: prompts of the same prefix begin with the same "prefix_tokens" tokens, all of the shorter
one's without it), "tenant", "priority" (batch, normal, interactive), "deadline_ms" (since its arrival), "num_outputs",
"max_tokens" (it asked for more than it got, and ended by itself).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from bench.jobs import PRIORITIES, Job, Part
from bench.workloads import WorkloadError

_MOST_TOKENS = 1 << 24
_FIELDS = (
    "arrival_s",
    "prompt_tokens",
    "output_tokens",
    "prefix",
    "prefix_tokens",
    "tenant",
    "priority",
    "deadline_ms",
    "num_outputs",
    "max_tokens",
)


@dataclass(frozen=True)
class Trace:
    """The file's requests, by arrival."""

    name: str
    requests: tuple[Job, ...]
    shares_prefixes: bool

    def jobs(self, rate: float, count: int, seed: int) -> Iterator[Job]:
        """The first `count` (0: all) at `rate` a second in the mean; rate 0: as the file says. The seed changes nothing."""
        scale = self.own_rate / rate if rate else 1.0
        for job in islice(self.requests, count or None):
            yield replace(job, arrival_ns=round(job.arrival_ns * scale)) if scale != 1.0 else job

    @property
    def own_rate(self) -> float:
        """Requests a second; infinite when all come at once."""
        span_ns = self.requests[-1].arrival_ns - self.requests[0].arrival_ns
        return (len(self.requests) - 1) / span_ns * 1e9 if span_ns else math.inf


def read(path: Path) -> Trace:
    """Raises WorkloadError."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise WorkloadError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise WorkloadError(f"{path} is not UTF-8 text") from None
    jobs, shared = [], False
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            jobs.append(_job(entry, number))
        except ValueError as error:
            words = f"no JSON: {error}" if isinstance(error, json.JSONDecodeError) else error
            raise WorkloadError(f"{path}, line {number}: {words}") from None
        shared |= "prefix" in entry
    if not jobs:
        raise WorkloadError(f"{path} holds no requests")
    first_ns = min(job.arrival_ns for job in jobs)
    jobs = [replace(job, arrival_ns=job.arrival_ns - first_ns) for job in jobs]
    return Trace(path.name, tuple(sorted(jobs, key=lambda job: job.arrival_ns)), shared)


def _job(entry: Any, number: int) -> Job:
    """Raises ValueError."""
    if not isinstance(entry, dict):
        raise ValueError("a JSON object was expected")
    unknown = [name for name in entry if name not in _FIELDS]
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}; there are {', '.join(_FIELDS)}")

    def number_of(name: str, default: float | None, least: float, what: str) -> float:
        value = entry.get(name, default)
        if value is None:
            raise ValueError(f"{name} is missing")
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
            raise ValueError(f"{name} must be {what}, not {json.dumps(value)}")
        return value

    def tokens(name: str, default: int | None = None, least: int = 1, most: int = _MOST_TOKENS) -> int:
        what = f"a whole number from {least} to {most}"
        value = number_of(name, default, least, what)
        if value != int(value) or value > most:
            raise ValueError(f"{name} must be {what}, not {json.dumps(value)}")
        return int(value)

    def text(name: str, default: str = "") -> str:
        value = entry.get(name, default)
        if not isinstance(value, str):
            raise ValueError(f"{name} must be text, not {json.dumps(value)}")
        return value

    arrival_s = number_of("arrival_s", None, -math.inf, "a number of seconds")
    deadline_ms = number_of("deadline_ms", 0, 0, "a number of milliseconds, at least 0")
    prompt_tokens, output_tokens, priority = tokens("prompt_tokens"), tokens("output_tokens"), text("priority", "normal")
    max_tokens = tokens("max_tokens", output_tokens)
    if max_tokens < output_tokens:
        raise ValueError(f"max_tokens ({max_tokens}) is less than output_tokens ({output_tokens})")
    if priority not in PRIORITIES:
        raise ValueError(f"priority must be one of {', '.join(PRIORITIES)}, not {json.dumps(priority)}")
    own, prefix = Part(-number, prompt_tokens), text("prefix")
    prefix_tokens = tokens("prefix_tokens", prompt_tokens, 0, prompt_tokens)
    if "prefix_tokens" in entry and not prefix:
        raise ValueError("prefix_tokens stands without a prefix")
    prompt: tuple[Part, ...] = (own,)
    if prefix:
        parts = (Part(_key(prefix), prefix_tokens), replace(own, length=prompt_tokens - prefix_tokens))
        prompt = tuple(part for part in parts if part.length)
    return Job(
        arrival_ns=round(arrival_s * 1e9),
        prompt=prompt,
        output_tokens=output_tokens,
        max_tokens=max_tokens if max_tokens > output_tokens else 0,
        tenant=text("tenant"),
        priority=PRIORITIES[priority],
        deadline_ns=round(deadline_ms * 1e6),
        num_outputs=tokens("num_outputs", 1, 1, 64),
    )


def _key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little") + 1
