"""The layers of a model as a program of compiled operations (worker.compiled.program): they compute what the layers compute one
after the other, each token's attention by itself.

Legend: T tokens, C hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kvcache.storage import KVStorage
from worker import compiled
from worker.attention.base import AttentionBackend, AttentionInputs
from worker.attention.cpu import CpuAttention, queries_of
from worker.layers.norm import LayerNorm, RMSNorm
from worker.layers.rotary import CosSin

if TYPE_CHECKING:
    from worker.models.llama import Llama
    from worker.models.opt import Opt
    from worker.models.qwen3 import Qwen3

_FEWEST_ROWS = 16  # that a program is written for


class Recorded:
    """Written down at the first step, and again when a step has more rows than any before it, or another cache."""

    def __init__(self, record: Callable[[Any, Any, Any, KVStorage], Any]) -> None:
        """record(model, program, hidden, kv) writes down what is to be done with the rows `hidden`, and says which rows then
        hold the result."""
        self._record = record
        self._program: Any = None
        self._kv: KVStorage | None = None

    def forward(
        self,
        model: Any,
        hidden_TC: Tensor,
        cos_sin: CosSin | None,
        attention: AttentionBackend,
        kv: KVStorage,
        inputs: AttentionInputs,
    ) -> Tensor | None:
        """Hidden states after the last norm, [T, C]; None: the layers have to do it themselves."""
        multiplies = model.layers[0].attention.qkv.matrix is not None
        if not (multiplies and isinstance(attention, CpuAttention) and compiled.fits_cache(kv.layers[0])):
            return None
        queries = queries_of(np.arange(len(inputs.context_lens_cpu)), inputs)
        rows = len(hidden_TC)
        if self._program is None or self._program.capacity < rows or self._kv is not kv:
            # A power of two: a batch that grows row by row does not have it written down anew each time.
            self._program = compiled.new_program(max(_FEWEST_ROWS, 1 << (rows - 1).bit_length()))
            self._kv, self._hidden = kv, self._program.scratch("hidden", hidden_TC.shape[1])
            self._out = self._record(model, self._program, self._hidden, kv)
        self._hidden.array[:rows] = hidden_TC.numpy()
        compiled.run(self._program, cos_sin, inputs.slot_mapping, queries.tables[queries.row], queries.length)
        return torch.from_numpy(self._out.array[:rows].copy())


def record_llama(model: Llama | Qwen3, program: Any, hidden: Any, kv: KVStorage) -> Any:
    normed = program.scratch("normed", hidden.size)
    for layer, kv_layer in zip(model.layers, kv.layers, strict=True):
        attention, mlp, cache = layer.attention, layer.mlp, compiled.array(kv_layer)
        gate_up = program.scratch("gate_up", mlp.gate_up.matrix.num_outputs)
        inner = program.scratch("inner", mlp.down.matrix.num_inputs)
        _norm(program, layer.input_norm, hidden, normed)
        qkv = _qkv(program, attention, normed)
        program.rotate_and_write(qkv, attention.num_heads, cache, *_head_norms(attention))
        _attend(program, attention, attention.num_heads, qkv, cache, hidden)
        _norm(program, layer.post_attention_norm, hidden, normed)
        program.product(normed, mlp.gate_up.matrix, gate_up)
        program.silu_and_mul(gate_up, inner)
        program.product(inner, mlp.down.matrix, hidden, plus=hidden)
    _norm(program, model.norm, hidden, normed)
    return normed


def record_opt(model: Opt, program: Any, hidden: Any, kv: KVStorage) -> Any:
    normed = program.scratch("normed", hidden.size)
    for layer, kv_layer in zip(model.layers, kv.layers, strict=True):
        attention, mlp, cache = layer.attention, layer.mlp, compiled.array(kv_layer)
        inner = program.scratch("inner", mlp.down.matrix.num_inputs)
        before = normed if layer.norm_before else hidden
        if layer.norm_before:
            _norm(program, layer.attention_norm, hidden, normed)
        qkv = _qkv(program, attention, before)
        num_heads = attention.out.matrix.num_inputs // attention.head_dim
        program.write(qkv, num_heads, cache)
        _attend(program, attention, num_heads, qkv, cache, hidden)
        _norm(program, layer.mlp_norm if layer.norm_before else layer.attention_norm, hidden, before)
        program.product(before, mlp.up.matrix, inner)
        program.activate(mlp.activation, inner, inner)
        program.product(inner, mlp.down.matrix, hidden, plus=hidden)
        if not layer.norm_before:
            _norm(program, layer.mlp_norm, hidden, hidden)
    if model.norm is None:
        return hidden
    _norm(program, model.norm, hidden, normed)
    return normed


def _norm(program: Any, norm: RMSNorm | LayerNorm, x: Any, y: Any) -> None:
    if isinstance(norm, RMSNorm):
        program.rms_norm(x, norm.weight.numpy(), norm.eps, y)
    else:
        weight, bias = (None if tensor is None else tensor.numpy() for tensor in (norm.weight, norm.bias))
        program.layer_norm(x, weight, bias, norm.eps, y)


def _qkv(program: Any, attention: Any, x: Any) -> Any:
    qkv = program.scratch("qkv", attention.qkv.matrix.num_outputs)
    program.product(x, attention.qkv.matrix, qkv)
    return qkv


def _attend(program: Any, attention: Any, num_heads: int, qkv: Any, cache: np.ndarray, hidden: Any) -> None:
    """hidden += the projection of what the queries see."""
    attended = program.scratch("attended", attention.out.matrix.num_inputs)
    program.attend(qkv, num_heads, cache, attention.head_dim**-0.5, attended)
    program.product(attended, attention.out.matrix, hidden, plus=hidden)


def _head_norms(attention: Any) -> tuple[Any, ...]:
    """The weights of a Qwen3's norms of queries and keys, and their ε."""
    if not hasattr(attention, "q_norm"):
        return ()
    return (attention.q_norm.weight.numpy(), attention.k_norm.weight.numpy()), attention.q_norm.eps
