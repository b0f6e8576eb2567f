"""Products with a matrix in tiles of 32 outputs: one instruction multiplies an input of a row with half of a line of a tile.

The sums of up to ROWS rows of a tile stay in registers while the tile passes by once, in the order in which it lies in memory,
and lines are asked for ahead of their turn: so reading and multiplying overlap, and a product takes the longer of the two.
Written in LLVM's own language, because numba's loops leave the sums in memory. Each sum is added up over its inputs from the
first to the last, whatever other rows there are: a row's bits do not depend on its company.

Legend: T rows, I inputs, O outputs, L lines of a tile: I, or ⌈I / 4⌉ with four inputs' integers to a number.
"""

from __future__ import annotations

import math
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import DTypeLike

LINE = 64  # bytes, of the cache and of a register
LANES = 16  # float32 numbers, or 32-bit sums, of a register
FOLD = 4  # 8-bit inputs that an instruction multiplies and adds up
_SUMS = 24  # registers for sums, of 32
WIDE = (
    2  # registers that hold a line of a tile: with one, loads are as many as multiplications, and at times take twice as long
)
ROWS = _SUMS // WIDE  # at a time

SCALE_STEP = LINE  # bytes from the scale of a row to that of the next
_AHEAD = 64 * LINE  # bytes; 0, 1 and 2 KiB take longer
_INTO_FIRST_LEVEL = 3  # locality, as llvm.prefetch counts

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
_FLOATS, _INTS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_POINTER = ir.IntType(8).as_pointer()


def _features() -> dict[str, bool]:
    try:
        return dict(llvm.get_host_cpu_features())
    except RuntimeError:  # of a processor that LLVM does not know
        return {}


HAS_FLOATS = bool(_features().get("avx512f"))
HAS_BYTES = HAS_FLOATS and bool(_features().get("avx512vnni"))


def packed(matrix_OI: np.ndarray) -> np.ndarray:
    """float32 or int8 in tiles, zeros where the last one has no output: [⌈O / 32⌉, L, 32] or [⌈O / 32⌉, L, 32, 4]. Tile t holds
    the outputs from 32 t on; a line, one input (or four) of all of them."""
    outputs, inputs = matrix_OI.shape
    fold, wide = FOLD if matrix_OI.dtype == np.int8 else 1, WIDE * LANES
    tiles, lines = -(-outputs // wide), -(-inputs // fold)
    packed_TLOF = aligned((tiles, lines, wide, fold), matrix_OI.dtype)
    if outputs % wide or inputs % fold:
        packed_TLOF[:] = 0
    for tile in range(tiles):
        part = matrix_OI[tile * wide : (tile + 1) * wide]
        for f in range(fold):
            column = part[:, f::fold]
            packed_TLOF[tile, : column.shape[1], : len(part), f] = column.T
    return packed_TLOF if fold > 1 else packed_TLOF[..., 0]


def aligned(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Memory whose lines begin where the processor's do."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + LINE, np.uint8)
    begin = -memory.ctypes.data % LINE
    return memory[begin : begin + size].view(dtype).reshape(shape)


# ------------------------------------------------------------------------------------------------------------ instructions


def _lanes(builder: Any, number: Any, vector: Any) -> Any:
    """The number in every lane."""
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, number, _I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))


def _load(builder: Any, address: Any, of: Any, align: int) -> Any:
    loaded = builder.load(builder.inttoptr(address, of.as_pointer()))
    loaded.align = align
    return loaded


def _vectors(builder: Any, address: Any, of: Any, count: int) -> list[Any]:
    return [_load(builder, builder.add(address, _I64(i * LINE)), of, LINE) for i in range(count)]


def _row(builder: Any, address: Any, step: Any, row: int) -> Any:
    return builder.add(address, builder.mul(step, _I64(row)))


