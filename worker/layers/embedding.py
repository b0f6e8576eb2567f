"""Token ids (or positions) to vectors, and vectors to logits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from worker.layers.products import product
from worker.weights import Weights


class Embedding(nn.Module):
    """Row i of the table for id i: [T] → [T, size]."""

    def __init__(self, weights: Weights, name: str, count: int, size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(weights.table(f"{name}.weight", count, size), requires_grad=False)
        self._dtype = weights.dtype

    def forward(self, ids_T: Tensor) -> Tensor:
        return F.embedding(ids_T, self.table).to(self._dtype)


class Head(nn.Module):
    """Logits x Wᵀ, [N, size] → [N, vocabulary], in float32; W is the embedding's own table if tied (arXiv:1608.05859)."""

    def __init__(self, weights: Weights, name: str, embedding: Embedding, tied: bool) -> None:
        super().__init__()
        if tied:
            weights.same(f"{name}.weight", embedding.table)
            weight_VC = embedding.table.detach().to(weights.dtype)
        else:
            weight_VC = weights.take(f"{name}.weight", *embedding.table.shape)
        self._product = product(weight_VC, None, weights.quantization, weights.deterministic)

    def forward(self, x_NC: Tensor) -> Tensor:
        return self._product(x_NC).float()
