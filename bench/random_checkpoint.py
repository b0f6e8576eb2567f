"""A Llama checkpoint of a named shape with random weights, for measuring: its answers are noise, the time they take is not."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.roofline import Shape

_DEMO = Path(__file__).parents[1] / "demo" / "model"


def write(shape: Shape, folder: Path, seed: int = 0, max_len: int = 2048) -> Path:
    """config.json and model.safetensors in float32, and the demo model's tokenizer, so that it can be served."""
    assert shape.gated, f"{shape.name} is no Llama"
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": min(shape.max_len, max_len),
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": shape.tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    copy_tokenizer(folder)
    save_file(_tensors(shape, torch.Generator().manual_seed(seed)), folder / "model.safetensors")
    return folder


def copy_tokenizer(folder: Path) -> None:
    """The demo model's."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(_DEMO / name, folder / name)


def _tensors(shape: Shape, random: torch.Generator) -> dict[str, torch.Tensor]:
    """Matrices keep the scale of what they pass on."""

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=random).div(math.sqrt(columns))

    hidden, queries, keys = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tensors = {"model.embed_tokens.weight": matrix(shape.vocab, hidden), "model.norm.weight": torch.ones(hidden)}
    if not shape.tied:
        tensors["lm_head.weight"] = matrix(shape.vocab, hidden)
    for layer in range(shape.layers):
        at = f"model.layers.{layer}."
        for name, rows, columns in (
            ("self_attn.q_proj", queries, hidden),
            ("self_attn.k_proj", keys, hidden),
            ("self_attn.v_proj", keys, hidden),
            ("self_attn.o_proj", hidden, queries),
            ("mlp.gate_proj", shape.ffn, hidden),
            ("mlp.up_proj", shape.ffn, hidden),
            ("mlp.down_proj", hidden, shape.ffn),
        ):
            tensors[f"{at}{name}.weight"] = matrix(rows, columns)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}{name}.weight"] = torch.ones(hidden)
    return tensors
