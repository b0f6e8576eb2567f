"""Paged attention on a GPU, by the Triton kernels of worker/kernels: how a step is cut into tiles and splits, worked out once a
step on the host and used by all layers, or once for all steps of a CUDA graph. No model here.

A row of few queries (one tile's worth) goes by the decode variant, the others by the prefill variant: at most two launches,
and a third where contexts are divided.

Legend: T tokens of the step, H query heads, K key-value heads, G = H / K, D head size, R rows, P tiles, N splits, S places of
partial results.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from worker.attention.base import AttentionInputs
from worker.gpu.streams import to_device
from worker.kernels.heuristics import (
    I32,
    AttentionConfig,
    Gpu,
    decode_config,
    num_splits,
    prefill_config,
    query_tiles,
)
from worker.kernels.merge_splits import merge_splits
from worker.kernels.paged_attention import paged_attention
from worker.kernels.write_kv import write_kv


@dataclass(frozen=True)
class AttentionShape:
    """Of a model's attention; with it, what a plan needs to know of the device."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    gpu: Gpu

    @classmethod
    def of(cls, q_THD: Tensor, kv_layer: Tensor) -> AttentionShape:
        _, num_heads, head_dim = q_THD.shape
        return cls(num_heads, kv_layer.shape[2], head_dim, q_THD.dtype, q_THD.device, gpu_of(q_THD.device))

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads


@dataclass(slots=True)
class Tiles:
    row: Tensor  # [P] int32, -1: none
    first: Tensor  # [P] int32: the tile's first query, of its row's
    config: AttentionConfig


