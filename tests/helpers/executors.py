"""A model executor for tests: float32 on the CPU, a pool of a given size, random weights from tests.helpers.checkpoints."""

from __future__ import annotations

from pathlib import Path

from worker.config import WorkerConfig
from worker.model_executor import ModelExecutor


def model_executor(model_dir: Path, num_blocks: int, block_size: int = 16) -> ModelExecutor:
    config = WorkerConfig(
        connect="ipc:///unused",
        model=str(model_dir),
        device="cpu",
        dtype="float32",
        num_blocks=num_blocks,
        block_size=block_size,
        max_batch_rows=64,
        max_step_tokens=512,
    )
    return ModelExecutor.of(config, model_dir)