class _Function:
    """LLVM's functions that panels call."""

    def __init__(self, builder: Any) -> None:
        self._builder, self._module = builder, builder.module

    def _call(self, name: str, result: Any, *arguments: Any) -> Any:
        function = ir.FunctionType(result, [argument.type for argument in arguments])
        return self._builder.call(cgutils.get_or_insert_function(self._module, function, name), arguments)

    def multiply_and_add(self, x: Any, w: Any, total: Any) -> Any:
        return self._call("llvm.fma.v16f32", _FLOATS, x, w, total)

    def multiply_and_add_bytes(self, x: Any, w: Any, total: Any) -> Any:
        """To each lane the sum of four products of an unsigned byte of x and a signed one of w."""
        return self._call("llvm.x86.avx512.vpdpbusd.512", _INTS, total, x, w)

    def prefetch(self, address: Any) -> None:
        at = self._builder.inttoptr(address, _POINTER)
        self._call("llvm.prefetch.p0i8", ir.VoidType(), at, _I32(0), _I32(_INTO_FIRST_LEVEL), _I32(1))

    def load_stored(self, address: Any, of_halves: bool) -> Any:
        """A register of the cache's numbers, float32 or bfloat16."""
        if not of_halves:
            return _load(self._builder, address, _FLOATS, 4)
        halves = _load(self._builder, address, ir.VectorType(ir.IntType(16), LANES), 2)
        bits = self._builder.shl(self._builder.zext(halves, _INTS), ir.Constant(_INTS, [16] * LANES))
        return self._builder.bitcast(bits, _FLOATS)

    def load_some(self, address: Any, some: Any) -> Any:
        at = self._builder.inttoptr(address, _FLOATS.as_pointer())
        return self._call("llvm.masked.load.v16f32.p0v16f32", _FLOATS, at, _I32(4), some, ir.Constant(_FLOATS, [0.0] * LANES))

    def store_some(self, vector: Any, address: Any, some: Any) -> None:
        at = self._builder.inttoptr(address, _FLOATS.as_pointer())
        self._call("llvm.masked.store.v16f32.p0v16f32", ir.VoidType(), vector, at, _I32(4), some)


def _sums(
    builder: Any,
    function: _Function,
    x_rows: list[Any],
    line_at: Any,
    lines: Any,
    begins: list[list[Any]],
    bytes_: bool = False,
) -> list[list[Any]]:
    """The loop over lines: for each row, Σ of its inputs times their lines, on top of `begins`, [rows][registers].
    line_at(i): the registers of line i."""
    number, vector = (_I32, _INTS) if bytes_ else (_F32, _FLOATS)
    add = function.multiply_and_add_bytes if bytes_ else function.multiply_and_add
    before = builder.block
    loop, after = builder.append_basic_block("lines"), builder.append_basic_block("end_of_tile")
    builder.branch(loop)
    builder.position_at_end(loop)
    line = builder.phi(_I64)
    totals = [[builder.phi(vector) for _ in of_row] for of_row in begins]
    w = line_at(line)
    offset = builder.mul(line, _I64(4))
    sums = []
    for x_row, of_row in zip(x_rows, totals, strict=True):
        inputs = _lanes(builder, _load(builder, builder.add(x_row, offset), number, 1 if bytes_ else 4), vector)
        sums.append([add(inputs, part, total) for part, total in zip(w, of_row, strict=True)])
    following = builder.add(line, _I64(1))
    line.add_incoming(_I64(0), before)
    line.add_incoming(following, loop)
    for of_row, of_row_after, of_row_before in zip(totals, sums, begins, strict=True):
        for total, total_after, begin in zip(of_row, of_row_after, of_row_before, strict=True):
            total.add_incoming(begin, before)
            total.add_incoming(total_after, loop)
    builder.cbranch(builder.icmp_signed("<", following, lines), loop, after)
    builder.position_at_end(after)
    return sums


def _tile_lines(builder: Any, function: _Function, tile: Any, of: Any) -> Any:
    """Of a matrix; lines further on are asked for."""

    def line_at(line: Any) -> list[Any]:
        at = builder.add(tile, builder.mul(line, _I64(WIDE * LINE)))
        for i in range(WIDE):
            function.prefetch(builder.add(at, _I64(i * LINE + _AHEAD)))
        return _vectors(builder, at, of, WIDE)

    return line_at


def _for_each_number_of_rows(builder: Any, rows: Any, most: int, panel: Any) -> None:
    """panel(n) for n = rows, of which it knows 1 to `most`."""
    end = builder.append_basic_block("end")
    switch = builder.switch(rows, end)
    for n in range(1, most + 1):
        switch.add_case(_I64(n), builder.append_basic_block(f"rows_{n}"))
        builder.position_at_end(switch.cases[-1][1])
        panel(n)
        builder.branch(end)
    builder.position_at_end(end)


def _first_lanes(builder: Any, count: Any) -> list[Any]:
    """1 in the first `count` lanes of WIDE registers, else 0."""
    last = _lanes(builder, builder.trunc(count, _I32), _INTS)
    numbers = [ir.Constant(_INTS, list(range(i * LANES, (i + 1) * LANES))) for i in range(WIDE)]
    return [builder.icmp_signed("<", these, last) for these in numbers]


