"""The baseline: an interpolated modified Kneser-Ney n-gram model, pruned until its packed tables fit a given size.

Arrays of symbols in, probabilities out; what a symbol is (a byte, a token of the demo's vocabulary) is the caller's
business. Smoothing: Chen & Goodman, "An empirical study of smoothing techniques for language modeling" (1998).
Pruning: Stolcke, "Entropy-based pruning of backoff language models" (1998), by its cheaper form: an n-gram is worth
its count times the bits it saves over the next shorter context.

Tables are kept by order k = 1..n. An n-gram of order k is a node of a trie: the node of its first k - 1 symbols
(the parent, the context) and its last symbol. Node 0 of order 0 is the empty context.
"""

import lzma
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

CODE_STEP = 1 / 12  # bits between two of the 256 values that a stored probability can take: 2^0 .. 2^-21.25


@dataclass
class Order:
    """All n-grams of one length, before pruning; every array has one entry per node."""

    parent: Ints
    symbol: Ints
    count: Ints
    suffix: Ints  # the node of order k - 1 without the first symbol
    share: Floats  # the discounted count over its context's total
    probability: Floats  # share, plus what the shorter contexts add


@dataclass
class Table:
    """One order of the finished model. `rest` is for order k's nodes as contexts: the mass left to shorter ones."""

    key: Ints  # parent * vocabulary + symbol, ascending
    share: Floats
    rest: Floats
    packed: bytes


@dataclass
class NGram:
    vocabulary: int
    root_rest: float
    tables: list[Table]

    @property
    def entries(self) -> int:
        return sum(len(table.key) for table in self.tables)

    @cached_property
    def packed_size(self) -> int:
        """Bytes of the tables as a file: symbols, one-byte probabilities, child counts, compressed with xz."""
        return len(lzma.compress(b"".join(table.packed for table in self.tables)))

    def bits(self, symbols: Ints) -> Floats:
        """-log2 of the probability of each symbol after all that stand before it."""
        probability = np.full(len(symbols), 1 / self.vocabulary)
        context = np.zeros(len(symbols), dtype=np.int64)  # the node that ends before each position, -1: none
        rest_of = np.array([self.root_rest])
        for table in self.tables:
            node = self._find(table, context, symbols)
            rest = np.where(context >= 0, rest_of[np.maximum(context, 0)], 1.0)
            probability = np.where(node >= 0, table.share[np.maximum(node, 0)], 0.0) + rest * probability
            context = np.concatenate([[-1], node[:-1]])
            rest_of = table.rest
        return -np.log2(probability)

    def _find(self, table: Table, context: Ints, symbols: Ints) -> Ints:
        """The node of each (context, symbol), -1 where the model holds none."""
        key = np.where(context >= 0, context * self.vocabulary + symbols, -1)
        at = np.minimum(np.searchsorted(table.key, key), len(table.key) - 1)
        return np.where(table.key[at] == key, at, -1)


