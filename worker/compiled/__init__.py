"""The small operations of a step as compiled loops, where numba is installed: norms, rotation, cache writes, quantizing, and
attention of single queries. One loop takes the place of five to ten torch operations, each of which costs some microseconds to
call. Every one has its twin in torch, which is used where these do not fit: without numba, on a GPU, in half precision, and,
but for attention, for many rows, which torch divides among threads. (numba's own threads would spin against torch's.)

`load` is called once by a worker on a CPU; until then, and where it finds no numba, nothing here fits.

A loop computes one row after the other, each in the same way: its results do not depend, bit for bit, on which rows there are.
torch's operations do, in the last digits: what it takes for one row, or at the end of a tensor, is not what it takes for many.
So a deterministic worker has the loops take all rows, and the activations too.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worker.compiled import threads

log = logging.getLogger(__name__)

MOST = 1 << 17  # numbers of an operation: about where two threads of torch's catch up with one loop

_kernels: ModuleType | None = None
_programs: ModuleType | None = None  # only where the processor has the instructions
_multiplies_bytes = False  # those for products of 8-bit integers
_activations: ModuleType | None = None  # only of a deterministic worker
_most: float = MOST


def load(deterministic: bool = False) -> str:
    """From here on loops are used: compiled when they are first called, or taken from numba's cache. By what, in words; empty:
    there is nothing to compile with."""
    global _kernels, _programs, _multiplies_bytes, _activations, _most
    try:
        from worker.compiled import kernels, panels
    except ImportError:
        return ""
    unload()
    if panels.HAS_FLOATS:
        from worker.compiled import program as programs

        _programs, _multiplies_bytes = programs, panels.HAS_BYTES
    if deterministic:
        from worker.compiled import activations

        _activations, _most = activations, math.inf
    _kernels = kernels
    return f"numba {kernels.VERSION}"


def compile_all() -> None:
    """All that a worker on this processor may want, into numba's cache."""
    assert load(deterministic=True)
    from worker.compiled import rows

    for loop in rows.Loop.all:
        loop.compile()


def unload() -> None:
    global _kernels, _programs, _multiplies_bytes, _activations, _most
    _kernels, _programs, _multiplies_bytes, _activations, _most = None, None, False, None, MOST


def is_loaded() -> bool:
    return _kernels is not None


def fits(x: Tensor) -> bool:
    """Whether the loops can be run over it."""
    return (
        _kernels is not None
        and x.dtype is torch.float32
        and x.device.type == "cpu"
        and x.is_contiguous()
        and 0 < x.numel() <= _most
    )


def samples(x_NV: Tensor) -> bool:
    """Whether loops are to look for the best of its rows and to draw, and can."""
    return _kernels is not None and x_NV.dtype is torch.float32 and x_NV.device.type == "cpu" and x_NV.is_contiguous()


def best(x_NV: Tensor) -> tuple[Tensor, Tensor]:
    """As x.max(dim=1), and the first of several."""
    assert _kernels is not None
    best_N, at_N = torch.empty(len(x_NV)), torch.empty(len(x_NV), dtype=torch.int64)
    _kernels.best(x_NV.numpy(), best_N.numpy(), at_N.numpy())  # on one thread: 64 rows take less time than waking another
    return best_N, at_N


