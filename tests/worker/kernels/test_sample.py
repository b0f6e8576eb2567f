"""The sampler's kernels draw the tokens that worker.sampler draws: the same filters, the same noise, the same ties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.helpers.device_rows import draw_columns, mixed_rows, sampling_rows
from worker.kernels.sampling import draw
from worker.kernels.sampling import sample as launches
from worker.kernels.sampling.noise import gumbel_noise
from worker.sampler import keep_slowly, sample_slowly, whole_noise
from worker.sampling_columns import SamplingRows


def logits(count: int, vocab: int, spread: float, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed)) * spread


@triton.jit
def noise_kernel(seed_ptr, position_ptr, index_ptr, out_ptr, BLOCK: tl.constexpr):
    begin = tl.program_id(0) * BLOCK
    noise = gumbel_noise(begin, tl.load(seed_ptr), tl.load(position_ptr), tl.load(index_ptr), BLOCK)
    tl.store(out_ptr + begin + tl.arange(0, BLOCK), noise)


def drawn(scores: torch.Tensor, rows: SamplingRows, device: torch.device) -> list[int]:
    slots = torch.arange(len(scores), dtype=torch.int32, device=device).flip(0) * 2
    last_tokens = torch.full((2 * len(scores),), -7, dtype=torch.int32, device=device)
    scores, before = scores.to(device), scores.clone()
    tokens = launches.sample(scores, draw_columns(rows, device), slots, last_tokens)
    assert torch.equal(scores.cpu(), before) or before.isnan().any(), "the logits are left alone"
    assert torch.equal(last_tokens[slots], tokens) and (last_tokens[1::2] == -7).all()
    return tokens.tolist()


@pytest.mark.parametrize("vocab", [1, 3, 101, 2311])
@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0, 30.0])
def test_tokens_equal_the_host_samplers(vocab: int, spread: float, device: torch.device) -> None:
    rows, scores = mixed_rows(8, seed=vocab + int(spread)), logits(8, vocab, spread, vocab)
    assert drawn(scores, rows, device) == sample_slowly(scores, rows).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_with_many_ties(dtype: torch.dtype, device: torch.device) -> None:
    scores = logits(12, 700, 2.0).to(dtype)
    scores[:, 100:200] = scores[:, :1]
    rows = mixed_rows(12, seed=5)
    assert drawn(scores, rows, device) == sample_slowly(scores.float(), rows).tolist()


@pytest.mark.parametrize("parts", [(1, 3), (2, 2), (3, 1)])
def test_however_a_row_is_divided(parts: tuple[int, int], device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "parts_of", lambda num_rows, vocab: parts)
    rows, scores = mixed_rows(6, seed=parts[0]), logits(6, 2500, 2.0)
    assert drawn(scores, rows, device) == sample_slowly(scores, rows).tolist()


@pytest.mark.parametrize("near", [1, 16, 256])
def test_an_edge_beyond_the_list_of_near_tokens_is_found(
    near: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launches, "NEAR", near)
    rows, scores = mixed_rows(8, seed=near), logits(8, 900, 3.0, near)
    assert drawn(scores, rows, device) == sample_slowly(scores, rows).tolist()


@pytest.mark.parametrize(
    "top_k, top_p, min_p",
    [(1, 1, 0), (7, 1, 0), (899, 1, 0), (0, 0.8, 0), (0, 1e-6, 0), (0, 0.9999, 0), (400, 0.7, 0), (40, 0.95, 0.05)],
)
def test_exactly_the_tokens_that_the_filters_keep_can_be_drawn(
    top_k: int, top_p: float, min_p: float, device: torch.device
) -> None:
    scores = logits(1, 900, 1.0, seed=top_k)
    kept = scores[0].clone()
    keep_slowly(kept, top_k, top_p, min_p)
    rows = sampling_rows(10, top_k=top_k, top_p=top_p, min_p=min_p, position=np.arange(10))
    tokens = drawn(scores.expand(10, 900).contiguous(), rows, device)
    assert kept[tokens].isfinite().all() and tokens == sample_slowly(scores.expand(10, 900), rows).tolist()


@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e4])
def test_the_edge_is_the_least_score_that_is_kept(spread: float, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    top_k, top_p = [1, 2, 17, 299, 0, 0, 0, 0, 40, 40], [1, 1, 1, 1, 0.0, 0.3, 0.9, 0.999, 0.1, 0.9]
    rows, scores, edges = sampling_rows(10, top_k=top_k, top_p=top_p), logits(10, 300, spread), []
    monkeypatch.setattr(launches, "draw_kernel", Spy(edges))
    drawn(scores, rows, device)
    for i, row in enumerate(scores):
        kept = row.clone()
        keep_slowly(kept, top_k[i], top_p[i], 0.0)
        bits = row.view(torch.int32)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        assert torch.equal(key >= edges[0][i].cpu(), kept.isfinite()), (top_k[i], top_p[i])


class Spy:
    """The draw's kernel, that tells of the edges it is given."""

    def __init__(self, edges: list[torch.Tensor]) -> None:
        self._edges = edges

    def __getitem__(self, grid):
        def launch(logits_NV, best, edge, *rest, **options) -> None:
            self._edges.append(edge.clone())
            draw.draw_kernel[grid](logits_NV, best, edge, *rest, **options)

        return launch


