"""The log-probability of a token equals torch's log softmax."""

from __future__ import annotations

import pytest
import torch

from worker.kernels.sampling.logprobs import logprobs_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 7, 1024, 2500])
@pytest.mark.parametrize("spread", [0.1, 30.0])
def test_logprobs_of_tokens(vocab: int, spread: float, dtype: torch.dtype, device: torch.device) -> None:
    logits = (torch.randn(5, vocab, generator=torch.Generator().manual_seed(vocab)) * spread).to(device, dtype)
    tokens = (torch.arange(5, device=device) * 977 % vocab).int()
    twin = logits.double().log_softmax(1).gather(1, tokens.long()[:, None])[:, 0].float()
    torch.testing.assert_close(logprobs_of(logits, tokens), twin, rtol=2e-6, atol=5e-6)


def test_impossible_tokens_and_parts_without_a_possible_one(device: torch.device) -> None:
    logits = torch.full((2, 3000), float("-inf"), device=device)
    logits[:, [3, 2900]] = torch.tensor([1.0, 2.0], device=device)
    tokens = torch.tensor([2900, 5], dtype=torch.int32, device=device)
    twin = logits.log_softmax(1).gather(1, tokens.long()[:, None])[:, 0]
    torch.testing.assert_close(logprobs_of(logits, tokens), twin)
