"""What a load came to: throughput, TTFT, ITL, E2E, goodput, errors. Pure: takes what was heard, returns figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bench.figures import Numbers, Percentiles, Slo, is_good, percentiles
from bench.generator import Heard, Offered

_LATE_S = 0.01  # a generator that sends its requests later than this changes what it measures
_BUSY_SHARE = 0.5  # of a core, likewise


@dataclass(frozen=True)
class LoadFigures:
    """Of requests that ended by themselves, unless said otherwise. Times in seconds, from when a request was to be sent."""

    requests: int
    errors: dict[str, int]  # by status; of all others that ended
    unfinished: int
    unsent: int
    seconds: float  # first request to the last end
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    request_rate: float
    output_tokens_per_s: float
    tokens_per_s: float  # prompt and output
    ttft: Percentiles
    itl: Percentiles  # tokens that come in one message are 0 s apart
    e2e: Percentiles
    good_share: float  # of all that ended, however they did
    goodput: float  # requests a second that kept the SLO
    generator_cpu_share: float  # of one core
    generator_late_s: Percentiles  # a request was sent after its time

    @property
    def generator_limits(self) -> bool:
        """The figures may be the generator's, not the server's."""
        return self.generator_cpu_share > _BUSY_SHARE or self.generator_late_s.p99 > _LATE_S


def load_figures(offered: Offered, slo: Slo) -> LoadFigures:
    served = [heard for heard in offered.heard if heard.is_served]
    due = _column([heard.due_ns for heard in served])
    first, last = (_column([getattr(heard, name) for heard in served]) - due for name in ("first_ns", "last_ns"))
    outputs = _column([heard.output_tokens for heard in served])
    good = int(is_good(first, last, outputs, slo).sum()) if served else 0
    prompts = sum(heard.prompt_tokens for heard in served)
    a_second = 1 / offered.seconds if offered.seconds else 0.0
    return LoadFigures(
        requests=len(served),
        errors=dict(Counter(_error(heard) for heard in offered.heard if not heard.is_served)),
        unfinished=offered.unfinished,
        unsent=offered.unsent,
        seconds=offered.seconds,
        prompt_tokens=prompts,
        cached_tokens=sum(heard.cached_tokens for heard in served),
        output_tokens=int(outputs.sum()),
        request_rate=len(served) * a_second,
        output_tokens_per_s=float(outputs.sum()) * a_second,
        tokens_per_s=float(prompts + outputs.sum()) * a_second,
        ttft=percentiles(first),
        itl=percentiles(_column([gap for heard in served for gap in gaps_ns(heard)])),
        e2e=percentiles(last),
        good_share=good / max(1, len(offered.heard)),
        goodput=good * a_second,
        generator_cpu_share=offered.cpu_s * a_second,
        generator_late_s=percentiles(_column([heard.sent_ns - heard.due_ns for heard in offered.heard])),
    )


def gaps_ns(heard: Heard) -> Iterator[int]:
    """Between two tokens of a request."""
    before = heard.first_ns
    for number, (at, count) in enumerate(heard.tokens):
        if number:
            yield at - before
        yield from (0,) * (count - 1)
        before = at


def _error(heard: Heard) -> str:
    return "no tokens" if heard.status == "OK" else heard.status


def _column(values: Sequence[int]) -> Numbers:
    return np.array(values, np.int64)
