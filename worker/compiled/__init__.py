"""The small operations of a step as compiled loops, where numba is installed: norms, rotation, cache writes, quantizing, and
attention of few queries. One loop takes the place of five to ten torch operations, each of which costs some microseconds to
call. Every one has its twin in torch, which is used where these do not fit: without numba, on a GPU, in half precision, and
for many rows, which torch divides among threads. (numba's own threads would spin against torch's.)

`load` is called once by a worker on a CPU; until then, and where it finds no numba, nothing here fits.
"""

from __future__ import annotations

import logging
from types import ModuleType

import torch
from torch import Tensor

log = logging.getLogger(__name__)

MOST = 1 << 17  # numbers of an operation: about where two threads of torch's catch up with one loop

_kernels: ModuleType | None = None


def load() -> str:
    """Compiles the loops, or takes them from numba's cache. What was loaded, in words; empty: nothing."""
    global _kernels
    try:
        from worker.compiled import kernels
    except ImportError:
        return ""
    _kernels = kernels
    return f"numba {kernels.VERSION}"


def unload() -> None:
    global _kernels
    _kernels = None


def is_loaded() -> bool:
    return _kernels is not None


def fits(x: Tensor) -> bool:
    """Whether the loops can be run over it."""
    return (
        _kernels is not None
        and x.dtype is torch.float32
        and x.device.type == "cpu"
        and x.is_contiguous()
        and 0 < x.numel() <= MOST
    )


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


def rotate(x_TAD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, num_heads: int) -> Tensor:
    """The first `num_heads` heads of x, as layers.rotary.rotate: [T, num_heads, D]."""
    assert _kernels is not None
    rows, _, size = x_TAD.shape
    out = torch.empty(rows, num_heads, size)
    _kernels.rotate(x_TAD.numpy(), cos_T1D.numpy()[:, 0], sin_T1D.numpy()[:, 0], out.numpy())
    return out


def write(k_TKD: Tensor, v_TKD: Tensor, kv_layer: Tensor, blocks_T: Tensor, offsets_T: Tensor) -> None:
    """Keys and values to their slots, as attention.cpu.CpuAttention.write; k and v may be parts of wider rows."""
    assert _kernels is not None
    _kernels.write(k_TKD.numpy(), v_TKD.numpy(), kv_layer.numpy(), blocks_T.numpy(), offsets_T.numpy())


def quantize_rows(x_TI: Tensor, levels: float, zero: float, least_scale: float) -> tuple[Tensor, Tensor]:
    """As layers.products.quantize_rows."""
    assert _kernels is not None
    quantized, scale = torch.empty(x_TI.shape, dtype=torch.uint8), torch.empty(len(x_TI), 1)
    _kernels.quantize_rows(x_TI.numpy(), levels, zero, least_scale, quantized.numpy(), scale.numpy())
    return quantized, scale


def attend(q_NHD: Tensor, kv_layer: Tensor, tables: Tensor, lengths: Tensor, scale: float, out_NHD: Tensor) -> None:
    """Query i over the first lengths[i] tokens of the blocks tables[i], as attention.singles."""
    assert _kernels is not None
    _kernels.attend(q_NHD.numpy(), kv_layer.numpy(), tables.numpy(), lengths.numpy(), scale, out_NHD.numpy())
