"""Angles equal those of transformers for every rope_type; turning equals its apply_rotary_pos_emb."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from worker.layers.rotary import Rotary, inverse_frequencies, rotate
from worker.model_config import ModelConfig

LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=128)
LONG = dict(
    rope_type="longrope",
    short_factor=[1.0 + 0.01 * i for i in range(32)],
    long_factor=[1.0 + 0.5 * i for i in range(32)],
    original_max_position_embeddings=128,
)
ROPES: dict[str, dict[str, Any]] = {
    "default": dict(rope_type="default", rope_theta=10_000.0),
    "default, large theta": dict(rope_type="default", rope_theta=1e6),
    "linear": dict(rope_type="linear", factor=2.5, rope_theta=10_000.0),
    "llama3": LLAMA3 | dict(rope_theta=500_000.0),
    "llama3, other bands": LLAMA3 | dict(rope_theta=10_000.0, low_freq_factor=2.0, high_freq_factor=32.0, factor=32.0),
    "yarn": YARN | dict(rope_theta=1e6),
    "yarn, no stretch": YARN | dict(rope_theta=1e6, factor=1.0),
    "yarn, not truncated": YARN | dict(rope_theta=10_000.0, truncate=False),
    "yarn, other bands": YARN | dict(rope_theta=10_000.0, beta_fast=16.0, beta_slow=2.0),
    "yarn, own attention factor": YARN | dict(rope_theta=10_000.0, attention_factor=0.7),
    "yarn, mscale": YARN | dict(rope_theta=10_000.0, mscale=0.8, mscale_all_dim=1.2),
    "yarn, mscale alone": YARN | dict(rope_theta=10_000.0, mscale=0.8),
    "yarn, factor from the lengths": dict(
        rope_type="yarn", factor=None, original_max_position_embeddings=128, rope_theta=10_000.0
    ),
    "longrope": LONG | dict(rope_theta=10_000.0),
    "longrope, factor given": LONG | dict(rope_theta=10_000.0, factor=16.0),
    "longrope, own attention factor": LONG | dict(rope_theta=10_000.0, attention_factor=1.3),
}
LENGTH = 512


def theirs(rope: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=256,
        intermediate_size=256,
        num_attention_heads=4,
        num_hidden_layers=1,
        max_position_embeddings=LENGTH,
        rope_parameters=dict(rope),
    )


def ours(rope: dict[str, Any], max_model_len: int | None = None) -> ModelConfig:
    entries = theirs(rope).to_dict() | dict(architectures=["LlamaForCausalLM"])
    return ModelConfig.of(entries, max_model_len)


def frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    assert config.rope is not None
    return inverse_frequencies(config.rope, config.head_dim, config.max_position_embeddings, config.max_model_len)


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_and_attention_factor_are_those_of_transformers(name: str) -> None:
    config = theirs(ROPES[name])
    kind = ROPES[name]["rope_type"]
    compute = LlamaRotaryEmbedding.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
    expected, expected_factor = compute(config, seq_len=LENGTH)  # longer than the original: longrope's long factors
    got, factor = frequencies(ours(ROPES[name]))
    torch.testing.assert_close(got, expected, rtol=3e-7, atol=0)
    assert factor == pytest.approx(expected_factor, rel=1e-12)


@pytest.mark.parametrize("name", ROPES)
def test_cosines_and_sines_are_those_of_transformers(name: str) -> None:
    positions = torch.tensor([0, 1, 2, 77, 300, LENGTH - 1])
    cos, sin = LlamaRotaryEmbedding(theirs(ROPES[name]))(torch.zeros(1), positions[None])
    got_cos, got_sin = Rotary(ours(ROPES[name]), torch.device("cpu")).at(positions)
    torch.testing.assert_close(got_cos[:, 0], cos[0, :, :32], atol=1e-4, rtol=0)
    torch.testing.assert_close(got_sin[:, 0], sin[0, :, :32], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("max_model_len", "chosen"), [(127, "short_factor"), (128, "short_factor"), (129, "long_factor")])
def test_longrope_takes_its_factors_by_the_configured_length(max_model_len: int, chosen: str) -> None:
    got, _ = frequencies(ours(ROPES["longrope"], max_model_len))
    plain, _ = frequencies(ours(ROPES["default"]))
    torch.testing.assert_close(got, plain / torch.tensor(LONG[chosen]))


def test_tables_reach_as_far_as_the_configured_length() -> None:
    rotary = Rotary(replace(ours(ROPES["default"]), max_model_len=40), torch.device("cpu"))
    assert rotary.at(torch.tensor([39]))[0].shape == (1, 1, 32)
    with pytest.raises(IndexError):
        rotary.at(torch.tensor([40]))


def test_turning_is_that_of_transformers() -> None:
    x_THD = torch.randn(6, 5, 64)
    positions = torch.tensor([3, 4, 5, 0, 1, 500])
    cos, sin = LlamaRotaryEmbedding(theirs(ROPES["default"]))(x_THD, positions[None])
    expected, _ = apply_rotary_pos_emb(x_THD[None], x_THD[None], cos, sin, unsqueeze_dim=2)
    got = rotate(x_THD, *Rotary(ours(ROPES["default"]), torch.device("cpu")).at(positions))
    torch.testing.assert_close(got, expected[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_turning_in_half_precision_rounds_once(dtype: torch.dtype) -> None:
    x_THD = torch.randn(3, 2, 64).to(dtype)
    cos_sin = Rotary(ours(ROPES["default"]), torch.device("cpu")).at(torch.tensor([1, 2, 300]))
    assert rotate(x_THD, *cos_sin).equal(rotate(x_THD.float(), *cos_sin).to(dtype))


def test_turning_reads_strided_heads() -> None:
    x_THD = torch.randn(4, 6, 64)
    cos_sin = Rotary(ours(ROPES["default"]), torch.device("cpu")).at(torch.arange(4))
    assert rotate(x_THD[:, 1:3], *cos_sin).equal(rotate(x_THD[:, 1:3].contiguous(), *cos_sin))
