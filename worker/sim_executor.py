"""An executor without a model: tokens from a hash, time from a formula. No torch; numbers and the mirror only.

It refuses every plan that a real worker refuses (the checks are the mirror's), and its tokens depend on the request alone:
on the prompt, the seed, the output's index and the token's position, whatever the batch, the chunks and the preemptions. So a
scheduler tested with it is tested with a worker that forgives nothing and always answers the same.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from wire.messages import I32, ResultHeader, StepPlan, StepResult, WorkerFacts
from worker import philox
from worker.executor import Deliver, failure
from worker.sequences import PlanError, Sequences, StepRows

log = logging.getLogger(__name__)

_TOKEN_STREAM, _END_STREAM = 1, 2  # last counter word: apart from each other and from the sampler's, which is 0


@dataclass(frozen=True, slots=True)
class Latency:
    """Nanoseconds of a step: base + per_row · rows + per_token · tokens + per_context_token · tokens attended to.

    All 0, the default: as fast as it can. A memory-bound decode step is mostly `base_ns` (reading the weights) and
    `per_context_token_ns` (reading keys and values); prefill is mostly `per_token_ns` (arithmetic). Llama-3-8B in bfloat16 on
    an H200, by the roofline: base 3,500,000, per_token 17,500, per_context_token 30, per_row 0.
    """

    base_ns: int = 0
    per_row_ns: int = 0
    per_token_ns: int = 0
    per_context_token_ns: int = 0

    def of(self, rows: StepRows) -> int:
        context = int((rows.first + rows.count).sum())
        tokens = int(rows.count.sum())
        rows_ns = self.per_row_ns * len(rows.slots)
        return self.base_ns + rows_ns + self.per_token_ns * tokens + self.per_context_token_ns * context


class SimExecutor:
    """Sleeps as long as the formula says, less what the bookkeeping took. A sequence with stop tokens draws its first one
    with probability `end_chance` a token, and no stop token otherwise."""

    def __init__(
        self,
        facts: WorkerFacts,
        latency: Latency = Latency(),  # noqa: B008  (frozen)
        end_chance: float = 0.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        assert 0.0 <= end_chance <= 1.0
        self.facts = facts
        self._latency, self._sleep = latency, sleep
        self._end_below = np.uint64(round(end_chance * 2**32))
        self._sequences = Sequences(facts)
        self._prompt_hash = np.zeros(facts.max_batch_rows, np.uint64)

    def reset(self) -> None:
        self._sequences.reset()

    def submit(self, plan: StepPlan, deliver: Deliver) -> None:
        began = time.perf_counter_ns()
        try:
            rows = self._apply(plan)
        except PlanError as error:
            log.error("step %d: %s", plan.header.step_id, error)
            return deliver(failure(plan, error))
        tokens = self._tokens(rows)
        self._sequences.feed(rows, tokens)
        slots = rows.sampled_slots.astype(np.uint16)
        duration_ns = self._wait(rows, began)
        header = ResultHeader(plan.header.group, plan.header.epoch, plan.header.step_id, duration_ns)
        deliver(StepResult(header, tokens, slots))

    def close(self) -> None:
        pass

    def _apply(self, plan: StepPlan) -> StepRows:
        rows = self._sequences.apply(plan)
        for start in plan.header.starts:
            prompt = self._sequences.tokens[start.slot, : start.num_prompt_tokens].astype("<i4")
            digest = hashlib.blake2b(prompt.tobytes(), digest_size=8).digest()
            self._prompt_hash[start.slot] = int.from_bytes(digest, "little")
        return rows

    def _tokens(self, rows: StepRows) -> I32:
        sequences, slots = self._sequences, rows.sampled_slots
        drawing = rows.drawing[: rows.num_sampled]
        position = (rows.first[drawing] + rows.count[drawing]).astype(np.uint64)
        key = self._prompt_hash[slots] ^ sequences.seed[slots]
        index = sequences.output_index[slots].astype(np.uint64)
        zeros = np.zeros(len(slots), np.uint64)
        tokens = (philox.words(key, zeros, position, index, _TOKEN_STREAM)[:, 0] % self.facts.vocab_size).astype(np.int32)
        self._avoid_stops(tokens, sequences.stop_token_ids[slots])
        if self._end_below:
            stops = sequences.stop_token_ids[slots, 0]
            ends = philox.words(key, zeros, position, index, _END_STREAM)[:, 0] < self._end_below
            late = position.astype(np.int64) - sequences.num_prompt[slots] >= sequences.min_tokens[slots]
            tokens = np.where(ends & late & (stops >= 0), stops, tokens)
        return tokens

    def _avoid_stops(self, tokens: I32, stops: I32) -> None:
        """Moves each token that is one of its row's stop tokens on to the next one that is not (if there is one)."""
        for _ in range(min(stops.shape[1], self.facts.vocab_size - 1)):
            clash = (tokens[:, None] == stops).any(axis=1)
            if not clash.any():
                return
            tokens[clash] = (tokens[clash] + 1) % self.facts.vocab_size

    def _wait(self, rows: StepRows, began: int) -> int:
        wanted = self._latency.of(rows)
        left = wanted - (time.perf_counter_ns() - began)
        if left > 0:
            self._sleep(left / 1e9)
        return max(wanted, time.perf_counter_ns() - began)


def sim_facts(
    *,
    vocab_size: int = 32_000,
    max_model_len: int = 4_096,
    block_size: int = 16,
    num_blocks: int = 4_096,
    max_batch_rows: int = 64,
    max_step_tokens: int = 512,
    kv_bytes_per_token: int = 131_072,
    num_parameters: int = 0,
    architecture: str = "sim",
    dtype: str = "none",
    pid: int = 0,
) -> WorkerFacts:
    """Facts of a simulated worker; the defaults are a small Llama's."""
    return WorkerFacts(
        device="sim",
        pid=pid,
        description="simulated worker, no model",
        architecture=architecture,
        dtype=dtype,
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        block_size=block_size,
        num_blocks=num_blocks,
        kv_bytes_per_token=kv_bytes_per_token,
        num_parameters=num_parameters,
        max_batch_rows=max_batch_rows,
        max_step_tokens=max_step_tokens,
    )

