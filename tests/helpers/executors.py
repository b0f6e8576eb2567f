"""A model executor for tests: float32 on the CPU, pools of given sizes, random weights from tests.helpers.checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from kvcache.sizing import GIB
from worker.config import WorkerConfig
from worker.model_executor import ModelExecutor


def model_executor(
    model_dir: Path, num_blocks: int, block_size: int = 16, num_host_blocks: int = 0, deterministic: bool = False
) -> ModelExecutor:
    """With host blocks, a swap is said to cost next to nothing: whoever is preempted is swapped."""
    wished = WorkerConfig(
        connect="ipc:///unused",
        model=str(model_dir),
        device="cpu",
        dtype="float32",
        num_blocks=num_blocks,
        block_size=block_size,
        max_batch_rows=64,
        max_step_tokens=512,
        deterministic=deterministic,
    )
    executor = ModelExecutor.of(wished, model_dir)
    if num_host_blocks:
        block_bytes = block_size * executor.facts.kv_bytes_per_token
        swap_gib = num_host_blocks * block_bytes / GIB
        executor = ModelExecutor.of(dataclasses.replace(wished, swap_gib=swap_gib), model_dir)
        assert executor.facts.num_host_blocks == num_host_blocks
        executor.facts.swap_block_ns = 1
    return executor
