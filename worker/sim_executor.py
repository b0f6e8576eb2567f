"""An executor without a model: tokens from a hash, time from a formula. No torch; numbers and the mirror only.

It refuses every plan that a real worker refuses (the checks are the mirror's), and its tokens depend on the request alone:
on the prompt, the seed, the output's index and the token's position, whatever the batch, the chunks and the preemptions. So a
scheduler tested with it is tested with a worker that forgives nothing and always answers the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcache.sizing import DEFAULT_CPU_BYTES, bytes_per_token, format_bytes, size_host_pool, size_pool
from wire.messages import I32, ResultHeader, StepPlan, StepResult, WorkerFacts
from worker import philox
from worker.config import ConfigError, WorkerConfig
from worker.executor import Deliver, failure
from worker.sequences import PlanError, Sequences, StepRows

log = logging.getLogger(__name__)

_TOKEN_STREAM, _END_STREAM = 1, 2  # last counter word: apart from each other and from the sampler's, which is 0


@dataclass(frozen=True, slots=True)
class Latency:
    """Nanoseconds of a step: base + per_row · rows + per_token · tokens + per_context_token · tokens attended to
    + per_swapped_block · blocks swapped out or in + per_copied_block · blocks copied.

    All 0, the default: as fast as it can. A memory-bound decode step is mostly `base_ns` (reading the weights) and
    `per_context_token_ns` (reading keys and values); prefill is mostly `per_token_ns` (arithmetic). Llama-3-8B in bfloat16 on
    an H200, by the roofline: base 3,500,000, per_token 17,500, per_context_token 30, per_row 0; its blocks of 16 tokens have
    2 MiB: per_swapped_block 42,000 over a bus of 50 GB/s, per_copied_block 1,000.
    """

    base_ns: int = 0
    per_row_ns: int = 0
    per_token_ns: int = 0
    per_context_token_ns: int = 0
    per_swapped_block_ns: int = 0
    per_copied_block_ns: int = 0

    def of(self, rows: StepRows, num_swapped: int = 0, num_copied: int = 0) -> int:
        context = int((rows.first + rows.count).sum())
        tokens = int(rows.count.sum())
        rows_ns = self.per_row_ns * len(rows.slots)
        moves_ns = self.per_swapped_block_ns * num_swapped + self.per_copied_block_ns * num_copied
        return self.base_ns + rows_ns + self.per_token_ns * tokens + self.per_context_token_ns * context + moves_ns


class SimExecutor:
    """Sleeps as long as the formula says, less what the bookkeeping took by `clock` (nanoseconds). A sequence with stop tokens
    draws its first one with probability `end_chance` a token, and no stop token otherwise."""

    def __init__(
        self,
        facts: WorkerFacts,
        latency: Latency = Latency(),
        end_chance: float = 0.0,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        assert 0.0 <= end_chance <= 1.0
        self.facts = facts
        self._latency, self._sleep, self._clock = latency, sleep, clock
        self._end_below = np.uint64(round(end_chance * 2**32))
        self.sequences = Sequences(facts)
        self._prompt_hash = np.zeros(facts.max_batch_rows, np.uint64)

    @staticmethod
    def of(config: WorkerConfig, model_dir: Path | None) -> SimExecutor:
        """As told by a worker's options, with the shape of the model in `model_dir` if there is one."""
        shape = _Shape(vocab_size=config.sim.vocab_size)
        if model_dir is not None:
            shape, wished = _shape_of(model_dir), config.max_model_len
            if wished is not None and wished > shape.longest:
                raise ConfigError(f"--max-model-len {wished:,} is beyond what the model can, {shape.longest:,} tokens")
        rows, tokens = config.limits("sim")
        pool = size_pool(
            bytes_per_token=shape.kv_bytes_per_token,
            block_size=config.block_size,
            model_len=shape.max_model_len,
            max_batch_rows=rows,
            available_bytes=sys.maxsize,  # nothing is stored
            share=1.0,
            default_bytes=DEFAULT_CPU_BYTES,
            wish=config.wish,
        )
        host_blocks = config.sim.host_blocks or size_host_pool(pool.block_bytes, sys.maxsize, config.swap_bytes or 0)
        swap = f", {format_bytes(host_blocks * pool.block_bytes)} of host memory to swap to" if host_blocks else ""
        facts = sim_facts(
            vocab_size=shape.vocab_size,
            max_model_len=pool.max_model_len,
            block_size=pool.block_size,
            num_blocks=pool.num_blocks,
            max_batch_rows=rows,
            max_step_tokens=tokens,
            kv_bytes_per_token=pool.bytes_per_token,
            architecture=shape.architecture,
            dtype=shape.dtype,
            pid=os.getpid(),
            description=f"simulated {shape.architecture}, no model; KV cache {pool}{swap}",
            num_host_blocks=host_blocks,
            swap_block_ns=config.sim.swap_block_ns,
        )
        sim = config.sim
        latency = Latency(
            sim.base_ns, sim.per_row_ns, sim.per_token_ns, sim.per_context_token_ns, sim.swap_block_ns, sim.copy_block_ns
        )
        return SimExecutor(facts, latency, sim.end_chance)

    def reset(self) -> None:
        self.sequences.reset()

    def submit(self, plan: StepPlan, deliver: Deliver) -> None:
        began = self._clock()
        try:
            rows = self._apply(plan)
        except PlanError as error:
            log.error("step %d: %s", plan.header.step_id, error)
            return deliver(failure(plan, error))
        tokens = self._tokens(rows)
        self.sequences.feed(rows, tokens)
        slots = rows.sampled_slots.astype(np.uint16)
        num_swapped = len(plan.swap_out_blocks) + len(plan.swap_in_blocks)
        duration_ns = self._wait(self._latency.of(rows, num_swapped, len(plan.copy_to)), began)
        header = ResultHeader(plan.header.group, plan.header.epoch, plan.header.step_id, duration_ns)
        deliver(StepResult(header, tokens, slots))

    def close(self) -> None:
        pass

    def _apply(self, plan: StepPlan) -> StepRows:
        rows = self.sequences.apply(plan)
        for start in plan.header.starts:
            self._prompt_hash[start.slot] = prompt_hash(self.sequences.tokens[start.slot, : start.num_prompt_tokens])
        return rows

    def _tokens(self, rows: StepRows) -> I32:
        sequences, slots = self.sequences, rows.sampled_slots
        drawing = rows.drawing[: rows.num_sampled]
        position = rows.first[drawing] + rows.count[drawing]
        return draw(
            key=self._prompt_hash[slots] ^ sequences.columns.seed[slots],
            position=position,
            output_index=sequences.output_index[slots],
            stops=sequences.columns.stop_token_ids[slots],
            may_end=position - sequences.num_prompt[slots] >= sequences.columns.min_tokens[slots],
            vocab_size=self.facts.vocab_size,
            end_below=self._end_below,
        )

    def _wait(self, wanted: int, began: int) -> int:
        left = wanted - (self._clock() - began)
        if left > 0:
            self._sleep(left / 1e9)
        return max(wanted, self._clock() - began)


