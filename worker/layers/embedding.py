"""Token ids (or positions) to vectors, and vectors to logits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from worker.weights import Weights


class Embedding(nn.Module):
    """Row i of the table for id i: [T] → [T, size]."""

    def __init__(self, weights: Weights, name: str, count: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weights.take(f"{name}.weight", count, size), requires_grad=False)

    def forward(self, ids_T: Tensor) -> Tensor:
        return F.embedding(ids_T, self.weight)


class Head(nn.Module):
    """Logits x Wᵀ, [N, size] → [N, vocabulary], in float32; W is the embedding's own table if tied (arXiv:1608.05859)."""

    def __init__(self, weights: Weights, name: str, embedding: Embedding, tied: bool) -> None:
        super().__init__()
        self.weight = embedding.weight
        if tied:
            weights.same(f"{name}.weight", embedding.weight)
        else:
            self.weight = nn.Parameter(weights.take(f"{name}.weight", *embedding.weight.shape), requires_grad=False)

    def forward(self, x_NC: Tensor) -> Tensor:
        return F.linear(x_NC, self.weight).float()
