"""Paged attention of single queries: every block is read where it lies, once for all query heads that share it.

A task is a piece of a query's context (flash-decoding, arXiv:2311.01282): scores of all heads, their softmax, and the weighted
sum of the values, block by block. A second pass adds the pieces of longer contexts up. Where a context is cut depends on its
length only, so that what a query gets does not depend on the others of its step.

Legend: H query heads, K key-value heads, G = H / K, D head size, B tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from llvmlite import ir

from worker.compiled.emit import F16, F32, FREE, I16, I64, Builder, Kernel, num_accumulators, vector_width

PIECE = 256  # most tokens of a piece, a multiple of the vector width; their scores stay near the processor
KINDS = {"float32": F32, "float16": F16, "bfloat16": I16}  # how keys and values lie in the cache

_LOG2_E = 1.4426950408889634


class Field:
    """Places in the arguments of the kernel; addresses in bytes, everything else in values."""

    (QUERIES, QUERY_STRIDE, KEYS, VALUES, OUT, TABLES, TABLE_STRIDE, PIECES, WEIGHTS, SUMS, SCALE, COUNT) = range(12)


class Piece:
    """The columns of a piece, int64. Its result goes to row OUT of the results, [H, D] each; OUT is the query's own row where
    the context is one piece, else a row further down, and then row OUT of the weights, [H, 2], tells what it counts for."""

    (QUERY, TABLE, FIRST_BLOCK, LENGTH, OUT, COUNT) = range(6)


class Sum:
    """The columns of a query whose context is several pieces: their results stand one below the other from FIRST on."""

    (QUERY, FIRST, PIECES, COUNT) = range(4)


@dataclass(frozen=True, slots=True)
class Shape:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    kind: str  # of KINDS

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def fits(self) -> bool:
        return self.kind in KINDS and self.head_dim % vector_width() == 0 and self.block_size <= PIECE

    @property
    def piece(self) -> int:
        """Tokens of a whole piece."""
        return PIECE // self.block_size * self.block_size


@cache
def kernels(shape: Shape) -> tuple[Kernel, Kernel]:
    """A task of the first is a piece, a task of the second a sum."""
    assert shape.fits
    pieces = Kernel("pieces", lambda b, arguments, task: _attend_piece(shape, b, arguments, task))
    return pieces, Kernel("sums", lambda b, arguments, task: _add_pieces_up(shape, b, arguments, task))


def _attend_piece(shape: Shape, b: Builder, arguments: Any, task: Any) -> None:
    heads, head_dim, block_size = shape.num_heads, shape.head_dim, shape.block_size
    kind = KINDS[shape.kind]
    piece = b.at(b.pointer(b.argument(arguments, Field.PIECES), I64), b.times(task, Piece.COUNT))
    query, table, first, length, row = (b.argument(piece, column) for column in range(Piece.COUNT))
    queries = b.pointer(b.argument(arguments, Field.QUERIES), F32)
    queries = b.at(queries, b.times(query, b.argument(arguments, Field.QUERY_STRIDE)))
    keys, values = (b.pointer(b.argument(arguments, field), kind) for field in (Field.KEYS, Field.VALUES))
    out = b.at(b.pointer(b.argument(arguments, Field.OUT), F32), b.times(row, heads * head_dim))
    table_stride = b.argument(arguments, Field.TABLE_STRIDE)
    blocks = b.at(b.pointer(b.argument(arguments, Field.TABLES), ir.IntType(32)), b.plus(b.times(table, table_stride), first))
    weights = b.at(b.pointer(b.argument(arguments, Field.WEIGHTS), F32), b.times(row, 2 * heads))
    scores = b.alloca(F32, heads * PIECE)
    scores.align = 64
    num_blocks = b.sdiv(b.plus(length, block_size - 1), I64(block_size))

    def blocks_of(what: Any, use: Any) -> None:
        """use(head, first value of its block, the same of the block that comes next, tokens before the block, of the block)."""
        with b.loop(num_blocks) as number:
            begin = _block(b, blocks, number, shape)
            following = _block(b, blocks, b.least(b.plus(number, 1), b.plus(num_blocks, -1)), shape)
            before = b.times(number, block_size)
            count = b.least(b.sub(length, before), block_size)
            with b.loop(shape.num_kv_heads) as head:
                offset = b.times(head, block_size * head_dim)
                use(head, b.at(what, b.plus(begin, offset)), b.at(what, b.plus(following, offset)), before, count)

    def score(head: Any, block: Any, following: Any, before: Any, count: Any) -> None:
        own = b.at(scores, b.plus(b.times(head, shape.group * PIECE), before))
        _score_block(shape, b, b.at(queries, b.times(head, shape.group * head_dim)), block, following, own, count)

    def weigh(head: Any, block: Any, following: Any, before: Any, count: Any) -> None:
        own = b.at(scores, b.plus(b.times(head, shape.group * PIECE), before))
        _weigh_block(shape, b, own, block, following, b.at(out, b.times(head, shape.group * head_dim)), count)

    blocks_of(keys, score)
    factor = b.fmul(b.bitcast(b.trunc(b.argument(arguments, Field.SCALE), ir.IntType(32)), F32), F32(_LOG2_E))
    with b.loop(heads) as head:
        best, mass = _exponentiate(b, b.at(scores, b.times(head, PIECE)), length, factor)
        b.store(best, b.at(weights, b.times(head, 2)))
        b.store(mass, b.at(weights, b.plus(b.times(head, 2), 1)))
    with b.loop(heads * head_dim, b.width) as at:
        b.vstore(b.constant(0.0), out, at)
    blocks_of(values, weigh)
    with b.loop(heads) as head:
        share = b.splat(b.fdiv(F32(1.0), b.load(b.at(weights, b.plus(b.times(head, 2), 1)))))
        with b.loop(head_dim, b.width) as column:
            at = b.plus(b.times(head, head_dim), column)
            b.vstore(b.fmul(b.vload(out, at), share), out, at)


def _block(b: Builder, blocks: Any, number: Any, shape: Shape) -> Any:
    block = b.sext(b.load(b.at(blocks, number)), I64)
    return b.times(block, shape.num_kv_heads * shape.block_size * shape.head_dim)


def _score_block(shape: Shape, b: Builder, queries: Any, keys: Any, following: Any, scores: Any, count: Any) -> None:
    """scores[g, t] = queries[g] · keys[t] for the G heads of a group and the tokens of a block."""
    places = range(0, shape.head_dim, b.width)
    for some in _some_heads(shape, b):
        query = {(g, c): b.vload(queries, g * shape.head_dim + c) for g in some for c in places}
        with b.loop(count) as token:
            at = b.times(token, shape.head_dim)
            if some[0] == 0:
                for c in places:
                    b.prefetch(following, b.plus(at, c))
            key = {c: b.vload(keys, b.plus(at, c)) for c in places}
            for g in some:
                products = b.fmul(query[g, 0], key[0], flags=FREE)
                for c in places[1:]:
                    products = b.multiply_add(query[g, c], key[c], products)
                b.store(b.total(products), b.at(scores, b.plus(token, g * PIECE)))


def _weigh_block(shape: Shape, b: Builder, weights: Any, values: Any, following: Any, out: Any, count: Any) -> None:
    """out[g] += weights[g, t] · values[t], summed over the tokens of a block."""
    places = range(0, shape.head_dim, b.width)
    for some in _some_heads(shape, b):

        def add(token: Any, sums: list[Any], some: range = some) -> list[Any]:
            at = b.times(token, shape.head_dim)
            if some[0] == 0:
                for c in places:
                    b.prefetch(following, b.plus(at, c))
            value = [b.vload(values, b.plus(at, c)) for c in places]
            weight = [b.splat(b.load(b.at(weights, b.plus(token, g * PIECE)))) for g in some]
            factors = [(w, v) for w in weight for v in value]
            return [b.multiply_add(w, v, total) for (w, v), total in zip(factors, sums, strict=True)]

        at = [g * shape.head_dim + c for g in some for c in places]
        for value, place in zip(b.fold(count, [b.vload(out, place) for place in at], add), at, strict=True):
            b.vstore(value, out, place)


def _some_heads(shape: Shape, b: Builder) -> list[range]:
    """The heads of a group, in parts that find place in the registers."""
    part = max(1, num_accumulators() * b.width // shape.head_dim)
    return [range(first, min(first + part, shape.group)) for first in range(0, shape.group, part)]


def _exponentiate(b: Builder, scores: Any, length: Any, factor: Any) -> tuple[Any, Any]:
    """scores = 2^(factor · scores − best), where best is the largest of the factor · scores; returns it, and the sum."""
    nothing = b.constant(float("-inf"))
    spread = b.splat(factor)
    with b.loop(b.sub(b.times(b.sdiv(b.plus(length, b.width - 1), I64(b.width)), b.width), length)) as more:
        b.store(F32(float("-inf")), b.at(scores, b.plus(length, more)))

    def scaled(at: Any, best: list[Any]) -> list[Any]:
        value = b.fmul(b.vload(scores, at), spread)
        b.vstore(value, scores, at)
        return [b.larger(best[0], value)]

    best = b.largest(b.fold(length, [nothing], scaled, b.width)[0])
    shift = b.splat(best)

    def raised(at: Any, mass: list[Any]) -> list[Any]:
        value = b.exp2(b.fsub(b.vload(scores, at), shift))
        b.vstore(value, scores, at)
        return [b.fadd(mass[0], value)]

    return best, b.total(b.fold(length, [b.constant(0.0)], raised, b.width)[0])


def _add_pieces_up(shape: Shape, b: Builder, arguments: Any, task: Any) -> None:
    """Of a query's pieces: Σ wᵢ resultᵢ / Σ wᵢ with wᵢ = massᵢ · 2^(bestᵢ − best)."""
    heads, head_dim = shape.num_heads, shape.head_dim
    entry = b.at(b.pointer(b.argument(arguments, Field.SUMS), I64), b.times(task, Sum.COUNT))
    query, first, count = (b.argument(entry, column) for column in range(Sum.COUNT))
    results = b.pointer(b.argument(arguments, Field.OUT), F32)
    weights = b.pointer(b.argument(arguments, Field.WEIGHTS), F32)

    def weight(piece: Any, head: Any, column: int) -> Any:
        return b.load(b.at(weights, b.plus(b.times(b.plus(first, piece), 2 * heads), b.times(head, 2), column)))

    with b.loop(heads) as head:
        best = b.fold(count, [b.constant(float("-inf"))], lambda i, best: [b.larger(best[0], b.splat(weight(i, head, 0)))])[0]

        def share(piece: Any, head: Any = head, best: Any = best) -> Any:
            return b.fmul(b.exp2(b.fsub(b.splat(weight(piece, head, 0)), best)), b.splat(weight(piece, head, 1)))

        whole = b.fold(count, [b.constant(0.0)], lambda i, total: [b.fadd(total[0], share(i))])[0]
        with b.loop(head_dim, b.width) as column:
            at = b.plus(b.times(head, head_dim), column)

            def add(piece: Any, total: list[Any], at: Any = at) -> list[Any]:
                result = b.vload(results, b.plus(b.times(b.plus(first, piece), heads * head_dim), at))
                return [b.multiply_add(share(piece), result, total[0])]

            total = b.fold(count, [b.constant(0.0)], add)[0]
            b.vstore(b.fdiv(total, whole), results, b.plus(b.times(query, heads * head_dim), at))
