"""OPT (Zhang et al. 2022, arXiv:2205.01068): learned positions, LayerNorm, biases, one query head per key-value head.

opt-350m is the odd one: it norms behind each half of a layer, and its embeddings are narrower than its hidden size.

Legend: T tokens, C hidden size, E width of the embeddings, H heads, D head size, F inner size of the MLP, N rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvcache.storage import KVStorage
from worker.attention.base import AttentionBackend, AttentionInputs
from worker.layers.activation import ACTIVATIONS
from worker.layers.embedding import Embedding, Head
from worker.layers.linear import Linear
from worker.layers.norm import LayerNorm
from worker.model_config import ModelConfig
from worker.models.recorded import Recorded, record_opt
from worker.weights import Weights

_POSITION_OFFSET = 2  # the first two rows of the position table belong to padding


class Opt(nn.Module):
    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        super().__init__()
        assert config.opt is not None
        name, hidden, width = "model.decoder", config.hidden_size, config.opt.word_embed_proj_dim
        num_positions = config.max_position_embeddings + _POSITION_OFFSET
        self.embedding = Embedding(weights, f"{name}.embed_tokens", config.vocab_size, width)
        self.positions = Embedding(weights, f"{name}.embed_positions", num_positions, hidden)
        self.project_in = self.project_out = None
        if width != hidden:
            self.project_in = Linear(weights, {f"{name}.project_in": hidden}, width, bias=False)
            self.project_out = Linear(weights, {f"{name}.project_out": width}, hidden, bias=False)
        self.layers = nn.ModuleList(Layer(config, weights, f"{name}.layers.{i}") for i in range(config.num_layers))
        self.norm = _norm(config, weights, f"{name}.final_layer_norm") if config.opt.has_final_layer_norm else None
        self.head = Head(weights, "lm_head", self.embedding, config.tie_word_embeddings)
        self.num_parameters = weights.num_parameters
        self._recorded = Recorded(record_opt)

    @torch.inference_mode()
    def forward(
        self, input_ids_T: Tensor, positions_T: Tensor, attention: AttentionBackend, kv: KVStorage, inputs: AttentionInputs
    ) -> Tensor:
        hidden_TC = self.embedding(input_ids_T)
        if self.project_in is not None:
            hidden_TC = self.project_in(hidden_TC)
        hidden_TC = hidden_TC.add_(self.positions(positions_T + _POSITION_OFFSET))
        computed_TC = self._recorded.forward(self, hidden_TC, None, attention, kv, inputs)
        hidden_TC = self._computed(hidden_TC, attention, kv, inputs) if computed_TC is None else computed_TC
        return hidden_TC if self.project_out is None else self.project_out(hidden_TC)

    def _computed(self, hidden_TC: Tensor, attention: AttentionBackend, kv: KVStorage, inputs: AttentionInputs) -> Tensor:
        for layer, kv_layer in zip(self.layers, kv.layers, strict=True):
            hidden_TC = layer(hidden_TC, attention, kv_layer, inputs)
        return hidden_TC if self.norm is None else self.norm(hidden_TC)

    @torch.inference_mode()
    def logits(self, hidden_NE: Tensor) -> Tensor:
        return self.head(hidden_NE)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, weights: Weights, name: str) -> None:
        super().__init__()
        assert config.opt is not None
        self.norm_before = config.opt.do_layer_norm_before
        self.attention = Attention(config, weights, f"{name}.self_attn")
        self.attention_norm = _norm(config, weights, f"{name}.self_attn_layer_norm")
        self.mlp = MLP(config, weights, name)
        self.mlp_norm = _norm(config, weights, f"{name}.final_layer_norm")

    def forward(self, hidden_TC: Tensor, attention: AttentionBackend, kv_layer: Tensor, inputs: AttentionInputs) -> Tensor:
        if self.norm_before:
            attended_TC = self.attention(self.attention_norm(hidden_TC), attention, kv_layer, inputs)
            hidden_TC, normed_TC = self.mlp_norm.add(hidden_TC, attended_TC)
            return hidden_TC.add_(self.mlp(normed_TC))
        hidden_TC = self.attention_norm(hidden_TC.add_(self.attention(hidden_TC, attention, kv_layer, inputs)))
        return self.mlp_norm(hidden_TC.add_(self.mlp(hidden_TC)))


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, weights: Weights, name: str) -> None:
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        parts = {f"{name}.q_proj": hidden, f"{name}.k_proj": hidden, f"{name}.v_proj": hidden}
        self.qkv = Linear(weights, parts, hidden, config.attention_bias)
        self.out = Linear(weights, {f"{name}.out_proj": hidden}, hidden, config.attention_bias)

    def forward(self, x_TC: Tensor, attention: AttentionBackend, kv_layer: Tensor, inputs: AttentionInputs) -> Tensor:
        q_THD, k_THD, v_THD = self.qkv(x_TC).view(len(x_TC), -1, self.head_dim).chunk(3, dim=1)
        attention.write(k_THD, v_THD, kv_layer, inputs)
        attended_THD = attention.attend(q_THD, kv_layer, inputs, self.head_dim**-0.5)
        return self.out(attended_THD.flatten(1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, weights: Weights, name: str) -> None:
        super().__init__()
        self.up = Linear(weights, {f"{name}.fc1": config.intermediate_size}, config.hidden_size, config.mlp_bias)
        self.down = Linear(weights, {f"{name}.fc2": config.hidden_size}, config.intermediate_size, config.mlp_bias)
        self.activation = config.activation

    def forward(self, x_TC: Tensor) -> Tensor:
        return self.down(ACTIVATIONS[self.activation](self.up(x_TC)))


def _norm(config: ModelConfig, weights: Weights, name: str) -> LayerNorm:
    assert config.opt is not None
    affine = config.opt.layer_norm_elementwise_affine
    return LayerNorm(weights, name, config.hidden_size, config.norm_eps, affine)
