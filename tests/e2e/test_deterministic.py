"""With `--deterministic` a disturbed run gives exactly the tokens of the undisturbed one. There is no rule for near ties here,
and a model that has one at nearly every token."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from client.api import CarouselClient
from scheduler.core import CoreConfig
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.executors import model_executor
from tests.helpers.local_loop import GREEDY, LocalLoop
from tests.helpers.server import Server, eventually, kill, running
from wire import SamplingSpec
from worker import compiled

pytest.importorskip("numba")

NUM_REQUESTS, MODEL_LEN, VOCABULARY = 16, 256, 400
SAMPLED = SamplingSpec(temperature=0.7, top_k=0, top_p=0.8, min_p=0.01, seed=5)


def with_twins(folder: Path, architecture: str, **overrides: Any) -> Path:
    """A checkpoint whose tokens 2i and 2i + 1 have nearly the same row in the head: their logits differ by about as much as
    float32 rounds. Their embeddings have nothing in common, so it shows which of them was taken."""
    make_checkpoint(folder, architecture, vocab_size=VOCABULARY, tie_word_embeddings=False, tokenizer=True, **overrides)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    head = tensors["lm_head.weight"]
    noise = torch.randn(head[::2].shape, generator=torch.Generator().manual_seed(0))
    head[1::2] = head[::2] * (1 + 2e-7 * noise)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


class Case:
    """16 requests, greedy and sampled in turns."""

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        rng = random.Random(3)
        self.prompts = [[rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 110))] for _ in range(NUM_REQUESTS)]
        self.max_tokens = [rng.randint(10, 60) for _ in range(NUM_REQUESTS)]

    def loop(self, deterministic: bool = True, num_blocks: int = 300, max_step_tokens: int = 128) -> LocalLoop:
        executor = model_executor(self.model_dir, num_blocks, deterministic=deterministic)
        return LocalLoop(executor, CoreConfig(max_batch_rows=16, max_step_tokens=max_step_tokens))

    def run(self, loop: LocalLoop, between: Callable[[], object] = lambda: None) -> list[list[int]]:
        """All requests, `between` each two of them; then until their end."""
        for number, (prompt, count) in enumerate(zip(self.prompts, self.max_tokens, strict=True)):
            loop.add(prompt, count, SAMPLED if number % 4 == 3 else GREEDY)
            between()
        return [got.tokens for got in loop.run().values()]


@pytest.fixture(scope="module", params=["llama", "qwen3", "opt"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(with_twins(tmp_path_factory.mktemp("model"), request.param, max_position_embeddings=MODEL_LEN))


@pytest.fixture(scope="module")
def alone(case: Case) -> list[list[int]]:
    loop = case.loop()
    return case.run(loop, loop.run)


@pytest.fixture(autouse=True)
def _loops() -> Iterator[None]:
    yield
    compiled.unload()


def test_in_a_moving_batch(case: Case, alone: list[list[int]]) -> None:
    loop = case.loop()
    assert case.run(loop, loop.step) == alone


@pytest.mark.parametrize("max_step_tokens", [17, 53])
def test_in_chunks_of_odd_size(case: Case, alone: list[list[int]], max_step_tokens: int) -> None:
    assert case.run(case.loop(max_step_tokens=max_step_tokens)) == alone


def test_after_preemptions_and_a_workers_deaths(case: Case, alone: list[list[int]]) -> None:
    longest = max(len(prompt) + count for prompt, count in zip(case.prompts, case.max_tokens, strict=True))
    loop = case.loop(num_blocks=-(-longest // 16) + 4)

    def die_now_and_then() -> None:
        for _ in range(3):
            loop.step()
        if len(loop.got) % 5 == 0:
            loop.core.worker_lost(loop.now)
            loop.join()

    assert case.run(loop, die_now_and_then) == alone
    assert loop.core.counters.preemptions > 0 and loop.core.counters.recomputed_tokens > 0


def test_with_a_prefix_that_is_there_already(case: Case) -> None:
    """The whole prompt but its last block is a hit; so is the output that another one has computed token by token."""
    prompt = max(case.prompts, key=len)
    loop = case.loop()
    outputs = []
    for text in (prompt, prompt, None, prompt[:40]):
        text = prompt + outputs[0][:30] if text is None else text
        [handle] = loop.add_many(text, 40, num_outputs=1, salt="")
        outputs.append(loop.run()[handle].tokens)
    assert loop.core.counters.cached_tokens > 0
    fresh = case.loop()
    [handle] = fresh.add_many(prompt + outputs[0][:30], 40, num_outputs=1)
    assert outputs[1] == outputs[0] and outputs[2][:10] == outputs[0][30:] and outputs[2] == fresh.run()[handle].tokens


def test_without_it_the_same_requests_come_out_otherwise(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's near ties are real: what is tested above is worth testing. (Compiled products keep rows apart anyway.)"""
    monkeypatch.setattr("worker.compiled.panels.HAS_FLOATS", False)
    loop, batch = case.loop(deterministic=False), case.loop(deterministic=False)
    assert case.run(loop, loop.run) != case.run(batch, batch.step)


# ------------------------------------------------------------------------------------------------------- a whole server


TEXTS = ["for i in", "def main", "import os\n" * 4, "class A:\n    x = 1\n" * 6, "a", "return " * 9]


def tokens(client: CarouselClient, text: str, began: Callable[[], None], **wanted: Any) -> list[int]:
    got: list[int] = []
    for message in client.generate(text, max_tokens=120, ignore_eos=True, **wanted):
        got.extend(message.delta.token_ids)
        if got:
            began()
    return got


def all_of_them(server: Server, at_a_time: int, disturb: Callable[[], object] = lambda: None) -> list[list[int]]:
    jobs: list[tuple[str, dict[str, Any]]] = []
    for text in TEXTS:
        jobs += [(text, dict(temperature=0)), (text, dict(temperature=0.8, top_p=0.9, seed=7))]
    begun: set[int] = set()
    with CarouselClient(server.target) as client, ThreadPoolExecutor(at_a_time) as threads:
        running = [
            threads.submit(tokens, client, text, lambda number=number: begun.add(number), **wanted)  # type: ignore[misc]
            for number, (text, wanted) in enumerate(jobs)
        ]
        assert eventually(lambda: len(begun) >= min(at_a_time, 4))
        disturb()
        return [job.result(120) for job in running]


@pytest.mark.slow
def test_a_server_whose_worker_dies_whose_pool_is_small_and_whose_batch_is_full(tmp_path: Path) -> None:
    model = with_twins(tmp_path, "llama", max_position_embeddings=1024)
    options = ("--model", str(model), "--device", "cpu", "--threads", "1", "--deterministic", "--max-model-len", "512")
    with running(*options, "--num-blocks", "400") as server:
        undisturbed = all_of_them(server, at_a_time=1)
        assert ", deterministic" in server.log()
        with CarouselClient(server.target) as client:
            assert ", deterministic" in client.server_info().workers[0].description
    with running(*options, "--num-blocks", "40", "--no-prefix-caching", "--standby", "1") as server:
        for _ in range(2):
            [*workers] = server.children()["worker"]
            with CarouselClient(server.target) as client:
                pid = client.server_info().workers[0].pid
            assert pid in workers
            assert all_of_them(server, at_a_time=12, disturb=lambda pid=pid: kill(pid)) == undisturbed  # type: ignore[misc]
        assert server.log().count("was killed by signal 9") == 2
