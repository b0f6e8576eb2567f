"""A Llama checkpoint of safetensors as a GGUF file for llama.cpp. Runs in its own environment, which has no torch.

    python llama_gguf.py CHECKPOINT_DIR f32|f16|q8_0 OUT.gguf

Does what convert_hf_to_gguf.py of llama.cpp does for this architecture (matrices in the asked type, norms in float32,
rows of the query and key products reordered, as llama.cpp turns neighbouring pairs), but invents a token for every id, so that
a checkpoint whose tokenizer knows fewer ids than the model can be converted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType, quants  # type: ignore[import-not-found]
from numpy.typing import NDArray
from safetensors import safe_open

_TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
_WHOLE = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
_OF_A_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def convert(checkpoint: Path, type_name: str, out: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    matrix_type, file_type = _TYPES[type_name]
    writer = GGUFWriter(out, "llama")
    _describe(writer, config, file_type)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    with safe_open(checkpoint / "model.safetensors", framework="numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118  it is no dict
            gguf_name = _renamed(name)
            values = tensors.get_tensor(name)
            for part, count in heads.items():
                if gguf_name.endswith(part):
                    values = _pairs_together(values, count)
            wanted = matrix_type if values.ndim == 2 else GGMLQuantizationType.F32
            writer.add_tensor(f"{gguf_name}.weight", quants.quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: GGUFWriter, config: dict[str, int], file_type: LlamaFileType) -> None:
    writer.add_file_type(file_type)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{number}" for number in range(config["vocab_size"])])
    writer.add_token_types([TokenType.NORMAL] * config["vocab_size"])
    writer.add_token_merges(["t 0"])  # the list must be there
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def _renamed(name: str) -> str:
    if name in _WHOLE:
        return _WHOLE[name]
    number, _, part = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
    return f"blk.{number}.{_OF_A_LAYER[part]}"


def _pairs_together(weight_OI: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """From the halves of a head (transformers) to its neighbouring pairs (llama.cpp)."""
    outputs, inputs = weight_OI.shape
    return weight_OI.reshape(heads, 2, outputs // heads // 2, inputs).swapaxes(1, 2).reshape(outputs, inputs)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
