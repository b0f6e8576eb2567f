"""Qwen3 (arXiv:2505.09388), dense: as Llama, with a norm over each query and key head before they are turned.

Legend: T tokens, C hidden size, H query heads, K key-value heads, D head size, F inner size of the MLP, N rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvcache.storage import KVStorage
from worker.attention.base import AttentionBackend, AttentionInputs
from worker.layers.activation import silu_and_mul
from worker.layers.embedding import Embedding, Head
from worker.layers.heads import norm_rotate_and_write
from worker.layers.linear import Linear
from worker.layers.norm import RMSNorm
from worker.layers.rotary import CosSin, Rotary
from worker.model_config import ModelConfig
from worker.models.recorded import Recorded, record_llama
from worker.weights import Weights


class Qwen3(nn.Module):
    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        super().__init__()
        self.embedding = Embedding(weights, "model.embed_tokens", config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, weights, f"model.layers.{i}") for i in range(config.num_layers))
        self.norm = RMSNorm(weights, "model.norm", config.hidden_size, config.norm_eps)
        self.head = Head(weights, "lm_head", self.embedding, config.tie_word_embeddings)
        self.rotary = Rotary(config, weights.device)
        self.num_parameters = weights.num_parameters
        self._recorded = Recorded(record_llama)

    @torch.inference_mode()
    def forward(
        self, input_ids_T: Tensor, positions_T: Tensor, attention: AttentionBackend, kv: KVStorage, inputs: AttentionInputs
    ) -> Tensor:
        cos_sin = self.rotary.at(positions_T)
        hidden_TC = self.embedding(input_ids_T)
        computed_TC = self._recorded.forward(self, hidden_TC, cos_sin, attention, kv, inputs)
        if computed_TC is not None:
            return computed_TC
        for layer, kv_layer in zip(self.layers, kv.layers, strict=True):
            hidden_TC = layer(hidden_TC, cos_sin, attention, kv_layer, inputs)
        return self.norm(hidden_TC)

    @torch.inference_mode()
    def logits(self, hidden_NC: Tensor) -> Tensor:
        return self.head(hidden_NC)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, weights: Weights, name: str) -> None:
        super().__init__()
        self.input_norm = RMSNorm(weights, f"{name}.input_layernorm", config.hidden_size, config.norm_eps)
        self.attention = Attention(config, weights, f"{name}.self_attn")
        self.post_attention_norm = RMSNorm(weights, f"{name}.post_attention_layernorm", config.hidden_size, config.norm_eps)
        self.mlp = MLP(config, weights, f"{name}.mlp")

    def forward(
        self,
        hidden_TC: Tensor,
        cos_sin: CosSin,
        attention: AttentionBackend,
        kv_layer: Tensor,
        inputs: AttentionInputs,
    ) -> Tensor:
        attended_TC = self.attention(self.input_norm(hidden_TC), cos_sin, attention, kv_layer, inputs)
        hidden_TC, normed_TC = self.post_attention_norm.add(hidden_TC, attended_TC)
        return hidden_TC.add_(self.mlp(normed_TC))


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, weights: Weights, name: str) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        parts = {f"{name}.q_proj": q_size, f"{name}.k_proj": kv_size, f"{name}.v_proj": kv_size}
        self.qkv = Linear(weights, parts, config.hidden_size, config.attention_bias)
        self.q_norm = RMSNorm(weights, f"{name}.q_norm", self.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(weights, f"{name}.k_norm", self.head_dim, config.norm_eps)
        self.out = Linear(weights, {f"{name}.o_proj": config.hidden_size}, q_size, config.attention_bias)

    def forward(
        self,
        x_TC: Tensor,
        cos_sin: CosSin,
        attention: AttentionBackend,
        kv_layer: Tensor,
        inputs: AttentionInputs,
    ) -> Tensor:
        qkv_TAD = self.qkv(x_TC).view(len(x_TC), -1, self.head_dim)  # A = H + 2K
        norms = (self.q_norm, self.k_norm)
        q_THD = norm_rotate_and_write(qkv_TAD, self.num_heads, *norms, cos_sin, attention, kv_layer, inputs)
        attended_THD = attention.attend(q_THD, kv_layer, inputs, self.head_dim**-0.5)
        return self.out(attended_THD.flatten(1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, weights: Weights, name: str) -> None:
        super().__init__()
        inner, hidden = config.intermediate_size, config.hidden_size
        self.gate_up = Linear(weights, {f"{name}.gate_proj": inner, f"{name}.up_proj": inner}, hidden, bias=False)
        self.down = Linear(weights, {f"{name}.down_proj": hidden}, inner, bias=False)

    def forward(self, x_TC: Tensor) -> Tensor:
        return self.down(silu_and_mul(self.gate_up(x_TC)))
