"""Attention backends behind one Protocol (base.py); `choose` picks by device."""

from __future__ import annotations

import torch

from worker.attention.base import AttentionBackend
from worker.attention.cpu import CpuAttention
from worker.attention.torch_paged import TorchPagedAttention


def choose(device: torch.device | str) -> AttentionBackend:
    """A fresh backend for this device; one per worker, it may hold scratch memory."""
    return CpuAttention() if torch.device(device).type == "cpu" else TorchPagedAttention()
