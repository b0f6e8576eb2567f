"""How long a step takes: a measured table, or a roofline. Numbers in, nanoseconds out; no model is run here."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from bench.roofline import Machine, Shape


class CostError(Exception):
    """A file of step costs that can't be used; the text is one line."""


@dataclass(slots=True)
class StepWork:
    """What a step computes. A decode is a row that computes one token, padding counts as one; a chunk is a row with more."""

    decodes: int
    decode_context: int  # tokens that the decodes attend to, summed
    chunks: int = 0
    chunk_tokens: int = 0
    chunk_context: int = 0  # tokens in the cache after the step, summed over the chunks
    chunk_pairs: int = 0  # (token, token that it attends to) of the chunks
    sampled: int = 0  # rows whose logits are needed
    moved_blocks: int = 0  # swapped out or in
    copied_blocks: int = 0

    @property
    def tokens(self) -> int:
        return self.decodes + self.chunk_tokens


class CostModel(Protocol):
    def step_ns(self, work: StepWork) -> int: ...

    def describe(self) -> dict[str, Any]:
        """For a results file."""


@dataclass(frozen=True)
class Roofline:
    """The machine's limits, of which `bandwidth_share` and `peak_share` are reached."""

    shape: Shape
    machine: Machine
    bandwidth_share: float = 0.75
    peak_share: float = 0.75
    step_ns_more: int = 0  # launches, sampling and what else a step costs however small it is
    swap_bandwidth: float = 25e9  # bytes a second between device and host

    def step_ns(self, work: StepWork) -> int:
        bandwidth, peak, weights_s, body, head, kv_bytes, flops_per_pair = self._numbers
        flops_s = 2 * (body * work.tokens + head * work.sampled) / peak
        seconds = weights_s if weights_s > flops_s else flops_s
        seconds += work.decode_context * kv_bytes / bandwidth
        if work.chunks:
            seconds += max(work.chunk_context * kv_bytes / bandwidth, work.chunk_pairs * flops_per_pair / peak)
        return math.ceil(seconds * 1e9) + self.step_ns_more

    @cached_property
    def _numbers(self) -> tuple[float, float, float, int, int, int, int]:
        """What every step needs."""
        shape = self.shape
        bandwidth, peak = self.machine.bandwidth * self.bandwidth_share, self.machine.peak * self.peak_share
        weights_s = shape.weight_bytes / bandwidth
        return bandwidth, peak, weights_s, shape.body, shape.head, shape.kv_bytes_per_token, shape.flops_per_pair

    def swap_block_ns(self, block_size: int) -> int:
        return math.ceil(block_size * self.shape.kv_bytes_per_token / self.swap_bandwidth * 1e9)

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "roofline",
            "model": self.shape.name,
            "machine": asdict(self.machine),
            "bandwidth_share": self.bandwidth_share,
            "peak_share": self.peak_share,
            "step_ns_more": self.step_ns_more,
        }


@dataclass(frozen=True)
class Curve:
    """Straight lines between measured points, level before the first and on beyond the last."""

    at: tuple[float, ...]
    value: tuple[float, ...]

    def __call__(self, x: float) -> float:
        at, value = self.at, self.value
        if x <= at[0]:
            return value[0]
        last = len(at) - 1
        i = next((i for i in range(1, last) if x < at[i]), last) if last else 0
        if not last:
            return value[0]
        slope = (value[i] - value[i - 1]) / (at[i] - at[i - 1])
        return value[i] + (x - at[i]) * slope


@dataclass(frozen=True)
class Table:
    """Measured on one machine with one model, for the parts that a step's time is the sum of, in nanoseconds:

    tokens(T) of the layers for T tokens, with hardly any context; sampled(N) of the head and the sampler for N rows; context(R)
    for each token that R decodes attend to; chunk_pair for each pair of a token of a chunk and one that it attends to.
    """

    tokens: Curve
    sampled: Curve
    context: Curve
    chunk_pair: float
    facts: dict[str, Any]  # of the worker that was measured
    about: dict[str, Any]  # machine, commit, versions, model, how well the sum fits

    def step_ns(self, work: StepWork) -> int:
        total = self.tokens(work.tokens) + work.chunk_pairs * self.chunk_pair
        if work.sampled:
            total += self.sampled(work.sampled)
        if work.decodes:
            total += work.decode_context * self.context(work.decodes)
        return max(1, round(total))

    def describe(self) -> dict[str, Any]:
        return {"kind": "measured table", **self.about}


@dataclass(frozen=True)
class Line:
    """The sum of one number per token, row and token attended to, as it fits a recording."""

    base: float
    per_token: float
    per_row: float
    per_pair: float  # of a computed token and one that it attends to
    about: dict[str, Any]

    def step_ns(self, work: StepWork) -> int:
        pairs = work.decode_context + work.chunk_pairs
        rows = work.decodes + work.chunks
        return max(1, round(self.base + self.per_token * work.tokens + self.per_row * rows + self.per_pair * pairs))

    def describe(self) -> dict[str, Any]:
        return {"kind": "fitted line", **self.about}


def read_table(path: Path) -> Table:
    """Raises CostError."""
    try:
        entry = json.loads(path.read_text())
        parts = entry["ns"]
        return Table(
            tokens=_curve(parts["tokens"]),
            sampled=_curve(parts["sampled"]),
            context=_curve(parts["context"]),
            chunk_pair=float(parts["chunk_pair"]),
            facts=dict(entry["facts"]),
            about={key: value for key, value in entry.items() if key not in ("ns", "facts", "samples")},
        )
    except OSError as error:
        raise CostError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CostError(f"{path} holds no step costs: {error!r}; `python -m bench.measure_costs` makes such files") from None


def _curve(points: Sequence[Sequence[float]]) -> Curve:
    at, value = zip(*((float(x), float(y)) for x, y in points), strict=True)
    if list(at) != sorted(set(at)):
        raise ValueError("points are not in order")
    return Curve(at, value)
