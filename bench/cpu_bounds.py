"""What is possible at best on a CPU whose limits were measured, and what a static batch needs. Pure arithmetic.

C1, share of the bound of the ratio. The ratio is Carousel's tokens/s ÷ that of transformers' static batches of 4. Its bound is
what the ratio would be if Carousel ran at the machine's limit and static stayed as it was measured, so static's time cancels:

    bound = limit ÷ static measured        share = ratio ÷ bound = (best seconds of the workload) ÷ (Carousel's seconds)

    best seconds = max(products ÷ matrix peak + attention ÷ fp32 peak,  (steps · weights + keys and values) ÷ read bandwidth)

with steps = the longest output: all rows are packed into every step, and weights are read while products of other rows are
computed. No schedule is faster, as every step takes at least the longer of its two parts. (PERFORMANCE's serial bound, prefill
first and then all rows step by step, is `serial_seconds`: slower, and printed beside it.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bench.cpu_workload import Request
from bench.roofline import Demand, Shape


@dataclass(frozen=True)
class Limits:
    """Of this machine, on all threads."""

    fp32: float  # operations a second of a large matrix product
    int8: float  # the same of one in 8 bits, summed in 32
    bandwidth: float  # bytes a second, reading


@dataclass(frozen=True)
class Cost:
    """A model in a type of weights, on a machine."""

    shape: Shape
    limits: Limits
    int8: bool = False  # the weights; keys and values stay float32

    @property
    def weight_bytes(self) -> int:
        """Read by a step."""
        return replace(self.shape, bytes_per_value=1 if self.int8 else 4).weight_bytes

    @property
    def kv_bytes(self) -> int:
        """Of one token."""
        return replace(self.shape, bytes_per_value=4).kv_bytes_per_token

    @property
    def peak(self) -> float:
        """Of products with weights."""
        return self.limits.int8 if self.int8 else self.limits.fp32

    def compute_seconds(self, rows: int, heads: int, pairs: int) -> float:
        """Of tokens through the layers, of tokens through the head, and of (token, token attended to)."""
        products = 2 * (self.shape.body * rows + self.shape.head * heads)
        return products / self.peak + self.shape.flops_per_pair * pairs / self.limits.fp32

    def step_seconds(self, rows: int, context: int) -> float:
        """At least, for a decode of these rows that attend to `context` tokens together (PERFORMANCE, section 2)."""
        weights = self.weight_bytes / self.limits.bandwidth
        return max(weights, self.compute_seconds(rows, rows, 0)) + context * self.kv_bytes / self.limits.bandwidth


def demand(requests: Sequence[Request]) -> Demand:
    """The first output token comes with the prompt; the k-th decode attends to the prompt and k tokens."""
    prompts = np.array([len(request.prompt_ids) for request in requests])
    decodes = np.array([request.max_tokens - 1 for request in requests])
    return Demand(
        prompt_tokens=int(prompts.sum()),
        output_tokens=int(decodes.sum()),
        pairs=int((prompts * (prompts + 1) // 2).sum()),
        context=int((decodes * prompts + decodes * (decodes + 1) // 2).sum()),
        longest_output=int(decodes.max(initial=0)),
    )


def best_seconds(requests: Sequence[Request], cost: Cost) -> float:
    """No schedule of these requests is faster on this machine."""
    asked = demand(requests)
    tokens = asked.prompt_tokens + asked.output_tokens
    compute = cost.compute_seconds(tokens, asked.output_tokens + len(requests), asked.pairs + asked.context)
    steps = asked.longest_output + 1
    return max(compute, (steps * cost.weight_bytes + asked.context * cost.kv_bytes) / cost.limits.bandwidth)


def serial_seconds(requests: Sequence[Request], cost: Cost) -> float:
    """All prompts first, then all rows step by step, each as fast as can be and gone when it has its tokens."""
    return _prefill_seconds(requests, cost) + sum(
        cost.step_seconds(len(alive), sum(len(request.prompt_ids) + step for request in alive))
        for step in range(1, max(request.max_tokens for request in requests))
        if (alive := [request for request in requests if request.max_tokens > step])
    )


def static_best_seconds(requests: Sequence[Request], batch: int, cost: Cost) -> float:
    """The same in batches, one after the other, whose rows all go on until the longest has its tokens."""
    return sum(
        serial_seconds([Request(request.prompt_ids, longest(group)) for request in group], cost)
        for group in groups(requests, batch)
    )


def _prefill_seconds(requests: Sequence[Request], cost: Cost) -> float:
    asked = demand(requests)
    compute = cost.compute_seconds(asked.prompt_tokens, len(requests), asked.pairs)
    return max(compute, cost.weight_bytes / cost.limits.bandwidth)


def groups(requests: Sequence[Request], batch: int) -> list[Sequence[Request]]:
    return [requests[first : first + batch] for first in range(0, len(requests), batch)]


def longest(group: Sequence[Request]) -> int:
    return max(request.max_tokens for request in group)


@dataclass(frozen=True)
class Pace:
    """Of static batches as measured, in the mean over batches and steps."""

    first_s: float  # from a batch's begin to its first tokens
    step_s: float

    def seconds(self, requests: Sequence[Request], batch: int) -> float:
        """What all of them would take. Exact where batches of equal size take equal steps: prompts are equally long, and a
        step's time hardly depends on the rows' contexts; so a few measured batches tell, whatever output lengths they had."""
        return sum(self.first_s + (longest(group) - 1) * self.step_s for group in groups(requests, batch))


def pace(requests: Sequence[Request], token_s: Sequence[Sequence[float]], batch: int) -> Pace:
    """From the times of the tokens of batches that ran one after the other from 0 on."""
    begin = first_s = steps_s = 0.0
    steps = 0
    batches = groups(requests, batch)
    for number, group in enumerate(batches):
        times = max(token_s[number * batch : number * batch + len(group)], key=len)
        first_s += times[0] - begin
        steps_s += times[-1] - times[0]
        steps += len(times) - 1
        begin = times[-1]
    return Pace(first_s / len(batches), steps_s / max(1, steps))


def decode_share(tokens_per_s: float, cost: Cost) -> float:
    """C3: of read bandwidth, of one sequence that decodes alone: weights only, its keys and values not counted."""
    return tokens_per_s * cost.weight_bytes / cost.limits.bandwidth


def prefill_share(tokens: int, seconds: float, cost: Cost) -> float:
    """C3: of the matrix peak, of a prompt computed to its first token: layers, attention, one row of the head."""
    return cost.compute_seconds(tokens, 1, tokens * (tokens + 1) // 2) / seconds
