"""Activations between the two halves of an MLP."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from worker import compiled, kernels


def gelu(x_TF: Tensor) -> Tensor:
    """x · Φ(x), Φ the normal distribution (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
    return compiled.gelu(x_TF) if compiled.activates(x_TF) else F.gelu(x_TF)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": gelu}


def silu_and_mul(gate_up_TF: Tensor) -> Tensor:
    """silu(gate) · up of [gate, up] side by side, [T, 2F] → [T, F] (SwiGLU, Shazeer 2020, arXiv:2002.05202)."""
    if compiled.activates(gate_up_TF):
        return compiled.silu_and_mul(gate_up_TF)
    if kernels.fits(gate_up_TF):
        return kernels.silu_and_mul(gate_up_TF)
    gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
    return F.silu(gate_TF).mul_(up_TF)
