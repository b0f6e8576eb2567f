"""The executor with a model: loads it, sizes the KV pool, computes steps. Knows tensors and plans; no socket.

A step that fails, for want of memory or by a fault, becomes a StepFailed of one line; the trace goes to this process's log,
and the executor can go on after reset().
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from kvcache.sizing import (
    CPU_SHARE,
    CUDA_SHARE,
    DEFAULT_CPU_BYTES,
    PoolSize,
    SizingError,
    available_memory,
    format_bytes,
    size_host_pool,
    size_pool,
)
from kvcache.storage import KVStorage
from wire import PlanHeader, ResultHeader, SamplingSpec, SequenceStart, StepPlan, StepResult, WorkerFacts
from wire.messages import I32
from worker import attention, compiled
from worker.batch import build
from worker.config import ConfigError, WorkerConfig
from worker.executor import Answer, Deliver, failure
from worker.logprobs import OfDraws, Told, of_prompts
from worker.model_config import LongRope, ModelConfig
from worker.models import Model, footprint, load_model
from worker.sampler import sample
from worker.sequences import PlanError, Sequences, StepRows

log = logging.getLogger(__name__)

_SWAP_BLOCKS, _SWAP_ROUNDS = 64, 5  # moved at a time, and how often, to measure what a block takes


class ModelExecutor:
    """Computes each step here and now, in the thread that submits it."""

    def __init__(self, model: Model, kv: KVStorage, facts: WorkerFacts, device: torch.device) -> None:
        self.facts = facts
        self._model, self._kv, self._device = model, kv, device
        self._attention = attention.choose(device)
        self._sequences = Sequences(facts)

    @staticmethod
    def of(config: WorkerConfig, model_dir: Path) -> ModelExecutor:
        """As told by a worker's options. Raises ModelError, SizingError or ConfigError."""
        device = _device(config.device)
        threads = _set_threads(config.threads) if device.type == "cpu" else 0
        loops = compiled.load() if device.type == "cpu" else ""
        wished = ModelConfig.read(model_dir, config.max_model_len)
        dtype = _dtype(config.dtype, device, wished)
        _check_quantization(config, device)
        _check_memory(config, model_dir, wished, dtype, device)
        model, shape = load_model(model_dir, dtype, device, wished.max_model_len, config.quantization)
        pool = _size_pool(config, shape, dtype, device, _available(device))
        if pool.lowered_from is not None and isinstance(shape.rope, LongRope):  # its angles depend on the length
            del model
            model, shape = load_model(model_dir, dtype, device, pool.max_model_len, config.quantization)
        _release_freed_memory()
        host_blocks = _host_blocks(config, pool, device)
        sizes = (shape.num_layers, pool.num_blocks, shape.num_kv_heads, pool.block_size, shape.head_dim)
        kv = KVStorage(*sizes, dtype, device, host_blocks)
        facts = _facts(config, shape, pool, kv, dtype, device, threads, loops, model.num_parameters)
        executor = ModelExecutor(model, kv, facts, device)
        executor._rehearse()
        return executor

    def reset(self) -> None:
        self._sequences.reset()

    def submit(self, plan: StepPlan, deliver: Deliver) -> None:
        for answer in self._answers(plan):
            deliver(answer)

    def close(self) -> None:
        del self._model, self._kv

    def _answers(self, plan: StepPlan) -> list[Answer]:
        began = time.perf_counter_ns()
        try:
            rows, tokens, told = self._step(plan)
        except PlanError as error:
            log.error("step %d: %s", plan.header.step_id, error)
            return [failure(plan, error)]
        except Exception as error:
            log.exception("step %d failed", plan.header.step_id)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            return [failure(plan, error)]
        header = ResultHeader(plan.header.group, plan.header.epoch, plan.header.step_id, time.perf_counter_ns() - began)
        result = StepResult(header, tokens, rows.sampled_slots.astype(np.uint16))
        logprobs = told.message(plan)
        return [result] if logprobs is None else [logprobs, result]

    @torch.inference_mode()
    def _step(self, plan: StepPlan) -> tuple[StepRows, I32, Told]:
        told = Told()
        rows = self._sequences.apply(plan)
        self._move_blocks(plan)
        if not len(rows.slots):
            return rows, np.empty(0, np.int32), told
        batch = build(self._sequences, rows, self._device)
        hidden_TC = self._model.forward(batch.input_ids, batch.positions, self._attention, self._kv, batch.attention)
        of_prompts(told, self._sequences, rows, hidden_TC, self._model.logits)
        if not len(rows.drawing):
            return rows, np.empty(0, np.int32), told
        logits_NV = self._model.logits(hidden_TC[batch.drawing])
        of_draws = OfDraws(self._sequences, rows, logits_NV)
        tokens = sample(logits_NV, self._sequences.sampling(rows))[: rows.num_sampled]
        of_draws.tell(told, rows, tokens)
        self._sequences.feed(rows, tokens)
        return rows, tokens, told

    def _move_blocks(self, plan: StepPlan) -> None:
        if len(plan.swap_out_blocks):
            self._kv.swap_out(plan.swap_out_blocks, plan.swap_out_host_blocks)
        if len(plan.swap_in_blocks):
            self._kv.swap_in(plan.swap_in_host_blocks, plan.swap_in_blocks)
        if len(plan.copy_to):
            self._kv.copy(plan.copy_from, plan.copy_to)

    def _rehearse(self) -> None:
        """One step of one short sequence, so that what can't work fails before the hello, and libraries are warm."""
        sampling = SamplingSpec(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)
        start = SequenceStart(0, 0, 0, 1, 1, 0, 1, sampling)
        one = np.ones(1, np.int32)
        self._step(
            StepPlan(PlanHeader(0, 0, 0, (start,)), one, start_tokens=0 * one, start_blocks=one, slots=np.zeros(1, np.uint16))
        )
        self.reset()


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device here; --device cpu works anywhere")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _set_threads(wished: int | None) -> int:
    """torch's own choice, one per core that this process may run on, but no more than a container's quota. More threads than
    processors wait for each other in every product, so a wish for them is refused."""
    there_are = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    there_are = min(there_are, _cpu_quota() or there_are)
    if wished is not None and wished > there_are:
        processors = "1 processor" if there_are == 1 else f"{there_are} processors"
        raise ConfigError(f"--threads {wished}: this process may use {processors}: {there_are} at most")
    threads = wished or min(torch.get_num_threads(), there_are)
    torch.set_num_threads(threads)
    return threads


