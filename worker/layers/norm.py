"""Normalization over the last dimension, alone or behind the addition of a residual."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from worker import compiled, kernels
from worker.weights import Weights


class RMSNorm(nn.Module):
    """y = w · x / √(mean(x²) + ε), [..., size] (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, weights: Weights, name: str, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weights.take(f"{name}.weight", size), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if compiled.fits(x):
            return compiled.rms_norm(x, self.weight, self.eps)
        if kernels.fits(x):
            return kernels.rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def add(self, residual: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """residual + x, and its norm: the two that the next half of a layer needs. The residual is overwritten."""
        if compiled.fits(x) and residual.is_contiguous():
            return residual, compiled.add_rms_norm(residual, x, self.weight, self.eps)
        if kernels.fits(x):
            return residual, kernels.add_rms_norm(residual, x, self.weight, self.eps)
        residual.add_(x)
        return residual, self(residual)


class LayerNorm(nn.Module):
    """y = w · (x − mean(x)) / √(var(x) + ε) + b, [..., size] (Ba et al. 2016, arXiv:1607.06450); w = 1, b = 0 if not affine."""

    def __init__(self, weights: Weights, name: str, size: int, eps: float, affine: bool) -> None:
        super().__init__()
        self.size, self.eps = (size,), eps
        self.weight = self.bias = None
        if affine:
            self.weight = nn.Parameter(weights.take(f"{name}.weight", size), requires_grad=False)
            self.bias = nn.Parameter(weights.take(f"{name}.bias", size), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if kernels.fits(x):
            if self.weight is None or self.bias is None:
                return kernels.plain_layer_norm(x, self.eps)
            return kernels.layer_norm(x, self.weight, self.bias, self.eps)
        return F.layer_norm(x, self.size, self.weight, self.bias, self.eps)

    def add(self, residual: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """residual + x, and its norm. The residual is overwritten."""
        if kernels.fits(x) and self.weight is not None and self.bias is not None:
            return residual, kernels.add_layer_norm(residual, x, self.weight, self.bias, self.eps)
        residual.add_(x)
        return residual, self(residual)
