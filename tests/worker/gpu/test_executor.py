"""Steps launched without waiting give the tokens of the torch backend, token for token: captured decode steps, mixed steps,
every parameter of sampling, swaps, copies and failures."""

from __future__ import annotations

import dataclasses
import queue
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs

from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.plans import GREEDY, PlanMaker
from wire import Logprobs, SamplingSpec, StepFailed, StepPlan, StepResult
from worker import kernels
from worker.attention import triton_paged
from worker.config import WorkerConfig
from worker.gpu.executor import GpuExecutor
from worker.kernels.heuristics import AttentionConfig, decode_config, prefill_config
from worker.kernels.paged_attention import paged_attention
from worker.loading import load
from worker.model_executor import ModelExecutor

VOCAB = 384
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SAMPLED = SamplingSpec(temperature=0.9, top_k=0, top_p=1.0, min_p=0.0, seed=11)
SPECS = [
    GREEDY,
    SAMPLED,
    structs.replace(SAMPLED, top_k=5, seed=12),
    structs.replace(SAMPLED, top_p=0.7, seed=2**63 + 5),
    structs.replace(SAMPLED, min_p=0.2, temperature=1.4),
    structs.replace(GREEDY, repetition_penalty=1.4, presence_penalty=0.5),
    structs.replace(SAMPLED, frequency_penalty=0.8, seed=77),
    structs.replace(GREEDY, logit_bias=((7, 4.0), (8, -3.0)), stop_token_ids=(1, 2, 3), min_tokens=6),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    head = dict(head_dim=32, num_attention_heads=4, num_key_value_heads=2, hidden_size=64)
    return {
        "llama": make_checkpoint(tmp_path_factory.mktemp("llama"), "llama", **head),
        "qwen3": make_checkpoint(tmp_path_factory.mktemp("qwen3"), "qwen3", **head),
        "opt": make_checkpoint(tmp_path_factory.mktemp("opt"), "opt", hidden_size=64, num_attention_heads=2),
    }


def config(**options: object) -> WorkerConfig:
    defaults = {"connect": "ipc://x", "model": "m", "device": "cpu", "threads": 1, "block_size": 16, "num_blocks": 60}
    sizes = {"max_batch_rows": 8, "max_step_tokens": 256, "max_model_len": 128, "swap_gib": 0.001}
    return WorkerConfig(**(defaults | sizes | options))


class Pair:
    """The executor under test, and the one that computes each step with torch and waits."""

    def __init__(self, model_dir: Path) -> None:
        kernels.unload()
        self.slow = ModelExecutor.of(config(), model_dir)
        kernels.load()
        self.fast = GpuExecutor(load(config(device=DEVICE, dtype="float32"), model_dir))
        self.answers: queue.SimpleQueue[StepResult | StepFailed | Logprobs] = queue.SimpleQueue()

    def reset(self) -> PlanMaker:
        self.slow.reset()
        self.fast.reset()
        return PlanMaker(self.fast.facts, shuffle=3)

    def expected(self, plan: StepPlan) -> list[StepResult | StepFailed | Logprobs]:
        answers: list[StepResult | StepFailed | Logprobs] = []
        kernels.unload()
        self.slow.submit(plan, answers.append)
        kernels.load()
        return answers

    def check(self, *plans: StepPlan) -> None:
        """The plans are submitted one after the other before an answer is read, as a pipeline does."""
        for plan in plans:
            self.fast.submit(plan, self.answers.put)
        for plan in plans:
            for expected in self.expected(plan):
                got = self.answers.get(timeout=60)
                assert type(got) is type(expected), got
                if isinstance(got, StepResult):
                    assert isinstance(expected, StepResult) and got.header.step_id == plan.header.step_id
                    assert got.slots.tolist() == expected.slots.tolist()
                    assert got.tokens.tolist() == expected.tokens.tolist()
                if isinstance(got, Logprobs):
                    assert isinstance(expected, Logprobs) and got.header == expected.header
                    assert got.token_ids.tolist() == expected.token_ids.tolist()
                    np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-4)


@pytest.fixture(scope="module")
def pairs(checkpoints: dict[str, Path]) -> Iterator[dict[str, Pair]]:
    pairs = {name: Pair(folder) for name, folder in checkpoints.items()}
    yield pairs
    for pair in pairs.values():
        pair.fast.close()


@pytest.fixture
def pair(pairs: dict[str, Pair]) -> Pair:
    return pairs["llama"]


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(1000 * seed + length).integers(3, VOCAB, length).tolist()


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "opt"])
def test_prompts_and_decode_steps_give_the_tokens_of_torch(pairs: dict[str, Pair], architecture: str) -> None:
    pair = pairs[architecture]
    maker = pair.reset()
    for slot, length in enumerate((1, 5, 16, 33)):
        maker.start(slot, prompt(length))
    pair.check(*(maker.plan() for _ in range(4)))


def test_every_parameter_of_sampling_is_obeyed_in_captured_steps(pair: Pair) -> None:
    maker = pair.reset()
    for slot, spec in enumerate(SPECS):
        maker.start(slot, prompt(6 + slot), spec, output_index=slot % 3)
    pair.check(*(maker.plan() for _ in range(9)))


