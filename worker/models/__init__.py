"""Models: one architecture a file, the whole forward visible in it. Here are their names and what they have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from kvcache.storage import KVStorage
from worker.attention.base import AttentionBackend, AttentionInputs
from worker.config import STORED, random_seed
from worker.model_config import ModelConfig
from worker.models.llama import Llama
from worker.models.opt import Opt
from worker.models.qwen3 import Qwen3
from worker.weights import Checkpoint, Footprint, Outline, RandomWeights, Weights


class Model(Protocol):
    """A causal language model over flat tokens: no batch dimension, rows one after the other as AttentionInputs says."""

    num_parameters: int  # tied weights count once

    def forward(
        self,
        input_ids_T: Tensor,
        positions_T: Tensor,
        attention: AttentionBackend,
        kv: KVStorage,
        inputs: AttentionInputs,
    ) -> Tensor:
        """Hidden states [T, hidden] after the last norm; the tokens' keys and values are in `kv` afterwards. Positions count
        from 0 within the row; both are int32 or int64."""

    def logits(self, hidden_NC: Tensor) -> Tensor:
        """Logits [N, vocabulary] in float32 of those hidden states that the caller wants them of."""


_MODELS: dict[str, type[Llama] | type[Qwen3] | type[Opt]] = {
    "LlamaForCausalLM": Llama,
    "Qwen3ForCausalLM": Qwen3,
    "OPTForCausalLM": Opt,
}


_SHORT = 2  # tokens; the length changes no weight, but tables are computed for it


def build(config: ModelConfig, weights: Weights) -> Model:
    """The model of config.architecture, its weights taken from `weights` as it is put together."""
    return _MODELS[config.architecture](config, weights)


def footprint(model_dir: Path, dtype: torch.dtype, quantization: str, weights: str = STORED) -> Footprint:
    """What load_model with the same arguments would take of memory, by the files' headers. Raises ModelError."""
    config = ModelConfig.read(model_dir, _SHORT)
    with Outline(model_dir, dtype, stored=weights == STORED) as outline:
        build(config, outline)
        return outline.footprint(quantization)


def load_model(
    model_dir: Path,
    dtype: torch.dtype | None,
    device: torch.device | str,
    max_model_len: int | None,
    quantization: str = "none",
    weights: str = STORED,
    deterministic: bool = False,
) -> tuple[Model, ModelConfig]:
    """Reads config.json and the safetensors files of a directory. dtype None: the checkpoint's own. quantization "int8": of
    the matrices that are multiplied with (layers.products), on a CPU only. weights "random:SEED": none are read.
    deterministic: rows do not depend on one another, bit for bit; needs compiled.load(deterministic=True).

    Raises ModelError (ModelConfigError, CheckpointError): one line naming the file and the tensor or setting.
    """
    config = ModelConfig.read(model_dir, max_model_len)
    if weights != STORED:
        made = getattr(torch, config.dtype or "float32") if dtype is None else dtype
        return build(config, RandomWeights(random_seed(weights), device, made, quantization, deterministic)), config
    with Checkpoint(model_dir, device, dtype or config.dtype, quantization, deterministic=deterministic) as checkpoint:
        model = build(config, checkpoint)
        checkpoint.check_all_taken()
    return model, config
