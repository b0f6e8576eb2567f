"""The whole engine (core, codec, mirror, paged attention, sampler) gives the tokens of transformers, in float32, greedy.

Near ties (law 12): a first difference counts only where transformers' own gap between its two best logits is 1e-4 or more.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from scheduler.core import CoreConfig
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.executors import model_executor
from tests.helpers.local_loop import LocalLoop
from tests.helpers.reference import Comparison, greedy

NUM_REQUESTS = 24
MODEL_LEN = 256
VOCABULARY = 256

HEADS = ((4, 4, True), (4, 1, False), (6, 2, True), (4, 4, False), (4, 1, True), (6, 2, False))  # heads, kv heads, tied


def shapes() -> Iterator[tuple[str, tuple[str, int, int, int, bool]]]:
    """Every architecture with every head size; heads, groups and tying take turns so that all of them meet."""
    for a, architecture in enumerate(("llama", "qwen3", "opt")):
        for i, head_dim in enumerate((32, 48, 64, 80, 96, 112, 128)):
            heads, kv_heads, tied = HEADS[(i + a) % len(HEADS)]
            kv_heads = heads if architecture == "opt" else kv_heads  # OPT has no grouped queries
            name = f"{architecture}-{heads}-{kv_heads}-{head_dim}-{'tied' if tied else 'untied'}"
            yield name, (architecture, heads, kv_heads, head_dim, tied)


SHAPES = dict(shapes())
QUICK = ("llama-6-2-64-tied", "qwen3-6-2-48-tied", "opt-6-6-32-tied")


class Case:
    """A checkpoint, 24 requests of different lengths, and what transformers says to each."""

    def __init__(self, folder: Path, name: str) -> None:
        architecture, heads, kv_heads, head_dim, tied = SHAPES[name]
        self.name = name
        self.model_dir = make_checkpoint(folder, architecture, **overrides(architecture, heads, kv_heads, head_dim, tied))
        rng = random.Random(name)
        self.prompts = [[rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 110))] for _ in range(NUM_REQUESTS)]
        self.max_tokens = [rng.randint(4, 40) for _ in range(NUM_REQUESTS)]
        self.references = greedy(self.model_dir, self.prompts, self.max_tokens)
        self.longest = max(len(prompt) + count for prompt, count in zip(self.prompts, self.max_tokens, strict=True))

    def loop(
        self, num_blocks: int = 400, block_size: int = 16, max_batch_rows: int = 16, max_step_tokens: int = 128
    ) -> LocalLoop:
        executor = model_executor(self.model_dir, num_blocks=num_blocks, block_size=block_size)
        return LocalLoop(executor, CoreConfig(max_batch_rows=max_batch_rows, max_step_tokens=max_step_tokens))

    def compare(self, loop: LocalLoop) -> None:
        """All 24 have been added in order; runs them and compares."""
        comparison = Comparison()
        for handle, got in loop.run().items():
            comparison.add(f"{self.name} request {handle}", got.tokens, self.references[handle])
        comparison.check()

    def add_all(self, loop: LocalLoop) -> None:
        for prompt, count in zip(self.prompts, self.max_tokens, strict=True):
            loop.add(prompt, count)


def overrides(architecture: str, heads: int, kv_heads: int, head_dim: int, tied: bool) -> dict[str, object]:
    """config.json entries of a shape."""
    common: dict[str, object] = dict(
        num_attention_heads=heads, max_position_embeddings=MODEL_LEN, tie_word_embeddings=tied, vocab_size=VOCABULARY
    )
    if architecture == "opt":  # its head size is hidden_size / heads
        return common | dict(hidden_size=heads * head_dim, word_embed_proj_dim=heads * head_dim)
    return common | dict(num_key_value_heads=kv_heads, head_dim=head_dim)


@pytest.fixture(scope="module", params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in SHAPES])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("model"), request.param)


def test_alone(case: Case) -> None:
    loop = case.loop()
    for prompt, count in zip(case.prompts, case.max_tokens, strict=True):
        loop.add(prompt, count)
        loop.run()
    case.compare(loop)


def test_24_requests_in_one_moving_batch(case: Case) -> None:
    loop = case.loop()
    for i, (prompt, count) in enumerate(zip(case.prompts, case.max_tokens, strict=True)):
        loop.add(prompt, count)
        for _ in range(i % 4):  # they join while others decode
            loop.step()
    case.compare(loop)


@pytest.mark.parametrize("max_step_tokens", [17, 31, 53])
def test_prompts_chunked_at_odd_sizes(case: Case, max_step_tokens: int) -> None:
    loop = case.loop(max_step_tokens=max_step_tokens)
    case.add_all(loop)
    case.compare(loop)
    assert sum(len(plan.slots) > 1 and int(plan.num_tokens.max()) > 1 for plan in loop.plans) > 5, "no mixed steps"


def test_after_preemptions(case: Case) -> None:
    loop = case.loop(num_blocks=-(-case.longest // 16) + 4, block_size=16)  # room for the longest and a little more
    case.add_all(loop)
    case.compare(loop)
    assert loop.core.counters.preemptions > 0


def test_with_a_pool_just_large_enough(case: Case) -> None:
    block_size = 16
    loop = case.loop(num_blocks=-(-case.longest // block_size), block_size=block_size)
    case.add_all(loop)
    case.compare(loop)


def test_after_a_workers_death(case: Case) -> None:
    loop = case.loop()
    case.add_all(loop)
    for _ in range(12):
        loop.step()
    loop.core.worker_lost(loop.now)
    loop.join()
    case.compare(loop)
    assert loop.core.counters.recomputed_tokens > 0


def test_static_batches(case: Case) -> None:
    executor = model_executor(case.model_dir, num_blocks=400, block_size=16)
    loop = LocalLoop(executor, CoreConfig(policy="static", max_batch_rows=8, max_step_tokens=128))
    case.add_all(loop)
    case.compare(loop)
    assert any(len(plan.padding) for plan in loop.plans)
