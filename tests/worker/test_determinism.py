"""A deterministic worker's logits are the same bits however a sequence is cut, whoever stands beside it, and where."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.paged_model import PagedModel
from worker import compiled, loading
from worker.config import ConfigError, WorkerConfig
from worker.layers import products
from worker.logprobs import log_sum_exp
from worker.model_executor import ModelExecutor
from worker.sampler import keep, parts

panels = pytest.importorskip("worker.compiled.panels", reason="numba is not installed")

VOCABULARY, LENGTH = 384, 75
WIDE = "llama wide"  # many rows of it are more than the loops usually take
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", dict(intermediate_size=167)),  # odd: no whole number of vectors
    "llama biases": ("llama", dict(attention_bias=True, mlp_bias=True, num_key_value_heads=6)),
    WIDE: ("llama", dict(hidden_size=512, intermediate_size=1030, num_attention_heads=8, head_dim=64)),
    "qwen3": ("qwen3", dict(head_dim=40)),
    "opt": ("opt", dict(ffn_dim=210)),
    "opt gelu": ("opt", dict(activation_function="gelu", ffn_dim=203)),
}
CASES = [(name, quantization) for name in SHAPES for quantization in ("none", "int8") if (name, quantization) != (WIDE, "int8")]


@pytest.fixture(autouse=True)
def _loops() -> Iterator[None]:
    compiled.load(deterministic=True)
    yield
    compiled.unload()


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def folder(name: str) -> Path:
        architecture, overrides = SHAPES[name]
        return make_checkpoint(tmp_path_factory.mktemp("model"), architecture, **overrides)

    @functools.cache
    def model(name: str, quantization: str = "none", deterministic: bool = True) -> PagedModel:
        return PagedModel(
            folder(name), num_blocks=LENGTH * 71 + 50, max_model_len=512, quantization=quantization, deterministic=deterministic
        )

    return model


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPT = tokens(LENGTH, 0)
Company = list[tuple[int, int]]  # of each other row: tokens that it has already, and how many it computes now


def in_company(model: PagedModel, cuts: list[int], companies: list[tuple[Company, Company]]) -> Tensor:
    """Logits of PROMPT, cut before these tokens; in each step others stand before and behind it."""
    model.forget()
    ends, got, other = [*cuts, LENGTH], [], 1
    for number, (first, end) in enumerate(zip([0, *cuts], ends, strict=True)):
        rows: list[list[tuple[int, list[int]]]] = []
        for company in companies[number % len(companies)]:
            rows.append([])
            for known, count in company:
                if known:
                    model.prompt(other, tokens(known, other))
                rows[-1].append((other, tokens(count, 1000 + other)))
                other += 1
        before, behind = rows
        step = model.step([*before, (0, PROMPT[first:end]), *behind])
        got.append(step[len(before)])
    return torch.cat(got)


companies = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 30) | st.just(1)), max_size=4)
cuts = st.sets(st.integers(1, LENGTH - 1), max_size=5).map(sorted)


@pytest.mark.parametrize(("name", "quantization"), CASES)
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=cuts, steps=st.lists(st.tuples(companies, companies), min_size=1, max_size=3))
def test_logits_depend_on_the_sequence_alone(
    model_of: Any, name: str, quantization: str, cuts: list[int], steps: list[tuple[Company, Company]]
) -> None:
    model = model_of(name, quantization)
    alone = in_company(model, [], [([], [])])
    assert torch.equal(in_company(model, cuts, steps), alone)


@pytest.mark.parametrize(("name", "quantization"), CASES)
def test_token_by_token_as_in_one_piece_and_at_every_place_of_a_batch(model_of: Any, name: str, quantization: str) -> None:
    """Preempted and computed again, what were single tokens is a chunk."""
    model = model_of(name, quantization)
    alone = in_company(model, [], [([], [])])
    assert torch.equal(in_company(model, list(range(1, LENGTH)), [([], [])]), alone)
    places = [([(0, 1)] * before, [(0, 1)] * (70 - before)) for before in range(0, 71, 5)]
    assert torch.equal(in_company(model, list(range(5, LENGTH, 5)), places), alone)
    assert torch.equal(in_company(model, [9], [([], [(0, 500)]), ([(0, 333)], [])]), alone), "many rows"


def test_without_it_they_do_not(model_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: torch and the libraries below it choose by the number of rows. (Compiled products do not, but
    are not everywhere.)"""
    monkeypatch.setattr(panels, "HAS_FLOATS", False)
    compiled.load()
    different = 0
    for name in ("llama", "qwen3", "opt"):
        model = model_of.__wrapped__(name, deterministic=False)
        alone = in_company(model, [], [([], [])])
        different += not torch.equal(in_company(model, list(range(1, LENGTH)), [([], [])]), alone)
    assert different == 3


