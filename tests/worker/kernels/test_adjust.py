"""Bias, penalties and mask on the device equal the host sampler's, and so do the counts behind the penalties."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers.device_rows import adjust_columns, sampling_rows
from worker.kernels.sampling import adjust as kernels
from worker.sampler import adjust_slowly
from worker.sampling_columns import Entries, SamplingRows


def entries(triples) -> Entries:
    """Of (row, token, value)."""
    row, token, value = zip(*triples, strict=True) if triples else ((), (), ())
    return Entries(np.array(row, np.intp), np.array(token, np.intp), np.array(value, np.float32))


def random_rows(count: int, vocab: int, seed: int) -> SamplingRows:
    choose = np.random.default_rng(seed)

    def some(values, most: int) -> Entries:
        """Up to `most` tokens for every other row."""
        tokens = [(row, token) for row in range(0, count, 2) for token in choose.permutation(vocab)[: choose.integers(most)]]
        return entries([(*pair, float(choose.choice(values))) for pair in tokens])

    return sampling_rows(
        count,
        repetition_penalty=choose.choice([1.0, 0.5, 1.3], count),
        presence_penalty=choose.choice([0.0, -2.0, 1.5], count),
        frequency_penalty=choose.choice([0.0, 0.25, -1.0], count),
        bias=some([-100.0, 0.5, 100.0], 70),
        seen=some([0.0, 1.0, 2.0, 7.0], vocab // 2),
        masked=(np.repeat(np.arange(count), 3), np.concatenate([choose.permutation(vocab)[:3] for _ in range(count)])),
    )


@pytest.mark.parametrize("vocab", [8, 65, 2500])
def test_adjustments_equal_the_host_samplers(vocab: int, device: torch.device) -> None:
    for seed in range(3):
        rows = random_rows(6, vocab, seed)
        slow = torch.randn(6, vocab, generator=torch.Generator().manual_seed(seed)) * 4
        fast = slow.clone().to(device)
        kernels.adjust(fast, *adjust_columns(rows, 6, vocab, device))
        for i, row in enumerate(slow):
            adjust_slowly(row, rows, i)
        torch.testing.assert_close(fast.cpu(), slow, atol=1e-5, rtol=0)


def test_a_bias_comes_before_the_penalty_and_the_mask_after_both(device: torch.device) -> None:
    scores = torch.ones(1, 3, device=device)
    rows = sampling_rows(
        1,
        repetition_penalty=2.0,
        bias=entries([(0, 0, -3.0), (0, 2, 100.0)]),
        seen=entries([(0, 0, 0)]),
        masked=(np.array([0]), np.array([2])),
    )
    kernels.adjust(scores, *adjust_columns(rows, 1, 3, device))
    assert scores.tolist() == [[-4.0, 1.0, float("-inf")]]


def test_a_token_of_the_prompt_only_is_not_punished_for_presence_or_frequency(device: torch.device) -> None:
    scores, rows = torch.zeros(1, 4, device=device), sampling_rows(1, presence_penalty=0.5, frequency_penalty=0.25)
    columns, seen = adjust_columns(rows, 1, 4, device)
    seen[0] = torch.tensor([0, 1, 2, 9])
    columns.seen_row[0] = 0
    kernels.adjust(scores, columns, seen)
    assert scores.tolist() == [[0.0, 0.0, -0.75, -1.5]]


def test_rows_that_ask_for_nothing_are_left_alone(device: torch.device) -> None:
    scores = torch.randn(3, 1500, generator=torch.Generator().manual_seed(0)).to(device)
    before = scores.clone()
    columns, seen = adjust_columns(sampling_rows(3, repetition_penalty=9.0), 3, 1500, device)
    kernels.adjust(scores, columns, seen.fill_(3))
    assert torch.equal(scores, before)


def test_counts_of_a_sequence_and_of_what_it_draws(device: torch.device) -> None:
    tokens = torch.tensor([5, 5, 0, 9, 5, 9, 9], dtype=torch.int32, device=device)
    seen = torch.full((3, 10), 77, dtype=torch.int32, device=device)
    kernels.fill_seen(seen, 1, tokens, num_prompt=3)
    expected = [1, 0, 0, 0, 0, 3, 0, 0, 0, 6]
    assert seen[1].tolist() == expected and (seen[[0, 2]] == 77).all()
    rows, drawn = torch.tensor([-1, 1, 2], dtype=torch.int32, device=device), torch.tensor([4, 9, 3], device=device).int()
    kernels.count_drawn(seen, rows, drawn)
    expected[9] = 8
    assert seen[1].tolist() == expected and seen[2, 3] == 79 and int((seen == 77).sum()) == 19
    kernels.fill_seen(seen, 1, tokens[:0], num_prompt=0)
    assert not seen[1].any()


def test_long_sequences_are_counted_whole(device: torch.device) -> None:
    tokens = torch.randint(0, 50, (2500,), generator=torch.Generator().manual_seed(0))
    seen = torch.empty(1, 50, dtype=torch.int32, device=device)
    kernels.fill_seen(seen, 0, tokens.int().to(device), num_prompt=1100)
    in_prompt = torch.bincount(tokens[:1100], minlength=50) > 0
    assert torch.equal(seen[0].cpu(), (2 * torch.bincount(tokens[1100:], minlength=50) + in_prompt).int())
