"""From a worker's options to a model, a KV pool and the facts about both: what is read, how much memory each may take, and what
is refused before anything is loaded. Computes no step.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import platform
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

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
from wire import WorkerFacts
from worker import compiled, kernels
from worker.config import ConfigError, WorkerConfig
from worker.model_config import LongRope, ModelConfig
from worker.models import Model, footprint, load_model

if TYPE_CHECKING:
    from worker.gpu.blocks import DeviceBlocks

log = logging.getLogger(__name__)

_SWAP_BLOCKS, _SWAP_ROUNDS = 64, 5  # moved at a time, and how often, to measure what a block takes


@dataclass(slots=True)
class Loaded:
    model: Model
    shape: ModelConfig
    kv: KVStorage
    facts: WorkerFacts
    device: torch.device
    deterministic: bool = False


def load(config: WorkerConfig, model_dir: Path) -> Loaded:
    """Raises ModelError, SizingError or ConfigError."""
    device = _device(config.device)
    threads = _set_threads(config.threads) if device.type == "cpu" else 0
    loops = compiled.load(config.deterministic) if device.type == "cpu" else kernels.load()
    wished = ModelConfig.read(model_dir, config.max_model_len)
    dtype = _dtype(config.dtype, device, wished)
    _check_quantization(config, device)
    _check_deterministic(config, device, loops)
    if device.type == "cuda":
        _check_gpu(device, wished)
    _check_memory(config, model_dir, wished, dtype, device)
    options = (config.quantization, config.weights, config.deterministic)
    model, shape = load_model(model_dir, dtype, device, wished.max_model_len, *options)
    available, why = _left_for_cache(config, model, shape, dtype, device)
    pool = _size_pool(config, shape, dtype, device, available, share=CPU_SHARE if device.type == "cpu" else 1)
    if pool.lowered_from is not None and isinstance(shape.rope, LongRope):  # its angles depend on the length
        del model
        model, shape = load_model(model_dir, dtype, device, pool.max_model_len, *options)
    _release_freed_memory()
    kv, pool = _allocate(config, shape, pool, dtype, device)
    facts = _facts(config, shape, pool, kv, dtype, device, threads, loops, model.num_parameters, why)
    return Loaded(model, shape, kv, facts, device, config.deterministic)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device cuda: torch finds no CUDA device here{_why_no_cuda()}; --device cpu works anywhere")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _why_no_cuda() -> str:
    """In torch's words: no driver, one that is too old, or a torch that was built without CUDA."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f" ({' '.join(str(error).split()).split('. ')[0].rstrip('.')})"
    return ""


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


def _check_gpu(device: torch.device, shape: ModelConfig) -> None:
    if not kernels.is_loaded():
        raise ConfigError("--device cuda needs triton, which is not installed here: pip install triton, or --device cpu")
    from worker.gpu.memory import check_device

    check_device(device, shape.head_dim)


def _left_for_cache(
    config: WorkerConfig, model: Model, shape: ModelConfig, dtype: torch.dtype, device: torch.device
) -> tuple[int, str]:
    """Bytes that the KV cache may be sized by, with the weights loaded; and why so many, in words, on a GPU."""
    if device.type == "cpu":
        return available_memory(), ""
    from worker.gpu.memory import measure

    budget = measure(model, shape, config, dtype, device)
    if budget.for_cache <= 0:
        raise SizingError(f"no memory is left for the KV cache ({budget}): lower --max-step-tokens or --max-batch-rows")
    return budget.for_cache, f"; {budget}"


_SMALLER, _TRIES = 0.95, 10  # of a cache that another process left no memory for


def _allocate(
    config: WorkerConfig, shape: ModelConfig, pool: PoolSize, dtype: torch.dtype, device: torch.device
) -> tuple[KVStorage, PoolSize]:
    """The cache, smaller than planned where its size is ours to choose and the memory has gone meanwhile."""
    for _ in range(_TRIES):
        sizes = (shape.num_layers, pool.num_blocks, shape.num_kv_heads, pool.block_size, shape.head_dim)
        try:
            return KVStorage(*sizes, cache_dtype(config.quantization, dtype), device, _host_blocks(config, pool, device)), pool
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            is_wished = config.wish.num_blocks is not None or config.wish.memory_bytes is not None
            fewer = int(pool.num_blocks * _SMALLER)
            if is_wished or fewer * pool.block_size < pool.max_model_len:
                break
            log.warning("the memory for %d blocks of KV cache is gone, trying %d", pool.num_blocks, fewer)
            pool = replace(pool, num_blocks=fewer)
    raise SizingError(
        f"a KV cache of {pool.num_blocks:,} blocks needs {format_bytes(pool.num_bytes)}, which the GPU no longer has: "
        "another process took it; try again, or lower --kv-memory-gib"
    )


def _check_quantization(config: WorkerConfig, device: torch.device) -> None:
    what = f"--quantization {config.quantization}"
    if config.quantization == "none":
        return
    if device.type != "cpu":
        raise ConfigError(f"{what} is for a CPU, and --device {config.device} found a GPU: add --device cpu")
    if not torch.backends.mkldnn.is_available():
        raise ConfigError(f"{what}: this torch comes without oneDNN, which multiplies the integers")