def _cpu_quota() -> int | None:
    """Processors' worth of time that the control group grants, rounded up; None: no limit that shows here."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = " ".join((Path("/sys/fs/cgroup") / name).read_text() for name in names).split()
            if words[0] not in ("max", "-1"):
                return max(1, -(-int(words[0]) // int(words[1])))
        except (OSError, ValueError, IndexError):
            continue
    return None


def _dtype(name: str, device: torch.device, shape: ModelConfig) -> torch.dtype:
    if name == "auto":
        name = "float32" if device.type == "cpu" else shape.dtype or "bfloat16"
    return getattr(torch, name)


def _check_quantization(config: WorkerConfig, device: torch.device) -> None:
    what = f"--quantization {config.quantization}"
    if config.quantization == "none":
        return
    if device.type != "cpu":
        raise ConfigError(f"{what} is for a CPU, and --device {config.device} found a GPU: add --device cpu")
    if not torch.backends.mkldnn.is_available():
        raise ConfigError(f"{what}: this torch comes without oneDNN, which multiplies the integers")


def _check_memory(config: WorkerConfig, model_dir: Path, shape: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Before anything is read: a model that would not fit, or leaves too little for the KV cache that was asked for, is refused
    with what it needs and what would help. Raises SizingError."""
    there_is, needed = _available(device), footprint(model_dir, dtype, config.quantization)
    if (needed.peak if device.type == "cpu" else needed.resident) > there_is:  # only a CPU packs them
        raise SizingError(
            f"the weights need {format_bytes(needed.resident)} in {_weights_name(dtype, config.quantization)}, and "
            f"{format_bytes(needed.peak)} while they are loaded; {format_bytes(there_is)} are available: "
            + _smaller_weights(model_dir, dtype, device, config.quantization, there_is)
        )
    try:
        _size_pool(config, shape, dtype, device, there_is - needed.resident)
    except SizingError as error:
        raise SizingError(
            f"{error} (of {format_bytes(there_is)} that are available, the weights take {format_bytes(needed.resident)})"
        ) from None


def _smaller_weights(model_dir: Path, dtype: torch.dtype, device: torch.device, quantization: str, there_is: int) -> str:
    """Which options would make them fit."""
    others = [("--quantization int8", dtype, "int8")] if device.type == "cpu" and quantization == "none" else []
    if dtype.itemsize > 2:
        others.append(("--dtype bfloat16", torch.bfloat16, quantization))
    needed = {option: footprint(model_dir, *settings).peak for option, *settings in others}
    fitting = [f"{option} would need {format_bytes(count)}" for option, count in needed.items() if count <= there_is]
    return ", ".join(fitting) or "free some, or take a smaller model"


