"""Attention of single queries, each with a context of its own: three ways to compute it on a CPU, the best first. Compiled and
sparse read the blocks where they lie; gathered copies them first, and can do whatever torch can.

Legend: N queries, R rows, W blocks of the widest table, H query heads, K key-value heads, D head size, L tokens of the longest
context of a group.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
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


# ------------------------------------------------------------------------------------------------------------------ sparse


@dataclass(slots=True)
class _Group:
    tokens: Tensor  # [N]
    pattern: Tensor  # [N · H, slots of the layer] compressed rows: which keys each query head sees, L of them in each row
    begins: Tensor  # [N · H] 0, L, 2 L, …
    bias: Tensor  # [N · H, L] −inf past a row's own length
    places: Tensor  # [N · H · L] the same keys, as rows of [slots, D]


class SparseSingles:
    """By torch's sparse products. The scores are those entries of q kᵀ at which a query sees a key (sampled_addmm), and the
    weighted sums of values are bags of an embedding table (embedding_bag); neither copies a block. Queries of about the same
    length make a group, padded to its longest with their own first key."""

    def __init__(self, queries: Queries, num_heads: int, kv_layer: Tensor) -> None:
        self._num_tokens = queries.num_tokens
        self._groups = [_group(queries, members, num_heads, kv_layer) for members in _alike(queries.length)]

    @classmethod
    def of(cls, queries: Queries, num_heads: int, kv_layer: Tensor) -> SparseSingles | None:
        fits = kv_layer.device.type == "cpu" and kv_layer.dtype == torch.float32
        return cls(queries, num_heads, kv_layer) if fits else None

    def attend(self, q_THD: Tensor, kv_layer: Tensor, scale: float) -> Tensor:
        _, num_heads, head_dim = q_THD.shape
        out_THD = q_THD.new_empty(self._num_tokens, num_heads, head_dim)
        keys, values = (part.view(-1, head_dim) for part in kv_layer)
        for group in self._groups:
            q_XD = q_THD[group.tokens].view(-1, head_dim)
            scores = torch.sparse.sampled_addmm(group.pattern, q_XD, keys.t(), beta=0.0, alpha=scale)
            weights = torch.softmax(scores.values().view(group.bias.shape).add_(group.bias), dim=-1)
            sums = F.embedding_bag(group.places, values, group.begins, mode="sum", per_sample_weights=weights.flatten())
            out_THD[group.tokens] = sums.view(-1, num_heads, head_dim)
        return out_THD


def _alike(length: I64) -> Iterator[I64]:
    """Queries in groups whose longest is at most a quarter longer than its shortest."""
    order = np.argsort(length, kind="stable")
    at, in_order = 0, length[order]
    while at < len(order):
        end = int(np.searchsorted(in_order, in_order[at] + max(16, in_order[at] // 4), "right"))
        yield order[at:end]
        at = end


def _group(queries: Queries, members: I64, num_heads: int, kv_layer: Tensor) -> _Group:
    _, num_blocks, num_kv_heads, block_size, _ = kv_layer.shape
    length_N1 = queries.length[members][:, None]
    longest = int(length_N1.max())
    seen_NL = np.arange(longest) < length_N1
    position_NL = np.where(seen_NL, np.arange(longest), 0)
    block_NL = queries.tables[queries.row[members][:, None], position_NL // block_size].astype(np.int64)
    head_H1 = np.arange(num_heads)[:, None] // (num_heads // num_kv_heads)
    place_NHL = (block_NL[:, None] * num_kv_heads + head_H1) * block_size + (position_NL % block_size)[:, None]
    num_slots, rows = num_blocks * num_kv_heads * block_size, len(members) * num_heads
    index = torch.int32 if max(num_slots, place_NHL.size) < 2**31 else torch.int64
    places = torch.from_numpy(place_NHL.ravel()).to(index)
    begins = torch.arange(rows + 1, dtype=index) * longest
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that compressed rows are in beta
        pattern = torch.sparse_csr_tensor(begins, places, torch.zeros(len(places)), (rows, num_slots), check_invariants=False)
    bias_NL = torch.zeros(seen_NL.shape).masked_fill_(torch.from_numpy(~seen_NL), -torch.inf)
    bias = bias_NL[:, None].expand(-1, num_heads, -1).reshape(rows, longest)
    return _Group(torch.from_numpy(queries.token[members]), pattern, begins[:-1], bias, places)


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
