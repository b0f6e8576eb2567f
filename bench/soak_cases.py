"""The requests of `make soak`: each of them drawn from the seed and its number, with the tokens that must come of it.

Many are short and share the beginnings of their prompts, some are long, so that blocks run out. What becomes of a request is
part of it: read to its end, cancelled, given too little time, read slowly, left and resumed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from bench.sim_tokens import Drawn, sim_tokens
from carousel.v1 import generation_pb2 as pb

WINDOW_MS = 30_000  # of those that may be resumed
_AT_ONCE = 256  # requests whose tokens are computed together
_FAMILIES = 24  # beginnings of prompts that are shared
_FAMILY_TOKENS = (16, 96)
_OWN_TOKENS = (1, 24)
_LONG_PROMPT, _LONG_OUTPUT = (200, 400), (80, 200)  # of one request in …
_LONG_EVERY = 40
_MEAN_OUTPUT, _MOST_OUTPUT = 7, 32
_TENANTS = ("", "amber", "birch", "cedar", "dune", "ember")
_CLASSES = (pb.PRIORITY_CLASS_BATCH, pb.PRIORITY_CLASS_NORMAL, pb.PRIORITY_CLASS_INTERACTIVE)
_MOST_TIME_MS = 300
_FIRST_TOKEN = 8  # below it are the tokenizer's special ones


class Fate(StrEnum):
    WHOLE = "whole"  # read to its end
    CANCELLED = "cancelled"
    LATE = "late"  # its time is over before it ends, as a rule
    SLOW = "slow"  # its reader takes its time
    BROKEN = "broken"  # its stream is left in the middle, and resumed


_FATES = {Fate.WHOLE: 72, Fate.CANCELLED: 8, Fate.LATE: 6, Fate.SLOW: 6, Fate.BROKEN: 8}


@dataclass(frozen=True, slots=True)
class Case:
    number: int
    request: pb.GenerateRequest  # without an id
    fate: Fate
    after: int  # tokens until then; a request is cancelled after 0 before anything of it has come
    by_many: bool  # one of many on a connection, else a stream of its own
    expected: list[list[int]]  # tokens of each output, if all come

    @property
    def has_window(self) -> bool:
        return bool(self.request.scheduling.resume_window_ms)


def cases(seed: int, numbers: range, vocab_size: int) -> Iterator[Case]:
    families = _families(seed, vocab_size)
    for first in range(numbers.start, numbers.stop, _AT_ONCE):
        drawn = [_draw(seed, number, families, vocab_size) for number in range(first, min(first + _AT_ONCE, numbers.stop))]
        outputs = [output for _, mine in drawn for output in mine]
        tokens = iter(sim_tokens(outputs, vocab_size))
        for case, mine in drawn:
            case.expected.extend(next(tokens) for _ in mine)
            yield case


def _families(seed: int, vocab_size: int) -> list[list[int]]:
    draws = random.Random(f"families {seed}")
    return [_tokens(draws, draws.randint(*_FAMILY_TOKENS), vocab_size) for _ in range(_FAMILIES)]


def _draw(seed: int, number: int, families: Sequence[list[int]], vocab_size: int) -> tuple[Case, list[Drawn]]:
    draws = random.Random(f"{seed} {number}")
    fate = draws.choices(list(_FATES), list(_FATES.values()))[0]
    is_long = draws.randrange(_LONG_EVERY) == 0
    own = _LONG_PROMPT if is_long else _OWN_TOKENS
    prompt = [*draws.choice(families), *_tokens(draws, draws.randint(*own), vocab_size)]
    count = draws.randint(*_LONG_OUTPUT) if is_long else min(_MOST_OUTPUT, 1 + int(draws.expovariate(1 / _MEAN_OUTPUT)))
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt),
        sampling=pb.SamplingParams(
            temperature=draws.choice((0.0, 1.0)),
            seed=draws.getrandbits(64),
            num_outputs=draws.choices((1, 2, 3), (12, 1, 1))[0],
        ),
        stopping=pb.StoppingParams(max_tokens=count, ignore_eos=True),
        output=pb.OutputParams(text=draws.random() < 0.1),
        scheduling=pb.SchedulingParams(priority=draws.choice(_CLASSES)),
    )
    scheduling = request.scheduling
    if tenant := draws.choice(_TENANTS):
        scheduling.tenant = tenant
    if fate is Fate.BROKEN or draws.random() < 0.6:
        scheduling.resume_window_ms = WINDOW_MS
    if fate is Fate.LATE:
        scheduling.max_time_ms = draws.randint(1, _MOST_TIME_MS)
        scheduling.on_timeout = draws.choice((pb.ON_TIMEOUT_RETURN_PARTIAL, pb.ON_TIMEOUT_FAIL))
        scheduling.whole_by_deadline = False
    case = Case(number, request, fate, draws.randint(0, count), draws.random() < 0.75 and fate is not Fate.BROKEN, [])
    sampling = request.sampling
    return case, [Drawn(prompt, sampling.seed, count, index) for index in range(sampling.num_outputs)]


def _tokens(draws: random.Random, count: int, vocab_size: int) -> list[int]:
    return [draws.randrange(_FIRST_TOKEN, vocab_size) for _ in range(count)]
