"""Small random-weight checkpoints in the Hugging Face format, written by transformers itself.

The weights are larger than transformers would start a training with, and the norms and biases are no ones and zeros: greedy
choices are clear, and a forgotten bias or norm shows.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import zlib
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedModel, Qwen3Config
from transformers.utils import logging as transformers_logging

CONFIGS = {"llama": LlamaConfig, "qwen3": Qwen3Config, "opt": OPTConfig}
SHAPES: dict[str, dict[str, Any]] = {  # config.json entries unless overridden
    "llama": dict(hidden_size=96, intermediate_size=160, num_attention_heads=6, num_key_value_heads=2, head_dim=16),
    "qwen3": dict(hidden_size=96, intermediate_size=160, num_attention_heads=6, num_key_value_heads=2, head_dim=32),
    "opt": dict(hidden_size=96, ffn_dim=192, num_attention_heads=6),
}
COMMON: dict[str, Any] = dict(
    vocab_size=384, num_hidden_layers=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0
)
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")  # ids 0, 1, 2
TRAINING_TEXT = [
    "def main(argv: list[str]) -> int:",
    "    for index, value in enumerate(values):",
    "        return self.value if other is None else other.value",
    "import os",
    "class Carousel(object):",
    'raise ValueError("the batch that never stops turning")',
    "what is computed once is never computed again",
]


def make_checkpoint(
    folder: Path,
    architecture: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | int | None = None,
    tokenizer: bool = False,
    **overrides: Any,
) -> Path:
    """Writes config.json, generation_config.json and model.safetensors (several, with an index, if max_shard_size asks for
    it) of architecture "llama", "qwen3" or "opt" to `folder` and returns it. Overrides are entries of config.json. With
    `tokenizer`, a byte-level BPE tokenizer.json of at most vocab_size entries too. Same arguments, same bytes."""
    config = CONFIGS[architecture](**(COMMON | SHAPES[architecture] | overrides))
    model = _quietly(AutoModelForCausalLM.from_config, config).to(dtype=torch.float32).eval()
    randomize(model, seed)
    model.generation_config.update(do_sample=False, eos_token_id=config.eos_token_id, bos_token_id=config.bos_token_id)
    shards = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    _quietly(model.to(dtype).save_pretrained, folder, **shards)
    assert (folder / "generation_config.json").exists()
    if tokenizer:
        write_tokenizer(folder, config.vocab_size)
    return folder


def randomize(model: PreTrainedModel, seed: int) -> None:
    """Matrices keep the scale of what they pass on (fan-in), embeddings are about 1, biases 0.1, norms 1 ± 0.2; the head is
    scaled so that logits spread by about 2. Each tensor's numbers depend on its name, shape and the seed."""
    head = model.get_output_embeddings().weight
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor is head:
                tensor.copy_(noise * 2 / math.sqrt(tensor.shape[1]))
            elif tensor is embedding:
                tensor.copy_(noise)
            elif name.endswith("bias"):
                tensor.copy_(noise * 0.1)
            elif "norm" in name:
                tensor.copy_(1 + 0.2 * noise)
            elif "embed_positions" in name:
                tensor.copy_(noise * 0.5)
            else:
                tensor.copy_(noise / math.sqrt(tensor.shape[1]))


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level BPE tokenizer with <pad>, <s> and </s> as its first ids. It needs 259 entries for bytes and these."""
    assert vocab_size >= 256 + len(SPECIAL_TOKENS), "the byte alphabet does not fit"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    facts = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    (folder / "tokenizer_config.json").write_text(json.dumps(facts, indent=2))


def reference_model(folder: Path) -> PreTrainedModel:
    """transformers' own model of the checkpoint, in float32."""
    return _quietly(AutoModelForCausalLM.from_pretrained, folder, dtype=torch.float32).eval()


def write_config(folder: Path, **changes: Any) -> None:
    """Rewrites config.json with these entries; None removes one."""
    path = folder / "config.json"
    entries = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in entries.items() if value is not None}, indent=2))


def as_transformers_4(folder: Path) -> None:
    """Rewrites config.json as transformers 4 wrote it: rope_theta and rope_scaling, torch_dtype."""
    entries = json.loads((folder / "config.json").read_text())
    rope = dict(entries.get("rope_parameters") or {})
    theta = rope.pop("rope_theta", None)
    kind = rope.pop("rope_type", "default")
    scaling = None if kind == "default" else {"type": kind, "rope_type": kind, **rope}
    write_config(
        folder,
        rope_parameters=None,
        rope_theta=theta,
        rope_scaling=scaling,
        dtype=None,
        torch_dtype=entries.get("dtype"),
        transformers_version="4.46.0",
    )


def _quietly(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Without transformers' progress bars and advice."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return function(*args, **kwargs)
    finally:
        transformers_logging.set_verbosity(verbosity)