def _available(device: torch.device) -> int:
    return available_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]


def _release_freed_memory() -> None:
    """Loading frees many pieces between those that stay, which glibc keeps for later: a twentieth of the weights."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _size_pool(
    config: WorkerConfig, shape: ModelConfig, dtype: torch.dtype, device: torch.device, available_bytes: int
) -> PoolSize:
    on_cpu = device.type == "cpu"
    return size_pool(
        bytes_per_token=shape.kv_bytes_per_token(dtype.itemsize),
        block_size=config.block_size,
        model_len=shape.max_model_len,
        max_batch_rows=config.max_batch_rows,
        available_bytes=available_bytes,
        share=CPU_SHARE if on_cpu else CUDA_SHARE,
        default_bytes=DEFAULT_CPU_BYTES if on_cpu else None,
        wish=config.wish,
    )


def _host_blocks(config: WorkerConfig, pool: PoolSize, device: torch.device) -> int:
    """Blocks of host memory that sequences can be swapped to. On a CPU none unless asked for: they would be copied from one
    place of the memory to another."""
    on_cpu = device.type == "cpu"
    wished = 0 if on_cpu and config.swap_bytes is None else config.swap_bytes
    return size_host_pool(pool.block_bytes, available_memory() - (pool.num_bytes if on_cpu else 0), wished)


def _swap_block_ns(kv: KVStorage, device: torch.device) -> int:
    """Nanoseconds that a block takes between device and host, the mean of both ways; 0 without host blocks."""
    count = min(kv.num_host_blocks, kv.num_blocks, _SWAP_BLOCKS)
    if not count:
        return 0
    ids, rounds = np.arange(1, count + 1, dtype=np.int32), []
    for _ in range(1 + _SWAP_ROUNDS):
        began = time.perf_counter_ns()
        kv.swap_out(ids, ids)
        kv.swap_in(ids, ids)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rounds.append(time.perf_counter_ns() - began)
    return max(1, int(statistics.median(rounds[1:])) // (2 * count))  # the first one warms up


def _weights_name(dtype: torch.dtype, quantization: str) -> str:
    name = str(dtype).removeprefix("torch.")
    return name if quantization == "none" else f"{name} with {quantization} weights"


def _lacking() -> str:
    """Instructions that would make steps shorter, and this processor has not; empty when it has them all."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ""
    there_is = {
        "AVX512": torch.backends.cpu.get_cpu_capability() == "AVX512",
        "VNNI": torch.cpu._is_vnni_supported(),  # products of 8-bit integers
    }
    lacking = [name for name, has in there_is.items() if not has]
    return f", without {' and '.join(lacking)}" if lacking else ""


def _facts(
    config: WorkerConfig,
    shape: ModelConfig,
    pool: PoolSize,
    kv: KVStorage,
    dtype: torch.dtype,
    device: torch.device,
    threads: int,
    loops: str,
    num_parameters: int,
) -> WorkerFacts:
    dtype_name, weights = str(dtype).removeprefix("torch."), _weights_name(dtype, config.quantization)
    loops = f", loops by {loops}" if loops else ""
    where = f"cpu ({threads} threads{_lacking()}{loops})" if device.type == "cpu" else torch.cuda.get_device_name(device)
    swap = f", {format_bytes(kv.num_host_blocks * pool.block_bytes)} of host memory to swap to" if kv.num_host_blocks else ""
    size = f"{num_parameters / 1e9:.2f} B" if num_parameters >= 1e9 else f"{num_parameters / 1e6:.1f} M"
    return WorkerFacts(
        device=device.type,
        pid=os.getpid(),
        description=f"{shape.architecture}, {size} parameters in {weights} on {where}; KV cache {pool}{swap}",
        architecture=shape.architecture,
        dtype=dtype_name,
        vocab_size=shape.vocab_size,
        max_model_len=pool.max_model_len,
        block_size=pool.block_size,
        num_blocks=pool.num_blocks,
        kv_bytes_per_token=pool.bytes_per_token,
        num_parameters=num_parameters,
        max_batch_rows=config.max_batch_rows,
        max_step_tokens=config.max_step_tokens,
        num_host_blocks=kv.num_host_blocks,
        swap_block_ns=_swap_block_ns(kv, device),
    )
