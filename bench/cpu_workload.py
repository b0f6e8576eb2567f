"""What is asked of every engine on a CPU, what one run of it came to, and how runs are shown side by side.

Carousel, transformers and the peers are all given `offline_requests` and all end up as an `Outcome`. Knows no engine. Needs
numpy only (`table` needs rich), so that a peer's own environment can import it.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np

from bench.draws import Exponential, Floats, Uniform, generators

if TYPE_CHECKING:
    from rich.table import Table

Times: TypeAlias = list[list[float]]  # of every request, when its tokens came, in seconds since all were offered

_FIRST_ID = 5  # the ids before it may be special tokens


@dataclass(frozen=True)
class Request:
    """Greedy, the end-of-sequence token ignored: it makes max_tokens tokens."""

    prompt_ids: list[int]
    max_tokens: int


def offline_requests(
    vocab_size: int, count: int, prompt_len: int = 128, mean: float = 64, cap: int = 512, seed: int = 0
) -> list[Request]:
    """The workload of target C1, all offered at once: random prompts, exponential output lengths, drawn again above the cap.
    The first requests are the same however many are drawn."""
    prompts, outputs = generators(seed, 2)
    ids = Uniform(_FIRST_ID, vocab_size - 1)
    output = Exponential(mean, cap)
    return [Request(ids.draw(prompts, prompt_len).tolist(), int(output.draw(outputs, 1)[0])) for _ in range(count)]


@dataclass(frozen=True)
class Spread:
    """Seconds, or None where an engine does not tell."""

    p50: float | None
    p99: float | None

    @classmethod
    def of(cls, values: Sequence[float] | Floats) -> Self:
        if not len(values):
            return cls(None, None)
        p50, p99 = np.quantile(np.asarray(values), (0.5, 0.99), method="inverted_cdf")  # nearest rank
        return cls(float(p50), float(p99))


@dataclass(frozen=True)
class Outcome:
    """One run of one engine."""

    engine: str
    requests: int
    prompt_tokens: int
    output_tokens: int
    seconds: float  # from the offer to the last token
    ttft_s: Spread
    itl_s: Spread  # over all tokens of all requests; tokens that come in one piece are 0 s apart
    e2e_s: Spread
    peak_bytes: int | None  # peak_tree_bytes
    ready_s: float | None = None  # from exec to the first request taken
    single_tokens_per_s: float | None = None  # one request alone, without its first token
    limit_share: float | None = None  # of what the machine could do: best seconds of the same requests ÷ seconds
    note: str = ""  # what a reader of the numbers must know

    @property
    def output_tokens_per_s(self) -> float:
        return self.output_tokens / self.seconds

    @property
    def tokens_per_s(self) -> float:
        """Prompt and output."""
        return (self.prompt_tokens + self.output_tokens) / self.seconds

    @classmethod
    def of(
        cls, engine: str, requests: Sequence[Request], token_s: Sequence[Sequence[float]], peak_bytes: int | None, **more: Any
    ) -> Self:
        """token_s: Times."""
        counts = [len(times) for times in token_s]
        assert counts == [request.max_tokens for request in requests], f"{engine} made {counts} tokens"
        return cls(
            engine=engine,
            requests=len(requests),
            prompt_tokens=sum(len(request.prompt_ids) for request in requests),
            output_tokens=sum(counts),
            seconds=max(times[-1] for times in token_s),
            ttft_s=Spread.of([times[0] for times in token_s]),
            itl_s=Spread.of(np.concatenate([np.diff(times) for times in token_s])),
            e2e_s=Spread.of([times[-1] for times in token_s]),
            peak_bytes=peak_bytes,
            **more,
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"output_tokens_per_s": self.output_tokens_per_s, "tokens_per_s": self.tokens_per_s}

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> Self:
        fields = {name: value for name, value in line.items() if name in cls.__dataclass_fields__}
        return cls(**fields | {name: Spread(**fields[name]) for name in ("ttft_s", "itl_s", "e2e_s")})


def single_rate(times: Sequence[float]) -> float:
    """Tokens a second of one sequence alone, without its first token."""
    return (len(times) - 1) / (times[-1] - times[0])


def together_rate(token_s: Sequence[Sequence[float]]) -> float:
    """Tokens a second while all of them decode: after the last one's first token, until the first has all."""
    begin, end = max(times[0] for times in token_s), min(times[-1] for times in token_s)
    assert begin < end, "they never decoded together"
    return sum(begin < at <= end for times in token_s for at in times) / (end - begin)