@intrinsic
def multiply_panel(  # type: ignore[no-untyped-def]
    typingctx, rows, x, x_step, tile, lines, bias, plus, plus_step, plus_outputs, y, y_step, outputs
):
    """y = x W + bias + plus for `rows` rows, at most ROWS, and the first `outputs` of one tile; plus of the first
    `plus_outputs`. All are int64: addresses of float32 numbers (those of a row without gaps; tile and bias aligned to lines),
    and steps in bytes from a row to the next."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, x, x_step, tile, lines, bias, plus, plus_step, plus_outputs, y, y_step, outputs = arguments
        function = _Function(builder)
        to_add, to_store = (_first_lanes(builder, count) for count in (plus_outputs, outputs))

        def panel(n: int) -> None:
            line_at = _tile_lines(builder, function, tile, _FLOATS)
            begins = [_vectors(builder, bias, _FLOATS, WIDE)] * n
            x_rows = [_row(builder, x, x_step, row) for row in range(n)]
            for row, totals in enumerate(_sums(builder, function, x_rows, line_at, lines, begins)):
                from_row, to_row = _row(builder, plus, plus_step, row), _row(builder, y, y_step, row)
                for i, total in enumerate(totals):
                    more = function.load_some(builder.add(from_row, _I64(i * LINE)), to_add[i])
                    function.store_some(builder.fadd(total, more), builder.add(to_row, _I64(i * LINE)), to_store[i])

        _for_each_number_of_rows(builder, rows, ROWS, panel)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 12), code


@intrinsic
def multiply_panel_of_bytes(  # type: ignore[no-untyped-def]
    typingctx, rows, x, x_step, x_scales, tile, lines, begins, w_scales, bias, plus, plus_step, plus_outputs, y, y_step, outputs
):
    """y = (begin + x W) · scale of the row · scale of the output + bias + plus, x unsigned and W signed bytes, whose products
    are added up exactly; `begins`, int32, make up for x's zero. The scales are float32, those of rows SCALE_STEP apart."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, x, x_step, x_scales, tile, lines, begins, w_scales, bias, plus, plus_step, plus_outputs, *to = arguments
        y, y_step, outputs = to
        function = _Function(builder)
        to_add, to_store = (_first_lanes(builder, count) for count in (plus_outputs, outputs))

        def panel(n: int) -> None:
            line_at = _tile_lines(builder, function, tile, _INTS)
            begin = [_vectors(builder, begins, _INTS, WIDE)] * n
            x_rows = [_row(builder, x, x_step, row) for row in range(n)]
            sums = _sums(builder, function, x_rows, line_at, lines, begin, bytes_=True)
            of_outputs, biases = (_vectors(builder, address, _FLOATS, WIDE) for address in (w_scales, bias))
            for row, totals in enumerate(sums):
                of_row = _lanes(builder, _load(builder, builder.add(x_scales, _I64(SCALE_STEP * row)), _F32, 4), _FLOATS)
                from_row, to_row = _row(builder, plus, plus_step, row), _row(builder, y, y_step, row)
                for i, total in enumerate(totals):
                    more = function.load_some(builder.add(from_row, _I64(i * LINE)), to_add[i])
                    scale = builder.fmul(of_outputs[i], of_row)
                    scaled = function.multiply_and_add(builder.sitofp(total, _FLOATS), scale, biases[i])
                    function.store_some(builder.fadd(scaled, more), builder.add(to_row, _I64(i * LINE)), to_store[i])

        _for_each_number_of_rows(builder, rows, ROWS, panel)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 16), code


# ------------------------------------------------------------------------------------------------------------- attention


