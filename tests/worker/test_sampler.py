"""Sampling: the right distribution, transformers' filters, the same draw in any company, the fast way equal to the slow one."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from worker import compiled, philox
from worker.sampler import adjust, adjust_slowly, draw, keep, keep_slowly, sample, sample_slowly, whole_noise
from worker.sampling_columns import Entries, SamplingRows


@pytest.fixture(autouse=True, params=["torch", "loops"])
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "loops":
        pytest.importorskip("numba")
        compiled.load()
    yield
    compiled.unload()


NOTHING = (np.empty(0, np.intp), np.empty(0, np.intp))


def rows(
    count: int,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    seed=7,
    position=0,
    output_index=0,
    repetition=1.0,
    presence=0.0,
    frequency=0.0,
    masked=NOTHING,
    bias=(),
    seen=(),
):
    def column(value: object, dtype: type) -> np.ndarray:
        return np.broadcast_to(np.asarray(value, dtype), (count,)).copy()

    return SamplingRows(
        temperature=column(temperature, np.float32),
        top_k=column(top_k, np.int32),
        top_p=column(top_p, np.float32),
        min_p=column(min_p, np.float32),
        seed=column(seed, np.uint64),
        position=column(position, np.int64),
        output_index=column(output_index, np.int32),
        repetition_penalty=column(repetition, np.float32),
        presence_penalty=column(presence, np.float32),
        frequency_penalty=column(frequency, np.float32),
        masked=masked,
        bias=entries(bias),
        seen=entries(seen),
    )


def entries(triples) -> Entries:
    """Of (row, token, value)."""
    row, token, value = zip(*triples, strict=True) if triples else ((), (), ())
    return Entries(np.array(row, np.intp), np.array(token, np.intp), np.array(value, np.float32))


def take(all_rows: SamplingRows, chosen: np.ndarray) -> SamplingRows:
    """Some rows of those that have no mask, no bias and no penalty."""
    whole = ("masked", "bias", "seen")
    return SamplingRows(**{name: getattr(all_rows, name)[chosen] for name in all_rows.__slots__ if name not in whole})


def logits(count: int, vocab: int, spread: float, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def mixed_rows(count: int, seed: int) -> SamplingRows:
    """Every combination of parameters, and greedy rows among them."""
    choose = np.random.default_rng(seed)
    return rows(
        count,
        temperature=choose.choice([0.0, 0.3, 1.0, 2.5], count),
        top_k=choose.choice([0, 1, 5, 50, 10_000], count),
        top_p=choose.choice([1.0, 0.95, 0.5, 0.01], count),
        min_p=choose.choice([0.0, 0.05, 0.5], count),
        seed=choose.integers(0, 2**64, count, dtype=np.uint64),
        position=choose.integers(0, 5_000, count),
        output_index=choose.integers(0, 4, count),
    )


def test_greedy_rows_take_the_best_token_and_ties_go_to_the_lowest_id() -> None:
    scores = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0], [-1.0, -2.0, -3.0, -0.5]])
    assert sample(scores, rows(3, temperature=0.0)).tolist() == [1, 0, 3]


@pytest.mark.parametrize("vocab", [1, 3, 64, 101, 3001, 49152])
@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 4.0, 30.0])
def test_fast_sampling_equals_its_slow_twin(vocab: int, spread: float) -> None:
    parameters = mixed_rows(48, seed=vocab)
    scores = logits(48, vocab, spread)
    assert sample(scores.clone(), parameters).tolist() == sample_slowly(scores, parameters).tolist()


def test_ties_among_the_perturbed_scores_and_coarse_logits_equal_the_slow_twin() -> None:
    scores = logits(64, 500, 2.0).to(torch.bfloat16).float()
    scores[:, 100:200] = scores[:, :1]
    parameters = mixed_rows(64, seed=5)
    assert sample(scores.clone(), parameters).tolist() == sample_slowly(scores, parameters).tolist()


@pytest.mark.parametrize(
    "row",
    [
        [3e38, -3e38, 1.0, -torch.inf],
        [-torch.inf, -torch.inf, -7.0, -torch.inf],
        [1e-45, 0.0, -0.0, 2e-45],
        [1e34, 1e33, -1e34, 0.0],
        [5.0, 5.0, 5.0, 5.0],
        [-1e30, -1e30, -2e30, -torch.inf],
        [1.0, 0.5, -1e9, -70.0],
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 2e-5])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_scores_of_any_size(row: list[float], temperature: float) -> None:
    scores, parameters = torch.tensor([row * 3] * 48), mixed_rows(48, seed=5)
    parameters.temperature[parameters.temperature == 1] = temperature
    slow = [int(token) for token in sample_slowly(scores, parameters)]
    fast = sample(scores.clone(), parameters).tolist()
    over = max(row) / np.maximum(parameters.temperature.astype(float), 1e-5) > np.finfo(np.float32).max  # infinite then
    for i in range(48):
        assert fast[i] == slow[i] or (over[i] and parameters.temperature[i] > 0)
        assert scores[i, fast[i]] > -torch.inf


def test_a_nucleus_wider_than_the_first_try_is_found_whole() -> None:
    scores = logits(3, 4000, 0.1)
    slow = [row.clone() for row in scores]
    for row in slow:
        keep_slowly(row, 0, 0.9, 0.0)
    keep(scores, np.zeros(3, np.int32), np.full(3, 0.9, np.float32), np.zeros(3, np.float32))
    assert torch.equal(scores, torch.stack(slow)) and 3000 < int(torch.isfinite(scores[0]).sum()) < 4000


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize(
    "top_k, top_p, min_p",
    [(0, 1, 0.1), (7, 1, 0), (0, 0.8, 0), (20, 0.9, 0), (0, 0.999, 0.001), (40, 0.95, 0.05), (1, 1, 0), (0, 0.001, 0)],
)
def test_filters_keep_the_same_tokens_as_transformers(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    scores = logits(20, 1000, 3.0, seed=top_k)
    expected = TemperatureLogitsWarper(temperature)(None, scores.clone())
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    if min_p:
        expected = MinPLogitsWarper(min_p)(None, expected)
    ours = scores / temperature
    keep(ours, np.full(20, top_k, np.int32), np.full(20, top_p, np.float32), np.full(20, min_p, np.float32))
    assert torch.equal(torch.isfinite(ours), torch.isfinite(expected))
    assert torch.allclose(ours[torch.isfinite(ours)], expected[torch.isfinite(ours)])


def test_filters_of_one_row_leave_the_others_alone() -> None:
    scores = logits(4, 50, 1.0)
    before = scores.clone()
    keep(scores, np.array([0, 3, 0, 0], np.int32), np.array([1, 1, 0.2, 1], np.float32), np.array([0, 0, 0, 0.9], np.float32))
    assert torch.equal(scores[0], before[0]) and torch.isfinite(scores[1:]).sum() < 30


def test_tokens_that_tie_at_the_edge_stay_together() -> None:
    scores = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]] * 2)
    keep(scores, np.array([2, 0], np.int32), np.array([1.0, 0.5], np.float32), np.zeros(2, np.float32))
    assert torch.isfinite(scores).tolist() == [[True, True, True, True, False]] * 2


def test_the_same_request_draws_the_same_tokens_in_any_company() -> None:
    parameters = mixed_rows(40, seed=11)
    scores = logits(40, 777, 3.0)
    together = sample(scores.clone(), parameters)
    choose = np.random.default_rng(0)
    for _ in range(5):
        chosen = choose.permutation(40)[: choose.integers(1, 20)]
        assert sample(scores[chosen].clone(), take(parameters, chosen)).tolist() == together[chosen].tolist()


@pytest.mark.parametrize("field", ["seed", "position", "output_index"])
def test_another_seed_position_or_output_gives_other_draws(field: str) -> None:
    scores = torch.zeros(2, 1000)
    values = np.array([12, 13])
    first, second = sample(scores.clone(), rows(2, **{field: values}))
    assert first != second


def test_draws_use_the_documented_counters() -> None:
    """The noise of token t is word t % 4 of philox(key = seed, counter = (t // 4, position, output index, 0))."""
    seed, position, output_index, vocab = 0xDEADBEEF_01234567, 4321, 3, 10
    expected = []
    for token in range(vocab):
        counter = [np.array([value], np.uint64) for value in (token // 4, position, output_index, 0)]
        key = [np.array([value], np.uint64) for value in (seed & 0xFFFFFFFF, seed >> 32)]
        expected.append(philox.gumbel(philox.philox4x32(*counter, *key))[0, token % 4])
    noise = whole_noise(vocab, np.uint64(seed), np.int64(position), np.int32(output_index))
    assert noise.tolist() == expected
    got = sample(torch.zeros(1, vocab), rows(1, seed=seed, position=position, output_index=output_index))
    assert got.tolist() == [int(np.argmax(expected))]


@pytest.mark.parametrize(
    "temperature, top_k, top_p, min_p", [(1.0, 0, 1.0, 0.0), (0.6, 0, 1.0, 0.0), (1.5, 12, 0.9, 0.0), (1.0, 0, 1.0, 0.2)]
)
def test_tokens_are_drawn_with_the_probabilities_of_the_softmax(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Chi-square over 40,000 draws at fixed seeds: below the 0.999 quantile, which for f degrees of freedom is about
    f + 3.09·√(2f) + 6."""
    count, vocab = 40_000, 30
    scores = logits(1, vocab, 1.0, seed=3)
    parameters = rows(
        count, temperature, top_k, top_p, min_p, seed=np.arange(count) // 200 + 17, position=np.arange(count) % 200
    )
    drawn = sample(scores.expand(count, vocab).clone(), parameters)
    kept = scores[0] / temperature
    keep_slowly(kept, top_k, top_p, min_p)
    probability = torch.softmax(kept.double(), -1).numpy()
    observed = np.bincount(drawn, minlength=vocab)
    assert observed[probability == 0].sum() == 0
    expected = probability[probability > 0] * count
    assert expected.min() > 5
    chi_square = float(((observed[probability > 0] - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    assert chi_square < freedom + 3.09 * np.sqrt(2 * freedom) + 6


def test_masked_stop_tokens_are_neither_best_nor_drawn() -> None:
    scores = torch.zeros(2, 4)
    scores[:, 2] = 100.0
    masked = (np.array([0, 1]), np.array([2, 2]))
    tokens = sample(scores.clone(), rows(2, temperature=np.array([0.0, 1.0]), masked=masked))
    assert tokens[0] == 0 and tokens[1] != 2
    assert sample_slowly(scores, rows(2, temperature=np.array([0.0, 1.0]), masked=masked)).tolist() == tokens.tolist()


def adjusted_rows(count: int, vocab: int, seed: int) -> SamplingRows:
    """Rows with and without bias and penalties, some tokens in several of them."""
    choose = np.random.default_rng(seed)

    def some(values) -> list[tuple[int, int, float]]:
        pairs = [(row, token) for row in range(count) for token in range(vocab)]
        chosen = choose.permutation(len(pairs))[: len(pairs) // 3]
        return [(*pairs[i], float(value)) for i, value in zip(chosen, choose.choice(values, len(chosen)), strict=True)]

    return rows(
        count,
        temperature=choose.choice([0.0, 1.0], count),
        seed=choose.integers(0, 2**64, count, dtype=np.uint64),
        repetition=choose.choice([1.0, 0.5, 1.3], count),
        presence=choose.choice([0.0, -2.0, 1.5], count),
        frequency=choose.choice([0.0, 0.25, -1.0], count),
        bias=some([-100.0, 0.5, 100.0]),
        seen=some([0.0, 1.0, 2.0, 7.0]),
        masked=(np.arange(count), choose.integers(0, vocab, count)),
    )


@pytest.mark.parametrize("vocab", [3, 64])
def test_fast_adjustments_equal_their_slow_twin(vocab: int) -> None:
    for seed in range(10):
        scores, asked = logits(9, vocab, 4.0, seed), adjusted_rows(9, vocab, seed)
        fast, slow = scores.clone(), scores.clone()
        adjust(fast, asked)
        for i, row in enumerate(slow):
            adjust_slowly(row, asked, i)
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=0)
        assert sample(scores.clone(), asked).tolist() == sample_slowly(scores.clone(), asked).tolist()


@pytest.mark.parametrize("penalty", [0.5, 1.3, 10.0])
def test_the_repetition_penalty_is_transformers(penalty: float) -> None:
    scores, seen = logits(2, 50, 3.0), [[3, 3, 7, 49], [0, 1, 1, 2]]
    asked = rows(2, repetition=penalty, seen=[(i, token, 0) for i, ids in enumerate(seen) for token in sorted(set(ids))])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(seen), scores.clone())
    adjust(scores, asked)
    torch.testing.assert_close(scores, expected)


def test_presence_counts_once_and_frequency_as_often_as_it_came() -> None:
    scores = torch.zeros(1, 4)
    adjust(scores, rows(1, presence=0.5, frequency=0.25, seen=[(0, 1, 0), (0, 2, 1), (0, 3, 4)]))
    assert scores.tolist() == [[0.0, 0.0, -0.75, -1.5]], "a token that is in the prompt only is not punished"


def test_a_bias_comes_before_the_penalty_and_the_mask_after_both() -> None:
    scores = torch.tensor([[1.0, 1.0, 1.0]])
    masked = (np.array([0]), np.array([2]))
    adjust(scores, rows(1, repetition=2.0, bias=[(0, 0, -3.0), (0, 2, 100.0)], seen=[(0, 0, 0)], masked=masked))
    assert scores.tolist() == [[-4.0, 1.0, float("-inf")]]


def test_a_row_that_is_not_finite_gets_a_token_and_spoils_no_other() -> None:
    scores = logits(5, 20, 1.0)
    alone = sample(scores[4:].clone(), rows(1))
    scores[0, 3] = float("nan")
    scores[1, 4] = float("inf")
    scores[2] = float("-inf")
    tokens = sample(scores.clone(), rows(5))
    assert tokens[0] == 3 and tokens[1] == 4 and 0 <= tokens[2] < 20 and tokens[4] == alone[0]
    assert sample_slowly(scores, rows(5)).tolist() == tokens.tolist()


def test_extreme_temperatures_stay_in_range() -> None:
    scores = logits(4, 50, 10.0)
    temperatures = np.array([1e-30, 1e-5, 1e-4, 1e6])
    tokens = sample(scores.clone(), rows(4, temperature=temperatures))
    assert tokens[:3].tolist() == scores[:3].argmax(-1).tolist() and 0 <= tokens[3] < 50


def test_noise_is_drawn_for_candidates_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peaked row costs a few groups of four tokens, not the vocabulary."""
    counted: list[int] = []
    words = philox.words
    monkeypatch.setattr(philox, "words", lambda seed, c0, *rest: counted.append(len(c0)) or words(seed, c0, *rest))
    scores = torch.full((1, 4096), -40.0)
    scores[0, :8] = 0.0
    one = np.zeros(1, np.int64)
    token = draw(scores, one.astype(np.uint64), one, one.astype(np.int32))
    assert token[0] < 8 and sum(counted) == 2