@dataclass(frozen=True)
class Noise:
    """A number over the rounds."""

    least: float
    median: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        return cls(min(values), statistics.median(values), max(values))


def noise(outcomes: Sequence[Outcome], number: Callable[[Outcome], float | None]) -> Noise | None:
    """None when any of the runs lacks the number."""
    values = [value for outcome in outcomes if (value := number(outcome)) is not None]
    return Noise.of(values) if values and len(values) == len(outcomes) else None


_COLUMNS = (
    "out",
    "min–max",
    "in+out",
    "alone",
    "of limit",
    "TTFT p50 / p99",
    "ITL p50 / p99",
    "E2E p50 / p99",
    "peak",
    "ready",
)


def table(runs: Sequence[Sequence[Outcome]]) -> Table:
    """One line for each engine: medians of its rounds, speeds in tokens a second. For rich."""
    from rich import box
    from rich.table import Table

    found = Table("engine", box=box.SIMPLE_HEAD)
    for column in _COLUMNS:
        found.add_column(column, justify="right", no_wrap=True)
    for outcomes in runs:
        found.add_row(outcomes[0].engine, *_cells(outcomes))
    return found


def _cells(outcomes: Sequence[Outcome]) -> list[str]:
    speed = noise(outcomes, lambda o: o.output_tokens_per_s)
    assert speed is not None
    limit, peak = (_median(outcomes, number) for number in (lambda o: o.limit_share, lambda o: o.peak_bytes))
    return [
        _plain(speed.median),
        f"{_plain(speed.least)}–{_plain(speed.most)}",
        _plain(_median(outcomes, lambda o: o.tokens_per_s)),
        _plain(_median(outcomes, lambda o: o.single_tokens_per_s)),
        "–" if limit is None else f"{limit:.0%}",
        *(_spread([getattr(outcome, name) for outcome in outcomes]) for name in ("ttft_s", "itl_s", "e2e_s")),
        "–" if peak is None else f"{peak / 2**30:.2f} GiB",
        _seconds(_median(outcomes, lambda o: o.ready_s)),
    ]


def _spread(spreads: Sequence[Spread]) -> str:
    found = [[getattr(spread, share) for spread in spreads] for share in ("p50", "p99")]
    return " / ".join(_seconds(None if None in values else statistics.median(values)) for values in found)


def _median(outcomes: Sequence[Outcome], number: Callable[[Outcome], float | None]) -> float | None:
    found = noise(outcomes, number)
    return None if found is None else found.median


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} s" if value >= 0.9995 else f"{value * 1e3:.0f} ms"


def peak_tree_bytes(pid: int) -> int | None:
    """The most memory resident in a living process and its descendants, each at its own peak (VmHWM), summed: at least the peak
    of the sum, and pages that two of them share count twice. None where there is no /proc."""
    if not Path("/proc/self/status").exists():
        return None
    status = _statuses()
    children: dict[int, list[int]] = {}
    for child, (parent, _) in status.items():
        children.setdefault(parent, []).append(child)
    total, left = 0, [pid]
    while left:
        one = left.pop()
        total += status.get(one, (0, 0))[1]
        left += children.get(one, [])
    return total


def _statuses() -> dict[int, tuple[int, int]]:
    """(parent, VmHWM in bytes) of every process."""
    found = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            lines = Path("/proc", name, "status").read_text().splitlines()
        except OSError:
            continue  # it has ended
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        found[int(name)] = int(fields["PPid"]), int(fields.get("VmHWM", "0 kB").split()[0]) * 1024
    return found
