"""What of a GPU's memory is left for the KV cache, found by doing once what will be done: the largest step.

Another process may take or free memory at any moment, so what is free is asked for only where it is divided, and whoever
allocates the cache takes less when it is not there any more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kvcache.sizing import SizingError, format_bytes
from kvcache.storage import STAGE_BYTES, KVStorage
from worker.attention.base import AttentionInputs
from worker.attention.triton_paged import TritonPagedAttention
from worker.config import ConfigError, WorkerConfig
from worker.gpu.draw import draw
from worker.gpu.graphs import sizes_up_to
from worker.gpu.state import DeviceState
from worker.model_config import ModelConfig
from worker.models import Model

OLDEST = (8, 0)  # compute capability; before it there is no bfloat16 and no asynchronous copy to shared memory
HEAD_DIMS = range(32, 257, 16)
_GRAPH_BYTES = 8 << 20  # of a captured step, in the driver; a guess until it has been measured
_WORKSPACES = 64 << 20  # of libraries, for the stream that captures
_SPARE = 0.01  # of the whole: fragments


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes."""

    total: int  # of the device
    free: int  # with weights, kernels and libraries loaded
    largest_step: int  # what it takes at its peak
    state: int  # by slot: tables, parameters, counted tokens
    others: int  # captured steps, workspaces, blocks on their way to the host and back

    @property
    def for_cache(self) -> int:
        """The largest step's memory is needed twice: captured steps keep theirs."""
        return self.free - 2 * self.largest_step - self.state - self.others - int(_SPARE * self.total)

    def __str__(self) -> str:
        used = self.total - self.free
        return (
            f"of {format_bytes(self.total)}: {format_bytes(used)} weights and others, 2 × {format_bytes(self.largest_step)} "
            f"largest step, {format_bytes(self.state)} state, {format_bytes(self.others)} captured steps and others, "
            f"{format_bytes(max(0, self.for_cache))} left for the KV cache"
        )


def check_device(device: torch.device, head_dim: int) -> None:
    """Raises ConfigError for a GPU, or a model, that the kernels don't serve."""
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < OLDEST:
        name, has, needs = torch.cuda.get_device_name(device), *(".".join(map(str, each)) for each in (capability, OLDEST))
        raise ConfigError(f"{name} has compute capability {has}, the kernels need {needs}: --device cpu works anywhere")
    check_head_dim(head_dim)


def check_head_dim(head_dim: int) -> None:
    if head_dim not in HEAD_DIMS:
        served = f"{HEAD_DIMS.start} to {HEAD_DIMS[-1]} in steps of {HEAD_DIMS.step}"
        raise ConfigError(f"the model's heads have {head_dim} numbers, the kernels serve {served}: --device cpu takes any")


def measure(model: Model, shape: ModelConfig, config: WorkerConfig, dtype: torch.dtype, device: torch.device) -> Budget:
    """Runs the largest step, on a cache that is just large enough for it."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    width = -(-shape.max_model_len // config.block_size)
    rows, tokens = config.limits(device.type)
    state = DeviceState(rows, width, shape.vocab_size, device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        kept = _largest_step(model, shape, config, dtype, device, state)
    except torch.OutOfMemoryError:
        raise SizingError(
            f"{format_bytes(free)} of the GPU's {format_bytes(total)} are free with the weights loaded, too little for a step "
            f"of {tokens:,} tokens: lower --max-step-tokens or --max-batch-rows"
        ) from None
    peak = torch.cuda.max_memory_allocated(device) - before
    state_bytes = state.num_bytes
    del state
    torch.cuda.empty_cache()
    free = min(free, torch.cuda.mem_get_info(device)[0])  # kernels and libraries were loaded by the step
    return Budget(total, free, peak - kept, state_bytes, others_bytes(rows, config.swap_bytes != 0))


def others_bytes(num_rows: int, swaps: bool) -> int:
    return len(sizes_up_to(num_rows)) * _GRAPH_BYTES + _WORKSPACES + 2 * STAGE_BYTES * swaps


@torch.inference_mode()
def _largest_step(
    model: Model, shape: ModelConfig, config: WorkerConfig, dtype: torch.dtype, device: torch.device, state: DeviceState
) -> int:
    """Computes the tokens of the largest step and draws for all rows. Returns the bytes of the small cache."""
    num_rows, tokens = config.limits(device.type)
    count = np.diff(np.minimum(np.arange(0, tokens + shape.max_model_len, shape.max_model_len), tokens))
    blocks = -(-count // config.block_size)
    kv = KVStorage(shape.num_layers, int(blocks.sum()), shape.num_kv_heads, config.block_size, shape.head_dim, dtype, device)
    tables = np.zeros((len(count), int(blocks.max())), np.int32)
    tables[np.arange(tables.shape[1]) < blocks[:, None]] = np.arange(1, blocks.sum() + 1)
    positions = np.concatenate([np.arange(each) for each in count])
    rows = np.repeat(np.arange(len(count)), count)
    slots = tables[rows, positions // config.block_size] * np.int64(config.block_size) + positions % config.block_size
    query_start = np.concatenate(([0], np.cumsum(count))).astype(np.int32)
    inputs = AttentionInputs.of(query_start, count.astype(np.int32), tables, slots, device)
    positions_T = torch.from_numpy(positions).to(device)
    hidden_TC = model.forward(torch.zeros_like(positions_T), positions_T, TritonPagedAttention(), kv, inputs)
    drawing_N = torch.zeros(num_rows, dtype=torch.int64, device=device)
    logits_NV = model.logits(hidden_TC[drawing_N])
    slots_N = torch.full_like(drawing_N, state.dump, dtype=torch.int32)
    draw(logits_NV, state, slots_N, torch.ones_like(slots_N), None)
    return sum(layer.nbytes for layer in kv.layers)
