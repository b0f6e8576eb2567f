"""Attention of single queries, each with a context of its own: two ways to compute it on a CPU, the better first. Compiled
reads the blocks where they lie; gathered copies them first, and can do whatever torch can.

Legend: N queries, R rows, W blocks of the widest table, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worker import compiled
from worker.attention.base import AttentionInputs
from worker.attention.torch_paged import TorchPagedAttention

I64 = NDArray[np.int64]


@dataclass(slots=True)
class Queries:
    """Query i is token `token[i]` of the step; it sees the first `length[i]` tokens of the row whose blocks are
    `tables[row[i]]`."""

    token: I64  # [N]
    row: I64  # [N]
    length: I64  # [N], at least 1
    tables: NDArray[np.int32]  # [R, W]
    num_tokens: int  # of the step


class Singles(Protocol):
    """Worked out once a step, used by all layers."""

    @classmethod
    def of(cls, queries: Queries, num_heads: int, kv_layer: Tensor) -> Singles | None:
        """None: it can't, for this dtype or device."""

    def attend(self, q_THD: Tensor, kv_layer: Tensor, scale: float) -> Tensor:
        """[T, H, D], with the queries' results in their places and anything elsewhere; it is the caller's to write to."""


# ---------------------------------------------------------------------------------------------------------------- compiled


class CompiledSingles:
    """By a loop over the blocks where they lie, which threads share."""

    _PART = 3000  # keys that query heads see in a part, at least: some 100 µs

    def __init__(self, queries: Queries, num_heads: int, num_kv_heads: int) -> None:
        self._tokens, self._num_tokens = torch.from_numpy(queries.token), queries.num_tokens
        self._tables = torch.from_numpy(queries.tables[queries.row].astype(np.int64))
        self._lengths = torch.from_numpy(queries.length)
        pairs = np.repeat(queries.length, num_kv_heads)  # of a query and a key-value head
        self._parts = list(_parts(pairs, -(-self._PART * num_kv_heads // num_heads)))

    @classmethod
    def of(cls, queries: Queries, num_heads: int, kv_layer: Tensor) -> CompiledSingles | None:
        return cls(queries, num_heads, kv_layer.shape[2]) if compiled.fits_cache(kv_layer) else None

    def attend(self, q_THD: Tensor, kv_layer: Tensor, scale: float) -> Tensor:
        whole = len(self._tokens) == self._num_tokens
        q_NHD = (q_THD if whole else q_THD[self._tokens]).float().contiguous()
        out_NHD = torch.empty(q_NHD.shape)
        compiled.attend(q_NHD, kv_layer, self._tables, self._lengths, self._parts, scale, out_NHD)
        out_NHD = out_NHD.to(q_THD.dtype)
        return out_NHD if whole else q_THD.new_empty(self._num_tokens, *out_NHD.shape[1:]).index_copy_(0, self._tokens, out_NHD)


def _parts(length: I64, size: int) -> Iterator[slice]:
    """Of consecutive ones that together see about `size` keys."""
    part_of = (np.cumsum(length) - 1) // size
    begins = [0, *(np.flatnonzero(np.diff(part_of)) + 1).tolist(), len(length)]
    yield from (slice(begin, end) for begin, end in itertools.pairwise(begins))


# ---------------------------------------------------------------------------------------------------------------- gathered


class GatheredSingles:
    """By the paged attention that any device has (torch_paged.py), each query as a row of one token."""

    _attention = TorchPagedAttention()  # one scratch buffer for all steps

    def __init__(self, queries: Queries) -> None:
        length, token = queries.length.astype(np.int32), torch.from_numpy(queries.token)
        starts = np.arange(len(length) + 1, dtype=np.int32)
        self._inputs = AttentionInputs.of(starts, length, queries.tables[queries.row], np.zeros(len(length), np.int64))
        self._tokens, self._num_tokens = token, queries.num_tokens

    @classmethod
    def of(cls, queries: Queries, num_heads: int, kv_layer: Tensor) -> GatheredSingles:
        return cls(queries)

    def attend(self, q_THD: Tensor, kv_layer: Tensor, scale: float) -> Tensor:
        out_THD = q_THD.new_empty(self._num_tokens, *q_THD.shape[1:])
        return out_THD.index_copy_(0, self._tokens, self._attention.attend(q_THD[self._tokens], kv_layer, self._inputs, scale))