@pytest.mark.parametrize("name", SHAPES)
def test_its_logits_are_those_of_the_default_within_rounding(model_of: Any, name: str) -> None:
    got = in_company(model_of(name), [], [([], [])])
    compiled.load()
    usual = in_company(model_of(name, deterministic=False), [], [([], [])])
    torch.testing.assert_close(got, usual, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------------------ its start


def config(**options: Any) -> WorkerConfig:
    defaults = {"connect": "ipc://x", "model": "m", "device": "cpu", "threads": 1, "num_blocks": 60, "max_model_len": 128}
    return WorkerConfig(**(defaults | {"max_batch_rows": 8, "max_step_tokens": 256, "deterministic": True} | options))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama")


@pytest.mark.parametrize("options", [{}, {"quantization": "int8"}, {"num_blocks": 1, "max_model_len": 16}, {"block_size": 64}])
@pytest.mark.parametrize("has_floats", {panels.HAS_FLOATS, False})
def test_it_starts_and_says_what_it_costs(
    checkpoint: Path, options: dict[str, Any], has_floats: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(panels, "HAS_FLOATS", has_floats)
    costs = "" if has_floats else " (prompts take longer)"
    description = ModelExecutor.of(config(**options), checkpoint).facts.description
    assert f", deterministic{costs}; KV cache" in description
    assert "deterministic" not in ModelExecutor.of(config(**options, deterministic=False), checkpoint).facts.description


@pytest.mark.parametrize("options", [dict(device="cuda"), dict(dtype="bfloat16"), dict(dtype="float16")])
def test_what_it_cannot_do_is_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"--deterministic (is for --device cpu so far|computes in float32)"):
        config(**options)


def test_it_is_refused_where_a_gpu_was_found(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="--deterministic is for a CPU so far, and --device auto found a GPU"):
        ModelExecutor.of(config(device="auto"), checkpoint)


def test_it_is_refused_without_numba(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.compiled, "load", lambda deterministic: "")
    with pytest.raises(ConfigError, match="--deterministic needs numba, which is not installed here"):
        ModelExecutor.of(config(), checkpoint)


def test_it_is_refused_where_the_libraries_do_not_keep_rows_apart(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels, "HAS_FLOATS", False)  # where products are the libraries'
    whole = products.TiledProduct.__call__

    def leaking(self: products.TiledProduct, x_TI: Tensor) -> Tensor:
        return whole(self, x_TI) * (1 + 2**-23 * (len(x_TI) > 80))

    monkeypatch.setattr(products.TiledProduct, "__call__", leaking)
    with pytest.raises(ConfigError, match="--deterministic: with the libraries of this processor the rows of a step change"):
        ModelExecutor.of(config(), checkpoint)


# ------------------------------------------------------------------------------------------------- what is made of logits


def test_log_probabilities_are_the_same_bits_in_any_company() -> None:
    logits = 3 * torch.randn(9, 50_001, generator=torch.Generator().manual_seed(0))
    together = log_sum_exp(logits, one_by_one=True)
    assert torch.equal(together, torch.cat([log_sum_exp(row[None], one_by_one=True) for row in logits]))
    torch.testing.assert_close(together, logits.logsumexp(dim=1))
    assert len(log_sum_exp(logits[:0], one_by_one=True)) == 0


@pytest.mark.parametrize("vocab", [999, 40_003])
def test_filters_keep_the_same_tokens_in_any_company(vocab: int) -> None:
    """Rows of nearly equal scores, whose nucleus ends at another token when the sum changes in its last digit."""
    scores = 1e-6 * torch.randn(12, vocab, generator=torch.Generator().manual_seed(1))
    top_k = np.array([0, 0, 700] * 4, np.int32)
    top_p = np.linspace(0.3, 0.9, 12, dtype=np.float32)
    min_p = np.zeros(12, np.float32)
    together = scores.clone()
    for part in parts(12, one_by_one=True):
        keep(together[part], top_k[part], top_p[part], min_p[part])
    for i, row in enumerate(scores.clone()):
        keep(row[None], top_k[i : i + 1], top_p[i : i + 1], min_p[i : i + 1])
        assert torch.equal(row, together[i])
        assert 1 < row.isfinite().sum() < vocab
