"""Logits equal those of transformers in float32, through a paged cache whose unused slots hold NaN: whole prompts, prompts
in chunks of odd size, and steps that mix rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.helpers.checkpoints import as_transformers_4, make_checkpoint, reference_model, write_config
from tests.helpers.paged_model import PagedModel
from worker.attention.reference import ReferenceAttention
from worker.model_config import ModelConfigError
from worker.models import load_model

TOLERANCE = 1e-4  # of logits that spread by about 2
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=128, rope_theta=10_000.0)
LONG = dict(
    rope_type="longrope",
    short_factor=[1.0 + 0.1 * i for i in range(8)],
    long_factor=[2.0 + i for i in range(8)],
    original_max_position_embeddings=64,
    rope_theta=10_000.0,
)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", dict(tie_word_embeddings=True)),
    "llama MHA": ("llama", dict(num_key_value_heads=6)),
    "llama MQA": ("llama", dict(num_key_value_heads=1)),
    "llama biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama large eps": ("llama", dict(rms_norm_eps=0.1)),
    "llama large theta": ("llama", dict(rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "llama linear": ("llama", dict(rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=10_000.0))),
    "llama llama3": ("llama", dict(rope_parameters=LLAMA3 | dict(rope_theta=500.0))),
    "llama yarn": ("llama", dict(rope_parameters=YARN)),
    "qwen3": ("qwen3", {}),
    "qwen3 tied": ("qwen3", dict(tie_word_embeddings=True)),
    "qwen3 biases": ("qwen3", dict(attention_bias=True, head_dim=80)),
    "qwen3 yarn": ("qwen3", dict(rope_parameters=YARN)),
    "opt": ("opt", {}),
    "opt untied": ("opt", dict(tie_word_embeddings=False)),
    "opt-350m": ("opt", dict(do_layer_norm_before=False, word_embed_proj_dim=48)),
    "opt narrow untied": ("opt", dict(word_embed_proj_dim=48, tie_word_embeddings=False)),
    "opt no final norm": ("opt", dict(_remove_final_layer_norm=True)),
    "opt no biases": ("opt", dict(enable_bias=False)),
    "opt plain norms": ("opt", dict(layer_norm_elementwise_affine=False)),
    "opt gelu": ("opt", dict(activation_function="gelu")),
}
HEAD_SIZES = (32, 48, 64, 80, 96, 112, 128)
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    f"{architecture} {heads}/{kv_heads} heads of {size}{' tied' if tied else ''}": (
        architecture,
        dict(num_attention_heads=heads, tie_word_embeddings=tied)
        | (dict(hidden_size=heads * size) if architecture == "opt" else dict(num_key_value_heads=kv_heads, head_dim=size)),
    )
    for architecture in ("llama", "qwen3", "opt")
    for heads, kv_heads in ((2, 2), (6, 2), (4, 1))
    for size in HEAD_SIZES
    for tied in (False, True)
    if heads == kv_heads or architecture != "opt"
}


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 384, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def expected(reference: PreTrainedModel, prompt: list[int]) -> Tensor:
    return reference(torch.tensor([prompt])).logits[0]


def close(got: Tensor, want: Tensor) -> None:
    assert got.dtype == torch.float32 and got.shape == want.shape
    assert want.std() > 0.5
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)


def check_everything(folder: Path) -> None:
    """The whole prompt, the same in chunks, and mixed steps."""
    reference = reference_model(folder)
    model = PagedModel(folder)
    prompt = tokens(100)
    want = expected(reference, prompt)
    close(model.prompt(0, prompt), want)
    close(model.prompt(1, prompt, chunk=7), want)
    check_mixed(model, reference)


def check_mixed(model: PagedModel, reference: PreTrainedModel) -> None:
    """Four rows whose chunks are of different sizes in every step, single tokens among them."""
    prompts = {row: tokens(count, seed=row) for row, count in ((10, 40), (11, 3), (12, 77), (13, 18))}
    chunks = {10: [40], 11: [1, 1, 1], 12: [30, 1, 46], 13: [1, 16, 1]}
    got: dict[int, list[Tensor]] = {row: [] for row in prompts}
    for step in range(3):
        rows = []
        for row, sizes in chunks.items():
            at = sum(sizes[:step])
            if step < len(sizes):
                rows.append((row, prompts[row][at : at + sizes[step]]))
        for (row, _), logits in zip(rows, model.step(rows), strict=True):
            got[row].append(logits)
    for row, prompt in prompts.items():
        close(torch.cat(got[row]), expected(reference, prompt))


@pytest.mark.parametrize("name", CASES)
def test_settings(name: str, tmp_path: Path) -> None:
    architecture, overrides = CASES[name]
    check_everything(make_checkpoint(tmp_path, architecture, **overrides))


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in SHAPES])
def test_shapes(name: str, tmp_path: Path) -> None:
    architecture, overrides = SHAPES[name]
    check_everything(make_checkpoint(tmp_path, architecture, **overrides))


@pytest.mark.parametrize("name", ["llama llama3", "llama linear", "llama yarn", "qwen3 tied", "opt"])
def test_config_as_transformers_4_wrote_it(name: str, tmp_path: Path) -> None:
    architecture, overrides = CASES[name]
    folder = make_checkpoint(tmp_path, architecture, **overrides)
    reference = reference_model(folder)
    as_transformers_4(folder)
    prompt = tokens(90)
    close(PagedModel(folder).prompt(0, prompt), expected(reference, prompt))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "opt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_in_half_precision_and_in_shards(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, architecture, dtype=dtype, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    prompt = tokens(50)
    close(PagedModel(folder).prompt(0, prompt), expected(reference_model(folder), prompt))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "opt"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.5), (torch.float16, 0.06)])
def test_computed_in_half_precision(architecture: str, dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, architecture, dtype=dtype)
    prompt = tokens(50)
    got = PagedModel(folder, dtype=dtype).prompt(0, prompt, chunk=13)
    assert got.dtype == torch.float32
    assert (got - expected(reference_model(folder), prompt)).abs().max() < tolerance


@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_block_sizes(block_size: int, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama")
    prompt = tokens(130)
    got = PagedModel(folder, block_size=block_size).prompt(0, prompt, chunk=31)
    close(got, expected(reference_model(folder), prompt))


def test_with_the_reference_backend(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen3")
    prompt = tokens(40)
    got = PagedModel(folder, attention=ReferenceAttention()).prompt(0, prompt, chunk=9)
    close(got, expected(reference_model(folder), prompt))


@pytest.mark.parametrize(("max_model_len", "length"), [(64, 60), (None, 100)])
def test_longrope_follows_the_configured_length(max_model_len: int | None, length: int, tmp_path: Path) -> None:
    """transformers chooses by the current length; they agree where both lie on the same side of the original length."""
    folder = make_checkpoint(tmp_path, "llama", rope_parameters=LONG)
    as_transformers_4(folder)
    prompt = tokens(length)
    got = PagedModel(folder, max_model_len=max_model_len).prompt(0, prompt, chunk=16)
    close(got, expected(reference_model(folder), prompt))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "opt"])
def test_greedy_tokens_in_a_moving_batch(architecture: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, architecture)
    reference, model = reference_model(folder), PagedModel(folder)
    sequences = {row: tokens(length, seed=row) for row, length in enumerate((5, 33, 1, 16))}
    computed = dict.fromkeys(sequences, 0)
    for step in range(24):
        joined = [row for row in sequences if step >= 3 * row]  # a new row every third step
        rows = [(row, sequences[row][computed[row] :]) for row in joined]
        for (row, chunk), logits in zip(rows, model.step(rows), strict=True):
            computed[row] += len(chunk)
            sequences[row].append(int(logits[-1].argmax()))
    for row, length in enumerate((5, 33, 1, 16)):
        with torch.inference_mode():
            logits = reference(torch.tensor([sequences[row][:-1]])).logits[0, length - 1 :]
        assert logits.argmax(-1).tolist() == sequences[row][length:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["llama", "qwen3 yarn", "opt-350m"])
def test_on_a_gpu(name: str, tmp_path: Path) -> None:
    architecture, overrides = CASES[name]
    folder = make_checkpoint(tmp_path, architecture, **overrides)
    check_mixed(PagedModel(folder, device="cuda"), reference_model(folder))


def test_an_unknown_architecture_is_an_error_before_any_weight_is_read(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama")
    write_config(folder, architectures=["GPT2LMHeadModel"])
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelConfigError, match="'GPT2LMHeadModel' is not implemented"):
        load_model(folder, torch.float32, "cpu", None)


def test_positions_beyond_the_configured_length_are_an_error_not_a_wrong_angle(tmp_path: Path) -> None:
    model = PagedModel(make_checkpoint(tmp_path, "llama"), max_model_len=20)
    model.prompt(0, tokens(20))
    with pytest.raises(IndexError):
        model.prompt(0, tokens(1))


def test_config_is_frozen(tmp_path: Path) -> None:
    _, config = load_model(make_checkpoint(tmp_path, "llama"), torch.float32, "cpu", None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_layers = 3  # type: ignore[misc]
