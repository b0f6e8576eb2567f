"""What an overload came to: goodput over time, refusals, memory, recovery. Pure: takes what was heard and seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from bench.figures import Percentiles, percentiles
from bench.generator import Heard

_REFUSED = "RESOURCE_EXHAUSTED"
_ESTIMATE = "estimate_ms"  # a refusal for a deadline that could not be met says this


@dataclass(frozen=True)
class Phase:
    """One load. Times in seconds."""

    requests: int  # that ended, however
    served: int
    good: int  # served whole in their time
    refused: int  # at their arrival
    told_when: int  # of these, with RetryInfo
    statuses: dict[str, int]
    goodput: float  # tokens a second of good requests, mean over the windows
    windows: list[float]  # … in each
    rate: float  # requests a second that ended well, over the windows
    ttft: Percentiles  # of those served, from when they were due
    e2e: Percentiles
    refusal: Percentiles  # from sending to the status
    late: Percentiles  # the generator sent them after their time
    prompt_tokens: float  # of those served, mean


@dataclass(frozen=True)
class Span:
    """Times by CLOCK_MONOTONIC, in nanoseconds: the windows of figures over time lie between them."""

    begin: int
    end: int
    window: int


def phase(heard: Sequence[Heard], deadline_ns: int, span: Span) -> Phase:
    served = [each for each in heard if each.is_served]
    good = [each for each in served if is_in_time(each, deadline_ns)]
    refused = [each for each in heard if is_refused(each)]
    windows = goodput(good, span)
    ended = sum(span.begin <= each.ended_ns < span.end for each in good)
    return Phase(
        requests=len(heard),
        served=len(served),
        good=len(good),
        refused=len(refused),
        told_when=sum(retry_after_ns(each.details) > 0 for each in refused),
        statuses=dict(Counter(each.status for each in heard)),
        goodput=float(np.mean(windows)) if windows else 0.0,
        windows=windows,
        rate=ended / max(1e-9, (span.end - span.begin) / 1e9),
        ttft=_spread(each.first_ns - each.due_ns for each in served),
        e2e=_spread(each.ended_ns - each.due_ns for each in served),
        refusal=_spread(each.ended_ns - each.sent_ns for each in refused),
        late=_spread(each.sent_ns - each.due_ns for each in heard),
        prompt_tokens=sum(each.prompt_tokens for each in served) / max(1, len(served)),
    )


def is_in_time(heard: Heard, deadline_ns: int) -> bool:
    """deadline_ns: after it was due; 0: any time is good."""
    return not deadline_ns or heard.ended_ns - heard.due_ns <= deadline_ns


def goodput(good: Iterable[Heard], span: Span) -> list[float]:
    """Tokens a second in each window that is whole; a token counts when it came."""
    count = (span.end - span.begin) // span.window
    if count <= 0:
        return []
    pairs = np.array([pair for each in good for pair in each.tokens], np.int64).reshape(-1, 2)
    number = (pairs[:, 0] - span.begin) // span.window
    inside = (number >= 0) & (number < count)
    tokens = np.bincount(number[inside], weights=pairs[inside, 1], minlength=count)
    return [float(each) for each in tokens / (span.window / 1e9)]


def is_refused(heard: Heard) -> bool:
    """At its arrival; one whose time ran out while it waited was not."""
    return not heard.tokens and (heard.status == _REFUSED or _ESTIMATE in _metadata(heard.details))


def retry_after_ns(details: bytes) -> int:
    """Of RetryInfo; 0: there is none."""
    for packed in status_pb2.Status.FromString(details).details:
        found = error_details_pb2.RetryInfo()
        if packed.Unpack(found):
            return int(found.retry_delay.ToNanoseconds())
    return 0


def _metadata(details: bytes) -> dict[str, str]:
    for packed in status_pb2.Status.FromString(details).details:
        found = error_details_pb2.ErrorInfo()
        if packed.Unpack(found):
            return dict(found.metadata)
    return {}


def _spread(values_ns: Iterable[int]) -> Percentiles:
    return percentiles(np.array(list(values_ns), np.int64))


# ---------------------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Growth:
    """Resident bytes of the processes of one role over a time."""

    first: float  # median of its first fifth
    last: float  # … and of its last
    most: float
    bytes_per_minute: float  # the line of least squares

    @property
    def share(self) -> float:
        """By how much the last is more than the first, of the first."""
        return self.last / self.first - 1


Resident = tuple[int, dict[str, int]]  # (CLOCK_MONOTONIC nanoseconds, bytes by role)


def growth(samples: Sequence[Resident], begin_ns: int, end_ns: int) -> dict[str, Growth]:
    """By role; of those between the two times, of which there are two at least."""
    within = [sample for sample in samples if begin_ns <= sample[0] <= end_ns]
    if len(within) < 2:
        return {}
    minutes = np.array([(at - within[0][0]) / 60e9 for at, _ in within])
    part = max(1, len(within) // 5)
    found = {}
    for role in within[0][1]:
        values = np.array([sizes.get(role, 0) for _, sizes in within], float)
        first, last = float(np.median(values[:part])), float(np.median(values[-part:]))
        slope = float(np.polyfit(minutes, values, 1)[0])
        found[role] = Growth(first, last, float(values.max()), slope)
    return found


# -------------------------------------------------------------------------------------------------------------- recovery


@dataclass(frozen=True)
class Recovery:
    """Seconds after the last request was sent; NaN: not seen."""

    empty_s: float  # until nobody waits
    idle_s: float  # … and nobody runs
    fresh_s: float  # until the first of the requests sent then that had its token as soon as before the load


Load = tuple[int, int, int]  # (CLOCK_MONOTONIC nanoseconds, requests that wait, that run)


def recovery(sent_ns: int, loads: Sequence[Load], fresh: Sequence[tuple[int, float]], usual_s: float) -> Recovery:
    """fresh: requests sent one by one afterwards, each with the seconds to its first token; usual_s: what that may be."""

    def seconds(times: Iterable[int]) -> float:
        first = min((at for at in times if at >= sent_ns), default=None)
        return float("nan") if first is None else (first - sent_ns) / 1e9

    return Recovery(
        empty_s=seconds(at for at, waiting, _ in loads if not waiting),
        idle_s=seconds(at for at, waiting, running in loads if not waiting and not running),
        fresh_s=seconds(at for at, first_s in fresh if first_s <= usual_s),
    )
