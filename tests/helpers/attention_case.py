"""Rows with random keys and values in shuffled blocks, for tests of attention."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import torch
from torch import Tensor

from kvcache.storage import KVStorage
from tests.helpers.paged_model import step_inputs
from worker.attention.base import AttentionBackend
from worker.attention.reference import ReferenceAttention, dense_attention

MIXED = [(1, 1), (1, 70), (5, 5), (1, 64), (17, 40), (1, 33), (3, 129), (1, 16), (16, 16), (1, 17), (40, 41), (1, 15)]


class Case:
    """Rows of (query length, context length) with random keys and values; NaN wherever no row has a token."""

    def __init__(
        self,
        rows: list[tuple[int, int]],
        *,
        num_heads: int = 6,
        num_kv_heads: int = 2,
        head_dim: int = 32,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        self.rows, self.block_size, self.scale = rows, block_size, head_dim**-0.5
        needed = [-(-length // block_size) for _, length in rows]
        num_blocks = sum(needed) + 5
        blocks = (np.random.default_rng(seed).permutation(num_blocks) + 1).tolist()
        self.tables = [[blocks.pop() for _ in range(count)] for count in needed]
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        self.q_THD = random(sum(count for count, _ in rows), num_heads, head_dim)
        self.k_LKD = [random(length, num_kv_heads, head_dim) for _, length in rows]
        self.v_LKD = [random(length, num_kv_heads, head_dim) for _, length in rows]
        self.kv_layer = KVStorage(1, num_blocks, num_kv_heads, block_size, head_dim, dtype, device).layers[0].fill_(torch.nan)
        counts, lengths = [count for count, _ in rows], [length for _, length in rows]
        self.inputs = step_inputs(counts, lengths, self.tables, block_size, device)
        self._fill()

    def _fill(self) -> None:
        """All tokens' keys and values, written as one step that computes everything."""
        lengths = [length for _, length in self.rows]
        everything = step_inputs(lengths, lengths, self.tables, self.block_size, str(self.q_THD.device))
        ReferenceAttention().write(torch.cat(self.k_LKD), torch.cat(self.v_LKD), self.kv_layer, everything)

    def only(self, row: int) -> Case:
        """The same keys and values, and a step of this row alone."""
        alone = copy.copy(self)
        first = sum(count for count, _ in self.rows[:row])
        count, length = self.rows[row]
        alone.rows, alone.q_THD = [self.rows[row]], self.q_THD[first : first + count]
        alone.inputs = step_inputs([count], [length], [self.tables[row]], self.block_size, str(self.q_THD.device))
        return alone

    def dense(self) -> Tensor:
        queries = self.q_THD.split([count for count, _ in self.rows])
        return torch.cat([dense_attention(*row, self.scale) for row in zip(queries, self.k_LKD, self.v_LKD, strict=True)])

    def reference(self) -> Tensor:
        return ReferenceAttention().attend(self.q_THD, self.kv_layer, self.inputs, self.scale)

    def by(self, backend: AttentionBackend) -> Tensor:
        inputs = dataclasses.replace(self.inputs, plan=None)
        return backend.attend(self.q_THD, self.kv_layer, inputs, self.scale)


def close(got: Tensor, expected: Tensor, tolerance: float = 5e-6) -> None:
    assert got.shape == expected.shape and got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)
