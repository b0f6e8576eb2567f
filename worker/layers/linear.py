"""Linear layers, also several that share their input in one product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from worker.layers.products import CompiledProduct, product
from worker.weights import Weights


class Linear(nn.Module):
    """y = x Wᵀ + b for x [T, in], with the rows of several layers stacked: {"…q_proj": 512, "…k_proj": 128} gives y [T, 640],
    to be split. Fewer, larger products read the same weights in less time."""

    def __init__(self, weights: Weights, parts: Mapping[str, int], num_inputs: int, bias: bool) -> None:
        super().__init__()
        weight_OI = weights.stack({f"{name}.weight": rows for name, rows in parts.items()}, num_inputs)
        bias_O = weights.stack({f"{name}.bias": rows for name, rows in parts.items()}) if bias else None
        self._product = product(weight_OI, bias_O, weights.quantization, weights.deterministic)

    @property
    def matrix(self) -> Any:
        """For programs (worker.compiled), if the product is compiled; else None."""
        return self._product.matrix if isinstance(self._product, CompiledProduct) else None

    def forward(self, x_TI: Tensor) -> Tensor:
        return self._product(x_TI)
