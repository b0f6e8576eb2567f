"""Every kernel variant that a worker can choose for the models that are compiled and checked without a GPU: bfloat16, the block
size a worker starts with. At most 40 rows for a GPU.

A row says what a launch would give to Triton: types of the arguments and constants, by the same rules (heuristics.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import triton

from worker.kernels import prepare
from worker.kernels.block_copy import copy_blocks_kernel, gather_blocks_kernel, move_constants, scatter_blocks_kernel
from worker.kernels.heuristics import AttentionConfig, Gpu, decode_config, prefill_config
from worker.kernels.layer_norm import add_layer_norm_kernel, layer_norm_kernel
from worker.kernels.merge_splits import merge_constants, merge_splits_kernel
from worker.kernels.paged_attention import paged_attention_kernel
from worker.kernels.rms_norm import add_rms_norm_kernel, rms_norm_kernel, tiles
from worker.kernels.sampling import adjust, best, draw, filters, log_sum_exp
from worker.kernels.sampling.order import BLOCK, PARTS
from worker.kernels.silu_and_mul import silu_and_mul_kernel
from worker.kernels.write_kv import (
    fused_constants,
    norm_rotate_and_write_kernel,
    rotate_and_write_kernel,
    write_constants,
    write_kv_kernel,
)

BLOCK_SIZE = 16  # worker.config
ITEMSIZE = 2


@dataclass(frozen=True)
class Shape:
    """Of a model, as the kernels see it."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads


SHAPES = {
    "llama-3-8b": Shape(32, 8, 128),  # and Qwen3-8B
    "llama-3.2-1b": Shape(32, 8, 64),
    "opt-13b": Shape(40, 40, 128),
}


@dataclass(frozen=True)
class Variant:
    name: str
    kernel: triton.JITFunction[Any]
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int


def variants(gpu: Gpu) -> list[Variant]:
    rows = [row for model, shape in SHAPES.items() for row in attention_variants(model, shape, gpu)]
    rows += block_variants(SHAPES["llama-3-8b"])
    rows += [*layer_variants(), *cache_variants(), *sampling_variants(), *prepare_variants()]
    assert len(rows) <= 40 and len({row.name for row in rows}) == len(rows)
    return rows


def attention_variants(model: str, shape: Shape, gpu: Gpu) -> Iterator[Variant]:
    size = (shape.group, shape.head_dim, ITEMSIZE, gpu)
    decode = decode_config(*size)
    yield _attention(f"decode {model}", shape, decode, partial=False)
    yield _attention(f"decode, divided {model}", shape, decode, partial=True)
    yield _attention(f"prefill {model}", shape, prefill_config(*size, few=False), partial=False)
    yield _attention(f"prefill, few {model}", shape, prefill_config(*size, few=True), partial=False)
    types = {
        **dict.fromkeys(("partial_ptr", "lse_ptr", "out_lse_ptr"), "*fp32"),
        "out_ptr": "*bf16",
        **dict.fromkeys(("query_start_ptr", "tile_row_ptr", "tile_first_ptr"), "*i32"),
        **dict.fromkeys(("num_splits", "num_places"), "i32"),
    }
    constants = merge_constants(shape.num_heads, shape.head_dim, decode.block_q, write_lse=False)
    yield Variant(f"merge {model}", merge_splits_kernel, types, constants, num_warps=4, num_stages=1)


def _attention(name: str, shape: Shape, config: AttentionConfig, *, partial: bool) -> Variant:
    types = {
        **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), "*bf16"),
        **dict.fromkeys(("out_ptr", "lse_ptr"), "*fp32" if partial else "*bf16"),
        **dict.fromkeys(("block_tables_ptr", "context_lens_ptr", "query_start_ptr", "tile_row_ptr", "tile_first_ptr"), "*i32"),
        "q_stride": "i32:16",
        **dict.fromkeys(("table_stride", "num_places", "window"), "i32"),
        "scale_log2e": "fp32",
    }
    constants = config.constants(shape.num_kv_heads, shape.group, shape.head_dim, BLOCK_SIZE, windowed=False, partial=partial)
    return Variant(name, paged_attention_kernel, types, constants, config.num_warps, config.num_stages)


def block_variants(shape: Shape) -> Iterator[Variant]:
    constants = move_constants(shape.num_kv_heads * BLOCK_SIZE * shape.head_dim * ITEMSIZE)
    for name, kernel, ids in (
        ("copy blocks", copy_blocks_kernel, ("sources_ptr", "destinations_ptr")),
        ("gather blocks", gather_blocks_kernel, ("blocks_ptr", "stage_ptr")),
        ("scatter blocks", scatter_blocks_kernel, ("blocks_ptr", "stage_ptr")),
    ):
        types = {"layers_ptr": "*i64", **dict.fromkeys(ids, "*i32"), "num_blocks": "i32"}
        yield Variant(name, kernel, types, constants, num_warps=4, num_stages=3)


# ------------------------------------------------------------------------------------- everything but attention and copies