def test_ties_go_to_the_lowest_token_and_minus_zero_is_zero(device: torch.device) -> None:
    scores = torch.full((3, 1030), -1.0)
    scores[0, [5, 1029]] = 3.0
    scores[1, [2, 7, 1025]] = torch.tensor([-0.0, 0.0, 0.0])
    scores[2] = float("-inf")
    assert drawn(scores, sampling_rows(3, temperature=[0, 0, 1]), device) == [5, 2, 0]


def test_a_row_that_is_not_finite_gets_its_argmax_and_spoils_no_other(device: torch.device) -> None:
    scores, rows = logits(5, 1100, 1.0), sampling_rows(5, top_k=[0, 3, 3, 0, 0], top_p=[0.5, 0.5, 1, 1, 0.9])
    alone = drawn(scores, rows, device)
    scores[0, [1030, 3]] = torch.tensor([float("inf"), float("nan")])
    scores[1, [4, 1029]] = float("inf")
    scores[2] = float("-inf")
    assert drawn(scores, rows, device) == [3, 4, 0, *alone[3:]] == sample_slowly(scores, rows).tolist()


def test_extreme_temperatures_and_logits_stay_in_range(device: torch.device) -> None:
    rows, scores = sampling_rows(6, temperature=[1e-30, 1e-5, 1e-4, 1e6, 1, 1e-4], top_p=0.9), logits(6, 50, 10.0)
    scores[4] *= 1e30
    scores[5] *= 1e37
    tokens = drawn(scores, rows, device)
    assert tokens[:3] == scores[:3].argmax(-1).tolist() and tokens[4:] == scores[4:].argmax(-1).tolist()
    assert tokens[3] == sample_slowly(scores[3:4], sampling_rows(1, temperature=1e6, top_p=0.9))[0]


def test_large_scores_whose_sums_with_noise_tie_by_rounding(device: torch.device) -> None:
    scores = logits(8, 300, 3.0) + torch.tensor([1e5, 1e6, 1e7, 1e8, -1e5, -1e6, -1e7, -1e8])[:, None]
    rows = sampling_rows(8, position=np.arange(8))
    assert drawn(scores, rows, device) == sample_slowly(scores, rows).tolist()


def test_a_rows_token_depends_on_no_other_row(device: torch.device) -> None:
    rows, scores = mixed_rows(4, seed=3), logits(4, 1100, 2.0)
    together = drawn(scores, rows, device)
    for i in range(4):
        own = {name: getattr(rows, name)[i : i + 1] for name in rows.__slots__ if name not in ("masked", "bias", "seen")}
        assert drawn(scores[i : i + 1], SamplingRows(**own), device) == together[i : i + 1]


def test_rows_of_a_wider_tensor(device: torch.device) -> None:
    wide = torch.full((4, 400), float("nan"), device=device)
    wide[:, 16:316] = logits(4, 300, 2.0).to(device)
    rows, slots = mixed_rows(4, seed=9), torch.arange(4, dtype=torch.int32, device=device)
    tokens = launches.sample(wide[:, 16:316], draw_columns(rows, device), slots, slots.clone())
    assert tokens.tolist() == sample_slowly(logits(4, 300, 2.0), rows).tolist()


@pytest.mark.parametrize(
    "seed, position, output_index", [(0, 0, 0), (0xDEADBEEF_01234567, 4321, 3), (2**64 - 1, 2**32 - 1, 2**31 - 1)]
)
def test_noise_equals_the_hosts_but_for_the_last_digit(
    seed: int, position: int, output_index: int, device: torch.device
) -> None:
    noise = torch.empty(8192, device=device)
    seeds = torch.from_numpy(np.array([seed], np.uint64).view(np.int64)).to(device)
    positions, index = torch.tensor([position], device=device), torch.tensor([output_index], dtype=torch.int32, device=device)
    noise_kernel[(4,)](seeds, positions, index, noise, BLOCK=2048)
    twin = whole_noise(8192, np.uint64(seed), np.int64(position), np.int32(output_index))
    torch.testing.assert_close(noise.cpu(), torch.from_numpy(twin), rtol=2e-6, atol=2e-7)