def _added_up(builder: Any, vectors: list[Any]) -> Any:
    """The sum of the lanes of each of sixteen vectors, in one."""
    part = LANES
    while len(vectors) > 1:
        first = [lane for begin in range(0, 2 * LANES, part) for lane in range(begin, begin + part // 2)]
        lower, upper = (ir.Constant(_INTS, [lane + shift for lane in first]) for shift in (0, part // 2))
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [builder.fadd(builder.shuffle_vector(a, b, lower), builder.shuffle_vector(a, b, upper)) for a, b in pairs]
        part //= 2
    return vectors[0]


def _of_halves(stored: Any) -> bool:
    return bool(stored.dtype == types.uint16)


@intrinsic
def score_panel(typingctx, q, size, keys, scale, scores):  # type: ignore[no-untyped-def]
    """scale · q · k of one query and sixteen keys that lie one behind the other, each of `size` numbers, a multiple of 16."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        q, size, keys, scale, scores = arguments
        function = _Function(builder)
        before = builder.block
        loop, after = builder.append_basic_block("part_of_keys"), builder.append_basic_block("end_of_keys")
        builder.branch(loop)
        builder.position_at_end(loop)
        at, totals = builder.phi(_I64), [builder.phi(_FLOATS) for _ in range(LANES)]
        part_of_q = _load(builder, builder.add(q, builder.mul(at, _I64(4))), _FLOATS, 4)
        first = builder.add(keys, builder.mul(at, _I64(4)))
        key_step = builder.mul(size, _I64(4))
        following = builder.add(at, _I64(LANES))
        at.add_incoming(_I64(0), before)
        at.add_incoming(following, loop)
        sums = []
        for number, total in enumerate(totals):
            part_of_key = _load(builder, _row(builder, first, key_step, number), _FLOATS, 4)
            sums.append(function.multiply_and_add(part_of_q, part_of_key, total))
            total.add_incoming(ir.Constant(_FLOATS, [0.0] * LANES), before)
            total.add_incoming(sums[-1], loop)
        builder.cbranch(builder.icmp_signed("<", following, size), loop, after)
        builder.position_at_end(after)
        scaled = builder.fmul(_added_up(builder, sums), _lanes(builder, scale, _FLOATS))
        builder.store(scaled, builder.inttoptr(scores, _FLOATS.as_pointer())).align = 4
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.float32, types.int64), code


@intrinsic
def widen(typingctx, halves, count, floats):  # type: ignore[no-untyped-def]
    """`count` numbers of bfloat16, a multiple of 16, as float32; two addresses."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        halves, count, floats = arguments
        before, loop, after = builder.block, builder.append_basic_block("numbers"), builder.append_basic_block("wide")
        builder.branch(loop)
        builder.position_at_end(loop)
        at = builder.phi(_I64)
        wide = _Function(builder).load_stored(builder.add(halves, builder.mul(at, _I64(2))), of_halves=True)
        to = builder.add(floats, builder.mul(at, _I64(4)))
        builder.store(wide, builder.inttoptr(to, _FLOATS.as_pointer())).align = 4
        following = builder.add(at, _I64(LANES))
        at.add_incoming(_I64(0), before)
        at.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), code


@intrinsic
def prefetch_lines(typingctx, address, size):  # type: ignore[no-untyped-def]
    """Asks for `size` bytes, at least one."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, size = arguments
        before, loop, after = builder.block, builder.append_basic_block("lines"), builder.append_basic_block("asked_for")
        builder.branch(loop)
        builder.position_at_end(loop)
        at = builder.phi(_I64)
        _Function(builder).prefetch(builder.add(address, at))
        following = builder.add(at, _I64(LINE))
        at.add_incoming(_I64(0), before)
        at.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, size), loop, after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), code


QUERIES = 6  # that are computed together, of one key-value head
WIDE_VALUES = 4  # registers of a value that are


def _weigh(wide: int) -> Any:
    @intrinsic
    def weigh_panel(typingctx, queries, weights, weight_step, values, size, count, out, out_step, stored):  # type: ignore[no-untyped-def]
        """out += Σ weight · value for `queries` queries, at most QUERIES, and `count` values that lie one behind the other,
        each of `size` numbers, of which the first 16 · `wide`."""
        of_halves = _of_halves(stored)

        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            queries, weights, weight_step, values, size, count, out, out_step, _ = arguments
            function, width = _Function(builder), 2 if of_halves else 4
            value_step = builder.mul(size, _I64(width))

            def line_at(number: Any) -> list[Any]:
                at = builder.add(values, builder.mul(value_step, number))
                return [function.load_stored(builder.add(at, _I64(i * LANES * width)), of_halves) for i in range(wide)]

            def panel(n: int) -> None:
                rows = [_row(builder, weights, weight_step, row) for row in range(n)]
                places = [
                    [builder.add(_row(builder, out, out_step, row), _I64(i * LINE)) for i in range(wide)] for row in range(n)
                ]
                begins = [[_load(builder, place, _FLOATS, 4) for place in of_row] for of_row in places]
                for of_row, totals in zip(places, _sums(builder, function, rows, line_at, count, begins), strict=True):
                    for place, total in zip(of_row, totals, strict=True):
                        builder.store(total, builder.inttoptr(place, _FLOATS.as_pointer())).align = 4

            _for_each_number_of_rows(builder, queries, QUERIES, panel)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8, stored), code

    return weigh_panel


weigh_panel, weigh_wide_panel = _weigh(1), _weigh(WIDE_VALUES)