def test_chunks_and_decodes_share_a_step_and_sequences_come_and_go(pair: Pair) -> None:
    maker = pair.reset()
    maker.start(0, prompt(40), SAMPLED)
    pair.check(maker.plan({0: 17}), maker.plan({0: 23}))
    maker.start(5, prompt(30, 1), SPECS[3])
    pair.check(maker.plan({0: 1, 5: 11}), maker.plan({5: 19, 0: 1}), maker.plan())
    maker.end(0)
    maker.start(0, prompt(3, 2), SPECS[6])  # the slot's next sequence has another history
    pair.check(maker.plan(), maker.plan(), maker.plan({5: 1}, padding=[0]), maker.plan(padding=[5]))


def test_a_sequence_that_comes_back_with_its_output_is_drawn_on_as_before(pair: Pair) -> None:
    """Preempted and computed again: the penalties count what was drawn then."""
    maker = pair.reset()
    maker.start(2, [*prompt(9), 7, 7, 8], SPECS[6], num_prompt_tokens=9)
    pair.check(*(maker.plan() for _ in range(4)))


def test_lists_longer_than_the_device_keeps_are_sent(pair: Pair) -> None:
    bias = tuple((token, float(token % 7)) for token in range(3, 60))
    stops = tuple(range(60, 120))
    maker = pair.reset()
    maker.start(0, prompt(4), structs.replace(GREEDY, logit_bias=bias))
    maker.start(1, prompt(5), structs.replace(SAMPLED, stop_token_ids=stops, min_tokens=20))
    pair.check(*(maker.plan() for _ in range(3)))


def test_logprobs_of_prompt_and_draws(pair: Pair) -> None:
    maker = pair.reset()
    maker.start(0, prompt(7), structs.replace(SAMPLED, logprobs=3))
    maker.start(1, prompt(12), structs.replace(SPECS[5], logprobs=0, prompt_logprobs=2))
    maker.start(2, prompt(3))
    pair.check(*(maker.plan() for _ in range(3)))


def test_blocks_that_are_shared_copied_and_swapped_keep_their_content(pair: Pair) -> None:
    maker = pair.reset()
    maker.start(0, prompt(21), SAMPLED)
    pair.check(maker.plan(), maker.plan())
    maker.start(1, [*prompt(21), 9], structs.replace(SAMPLED, seed=5), prefix_of=0, num_computed=21)
    pair.check(maker.plan(), maker.plan())
    swapped = maker.swap_out(1)
    pair.check(maker.plan())
    # It returns with tokens that its plans knew; their content is what was swapped out.
    maker.start(3, prompt(swapped.computed + 1), swapped=swapped)
    pair.check(maker.plan(), maker.plan())


def test_a_plan_without_rows_is_answered_too(pair: Pair) -> None:
    maker = pair.reset()
    maker.start(0, prompt(5), spare_blocks=2)
    pair.check(maker.plan({}), maker.plan(), maker.plan())


def test_a_step_that_fails_is_told_in_its_turn_and_a_reset_heals(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = pair.reset()
    maker.start(0, prompt(5))
    first = maker.plan()
    wrong = dataclasses.replace(first, header=structs.replace(first.header, step_id=7))
    pair.fast.submit(first, pair.answers.put)
    pair.fast.submit(wrong, pair.answers.put)
    assert isinstance(pair.answers.get(timeout=60), StepResult)
    failed = pair.answers.get(timeout=60)
    assert isinstance(failed, StepFailed) and failed.message == "PlanError: step 7 came where step 1 was expected"

    def no_memory(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory, says the test")

    maker = pair.reset()
    maker.start(0, prompt(5))
    with monkeypatch.context() as patch:
        patch.setattr(pair.fast._model, "forward", no_memory)
        pair.fast.submit(maker.plan(), pair.answers.put)
        failed = pair.answers.get(timeout=60)
        assert isinstance(failed, StepFailed) and "out of memory, says the test" in failed.message
    maker = pair.reset()
    maker.start(0, prompt(5))
    pair.check(maker.plan(), maker.plan())


@pytest.mark.parametrize(
    ("error", "says_so_later", "status"),
    [
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), True, [3]),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), True, [3]),
        (RuntimeError("of no device"), False, []),
        (torch.OutOfMemoryError("CUDA out of memory"), True, []),
        (torch.AcceleratorError("CUDA error: out of memory"), True, []),
    ],
)
def test_a_lost_device_ends_the_process(
    error: Exception, says_so_later: bool, status: list[int], pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> torch.Tensor:
        raise error

    exits: list[int] = []
    if says_so_later:
        monkeypatch.setattr(pair.fast._streams, "synchronize", lost)
    maker = pair.reset()
    maker.start(0, prompt(5))
    monkeypatch.setattr(pair.fast, "_exit_process", exits.append)
    monkeypatch.setattr(pair.fast._model, "forward", lost)
    pair.fast.submit(maker.plan(), pair.answers.put)
    assert isinstance(pair.answers.get(timeout=60), StepFailed) and exits == status


def test_a_start_launches_every_variant_of_attention(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: set[AttentionConfig] = set()

    def launch(*arguments: object, config: AttentionConfig, **options: object) -> None:
        launched.add(config)
        paged_attention(*arguments, config=config, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(triton_paged, "paged_attention", launch)
    pair.reset()
    pair.fast._rehearse()
    shape = pair.fast._shape
    size = (shape.group, shape.head_dim, shape.dtype.itemsize, shape.gpu)
    assert launched == {decode_config(*size), prefill_config(*size, few=False), prefill_config(*size, few=True)}