def _check_deterministic(config: WorkerConfig, device: torch.device, loops: str) -> None:
    if not config.deterministic:
        return
    if device.type != "cpu":
        raise ConfigError(
            f"--deterministic is for a CPU so far, and --device {config.device} found a GPU, whose libraries choose by the"
            " number of rows how they add up: add --device cpu"
        )
    if not loops:
        raise ConfigError(
            "--deterministic needs numba, which is not installed here: what torch computes instead depends, in the last digits,"
            " on how many rows there are: pip install numba"
        )


def _check_memory(config: WorkerConfig, model_dir: Path, shape: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Before anything is read: a model that would not fit, or leaves too little for the KV cache that was asked for, is refused
    with what it needs and what would help. Raises SizingError."""
    there_is, needed = _available(device), footprint(model_dir, dtype, config.quantization, config.weights)
    if (needed.peak if device.type == "cpu" else needed.resident) > there_is:  # only a CPU packs them
        raise SizingError(
            f"the weights need {format_bytes(needed.resident)} in {_weights_name(dtype, config.quantization)}, and "
            f"{format_bytes(needed.peak)} while they are loaded; {format_bytes(there_is)} are available: "
            + _smaller_weights(config, model_dir, dtype, device, there_is)
        )
    try:
        _size_pool(config, shape, dtype, device, there_is - needed.resident, CPU_SHARE if device.type == "cpu" else CUDA_SHARE)
    except SizingError as error:
        raise SizingError(
            f"{error} (of {format_bytes(there_is)} that are available, the weights take {format_bytes(needed.resident)})"
        ) from None


def _smaller_weights(config: WorkerConfig, model_dir: Path, dtype: torch.dtype, device: torch.device, there_is: int) -> str:
    """Which options would make them fit."""
    quantization = config.quantization
    others = [("--quantization int8", dtype, "int8")] if device.type == "cpu" and quantization == "none" else []
    if dtype.itemsize > 2:
        others.append(("--dtype bfloat16", torch.bfloat16, quantization))
    needed = {option: footprint(model_dir, *settings, config.weights).peak for option, *settings in others}
    fitting = [f"{option} would need {format_bytes(count)}" for option, count in needed.items() if count <= there_is]
    return ", ".join(fitting) or "free some, or take a smaller model"


def _available(device: torch.device) -> int:
    return available_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]


def _release_freed_memory() -> None:
    """Loading frees many pieces between those that stay, which glibc keeps for later: a twentieth of the weights."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _size_pool(
    config: WorkerConfig, shape: ModelConfig, dtype: torch.dtype, device: torch.device, available_bytes: int, share: float
) -> PoolSize:
    on_cpu = device.type == "cpu"
    return size_pool(
        bytes_per_token=shape.kv_bytes_per_token(cache_dtype(config.quantization, dtype).itemsize),
        block_size=config.block_size,
        model_len=shape.max_model_len,
        max_batch_rows=config.limits(device.type)[0],
        available_bytes=available_bytes,
        share=share,
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
    moves: KVStorage | DeviceBlocks = kv
    if device.type == "cuda":
        from worker.gpu.blocks import DeviceBlocks

        moves = DeviceBlocks(kv)
    ids, rounds = np.arange(1, count + 1, dtype=np.int32), []
    for _ in range(1 + _SWAP_ROUNDS):
        began = time.perf_counter_ns()
        moves.swap_out(ids, ids)
        moves.swap_in(ids, ids)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rounds.append(time.perf_counter_ns() - began)
    return max(1, int(statistics.median(rounds[1:])) // (2 * count))  # the first one warms up


def cache_dtype(quantization: str, dtype: torch.dtype) -> torch.dtype:
    """With weights of 8 bits keys and values need not be exact either: half of float32's bytes are read in less time."""
    return torch.bfloat16 if quantization == "int8" and dtype == torch.float32 else dtype


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
    why: str,
) -> WorkerFacts:
    dtype_name, weights = str(dtype).removeprefix("torch."), _weights_name(dtype, config.quantization)
    rows, tokens = config.limits(device.type)
    stored = cache_dtype(config.quantization, dtype)
    of = "" if stored == dtype else f" of {str(stored).removeprefix('torch.')}:"
    by = f", {'loops' if device.type == 'cpu' else 'kernels'} by {loops}" if loops else ""
    where = f"cpu ({threads} threads{_lacking()}{by})" if device.type == "cpu" else f"{torch.cuda.get_device_name(device)}{by}"
    swap = f", {format_bytes(kv.num_host_blocks * pool.block_bytes)} of host memory to swap to" if kv.num_host_blocks else ""
    costs = "" if compiled.has_programs() else " (prompts take longer)"
    how = f", deterministic{costs}" if config.deterministic else ""
    size = f"{num_parameters / 1e9:.2f} B" if num_parameters >= 1e9 else f"{num_parameters / 1e6:.1f} M"
    return WorkerFacts(
        device=device.type,
        pid=os.getpid(),
        description=f"{shape.architecture}, {size} parameters in {weights} on {where}{how}; KV cache{of} {pool}{swap}{why}",
        architecture=shape.architecture,
        dtype=dtype_name,
        vocab_size=shape.vocab_size,
        max_model_len=pool.max_model_len,
        block_size=pool.block_size,
        num_blocks=pool.num_blocks,
        kv_bytes_per_token=pool.bytes_per_token,
        num_parameters=num_parameters,
        max_batch_rows=rows,
        max_step_tokens=tokens,
        num_host_blocks=kv.num_host_blocks,
        swap_block_ns=_swap_block_ns(kv, device),
    )
