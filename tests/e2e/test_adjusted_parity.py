"""Repetition penalty and logit bias through the whole engine give the tokens of transformers' generate, whatever happens to the
request on its way: chunks, company, preemption."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from scheduler.core import CoreConfig
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.executors import model_executor
from tests.helpers.local_loop import LocalLoop
from wire import SamplingSpec

VOCABULARY, LENGTH = 256, 24
PENALTIES = (1.0, 1.3, 0.8, 2.0)


def case(number: int) -> tuple[list[int], SamplingSpec]:
    """Prompts that repeat themselves; penalties and biases in turns, as some requests have none."""
    choose = random.Random(number)
    prompt = [choose.randrange(12) for _ in range(choose.randint(1, 70))]
    bias = {choose.randrange(VOCABULARY): choose.uniform(-8, 8) for _ in range(number % 3 * 4)}
    penalty = PENALTIES[number % len(PENALTIES)]
    return prompt, SamplingSpec(0.0, 0, 1.0, 0.0, 0, repetition_penalty=penalty, logit_bias=tuple(bias.items()))


@pytest.mark.parametrize(("num_blocks", "step_tokens"), [(200, 128), (14, 17)])
def test_tokens_are_those_of_transformers(num_blocks: int, step_tokens: int, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama", vocab_size=VOCABULARY)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    cases = [case(number) for number in range(12)]
    loop = LocalLoop(model_executor(folder, num_blocks=num_blocks), CoreConfig(max_batch_rows=8, max_step_tokens=step_tokens))
    for prompt, spec in cases:
        loop.add(prompt, LENGTH, spec)
    got = [each.tokens for each in loop.run().values()]
    assert (loop.core.counters.preemptions > 0) == (num_blocks < 100)
    for (prompt, spec), tokens in zip(cases, got, strict=True):
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=LENGTH,
            do_sample=False,
            pad_token_id=0,
            repetition_penalty=spec.repetition_penalty,
            sequence_bias={(token,): bias for token, bias in spec.logit_bias} or None,
        )
        assert tokens == expected[0, len(prompt) :].tolist()
