"""The log of the sum of exponentials equals torch's."""

from __future__ import annotations

import pytest
import torch

from worker.kernels.sampling.log_sum_exp import log_sum_exp


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 7, 1024, 2500])
@pytest.mark.parametrize("spread", [0.1, 30.0])
def test_rows_of_any_length(vocab: int, spread: float, dtype: torch.dtype, device: torch.device) -> None:
    logits = (torch.randn(5, vocab, generator=torch.Generator().manual_seed(vocab)) * spread).to(device, dtype)
    twin = logits.double().logsumexp(1).float()
    torch.testing.assert_close(log_sum_exp(logits), twin, rtol=2e-6, atol=5e-6)


def test_impossible_tokens_and_parts_without_a_possible_one(device: torch.device) -> None:
    logits = torch.full((2, 3000), float("-inf"), device=device)
    logits[:, [3, 2900]] = torch.tensor([1.0, 2.0], device=device)
    torch.testing.assert_close(log_sum_exp(logits), logits.logsumexp(1))