def draw(logits_NV: Tensor, row_M: np.ndarray, columns: Sequence[np.ndarray]) -> np.ndarray:
    """The tokens of these rows, as sampler.sample draws them; columns: temperature, top_k, top_p, min_p, seed, position and
    output_index of each."""
    assert _kernels is not None
    *parameters, position_M, output_index_M = columns
    token_M = np.empty(len(row_M), np.int64)
    of_rows = (row_M, *parameters, position_M.astype(np.uint32), output_index_M.astype(np.uint32), token_M)
    size = max(1, _DRAWN_SHARE // logits_NV.shape[1])
    parts = [tuple(column[at : at + size] for column in of_rows) for at in range(0, len(row_M), size)]
    logits, draw_rows = logits_NV.numpy(), _kernels.draw
    threads.share(lambda part: draw_rows(logits, *part), parts)
    return token_M.astype(np.int32)


def activates(x_TF: Tensor) -> bool:
    """Whether activations are to be computed by loops, and can be."""
    return _activations is not None and fits(x_TF)


def silu_and_mul(gate_up_TF: Tensor) -> Tensor:
    """As layers.activation.silu_and_mul."""
    assert _activations is not None
    out = torch.empty(len(gate_up_TF), gate_up_TF.shape[1] // 2)
    _share_rows(_activations.silu_and_mul, gate_up_TF, out)
    return out


def gelu(x_TF: Tensor) -> Tensor:
    """As layers.activation.gelu."""
    assert _activations is not None
    out = torch.empty_like(x_TF)
    _share_rows(_activations.gelu, x_TF, out)
    return out


_LEAST_SHARE = 1 << 14  # numbers of an operation on each thread: some 100 µs
_DRAWN_SHARE = 1 << 18  # logits of rows that draw: some 500 µs


def _share_rows(compute: Callable[[np.ndarray, np.ndarray], None], x: Tensor, out: Tensor) -> None:
    """compute(x, out), which takes row by row, on as many threads as pay."""
    rows = max(1, _LEAST_SHARE // max(1, out.shape[1]))
    parts = [(x[at : at + rows].numpy(), out[at : at + rows].numpy()) for at in range(0, len(x), rows)]
    threads.share(lambda part: compute(*part), parts)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., C] over its last dimension, as layers.norm.RMSNorm."""
    assert _kernels is not None
    out, size = torch.empty_like(x), x.shape[-1]
    _kernels.rms_norm(x.view(-1, size).numpy(), weight.numpy(), eps, out.view(-1, size).numpy())
    return out


def add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x, and its norm."""
    assert _kernels is not None
    out, size = torch.empty_like(x), x.shape[-1]
    _kernels.add_rms_norm(
        residual.view(-1, size).numpy(), x.view(-1, size).numpy(), weight.numpy(), eps, out.view(-1, size).numpy()
    )
    return out


def fits_cache(kv_layer: Tensor) -> bool:
    """The same of a layer of the KV cache, which may have any size, and hold bfloat16."""
    return _kernels is not None and kv_layer.dtype in (torch.float32, torch.bfloat16) and kv_layer.device.type == "cpu"


def array(kv_layer: Tensor) -> np.ndarray:
    """float32, or the bits of bfloat16."""
    return kv_layer.numpy() if kv_layer.dtype == torch.float32 else kv_layer.view(torch.uint16).numpy()


def write(k_TKD: Tensor, v_TKD: Tensor, kv_layer: Tensor, slots_T: Tensor) -> None:
    """Keys and values to their slots, as attention.cpu.CpuAttention.write; k and v may be parts of wider rows."""
    assert _kernels is not None
    _kernels.write(k_TKD.numpy(), v_TKD.numpy(), array(kv_layer), slots_T.numpy())


def rotate_and_write(
    qkv_TAD: Tensor, num_heads: int, cos_sin: tuple[Tensor, Tensor], kv_layer: Tensor, slots_T: Tensor
) -> Tensor:
    """As layers.heads.rotate_and_write."""
    assert _kernels is not None
    cos_T1D, sin_T1D = cos_sin
    q_THD = torch.empty(len(qkv_TAD), num_heads, qkv_TAD.shape[2])
    _kernels.rotate_and_write(
        qkv_TAD.numpy(), cos_T1D.numpy()[:, 0], sin_T1D.numpy()[:, 0], array(kv_layer), slots_T.numpy(), q_THD.numpy()
    )
    return q_THD


def norm_rotate_and_write(
    qkv_TAD: Tensor,
    num_heads: int,
    q_weight_D: Tensor,
    k_weight_D: Tensor,
    eps: float,
    cos_sin: tuple[Tensor, Tensor],
    kv_layer: Tensor,
    slots_T: Tensor,
) -> Tensor:
    """As layers.heads.norm_rotate_and_write; the projection is overwritten."""
    assert _kernels is not None
    qkv, num_keys = qkv_TAD.numpy(), kv_layer.shape[2]
    _kernels.norm_heads(qkv, 0, num_heads, q_weight_D.numpy(), eps)
    _kernels.norm_heads(qkv, num_heads, num_heads + num_keys, k_weight_D.numpy(), eps)
    return rotate_and_write(qkv_TAD, num_heads, cos_sin, kv_layer, slots_T)


def has_programs() -> bool:
    """Whether steps can be programs: numba is there, and the processor has the instructions."""
    return _programs is not None


def multiplies(weight_OI: Tensor, quantization: str) -> bool:
    """Whether products with the matrix are to be computed by loops: they can be, and are faster than the library's."""
    return (
        _programs is not None
        and weight_OI.dtype is torch.float32
        and weight_OI.device.type == "cpu"
        and (quantization == "none" or _multiplies_bytes)
    )


def new_matrix(weight_OI: Tensor, bias_O: Tensor | None, scale_O: Tensor | None) -> Any:
    """A program.Matrix of float32 numbers, or of 8-bit integers and the scales of the outputs."""
    assert _programs is not None
    arrays = (None if tensor is None else tensor.numpy() for tensor in (weight_OI, bias_O, scale_O))
    return _programs.Matrix(*arrays)


def multiply(matrix: Any, x_TI: Tensor) -> Tensor:
    """x Wᵀ + b; the matrix's own, whatever has been loaded or unloaded since it was made."""
    x_TI = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
    y_TO = torch.empty(len(x_TI), matrix.num_outputs)
    if len(x_TI):
        matrix.multiply(x_TI.numpy(), y_TO.numpy())
    return y_TO


def new_program(capacity: int) -> Any:
    """A program.Program."""
    assert _programs is not None
    return _programs.Program(capacity)


def run(
    program: Any, cos_sin: tuple[Tensor, Tensor] | None, slots_T: Tensor, tables_TW: np.ndarray, lengths_T: np.ndarray
) -> None:
    """On as many rows as there are slots."""
    assert _programs is not None
    nothing_T = np.empty((len(slots_T), 0), np.float32)
    cos_TD, sin_TD = (nothing_T, nothing_T) if cos_sin is None else (turn_T1D.numpy()[:, 0] for turn_T1D in cos_sin)
    queries = _programs.Queries(cos_TD, sin_TD, slots_T.numpy(), tables_TW.astype(np.int64), lengths_T)
    program.run(len(slots_T), queries)


def quantize_rows(x_TI: Tensor, levels: float, zero: float, least_scale: float) -> tuple[Tensor, Tensor]:
    """As layers.products.quantize_rows."""
    assert _kernels is not None
    quantized, scale = torch.empty(x_TI.shape, dtype=torch.uint8), torch.empty(len(x_TI), 1)
    _kernels.quantize_rows(x_TI.numpy(), levels, zero, least_scale, quantized.numpy(), scale.numpy())
    return quantized, scale


def attend(
    q_NHD: Tensor, kv_layer: Tensor, tables_NW: Tensor, lengths_N: Tensor, parts: Sequence[slice], scale: float, out_NHD: Tensor
) -> None:
    """Query i over the first lengths[i] tokens of the blocks tables[i], as attention.singles; in parts of the N · K pairs of a
    query and a key-value head, which threads share."""
    assert _kernels is not None
    arrays = (q_NHD.numpy(), array(kv_layer), tables_NW.numpy(), lengths_N.numpy(), scale, out_NHD.numpy())
    attend_part = _kernels.attend

    def compute(part: slice) -> None:
        attend_part(*arrays, part.start, part.stop)

    threads.share(compute, parts)
