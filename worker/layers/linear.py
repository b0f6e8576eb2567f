"""Linear layers, also several that share their input in one product."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from worker.weights import Weights


class Linear(nn.Module):
    """y = x Wᵀ + b for x [T, in], with the rows of several layers stacked: {"…q_proj": 512, "…k_proj": 128} gives y [T, 640],
    to be split. Fewer, larger products read the same weights in less time."""

    def __init__(self, weights: Weights, parts: Mapping[str, int], num_inputs: int, bias: bool) -> None:
        super().__init__()
        named = {f"{name}.weight": rows for name, rows in parts.items()}
        self.weight = nn.Parameter(weights.stack(named, num_inputs), requires_grad=False)
        self.bias = None
        if bias:
            biases = weights.stack({f"{name}.bias": rows for name, rows in parts.items()})
            self.bias = nn.Parameter(biases, requires_grad=False)

    def forward(self, x_TI: Tensor) -> Tensor:
        return F.linear(x_TI, self.weight, self.bias)
