"""config.json is read as transformers writes it, in both of its spellings; what is not implemented is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, OPTConfig, PreTrainedConfig, Qwen3Config

from worker.model_config import (
    DefaultRope,
    LinearRope,
    Llama3Rope,
    LongRope,
    ModelConfig,
    ModelConfigError,
    OptSettings,
    YarnRope,
)

SMALL: dict[str, Any] = dict(vocab_size=300, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
LLAMA = SMALL | dict(architectures=["LlamaForCausalLM"], intermediate_size=128)
QWEN3 = SMALL | dict(architectures=["Qwen3ForCausalLM"], intermediate_size=128, num_key_value_heads=2)
OPT = SMALL | dict(architectures=["OPTForCausalLM"], ffn_dim=128)


def as_saved(config: PreTrainedConfig, architecture: str, folder: Path) -> ModelConfig:
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return ModelConfig.read(folder)


def test_llama_as_transformers_5_writes_it(tmp_path: Path) -> None:
    rope = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=5e5)
    theirs = LlamaConfig(
        **SMALL,
        intermediate_size=128,
        num_key_value_heads=2,
        head_dim=48,
        rms_norm_eps=1e-5,
        attention_bias=True,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        rope_parameters=rope | dict(original_max_position_embeddings=1024),
        dtype="bfloat16",
    )
    assert as_saved(theirs, "LlamaForCausalLM", tmp_path) == ModelConfig(
        architecture="LlamaForCausalLM",
        dtype="bfloat16",
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=48,
        activation="silu",
        norm_eps=1e-5,
        attention_bias=True,
        mlp_bias=False,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        max_model_len=4096,
        rope=Llama3Rope(5e5, 8.0, 1.0, 4.0, 1024),
    )


def test_llama_as_transformers_4_wrote_it() -> None:
    scaling = dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    entries = LLAMA | dict(
        rope_theta=500_000.0, rope_scaling=scaling, torch_dtype="float16", max_position_embeddings=131_072, pretraining_tp=1
    )
    config = ModelConfig.of(entries)
    assert config.rope == Llama3Rope(500_000.0, 8.0, 1.0, 4.0, 8192)
    assert config.dtype == "float16"


def test_rope_scaling_of_old_checkpoints_names_its_kind_type() -> None:
    config = ModelConfig.of(LLAMA | dict(rope_scaling=dict(type="linear", factor=2.0)))
    assert config.rope == LinearRope(10_000.0, 2.0)


@pytest.mark.parametrize(
    ("entries", "rope"),
    [
        ({}, DefaultRope(10_000.0)),
        (dict(rope_theta=1e6, rope_scaling=None), DefaultRope(1e6)),
        (dict(rope_parameters=dict(rope_type="default", rope_theta=2e6), rope_theta=1e6), DefaultRope(2e6)),
        (dict(rope_scaling=dict(type="yarn", factor=4.0), max_position_embeddings=1000), YarnRope(10_000.0, 1000, 4.0)),
        (
            dict(rope_scaling=dict(type="yarn", factor=4, original_max_position_embeddings=500, finetuned=True, mscale=1)),
            YarnRope(10_000.0, 500, 4.0, mscale=1.0),
        ),
        (
            dict(
                rope_scaling=dict(type="longrope", short_factor=[1] * 8, long_factor=[2.5] * 8),
                original_max_position_embeddings=128,  # beside the rope_scaling, as Phi-3 has it
            ),
            LongRope(10_000.0, 128, (1,) * 8, (2.5,) * 8),
        ),
    ],
)
def test_ropes(entries: dict[str, Any], rope: object) -> None:
    assert ModelConfig.of(LLAMA | entries).rope == rope


@pytest.mark.parametrize(
    ("theirs", "entries"),
    [
        (LlamaConfig(**SMALL, intermediate_size=128), LLAMA),
        (Qwen3Config(**SMALL, intermediate_size=128, num_key_value_heads=2), QWEN3),
        (OPTConfig(**SMALL, ffn_dim=128), OPT),
    ],
    ids=["llama", "qwen3", "opt"],
)
def test_defaults_of_what_is_absent_are_those_of_transformers(
    theirs: PreTrainedConfig, entries: dict[str, Any], tmp_path: Path
) -> None:
    assert as_saved(theirs, entries["architectures"][0], tmp_path) == ModelConfig.of(entries)


def test_qwen3_has_heads_of_its_own_size(tmp_path: Path) -> None:
    config = ModelConfig.of(QWEN3)
    assert (config.head_dim, config.num_kv_heads, config.mlp_bias) == (128, 2, False)
    assert ModelConfig.of(QWEN3 | dict(head_dim=32)).head_dim == 32


def test_llama_without_counts_has_as_many_key_value_heads_as_heads() -> None:
    config = ModelConfig.of(LLAMA | dict(head_dim=None, num_key_value_heads=None))
    assert (config.num_kv_heads, config.head_dim) == (4, 16)


def test_opt(tmp_path: Path) -> None:
    config = as_saved(OPTConfig(**SMALL, ffn_dim=96), "OPTForCausalLM", tmp_path)
    assert config.tie_word_embeddings and config.rope is None
    assert config.opt == OptSettings(64, True, True, True)
    assert (config.attention_bias, config.mlp_bias, config.activation, config.intermediate_size) == (True, True, "relu", 96)


def test_opt_350m(tmp_path: Path) -> None:
    theirs = OPTConfig(**SMALL, ffn_dim=96, do_layer_norm_before=False, word_embed_proj_dim=32, activation_function="gelu")
    config = as_saved(theirs, "OPTForCausalLM", tmp_path)
    assert config.opt == OptSettings(32, False, False, True)
    assert config.activation == "gelu"


def test_opt_without_its_final_norm() -> None:
    config = ModelConfig.of(OPT | dict(_remove_final_layer_norm=True, enable_bias=False, layer_norm_elementwise_affine=False))
    assert config.opt == OptSettings(64, True, False, False)
    assert not config.attention_bias and not config.mlp_bias


def test_the_model_type_stands_in_for_missing_architectures() -> None:
    entries = QWEN3 | dict(model_type="qwen3", architectures=None)
    assert ModelConfig.of(entries).architecture == "Qwen3ForCausalLM"


def test_kv_bytes_per_token() -> None:
    assert ModelConfig.of(LLAMA | dict(num_key_value_heads=2)).kv_bytes_per_token(2) == 2 * 2 * 2 * 16 * 2


def test_the_configured_length_is_kept_within_the_models() -> None:
    entries = LLAMA | dict(max_position_embeddings=512)
    assert ModelConfig.of(entries).max_model_len == 512
    assert ModelConfig.of(entries, 100).max_model_len == 100
    with pytest.raises(ModelConfigError, match="max_model_len 513 is beyond what the model can, 512 tokens"):
        ModelConfig.of(entries, 513)


def test_yarn_reaches_as_far_as_its_factor_says() -> None:
    yarn = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=512)
    entries = LLAMA | dict(max_position_embeddings=640, rope_scaling=yarn)
    assert ModelConfig.of(entries).max_model_len == 640
    assert ModelConfig.of(entries, 2048).max_model_len == 2048
    with pytest.raises(ModelConfigError, match="2,048 tokens"):
        ModelConfig.of(entries, 2049)


DYNAMIC = dict(rope_type="dynamic", factor=2.0)
LONG = dict(type="longrope", short_factor=[1.0] * 8, long_factor=[1.0] * 7, original_max_position_embeddings=64)
BANDS = dict(rope_type="llama3", factor=8.0, low_freq_factor=4.0, high_freq_factor=4.0, original_max_position_embeddings=64)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            LLAMA | dict(architectures=["MambaForCausalLM"]),
            "architecture 'MambaForCausalLM' is not implemented; these are: Llama",
        ),
        (SMALL | dict(model_type="mamba"), "model_type 'mamba' is not implemented"),
        (SMALL, "model_type None is not implemented"),
        (LLAMA | dict(hidden_act="gelu"), "hidden_act 'gelu' is not implemented"),
        (OPT | dict(activation_function="gelu_new"), "activation_function 'gelu_new' is not implemented"),
        (LLAMA | dict(quantization_config=dict(quant_method="gptq")), "quantization_config: quantized checkpoints are not"),
        (LLAMA | dict(rope_scaling=DYNAMIC), "rope_type 'dynamic' changes angles with the current length: not implemented"),
        (LLAMA | dict(rope_parameters=dict(rope_type="proportional")), "rope_type 'proportional' is not implemented"),
        (LLAMA | dict(rope_parameters=dict(rope_type="default", mrope_section=[8, 8])), "mrope_section is not implemented"),
        (LLAMA | dict(rope_parameters=dict(full_attention={})), "full_attention is not implemented for rope_type 'default'"),
        (LLAMA | dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5 is not implemented"),
        (LLAMA | dict(rope_parameters=dict(partial_rotary_factor=0.25)), "rope_parameters: partial_rotary_factor 0.25"),
        (LLAMA | dict(rope_scaling=dict(type="linear")), "rope_scaling: factor is missing"),
        (LLAMA | dict(rope_scaling=dict(type="linear", factor=0.5)), "factor is 0.5, less than 1"),
        (LLAMA | dict(rope_scaling=BANDS), "high_freq_factor must be above low_freq_factor"),
        (LLAMA | dict(rope_scaling=LONG), "long_factor must be 8 positive numbers"),
        (LLAMA | dict(rope_theta=-1.0), "rope_theta is -1.0"),
        (LLAMA | dict(head_dim=15), "need an even head_dim, not 15"),
        (LLAMA | dict(num_key_value_heads=3), "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        (LLAMA | dict(num_attention_heads=5), "hidden_size 64 is no multiple of num_attention_heads 5"),
        (OPT | dict(num_attention_heads=5), "hidden_size 64 is no multiple of num_attention_heads 5"),
        (LLAMA | dict(num_hidden_layers=0), "num_hidden_layers is 0"),
        (LLAMA | dict(vocab_size="300"), "vocab_size is '300', not of type int"),
        (LLAMA | dict(attention_bias=1), "attention_bias is 1, not of type bool"),
        (LLAMA | dict(torch_dtype="float8_e4m3fn"), "dtype 'float8_e4m3fn' is not one of"),
        ({name: value for name, value in LLAMA.items() if name != "hidden_size"}, "hidden_size is missing"),
        (QWEN3 | dict(use_sliding_window=True, max_window_layers=1), "'sliding_attention' (use_sliding_window): only full"),
        (QWEN3 | dict(layer_types=["full_attention", "linear_attention"]), "layer_types has 'linear_attention'"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name_in_one_line(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelConfigError) as error:
        ModelConfig.of(entries, where="a/config.json")
    assert str(error.value).startswith("a/config.json: ") and message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "entries",
    [
        dict(use_sliding_window=False, sliding_window=4096, max_window_layers=1),
        dict(use_sliding_window=True, sliding_window=4096, max_window_layers=2),
        dict(use_sliding_window=True, sliding_window=None, layer_types=["full_attention"] * 2),
    ],
)
def test_a_sliding_window_that_no_layer_has_is_no_matter(entries: dict[str, Any]) -> None:
    assert ModelConfig.of(QWEN3 | entries).num_layers == 2


@pytest.mark.parametrize(("text", "message"), [(None, "No such file"), ("{", "no JSON"), ("[]", "not a JSON object")])
def test_a_config_that_cannot_be_read(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelConfigError, match=message):
        ModelConfig.read(tmp_path)


def test_no_torch_and_no_transformers_are_imported() -> None:
    import subprocess
    import sys

    code = "import sys, worker.model_config; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"


def test_read_takes_the_length(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert ModelConfig.read(tmp_path, 77).max_model_len == 77
