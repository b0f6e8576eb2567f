"""Attention backends behind one Protocol (base.py); `choose` picks by device."""

from __future__ import annotations

import math

import torch

from worker.attention.base import AttentionBackend
from worker.attention.cpu import CpuAttention
from worker.attention.singles import CompiledSingles
from worker.attention.torch_paged import TorchPagedAttention


def choose(device: torch.device | str, deterministic: bool = False) -> AttentionBackend:
    """A fresh backend for this device; one per worker, it may hold scratch memory. deterministic: each query is computed alone,
    by the one loop that does it the same way however its row is divided into chunks; on a CPU, with the loops loaded."""
    if deterministic:
        assert torch.device(device).type == "cpu"
        return CpuAttention(ways=(CompiledSingles,), most_singles=math.inf)
    return CpuAttention() if torch.device(device).type == "cpu" else TorchPagedAttention()