def prompt_hash(prompt: I32) -> int:
    """64 bits that stand for the prompt in all draws."""
    return int.from_bytes(hashlib.blake2b(prompt.astype("<i4").tobytes(), digest_size=8).digest(), "little")


def draw(
    key: NDArray[np.uint64],  # [N] prompt_hash ^ seed
    position: NDArray[np.int64],  # [N] of the token that is drawn
    output_index: I32,  # [N]
    stops: I32,  # [N, most stop tokens] −1 past the last
    may_end: NDArray[np.bool_],  # [N] min_tokens are out
    vocab_size: int,
    end_below: np.uint64,  # 2³² · the chance of the first stop token
) -> I32:
    """Tokens [N], each of its own row's numbers only."""
    counters = np.zeros(len(key), np.uint64), position.astype(np.uint64), output_index.astype(np.uint64)
    tokens = (philox.words(key, *counters, _TOKEN_STREAM)[:, 0] % vocab_size).astype(np.int32)
    _avoid_stops(tokens, stops, vocab_size)
    if end_below:
        ends = philox.words(key, *counters, _END_STREAM)[:, 0] < end_below
        tokens = np.where(ends & may_end & (stops[:, 0] >= 0), stops[:, 0], tokens)
    return tokens


def _avoid_stops(tokens: I32, stops: I32, vocab_size: int) -> None:
    """Moves each token that is one of its row's stop tokens on to the next one that is not (if there is one)."""
    for _ in range(min(stops.shape[1], vocab_size - 1)):
        clash = (tokens[:, None] == stops).any(axis=1)
        if not clash.any():
            return
        tokens[clash] = (tokens[clash] + 1) % vocab_size


@dataclass(frozen=True, slots=True)
class _Shape:
    """What of a model shows in facts; the defaults are a small Llama's."""

    vocab_size: int = 32_000
    max_model_len: int = 4_096
    kv_bytes_per_token: int = 131_072
    architecture: str = "model"
    dtype: str = "none"
    longest: int = 4_096  # tokens that the model can take


def _shape_of(model_dir: Path) -> _Shape:
    """Read loosely from config.json: nothing is computed with it."""
    path = model_dir / "config.json"
    try:
        return _parse_shape(json.loads(path.read_text()))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except KeyError as error:
        raise ConfigError(f"{path}: {error} is missing") from None
    except (TypeError, ValueError, AttributeError):
        raise ConfigError(f"{path} is not a model's configuration") from None


def _parse_shape(config: dict[str, Any]) -> _Shape:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    kv_heads = config.get("num_key_value_heads") or heads
    max_model_len = config.get("max_position_embeddings", _Shape().max_model_len)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    stretched = rope.get("factor", 1.0) * rope.get("original_max_position_embeddings", max_model_len)  # by yarn
    return _Shape(
        vocab_size=config["vocab_size"],
        max_model_len=max_model_len,
        kv_bytes_per_token=bytes_per_token(config["num_hidden_layers"], kv_heads, head_dim, 4 if dtype == "float32" else 2),
        architecture=config.get("architectures", ["model"])[0],
        dtype=dtype,
        longest=max(max_model_len, int(stretched) if rope.get("rope_type", rope.get("type")) == "yarn" else 0),
    )


def sim_facts(
    *,
    vocab_size: int = 32_000,
    max_model_len: int = 4_096,
    block_size: int = 16,
    num_blocks: int = 4_096,
    max_batch_rows: int = 64,
    max_step_tokens: int = 512,
    kv_bytes_per_token: int = 131_072,
    architecture: str = "model",
    dtype: str = "none",
    pid: int = 0,
    description: str = "simulated model",
    num_host_blocks: int = 0,
    swap_block_ns: int = 0,
) -> WorkerFacts:
    """Facts of a simulated worker."""
    return WorkerFacts(
        device="sim",
        pid=pid,
        description=description,
        architecture=architecture,
        dtype=dtype,
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        block_size=block_size,
        num_blocks=num_blocks,
        kv_bytes_per_token=kv_bytes_per_token,
        num_parameters=0,
        max_batch_rows=max_batch_rows,
        max_step_tokens=max_step_tokens,
        num_host_blocks=num_host_blocks,
        swap_block_ns=swap_block_ns,
    )
