"""Seeded draws of lengths and of times between arrivals. Numbers only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

CHUNK = 4096  # numbers drawn at a time

Generator = np.random.Generator
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Lengths:
    """Lengths in tokens with a given mean, median and 99th percentile.

    Half of the draws are below the median, lognormal with the standard deviation `log_sd` of the logarithm. The other half lies
    on median + (p99 - median) · t**k, with t even in [0, 50/49], and k such that the mean comes out: the traces' means, medians
    and tails fit no lognormal (that of the Azure conversations has a p99 of 7,578 tokens instead of 4,142).
    """

    mean: float
    median: float
    p99: float
    log_sd: float

    @cached_property
    def exponent(self) -> float:
        """k, by bisection: the mean falls as it grows."""
        low, high = 0.01, 100.0
        assert self._mean(high) < self.mean < self._mean(low), "no curve of this kind has such a mean"
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self._mean(middle) > self.mean else (low, middle)
        return low

    def _mean(self, exponent: float) -> float:
        below = self.median * math.exp(self.log_sd**2 / 2) * math.erfc(self.log_sd / math.sqrt(2)) / 2
        mean: float = below + self.median / 2 + (self.p99 - self.median) * 0.49 / (exponent + 1) * (50 / 49) ** (exponent + 1)
        return mean

    def draw(self, random: Generator, count: int) -> Ints:
        above = random.random(count) < 0.5
        below = self.median * np.exp(-self.log_sd * np.abs(random.standard_normal(count)))
        curve = self.median + (self.p99 - self.median) * (random.random(count) * 50 / 49) ** self.exponent
        return np.maximum(1, np.rint(np.where(above, curve, below))).astype(np.int64)


@dataclass(frozen=True)
class Exponential:
    """Exponential lengths, drawn again while above `cap`; a length is the next whole number."""

    mean: float
    cap: int

    def draw(self, random: Generator, count: int) -> Ints:
        lengths = np.ceil(random.exponential(self.mean, count))
        while (above := lengths > self.cap).any():
            lengths[above] = np.ceil(random.exponential(self.mean, int(above.sum())))
        return np.maximum(1, lengths).astype(np.int64)


@dataclass(frozen=True)
class Uniform:
    """Every whole number from `low` to `high` alike."""

    low: int
    high: int

    def draw(self, random: Generator, count: int) -> Ints:
        return random.integers(self.low, self.high + 1, count)


def gamma_gaps(variation: float) -> Callable[[Generator, int], Floats]:
    """Times between arrivals with mean 1 and the given coefficient of variation; 1 is a Poisson process."""
    shape = 1 / variation**2
    return lambda random, count: random.gamma(shape, 1 / shape, count)


def arrivals_ns(gaps: Callable[[Generator, int], Floats], rate: float, random: Generator) -> Iterator[int]:
    """Arrival times at `rate` a second, the first one gap after 0; an infinite rate: all at 0. The same draws at every rate: a
    workload at another rate is the same one at another speed."""
    assert rate > 0
    now = 0.0
    while True:
        times = now + np.cumsum(gaps(random, CHUNK))
        now = float(times[-1])
        yield from np.rint(times * (1e9 / rate)).astype(np.int64).tolist()


def stream(draw: Callable[[Generator, int], Ints], random: Generator) -> Iterator[int]:
    """Endless, drawn in chunks."""
    while True:
        yield from draw(random, CHUNK).tolist()


def generators(seed: int, count: int) -> list[Generator]:
    """Independent ones: what one of them draws does not depend on how much another one has drawn."""
    return [np.random.Generator(np.random.PCG64(child)) for child in np.random.SeedSequence(seed).spawn(count)]
