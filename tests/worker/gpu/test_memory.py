"""What is left for the KV cache is what the largest step and the captured ones leave, and a cache whose memory has gone
meanwhile is made smaller, unless its size was asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kvcache.sizing import GIB, PoolSize, SizingError
from kvcache.storage import STAGE_BYTES, KVStorage
from tests.helpers.checkpoints import make_checkpoint
from worker import loading
from worker.config import ConfigError, WorkerConfig
from worker.gpu import memory
from worker.gpu.memory import Budget, check_head_dim, others_bytes
from worker.gpu.state import DeviceState
from worker.models import load_model


def test_the_cache_gets_what_nobody_else_needs() -> None:
    budget = Budget(total=100 * GIB, free=80 * GIB, largest_step=2 * GIB, state=GIB, others=GIB // 4)
    assert budget.for_cache == 80 * GIB - 4 * GIB - GIB - GIB // 4 - GIB
    assert str(budget) == (
        "of 100.00 GiB: 20.00 GiB weights and others, 2 × 2.00 GiB largest step, 1.00 GiB state, "
        "256 MiB captured steps and others, 73.75 GiB left for the KV cache"
    )


def test_more_rows_capture_more_steps_and_swaps_take_staging() -> None:
    assert others_bytes(512, swaps=False) > others_bytes(8, swaps=False) > 0
    assert others_bytes(8, swaps=True) - others_bytes(8, swaps=False) == 2 * STAGE_BYTES


@pytest.mark.parametrize("size", [16, 24, 33, 272])
def test_a_head_size_that_no_kernel_serves_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=f"heads have {size} numbers, the kernels serve 32 to 256 in steps of 16"):
        check_head_dim(size)


def test_every_head_size_of_the_kernels_is_served() -> None:
    for size in range(32, 257, 16):
        check_head_dim(size)


@pytest.mark.parametrize("step_tokens", [7, 64, 200])
def test_the_largest_step_is_one_that_the_model_can_compute(tmp_path: Path, step_tokens: int) -> None:
    """More tokens than a sequence may have are several rows."""
    head = dict(head_dim=32, num_attention_heads=4, num_key_value_heads=2, hidden_size=64)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, shape = load_model(make_checkpoint(tmp_path, "llama", **head), torch.float32, device, 64)
    config = WorkerConfig(connect="ipc://x", model="m", max_batch_rows=4, max_step_tokens=step_tokens)
    state = DeviceState(4, 4, shape.vocab_size, device)
    kept = memory._largest_step(model, shape, config, torch.float32, device, state)
    rows = np.diff(np.minimum(np.arange(0, step_tokens + 64, 64), step_tokens))
    blocks = int((-(-rows // 16)).sum())
    assert kept == (1 + blocks) * 2 * shape.num_layers * 2 * 16 * 32 * 4
    assert state.num_bytes > 0 and not state.block_tables_SW.any()


class Vanishing:
    """KVStorage on a device where another process takes all but `left` blocks."""

    def __init__(self, left: int) -> None:
        self.left, self.tried = left, []

    def __call__(self, num_layers: int, num_blocks: int, *rest: object) -> KVStorage:
        self.tried.append(num_blocks)
        if num_blocks > self.left:
            raise torch.OutOfMemoryError
        return KVStorage(1, num_blocks, 1, 16, 32, torch.float32, "cpu")


def allocate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, left: int, **wish: object) -> tuple[PoolSize, list[int]]:
    storage = Vanishing(left)
    monkeypatch.setattr(loading, "KVStorage", storage)
    _, shape = load_model(make_checkpoint(tmp_path, "llama"), torch.float32, "cpu", 64)
    config = WorkerConfig(connect="ipc://x", model="m", **wish)
    pool = PoolSize(num_blocks=1000, block_size=16, bytes_per_token=64, max_model_len=64)
    _, pool = loading._allocate(config, shape, pool, torch.float32, torch.device("cpu"))
    return pool, storage.tried


def test_a_cache_is_made_smaller_when_its_memory_has_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pool, tried = allocate(monkeypatch, tmp_path, left=910)
    assert pool.num_blocks == 902 and tried == [1000, 950, 902]


@pytest.mark.parametrize(("left", "wish"), [(910, {"num_blocks": 1000}), (910, {"kv_memory_gib": 1.0}), (3, {})])
def test_a_wish_is_met_or_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, left: int, wish: dict) -> None:
    with pytest.raises(SizingError, match="which the GPU no longer has: another process took it"):
        allocate(monkeypatch, tmp_path, left, **wish)
