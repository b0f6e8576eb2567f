"""A step as a program: what layers compute, written down as a list of operations (walk.py), and then computed by all threads
without coming back to Python in between. A step of few rows takes hundreds of operations of microseconds each, and to call one
takes as long again.

Legend: T rows, C numbers of a row, I inputs, O outputs, H query heads, K key-value heads, D head size, A = H + 2K, P blocks of
a layer of the cache, S tokens of a block, W blocks of the widest table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from worker.compiled import threads, walk
from worker.compiled.panels import FOLD, LANES, LINE, ROWS, SCALE_STEP, aligned, packed

F32, I8, I64 = NDArray[np.float32], NDArray[np.int8], NDArray[np.int64]

LEVELS, ZERO = 127, 128  # integers of activations are −LEVELS … LEVELS around ZERO
_LEAST_SCALE = 1e-30  # of a row of zeros

_PART = 1 << 18  # bytes of a matrix that a thread takes at a time: some 15 µs
_FEWEST_PARTS = 8  # of an operation, where it has so many
_NUMBERS = 1 << 12  # that a thread takes of an operation that computes row by row
_SECOND_LEVEL = 1 << 18  # bytes of rows that a product keeps near: a quarter of the cache
_APART = LINE  # bytes between rows: those as long as a power of two would share the cache's lines


@dataclass(frozen=True, slots=True)
class Rows:
    """Numbers of every row, somewhere in memory."""

    address: int
    step: int  # bytes from a row to the next
    size: int  # numbers of a row
    array: np.ndarray  # [T, C]

    @staticmethod
    def of(array: np.ndarray) -> Rows:
        assert array.ndim == 2 and array.strides[1] == array.itemsize
        return Rows(array.ctypes.data, array.strides[0], array.shape[1], array)


class Matrix:
    """W, [O, I] float32 numbers, or 8-bit integers with a scale for each output; in tiles. What came in is not kept."""

    def __init__(self, weight_OI: F32 | I8, bias_O: F32 | None, scale_O: F32 | None = None) -> None:
        assert (weight_OI.dtype == np.int8) == (scale_O is not None)
        self.num_outputs, self.num_inputs = weight_OI.shape
        self.of_bytes = scale_O is not None
        self._tiles = packed(weight_OI)
        whole = len(self._tiles) * self._tiles.shape[2]
        self._bias, self._begin, self._scale = (aligned((whole,), kind) for kind in (np.float32, np.int32, np.float32))
        self._bias[: self.num_outputs] = 0 if bias_O is None else bias_O
        if scale_O is not None:
            self._begin[: self.num_outputs] = -ZERO * weight_OI.sum(axis=1, dtype=np.int32)
            self._scale[: self.num_outputs] = scale_O

    def multiply(self, x_TI: F32, y_TO: F32) -> None:
        """y = x Wᵀ + b, as a program of its own; one row at least."""
        once = Program(len(x_TI))
        once.product(Rows.of(x_TI), self, Rows.of(y_TO))
        once.run(len(x_TI))

    def product(self, x: Rows, x_scales: int, y: Rows, plus: Rows | None) -> list[int]:
        """The operation y = x Wᵀ + b + plus. x_scales: the address of the scales of x's rows."""
        assert x.size >= self.num_inputs and y.size == self.num_outputs
        kind = walk.PRODUCT_OF_BYTES if self.of_bytes else walk.PRODUCT
        tiles, lines = self._tiles.shape[:2]
        each = max(1, min(_PART // self._tiles[0].nbytes, tiles // _FEWEST_PARTS))
        near = max(ROWS, _SECOND_LEVEL // max(1, x.step) // ROWS * ROWS)
        return [
            *(kind, x.address, x.step, lines, self._tiles.ctypes.data, tiles, each, self._bias.ctypes.data),
            *((0, 0) if plus is None else (plus.address, plus.step)),
            *(y.address, y.step, self.num_outputs, near, x_scales, self._begin.ctypes.data, self._scale.ctypes.data),
        ]


@dataclass(frozen=True, slots=True)
class Queries:
    """What attention needs to know of a step, of each of its T tokens."""

    cos_TD: F32  # [T, D / 2]
    sin_TD: F32
    slots_T: I64  # where its key and value go
    tables_TW: I64
    lengths_T: I64  # tokens that it sees


_NONE = Queries(*(np.zeros((1, 1), np.float32),) * 2, np.zeros(1, np.int64), np.zeros((1, 1), np.int64), np.zeros(1, np.int64))


# With bytes comes a cache in bfloat16, so what computes the one has the other compiled.
_FLOAT, _HALF = np.zeros(1, np.float32), np.zeros(1, np.uint16)


class Program:
    """Operations on the first T of `capacity` rows."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._operations: list[list[int]] = []
        self._scratch: dict[str, Rows] = {}
        self._held: list[Any] = []  # all that operations have the address of
        self._heads = 1  # of queries
        self._stored = _FLOAT  # a number of the cache, of its kind
        self._written: I64 | None = None

    def scratch(self, name: str, size: int, dtype: DTypeLike = np.float32) -> Rows:
        """Memory for rows; the same name, the same memory."""
        if name not in self._scratch:
            width = -(-size * np.dtype(dtype).itemsize // LINE) * LINE + (_APART if size > 1 else 0)
            self._scratch[name] = Rows.of(aligned((self.capacity, width), np.uint8).view(dtype)[:, :size])
        return self._scratch[name]

    # ------------------------------------------------------------------------------------------------------- operations

    def rms_norm(self, x: Rows, weight_C: F32, eps: float, y: Rows) -> None:
        """y = w · x / √(mean(x²) + ε)"""
        assert x.size == y.size == len(weight_C)
        self._by_rows(walk.RMS_NORM, x, weight_C.ctypes.data, x.size, y.address, y.step, _bits(eps))
        self._held += [x, weight_C, y]

    def layer_norm(self, x: Rows, weight_C: F32 | None, bias_C: F32 | None, eps: float, y: Rows) -> None:
        """y = w · (x − mean(x)) / √(var(x) + ε) + b; w = 1, b = 0 where there are none"""
        weight_C = np.ones(x.size, np.float32) if weight_C is None else weight_C
        bias_C = np.zeros(x.size, np.float32) if bias_C is None else bias_C
        assert x.size == y.size == len(weight_C) == len(bias_C)
        places = (weight_C.ctypes.data, x.size, y.address, y.step, _bits(eps), bias_C.ctypes.data)
        self._by_rows(walk.LAYER_NORM, x, *places)
        self._held += [x, weight_C, bias_C, y]

    def product(self, x: Rows, matrix: Matrix, y: Rows, plus: Rows | None = None) -> None:
        """y = x Wᵀ + b + plus, which may be y itself."""
        at = 0
        if matrix.of_bytes:
            scales = self.scratch("scales", 1)
            assert scales.step == SCALE_STEP
            at = scales.address
            numbers = self.scratch(f"bytes of {x.size}", -(-x.size // FOLD) * FOLD, np.uint8)
            to = (numbers.address, numbers.step, scales.address, scales.step)
            self._by_rows(walk.QUANTIZE, x, x.size, *to, LEVELS, ZERO, _bits(_LEAST_SCALE))
            self._held.append(x)
            x = numbers
            if self._stored is _FLOAT:
                self._stored = _HALF
        self._operations.append(matrix.product(x, at, y, plus))
        self._held += [x, matrix, y, plus]

    def silu_and_mul(self, x: Rows, y: Rows) -> None:
        """silu(gate) · up of [gate, up] side by side"""
        assert x.size == 2 * y.size
        self._by_rows(walk.SILU_AND_MUL, x, y.size, y.address, y.step)
        self._held += [x, y]

    def activate(self, name: str, x: Rows, y: Rows) -> None:
        """y = relu(x) or gelu(x), which may be x itself."""
        assert x.size == y.size
        self._by_rows({"relu": walk.RELU, "gelu": walk.GELU}[name], x, x.size, y.address, y.step)
        self._held += [x, y]

    def write(self, qkv: Rows, num_heads: int, kv_2PKSD: np.ndarray) -> None:
        """Keys and values of [T, A, D] go to their slots."""
        self.rotate_and_write(qkv, num_heads, kv_2PKSD, turns=False)

    def rotate_and_write(
        self,
        qkv: Rows,
        num_heads: int,
        kv_2PKSD: np.ndarray,
        norms: tuple[F32, F32] | None = None,
        eps: float = 0.0,
        turns: bool = True,
    ) -> None:
        """Queries and keys of [T, A, D] are normed, if there are weights for them, and turned, in their place; keys and values
        go to their slots."""
        _, _, kv_heads, block, size = kv_2PKSD.shape
        assert qkv.size == (num_heads + 2 * kv_heads) * size
        keys, values = (half.ctypes.data for half in kv_2PKSD)
        weights = (0, 0) if norms is None else tuple(weight.ctypes.data for weight in norms)
        shape = (num_heads, kv_heads, size, block)
        self._by_rows(walk.ROTATE_AND_WRITE, qkv, *shape, keys, values, *weights, _bits(eps), int(turns))
        self._held += [qkv, kv_2PKSD, norms]
        self._stored = kv_2PKSD.reshape(-1)[:1]

    def attend(self, qkv: Rows, num_heads: int, kv_2PKSD: np.ndarray, scale: float, y: Rows) -> None:
        """Each query over what it sees of the cache, float32 or the bits of bfloat16."""
        _, blocks, kv_heads, block, size = kv_2PKSD.shape
        assert y.size == num_heads * size and kv_2PKSD.flags.c_contiguous
        keys, values = (half.ctypes.data for half in kv_2PKSD)
        shape = (num_heads, kv_heads, size, block)
        operation = [walk.ATTEND, qkv.address, qkv.step, *shape, keys, values, blocks, y.address, y.step, _bits(scale)]
        self._append(operation, 1)
        self._held += [qkv, kv_2PKSD, y]
        self._heads, self._stored = max(self._heads, num_heads), kv_2PKSD.reshape(-1)[:1]

    def _by_rows(self, kind: int, x: Rows, *more: int) -> None:
        self._append([kind, x.address, x.step, *more], max(1, _NUMBERS // x.size))

    def _append(self, operation: list[int], rows: int) -> None:
        """An operation whose parts are so many rows."""
        self._operations.append([*operation, *[0] * (walk.COLUMNS - 1 - len(operation)), rows])

    # -------------------------------------------------------------------------------------------------------------- run

    def run(self, rows: int, queries: Queries = _NONE) -> None:
        """Computes them all, on as many threads as torch has."""
        assert 0 < rows <= self.capacity
        if self._written is None:
            self._written = np.zeros((len(self._operations), walk.COLUMNS), np.int64)
            for row, operation in zip(self._written, self._operations, strict=True):
                row[: len(operation)] = operation
        counters = np.zeros((len(self._written), walk.COUNTERS), np.int64)
        arguments = (self._written, counters, rows, queries.cos_TD, queries.sin_TD, queries.slots_T, queries.tables_TW)
        compute = walk.WALKS[self._stored.dtype]
        longest = -(-int(queries.lengths_T.max()) // LANES) * LANES

        def prepare() -> Callable[[], None]:
            scratch = np.empty((self._heads, longest), np.float32), np.empty(walk.WIDE_KEYS, np.float32)
            return lambda: compute(*arguments, queries.lengths_T, *scratch, self._stored)

        threads.together(prepare)


def _bits(number: float) -> int:
    """Of the float32 number."""
    return int(np.float32(number).view(np.int32))