class Counts:
    """Every n-gram of a stream up to some order, with its Kneser-Ney probability: made once, pruned at will."""

    def __init__(self, symbols: Ints, vocabulary: int, order: int) -> None:
        self.vocabulary = vocabulary
        self.orders: list[Order] = []
        nodes = self._count(symbols, order)
        for k in range(order):
            self._smooth(k, nodes[k + 1] if k + 1 < order else None)

    def pruned_to(self, size: int) -> NGram:
        """The best model whose packed tables take at most `size` bytes."""
        entries = self.entries
        while True:
            model = self.pruned(entries)
            if model.packed_size <= size:
                return model
            entries = int(entries * 0.99 * size / model.packed_size)

    def pruned(self, entries: int) -> NGram:
        """Keep about `entries` n-grams: the most valuable, and the contexts that they hang on."""
        values = [order.count * np.log2(order.probability / self._lower_probability(k)) for k, order in enumerate(self.orders)]
        worst_kept = self.entries - min(entries, self.entries)
        floor = np.partition(np.concatenate(values), worst_kept)[worst_kept]
        keep = [value >= floor for value in values]
        keep[0][:] = True
        for k in range(len(keep) - 1, 0, -1):
            keep[k - 1][self.orders[k].parent[keep[k]]] = True
        return self._pack(keep)

    @property
    def entries(self) -> int:
        return sum(len(order.count) for order in self.orders)

    def _count(self, symbols: Ints, order: int) -> list[Ints]:
        """Fill parent, symbol, count and suffix. Returns, by order, one position at which each n-gram ends, by node."""
        ends: list[Ints] = []
        node = np.zeros(len(symbols), dtype=np.int64)
        shorter = np.zeros(len(symbols), dtype=np.int64)
        for k in range(order):
            valid = np.arange(k, len(symbols))
            key = (node[valid - 1] if k else node[valid]) * self.vocabulary + symbols[valid]
            unique, first, inverse, count = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
            ends.append(valid[first])
            zeros = np.zeros(len(unique))
            self.orders.append(
                Order(unique // self.vocabulary, unique % self.vocabulary, count, shorter[ends[k]], zeros, zeros)
            )
            node = np.full(len(symbols), -1, dtype=np.int64)
            node[valid] = inverse
            shorter = node
        return ends

    def _smooth(self, k: int, longer_ends: Ints | None) -> None:
        """Fill share and probability of order k + 1, shorter orders being done."""
        order = self.orders[k]
        weight = order.count
        if longer_ends is not None:  # below the highest order: the number of different symbols that come before
            preceded = np.bincount(self.orders[k + 1].suffix, minlength=len(order.count))
            weight = np.where(preceded > 0, preceded, 1)  # what only ever starts the stream has none
        discounted = weight - _discounts(weight)[np.minimum(weight, 3)]
        contexts = int(order.parent.max()) + 1
        total = np.bincount(order.parent, weights=weight, minlength=contexts)
        order.share = discounted / total[order.parent]
        rest = 1 - np.bincount(order.parent, weights=order.share, minlength=contexts)
        order.probability = order.share + rest[order.parent] * self._lower_probability(k)

    def _lower_probability(self, k: int) -> Floats:
        if k == 0:
            return np.full(len(self.orders[0].count), 1 / self.vocabulary)
        return self.orders[k - 1].probability[self.orders[k].suffix]

    def _pack(self, keep: list[NDArray[np.bool_]]) -> NGram:
        tables: list[Table] = []
        kept_parent: list[Ints] = []
        new_node = np.zeros(1, dtype=np.int64)
        rests: list[Floats] = []
        contexts = 1
        for order, mask in zip(self.orders, keep, strict=True):
            parent = new_node[order.parent[mask]]
            code = _code(order.share[mask])
            rest_code = _code(1 - np.bincount(parent, weights=order.share[mask], minlength=contexts))
            children = np.bincount(parent, minlength=contexts)
            rest = np.where(children > 0, _value(rest_code), 1.0)
            stored = np.bincount(parent, weights=_value(code), minlength=contexts)
            share = _value(code) * ((1 - rest) / np.where(stored > 0, stored, 1))[parent]  # so that all sums to one
            packed = (
                order.symbol[mask].astype(np.uint16).tobytes()
                + code.astype(np.uint8).tobytes()
                + np.minimum(children, 0xFFFF).astype(np.uint16).tobytes()
                + rest_code[children > 0].astype(np.uint8).tobytes()
            )
            tables.append(Table(parent * self.vocabulary + order.symbol[mask], share, np.ones(int(mask.sum())), packed))
            rests.append(rest)
            kept_parent.append(parent)
            new_node = np.cumsum(mask) - 1
            contexts = int(mask.sum())
        for table, rest in zip(tables, rests[1:], strict=False):
            table.rest = rest
        return NGram(self.vocabulary, float(rests[0][0]), tables)


def _discounts(weight: Ints) -> Floats:
    """What is taken from a count of 0, 1, 2, 3 or more: Chen & Goodman's estimates."""
    n1, n2, n3, n4 = (int((weight == count).sum()) for count in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) == 0:  # so few n-grams that no estimate holds
        return np.array([0.0, 0.5, 0.5, 0.5])
    y = n1 / (n1 + 2 * n2)
    return np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])


def _code(probability: Floats) -> Ints:
    steps = -np.log2(np.maximum(probability, 2.0**-40)) / CODE_STEP
    return np.clip(np.rint(steps), 0, 255).astype(np.int64)


def _value(code: Ints) -> Floats:
    return 2.0 ** (-code * CODE_STEP)
