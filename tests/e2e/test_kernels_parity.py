"""The whole engine with the GPU's side of the worker (kernels, captured steps, tokens that stay on the device) gives the tokens
of transformers. Without a GPU the kernels run in Triton's interpreter, so models and lengths are small."""

from __future__ import annotations

import queue
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from scheduler.core import CoreConfig
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.local_loop import LocalLoop
from tests.helpers.reference import Comparison, greedy
from wire import StepFailed, StepPlan, StepResult
from worker import compiled, kernels
from worker.config import WorkerConfig

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")]

HEADS = {
    "llama": dict(head_dim=32, num_attention_heads=4, num_key_value_heads=2, hidden_size=64),
    "qwen3": dict(head_dim=48, num_attention_heads=6, num_key_value_heads=2, hidden_size=64),
    "opt": dict(hidden_size=64, num_attention_heads=2),
}


class Waiting:
    """The executor, with its answer waited for before submit returns."""

    def __init__(self, model_dir: Path, num_blocks: int, swap_gib: float) -> None:
        from worker.gpu.executor import GpuExecutor
        from worker.loading import load

        sizes = {"num_blocks": num_blocks, "swap_gib": swap_gib, "max_batch_rows": 6, "max_step_tokens": 64}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        config = WorkerConfig(connect="ipc://x", model="m", device=device, dtype="float32", max_model_len=96, **sizes)
        self._executor = GpuExecutor(load(config, model_dir))
        self._answers: queue.SimpleQueue[StepResult | StepFailed] = queue.SimpleQueue()
        self.facts = self._executor.facts
        self.facts.swap_block_ns = min(self.facts.swap_block_ns, 1)

    def reset(self) -> None:
        self._executor.reset()

    def submit(self, plan: StepPlan, deliver: Callable[[StepResult | StepFailed], None]) -> None:
        self._executor.submit(plan, self._answers.put)
        deliver(self._answers.get(timeout=120))

    def close(self) -> None:
        self._executor.close()


@pytest.fixture(autouse=True)
def loaded_kernels() -> Iterator[None]:
    pytest.importorskip("triton")
    compiled.unload()
    kernels.load()
    yield
    kernels.unload()


@pytest.mark.parametrize("architecture", list(HEADS))
@pytest.mark.parametrize(("num_blocks", "swap_gib"), [(40, 0.0), (7, 0.0), (7, 0.001)], ids=["room", "recompute", "swap"])
def test_the_engine_on_the_kernels_gives_the_tokens_of_transformers(
    tmp_path: Path, architecture: str, num_blocks: int, swap_gib: float
) -> None:
    model_dir = make_checkpoint(tmp_path, architecture, **HEADS[architecture])
    rng = random.Random("opt")
    prompts = [[rng.randrange(256) for _ in range(rng.randint(1, 22))] for _ in range(6)]
    max_tokens = [rng.randint(16, 40) for _ in prompts]
    kernels.unload()
    references = greedy(model_dir, prompts, max_tokens)
    kernels.load()
    executor = Waiting(model_dir, num_blocks, swap_gib)
    loop = LocalLoop(executor, CoreConfig(max_batch_rows=6, max_step_tokens=48))
    for prompt, count in zip(prompts, max_tokens, strict=True):
        loop.add(prompt, count)
    comparison = Comparison()
    for handle, got in loop.run().items():
        comparison.add(f"{architecture} request {handle}", got.tokens, references[handle])
    comparison.check()
    assert (loop.core.load(0).preemptions > 0) == (num_blocks < 40)
    executor.close()