_STRIDES = ("x_stride", "residual_stride", "token_stride", "head_stride", "row_stride", "seen_stride", "size", "vocab")
_TYPES = {
    **dict.fromkeys(
        ("x_ptr", "weight_ptr", "bias_ptr", "y_ptr", "residual_ptr", "gate_up_ptr", "table_ptr", "out_ptr"), "*bf16"
    ),
    **dict.fromkeys(("qkv_ptr", "q_ptr", "k_ptr", "v_ptr", "kv_ptr", "q_weight_ptr", "k_weight_ptr"), "*bf16"),
    **dict.fromkeys(("slots_ptr", "best_ptr", "drawn_ptr", "mass_ptr", "near_mass_ptr", "seed_ptr", "position_ptr"), "*i64"),
    **dict.fromkeys(("cos_ptr", "sin_ptr", "logits_ptr", "near_ptr", "temperature_ptr", "top_p_ptr", "min_p_ptr"), "*fp32"),
    **dict.fromkeys(("repetition_ptr", "presence_ptr", "frequency_ptr", "bias_values_ptr"), "*fp32"),
    **dict.fromkeys(("peak_ptr", "sum_ptr", "logprob_ptr"), "*fp32"),
    **dict.fromkeys(("ids_ptr", "tokens_ptr", "last_tokens_ptr", "top_k_ptr", "num_near_ptr", "edge_ptr"), "*i32"),
    **dict.fromkeys(("output_index_ptr", "seen_ptr", "seen_row_ptr", "bias_tokens_ptr", "masked_tokens_ptr"), "*i32"),
    **dict.fromkeys((*_STRIDES, "k_token_stride", "k_head_stride", "v_token_stride", "v_head_stride"), "i32:16"),
    **dict.fromkeys(("num_rows", "num_ids", "num_blocks", "num_parts", "blocks_of_part"), "i32"),
    **dict.fromkeys(("bias_width", "bias_stride", "masked_width", "masked_stride"), "i32"),
    "eps": "fp32",
}


def _small(name: str, kernel: triton.JITFunction[Any], constants: Mapping[str, Any], num_warps: int, **types: str) -> Variant:
    return Variant(name, kernel, _TYPES | types, constants, num_warps, num_stages=3)


def layer_variants() -> Iterator[Variant]:
    for name, kernel, sizes in (
        ("rms_norm", rms_norm_kernel, [4096]),
        ("add_rms_norm", add_rms_norm_kernel, [2048, 4096, 5120]),
        ("layer_norm", layer_norm_kernel, [5120]),
        ("add_layer_norm", add_layer_norm_kernel, [5120]),
    ):
        for size in sizes:
            _, constants = tiles(1, size)
            num_warps = constants.pop("num_warps")
            yield _small(f"{name} {size}", kernel, constants, num_warps)
    yield _small("silu_and_mul", silu_and_mul_kernel, {"BLOCK": 1024}, 4)


def cache_variants() -> Iterator[Variant]:
    llama, small, opt = SHAPES["llama-3-8b"], SHAPES["llama-3.2-1b"], SHAPES["opt-13b"]
    yield _small("write_kv opt-13b", write_kv_kernel, write_constants(opt.num_kv_heads, BLOCK_SIZE, opt.head_dim), 4)
    for name, kernel, shape in (
        ("rotate_and_write llama-3-8b", rotate_and_write_kernel, llama),
        ("rotate_and_write llama-3.2-1b", rotate_and_write_kernel, small),
        ("norm_rotate_and_write qwen3-8b", norm_rotate_and_write_kernel, llama),
    ):
        yield _small(name, kernel, fused_constants(shape.num_heads, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim), 4)


def sampling_variants() -> Iterator[Variant]:
    parts, near = {"BLOCK": BLOCK, "PARTS": PARTS}, {"PARTS": PARTS, "NEAR": filters.NEAR}
    yield _small("best", best.best_kernel, parts, 4)
    yield _small("gather", filters.gather_kernel, parts | near, 8)
    yield _small("filter", filters.filter_kernel, near | {"SEARCH_BLOCK": filters.SEARCH_BLOCK}, 16)
    yield _small("draw", draw.draw_kernel, parts, 4, position_ptr="*i32")
    yield _small("finish", draw.finish_kernel, {"PARTS": PARTS}, 1, slots_ptr="*i32")
    yield _small("adjust", adjust.adjust_kernel, {"BLOCK": BLOCK, "LISTED": adjust.LISTED}, 4)
    yield _small("sums for logprobs", log_sum_exp.part_sums_kernel, parts, 4)
    yield _small("logprobs", log_sum_exp.log_sum_exp_kernel, {"PARTS": PARTS}, 1, out_ptr="*fp32")


def prepare_variants() -> Iterator[Variant]:
    tables = {"tables_ptr": "*i32", "table_stride": "i32", "count": "i32", "width": "i32"}
    yield _small("write tables", prepare.write_tables_kernel, {"BLOCK": prepare.BLOCK}, 4, **_INTEGERS, **tables)
    constants = {"BLOCK_SIZE": BLOCK_SIZE, "BLOCK": prepare.BLOCK}
    types = _INTEGERS | tables | dict.fromkeys(("out_ids_ptr", "out_positions_ptr", "slot_mapping_ptr"), "*i64")
    yield _small("tokens", prepare.tokens_kernel, constants, 4, **types)
    types = _INTEGERS | tables | {"out_ptr": "*i32"}
    yield _small("gather tables", prepare.gather_tables_kernel, {"BLOCK": prepare.TABLE_BLOCK}, 4, **types)


_INTEGERS = dict.fromkeys(("places_ptr", "blocks_ptr", "positions_ptr", "slots_ptr"), "*i32")