@dataclass(slots=True)
class AttentionPlan:
    """How one step, or every step of a CUDA graph, is computed. All layers share the scratch memory: it is written and read
    within one layer."""

    decode: Tiles | None
    prefill: Tiles | None
    # Where contexts are divided:
    partial_NSHD: Tensor | None = None
    lse_NSH: Tensor | None = None

    @classmethod
    def of(cls, query_start: I32, context_lens: I32, shape: AttentionShape) -> AttentionPlan:
        """From the host's arrays, with one copy to the device that doesn't wait."""
        query_lens = np.diff(query_start).astype(np.int32)
        size = (shape.group, shape.head_dim, shape.dtype.itemsize, shape.gpu)
        decode = decode_config(*size)
        is_few = query_lens <= decode.block_q
        rows = np.arange(len(query_lens), dtype=np.int32)
        chunks = rows[~is_few]
        prefill = prefill_config(*size, few=False)
        num_programs = int(np.sum(-(-query_lens[chunks] // prefill.block_q))) * shape.num_kv_heads
        if num_programs < shape.gpu.num_sms:
            prefill = prefill_config(*size, few=True)
        lists = [
            *query_tiles(rows[is_few], query_lens, context_lens, decode.block_q),
            *query_tiles(chunks, query_lens, context_lens, prefill.block_q),
        ]
        numbers = to_device(np.concatenate(lists), shape.device)
        decode_row, decode_first, prefill_row, prefill_first = numbers.split([len(x) for x in lists])
        plan = cls(
            Tiles(decode_row, decode_first, decode) if len(decode_row) else None,
            Tiles(prefill_row, prefill_first, prefill) if len(prefill_row) else None,
        )
        if plan.decode is not None:
            plan._divide(int(context_lens[is_few].max()), shape)
        return plan

    @classmethod
    def of_decode(cls, num_rows: int, max_context: int, shape: AttentionShape) -> AttentionPlan:
        """For steps of `num_rows` rows with one query each, the same in every step: nothing is read from the host, and a
        capturing CUDA graph may allocate it. A row of context 0 is padding, and gets zeros. `max_context`: of any step."""
        config = decode_config(shape.group, shape.head_dim, shape.dtype.itemsize, shape.gpu)
        row = torch.arange(num_rows, dtype=torch.int32, device=shape.device)
        plan = cls(Tiles(row, torch.zeros_like(row), config), None)
        plan._divide(max_context, shape)
        return plan

    def _divide(self, max_context: int, shape: AttentionShape) -> None:
        assert self.decode is not None
        num_tiles, config = len(self.decode.row), self.decode.config
        splits = num_splits(num_tiles, shape.num_kv_heads, max_context, config.tile, shape.gpu)
        if splits > 1:
            self.partial_NSHD, self.lse_NSH = scratch(splits, num_tiles * config.block_q, shape)


def scratch(num_splits: int, num_places: int, shape: AttentionShape) -> tuple[Tensor, Tensor]:
    """For partial results: [N, S, H, D] and their log-sum-exp [N, S, H]."""
    sizes = (num_splits, num_places, shape.num_heads, shape.head_dim)
    partial_NSHD = torch.empty(sizes, dtype=torch.float32, device=shape.device)
    return partial_NSHD, torch.empty(sizes[:3], dtype=torch.float32, device=shape.device)


class TritonPagedAttention:
    def __init__(self, window: int = 0) -> None:
        """`window`: tokens that a query sees at most, itself among them (arXiv:2310.06825); 0: all."""
        self._window = window

    def write(self, k_TKD: Tensor, v_TKD: Tensor, kv_layer: Tensor, inputs: AttentionInputs) -> None:
        write_kv(k_TKD, v_TKD, kv_layer, inputs.slot_mapping)

    def attend(self, q_THD: Tensor, kv_layer: Tensor, inputs: AttentionInputs, scale: float) -> Tensor:
        """The plan is inputs.plan where a graph runner has put one there, else it is made at the first layer."""
        if not isinstance(inputs.plan, AttentionPlan):
            shape = AttentionShape.of(q_THD, kv_layer)
            inputs.plan = AttentionPlan.of(inputs.query_start_cpu, inputs.context_lens_cpu, shape)
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        attend(q_THD, kv_layer, inputs, inputs.plan, scale, out_THD, window=self._window)
        return out_THD


def rehearse(kv_layer: Tensor, shape: AttentionShape) -> None:
    """Launches both prefill variants, for a tile that is none: which of them a step takes depends on how many tiles it has."""
    q_1HD = torch.empty(1, shape.num_heads, shape.head_dim, dtype=shape.dtype, device=shape.device)
    zeros = torch.zeros(2, dtype=torch.int32, device=shape.device)
    numbers = (zeros[:1, None], zeros[:1], zeros, zeros[:1] - 1, zeros[:1])
    for few in (False, True):
        config = prefill_config(shape.group, shape.head_dim, shape.dtype.itemsize, shape.gpu, few=few)
        paged_attention(q_1HD, kv_layer, torch.empty_like(q_1HD), None, *numbers, scale=1.0, num_splits=1, config=config)


def attend(
    q_THD: Tensor,
    kv_layer: Tensor,
    inputs: AttentionInputs,
    plan: AttentionPlan,
    scale: float,
    out_THD: Tensor,
    *,
    window: int = 0,
) -> None:
    numbers = (inputs.block_tables, inputs.context_lens, inputs.query_start)
    rules = dict(scale=scale, window=window)
    if plan.prefill is not None:
        row, first, config = plan.prefill.row, plan.prefill.first, plan.prefill.config
        paged_attention(q_THD, kv_layer, out_THD, None, *numbers, row, first, num_splits=1, config=config, **rules)
    if plan.decode is None:
        return
    row, first, config = plan.decode.row, plan.decode.first, plan.decode.config
    if plan.partial_NSHD is None:
        paged_attention(q_THD, kv_layer, out_THD, None, *numbers, row, first, num_splits=1, config=config, **rules)
        return
    partial_NSHD, lse_NSH = plan.partial_NSHD, plan.lse_NSH
    splits = len(partial_NSHD)
    paged_attention(q_THD, kv_layer, partial_NSHD, lse_NSH, *numbers, row, first, num_splits=splits, config=config, **rules)
    merge_splits(partial_NSHD, lse_NSH, out_THD, inputs.query_start, row, first)


_pretended = Gpu("cuda", 90, 132)


def pretend(gpu: Gpu) -> None:
    """That this is where tensors on a CPU are."""
    global _pretended
    _pretended = gpu


def gpu_of(device: torch.device) -> Gpu:
    """A CPU, where kernels are interpreted or only compiled, counts as a Hopper unless something else is pretended."""
    if device.type != "cuda":
        return _pretended
    properties = torch.cuda.get_device_properties(device)
    backend = "hip" if torch.version.hip else "cuda"
    return Gpu(backend, 10 * properties.major + properties.minor, properties.multi_processor_count)
