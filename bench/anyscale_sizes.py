"""How large the headline experiment is: the post's own numbers, and how they are scaled for a CPU. Numbers only.

Anyscale, "How continuous batching enables 23x throughput in LLM inference" (2023): OPT-13B on an A100-40G, a burst of 1,000
requests of 512 prompt tokens, output lengths exponential with mean 128 and drawn again above a cap; caps 32, 128, 512, 1536.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from bench.draws import Exponential, Uniform
from bench.roofline import SHAPES, Shape
from bench.workloads import ANYSCALE_CAPS, ANYSCALE_KV_TOKENS, ANYSCALE_REQUESTS, ANYSCALE_STATIC_ROWS, Independent

PROMPT, MEAN = 512, 128  # tokens, of the post
BLOCK = 16  # tokens


@dataclass(frozen=True)
class Size:
    """Lengths in tokens."""

    shape: Shape
    divisor: int  # all lengths of the post ÷ this
    requests: int
    baseline_requests: int  # of transformers, which takes long: the first ones, in whole batches
    rounds: int
    latency_requests: int
    latency_rounds: int
    device: str = "cpu"
    dtype: str = "float32"
    random_weights: bool = False  # made up on the device; else a checkpoint is made
    max_rows: int = 64  # of the batch
    all_kv_tokens: int | None = None  # "all memory"; None: what the device has
    caps: tuple[int, ...] = ANYSCALE_CAPS  # of the post
    loads: tuple[float, ...] = (0.5, 2.0)  # × what static can serve; the post's are a factor of 4 apart, too

    @cached_property
    def prompt(self) -> int:
        return PROMPT // self.divisor

    @cached_property
    def mean(self) -> float:
        return MEAN / self.divisor

    def cap(self, post_cap: int) -> int:
        return post_cap // self.divisor

    def burst(self, post_cap: int) -> Independent:
        """Every request asks for the cap, and nobody knows which one ends before."""
        cap = self.cap(post_cap)
        name = f"anyscale-{post_cap}÷{self.divisor}"
        return Independent(name, Uniform(self.prompt, self.prompt), self._outputs(cap), max_tokens=cap)

    @property
    def latency(self) -> Independent:
        """Prompts of any length up to the post's, Poisson arrivals."""
        cap = self.cap(self.caps[-1])
        name = f"anyscale-latency÷{self.divisor}"
        return Independent(name, Uniform(1, self.prompt), self._outputs(cap), max_tokens=cap)

    def _outputs(self, cap: int) -> Exponential:
        return Exponential(self.mean, cap)

    def static_rows(self, post_cap: int) -> int:
        """The post's batch."""
        return ANYSCALE_STATIC_ROWS[post_cap]

    def kv_blocks(self, post_cap: int) -> int:
        """For every policy alike: just enough for the post's static batch, with room for prompt + cap in each row. At full
        scale that is the budget of the post's continuous engines, or up to 2.4% more."""
        return self.static_rows(post_cap) * -(-(self.prompt + self.cap(post_cap)) // BLOCK)

    def published_kv_tokens(self, post_cap: int) -> float:
        return ANYSCALE_KV_TOKENS[post_cap] / self.divisor

    @property
    def max_len(self) -> int:
        return self.prompt + self.cap(self.caps[-1])

    @property
    def scaling(self) -> str:
        """For people."""
        post = (
            "1,000 requests, 512 prompt tokens, output lengths of mean 128, caps 32 / 128 / 512 / 1536, OPT-13B on an A100-40G"
        )
        caps = " / ".join(str(self.cap(cap)) for cap in self.caps)
        ours = (
            f"{self.requests:,} requests, {self.prompt} prompt tokens, output lengths of mean {self.mean:g}, caps {caps},"
            f" {self.shape.name} in {self.dtype} on {'a GPU' if self.device == 'cuda' else 'this CPU'}"
        )
        return f"The post: {post}. Here: {ours}; KV cache for the post's static batches ({self._rows}), random weights."

    @property
    def _rows(self) -> str:
        return " / ".join(str(self.static_rows(cap)) for cap in self.caps)


CPU = Size(
    SHAPES["llama-30m"],
    divisor=4,
    requests=192,
    baseline_requests=48,
    rounds=3,
    latency_requests=150,
    latency_rounds=2,
    all_kv_tokens=64 * 512,
)
QUICK = replace(CPU, requests=48, baseline_requests=24, rounds=1, latency_requests=32, latency_rounds=1)
FULL = Size(
    SHAPES["opt-13b"],
    divisor=1,
    requests=ANYSCALE_REQUESTS,
    baseline_requests=64,
    rounds=3,
    latency_requests=100,
    latency_rounds=2,
    device="cuda",
    dtype="bfloat16",
    random_weights=True,
    max_rows=512,
)
SIZES = {"cpu": CPU, "quick": QUICK, "full": FULL}
