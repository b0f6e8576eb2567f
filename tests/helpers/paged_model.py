"""A loaded model with a paged cache, driven by hand: shuffled blocks, and NaN in every slot that nothing was written to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kvcache.storage import KVStorage
from worker.attention import choose
from worker.attention.base import AttentionBackend, AttentionInputs
from worker.loading import cache_dtype
from worker.models import load_model


def step_inputs(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    tables: Sequence[Sequence[int]],
    block_size: int,
    device: str = "cpu",
) -> AttentionInputs:
    """The last query_lens[r] of context_lens[r] tokens of each row; tables[r] has at least the blocks for them."""
    width = max(-(-length // block_size) for length in context_lens)
    block_tables = np.zeros((len(tables), width), np.int32)
    for row, table in enumerate(tables):
        block_tables[row, : len(table)] = table[:width]
    slots = [
        tables[row][at // block_size] * block_size + at % block_size
        for row, (count, length) in enumerate(zip(query_lens, context_lens, strict=True))
        for at in range(length - count, length)
    ]
    query_start = np.concatenate(([0], np.cumsum(query_lens))).astype(np.int32)
    return AttentionInputs.of(query_start, np.array(context_lens, np.int32), block_tables, np.array(slots, np.int64), device)


class PagedModel:
    """Rows are numbered by the caller; a row begins with its first tokens."""

    def __init__(
        self,
        model_dir: Path,
        *,
        block_size: int = 16,
        num_blocks: int = 64,
        max_model_len: int | None = None,
        dtype: torch.dtype = torch.float32,
        attention: AttentionBackend | None = None,
        device: str = "cpu",
        seed: int = 0,
        quantization: str = "none",
        deterministic: bool = False,
    ) -> None:
        self.model, self.config = load_model(model_dir, dtype, device, max_model_len, quantization, deterministic=deterministic)
        shape, stored = self.config, cache_dtype(quantization, dtype)
        self.kv = KVStorage(shape.num_layers, num_blocks, shape.num_kv_heads, block_size, shape.head_dim, stored, device)
        self.attention = attention or choose(device, deterministic)
        self._block_size, self._device = block_size, device
        self._ids = (np.random.default_rng(seed).permutation(num_blocks) + 1).tolist()
        self.forget()

    def forget(self) -> None:
        """There are no rows, and nothing was ever written."""
        for layer in self.kv.layers:
            layer.fill_(torch.nan)
        self._free = list(self._ids)
        self._tables: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}

    def step(self, rows: Sequence[tuple[int, Sequence[int]]]) -> list[Tensor]:
        """Computes the next tokens of some rows in one step; returns the logits [n, vocabulary] of each row's tokens."""
        for row, tokens in rows:
            self._grow(row, len(tokens))
        counts = [len(tokens) for _, tokens in rows]
        lengths = [self._lengths[row] for row, _ in rows]
        inputs = step_inputs(counts, lengths, [self._tables[row] for row, _ in rows], self._block_size, self._device)
        positions = torch.cat([torch.arange(end - n, end) for n, end in zip(counts, lengths, strict=True)])
        ids = torch.tensor([token for _, tokens in rows for token in tokens])
        hidden = self.model.forward(ids.to(self._device), positions.to(self._device), self.attention, self.kv, inputs)
        return list(self.model.logits(hidden).cpu().split(counts))

    def prompt(self, row: int, tokens: Sequence[int], chunk: int | None = None) -> Tensor:
        """All tokens of a row, `chunk` at a time; their logits [len(tokens), vocabulary]."""
        size = chunk or len(tokens)
        return torch.cat([self.step([(row, tokens[at : at + size])])[0] for at in range(0, len(tokens), size)])

    def _grow(self, row: int, count: int) -> None:
        self._lengths[row] = self._lengths.get(row, 0) + count
        table = self._tables.setdefault(row, [])
        while len(table) * self._block_size < self._lengths[row]:
            table.append(self._free.pop())
