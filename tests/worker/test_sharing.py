"""With a model: tables that share blocks, copies on write and swaps give the logits and tokens of a run from scratch, alone.

Every slot of the cache begins as NaN, on the device and on the host, so that a block that was missed shows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.plans import GREEDY, PlanMaker
from wire import SamplingSpec, StepFailed, StepPlan, StepResult, decode, encode
from worker import model_executor
from worker.config import WorkerConfig
from worker.model_executor import ModelExecutor

NUM_TOKENS = 12
TOLERANCE = 1e-4  # float32 sums in another order
SEEDED = SamplingSpec(temperature=1.0, top_k=50, top_p=0.95, min_p=0.0, seed=11)


class Recorded:
    """Plans in, tokens and their logits out, by slot."""

    def __init__(self, executor: ModelExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
        self.executor = executor
        self._logits: list[torch.Tensor] = []
        sample = model_executor.sample

        def recording(logits_NV: torch.Tensor, *options: object) -> np.ndarray:
            self._logits = list(logits_NV.clone())
            return sample(logits_NV, *options)

        monkeypatch.setattr(model_executor, "sample", recording)
        self.begin()

    def begin(self) -> PlanMaker:
        self.executor.reset()
        for tensor in (*self.executor._kv.layers, self.executor._kv.host):
            tensor.fill_(torch.nan)
        self.tokens: dict[int, list[int]] = {}
        self.logits: dict[int, list[torch.Tensor]] = {}
        return PlanMaker(self.executor.facts, shuffle=7)

    def step(self, plan: StepPlan) -> None:
        answers: list[StepResult | StepFailed] = []
        decoded = decode(encode(plan))
        assert isinstance(decoded, StepPlan)
        self.executor.submit(decoded, answers.append)
        (answer,) = answers
        assert isinstance(answer, StepResult), answer
        for slot, token, logits in zip(answer.slots.tolist(), answer.tokens.tolist(), self._logits, strict=True):
            self.tokens.setdefault(slot, []).append(token)
            self.logits.setdefault(slot, []).append(logits)

    def alone(self, prompt: Sequence[int], sampling: SamplingSpec = GREEDY, index: int = 0) -> Run:
        """From scratch, nobody else there."""
        maker = self.begin()
        maker.start(0, prompt, sampling, output_index=index)
        for _ in range(NUM_TOKENS):
            self.step(maker.plan())
        return Run(self.tokens[0], self.logits[0])

    def run(self, *slots: int) -> Run:
        """What came of a sequence, in the slots that it held one after the other."""
        return Run([t for slot in slots for t in self.tokens[slot]], [one for slot in slots for one in self.logits[slot]])


class Run:
    """The tokens of one sequence, and the logits that each was drawn from."""

    def __init__(self, tokens: list[int], logits: list[torch.Tensor]) -> None:
        self.tokens, self.logits = tokens, logits

    def is_that_of(self, other: Run) -> bool:
        assert len(self.tokens) == len(other.tokens) == NUM_TOKENS
        assert self.tokens == other.tokens
        torch.testing.assert_close(torch.stack(self.logits), torch.stack(other.logits), atol=TOLERANCE, rtol=TOLERANCE)
        return True


@pytest.fixture(scope="module", params=["llama", "opt"])
def executor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelExecutor:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    options = dict(device="cpu", threads=1, block_size=16, num_blocks=40, swap_gib=0.001, max_model_len=128)
    return ModelExecutor.of(WorkerConfig("ipc://x", "m", max_batch_rows=8, max_step_tokens=256, **options), checkpoint)


@pytest.fixture
def recorded(executor: ModelExecutor, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    return Recorded(executor, monkeypatch)


@pytest.fixture(scope="module")
def prompts(executor: ModelExecutor) -> list[list[int]]:
    """The second begins like the first, for two blocks and a half."""
    choose = np.random.default_rng(3)
    first, second, third = (choose.integers(3, executor.facts.vocab_size, size).tolist() for size in (55, 20, 37))
    return [first, first[:40] + second, third]


def test_a_prefix_of_full_blocks_is_not_computed_again(recorded: Recorded, prompts: list[list[int]]) -> None:
    alone = [recorded.alone(prompt) for prompt in prompts]
    maker = recorded.begin()
    maker.start(0, prompts[0])
    maker.start(2, prompts[2])
    recorded.step(maker.plan())
    maker.start(1, prompts[1], prefix_of=0, num_computed=32)
    plan = maker.plan()
    assert plan.num_tokens.sum() == 2 + len(prompts[1]) - 32 and not len(plan.copy_to)
    recorded.step(plan)
    for _ in range(NUM_TOKENS - 2):
        recorded.step(maker.plan())
    maker.end(0, 2)  # the shared blocks stay
    recorded.step(maker.plan())
    for slot in range(3):
        assert recorded.run(slot).is_that_of(alone[slot])


def test_a_prefix_hit_outlives_the_sequence_that_computed_it(recorded: Recorded, prompts: list[list[int]]) -> None:
    alone = recorded.alone(prompts[0])
    maker = recorded.begin()
    maker.start(0, prompts[0])
    recorded.step(maker.plan())
    maker.start(1, prompts[0], prefix_of=0, num_computed=48)
    maker.end(0)
    for _ in range(NUM_TOKENS):
        recorded.step(maker.plan())
    assert recorded.run(1).is_that_of(alone)


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_outputs_that_fork_after_the_prompt_are_each_what_they_would_be_alone(
    recorded: Recorded, prompts: list[list[int]], sampling: SamplingSpec
) -> None:
    """Five outputs of one prompt: its last block is partly filled and copied for each, the first one writes on in it."""
    prompt = prompts[0]
    alone = [recorded.alone(prompt, sampling, index) for index in range(5)]
    maker = recorded.begin()
    maker.start(0, prompt, sampling)
    recorded.step(maker.plan())
    for index in range(1, 5):
        maker.start(index, prompt, sampling, output_index=index, prefix_of=0, num_computed=len(prompt) - 1)
    plan = maker.plan()
    assert plan.num_tokens.tolist() == [1] * 5 and plan.copy_from.tolist() == [maker.sequences[0].blocks[3]] * 4
    recorded.step(plan)
    for _ in range(NUM_TOKENS - 1):
        recorded.step(maker.plan())
    for index in range(5):
        recorded.tokens[index] = recorded.tokens[index][:NUM_TOKENS]
        recorded.logits[index] = recorded.logits[index][:NUM_TOKENS]
        assert recorded.run(index).is_that_of(alone[index])
    distinct = {tuple(run.tokens) for run in alone}
    assert len(distinct) == (1 if sampling is GREEDY else 5)


def test_a_swapped_sequence_goes_on_where_it_was(recorded: Recorded, prompts: list[list[int]]) -> None:
    """Its blocks are taken by others meanwhile, and it comes back to other ones."""
    prompt = prompts[0]
    alone, other = recorded.alone(prompt), recorded.alone(prompts[2])
    maker = recorded.begin()
    maker.start(0, prompt)
    for _ in range(5):
        recorded.step(maker.plan())
    blocks = list(maker.sequences[0].blocks)
    swapped = maker.swap_out(0)
    maker.start(2, prompts[2])
    assert set(maker.sequences[2].blocks) <= set(blocks)
    for _ in range(NUM_TOKENS):
        recorded.step(maker.plan())
    maker.start(1, prompt + recorded.tokens[0], num_prompt_tokens=len(prompt), swapped=swapped)
    assert maker.sequences[1].blocks != blocks
    maker.end(2)
    for _ in range(NUM_TOKENS - 5):
        plan = maker.plan()
        assert plan.num_tokens.tolist() == [1], "nothing is computed again"
        recorded.step(plan)
    assert recorded.run(0, 1).is_that_of(alone) and recorded.run(2).is_that_of(other)


def test_a_sequence_comes_back_partly_from_the_prefix_cache_and_partly_from_the_host(
    recorded: Recorded, prompts: list[list[int]]
) -> None:
    """Two outputs share a prompt; one is swapped out, and comes back to the other's blocks and its own last ones."""
    prompt = prompts[0]
    alone = [recorded.alone(prompt, SEEDED, index) for index in range(2)]
    maker = recorded.begin()
    maker.start(0, prompt, SEEDED)
    recorded.step(maker.plan())
    maker.start(1, prompt, SEEDED, output_index=1, prefix_of=0, num_computed=len(prompt) - 1)
    for _ in range(5):
        recorded.step(maker.plan())
    swapped = maker.swap_out(1)
    recorded.step(maker.plan())
    known = prompt + recorded.tokens[1]
    how = dict(num_prompt_tokens=len(prompt), output_index=1, prefix_of=0, num_computed=48, swapped=swapped)
    maker.start(3, known, SEEDED, **how)
    assert len(maker._swaps_in) == len(maker.sequences[3].blocks) - 3 == 1
    while len(recorded.tokens.get(3, [])) < NUM_TOKENS - 5:
        recorded.step(maker.plan())
    assert recorded.run(1, 3).is_that_of(alone[1])
    recorded.tokens[0], recorded.logits[0] = recorded.tokens[0][:NUM_TOKENS], recorded.logits[0][:NUM_TOKENS]
    assert recorded.run(0).is_that_of(alone[0])
