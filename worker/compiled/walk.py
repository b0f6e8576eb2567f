"""A step's operations, one after the other, by several threads at once: each operation is divided into parts, whoever is free
takes the next one, and all meet before the next operation begins.

A step of few rows is thousands of parts of microseconds: waking a thread takes longer than such a part. So the threads spin for
as long as one step takes, and leave the processor to others when they have spun for a while; between steps they sleep.

An operation is a row of the program, int64 numbers: which one, addresses, sizes in numbers, steps in bytes from a row to the
next. What each is, `program` writes; what they compute of a row is in rows.py.

Legend: T rows, H query heads, K key-value heads, D head size, S tokens of a block, W blocks of the widest table, P operations.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, float32, int64, types, uint16, void
from numba.core import cgutils
from numba.extending import intrinsic

from worker.compiled.panels import (
    LANES,
    LINE,
    QUERIES,
    ROWS,
    SCALE_STEP,
    WIDE,
    WIDE_VALUES,
    multiply_panel,
    multiply_panel_of_bytes,
    prefetch_lines,
    score_panel,
    weigh_panel,
    weigh_wide_panel,
    widen,
)
from worker.compiled.rows import (
    LOG2_E,
    Loop,
    attend_head,
    compiled,
    gelu_of,
    inlined,
    layer_norm_of,
    put_all,
    quantize,
    relu_of,
    rms_norm_of,
    silu_and_mul_of,
    softmax,
    turn,
)

RMS_NORM, LAYER_NORM, PRODUCT, PRODUCT_OF_BYTES, QUANTIZE, ROTATE_AND_WRITE, ATTEND, SILU_AND_MUL, RELU, GELU = range(10)
COLUMNS = 20  # of an operation
COUNTERS = 16  # numbers of an operation, of which two are used: each on a line of its own
_TAKEN, _DONE = 0, 8

_SOON = 1 << 14  # bytes between the keys or values that attention reads and those that it asks for
_FEW = 4  # rows that threads share; of fewer, they share the heads
_WIDEST = 256  # numbers of a head that are computed in panels
WIDE_KEYS = LANES * _WIDEST  # numbers of a panel's keys
_SPINS = 2000  # some 50 µs

_sched_yield = types.ExternalFunction("sched_yield", types.int32())


@intrinsic
def _increment(typingctx, address):  # type: ignore[no-untyped-def]
    """The number at the address, which is one more afterwards."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", number, ir.IntType(64)(1), "acq_rel")

    return types.int64(types.int64), code


@intrinsic
def _read(typingctx, address):  # type: ignore[no-untyped-def]
    """The number at the address, and with it all that was written before it was."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(number, "acquire", 8)

    return types.int64(types.int64), code


@intrinsic
def _pause(typingctx):  # type: ignore[no-untyped-def]
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = ir.FunctionType(ir.VoidType(), [])
        builder.call(cgutils.get_or_insert_function(builder.module, function, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), code


@intrinsic
def _pointer(typingctx, address):  # type: ignore[no-untyped-def]
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), code


@inlined
def _floats(address, count):  # type: ignore[no-untyped-def]
    return carray(_pointer(address), (count,), np.float32)


@inlined
def _float_of(bits):  # type: ignore[no-untyped-def]
    return np.int32(bits).view(np.float32)


@inlined
def _rms_norm(operation, row):  # type: ignore[no-untyped-def]
    """x, its step, weight, size, y, its step, ε"""
    size = operation[4]
    x_C, y_C = _floats(operation[1] + row * operation[2], size), _floats(operation[5] + row * operation[6], size)
    rms_norm_of(x_C, _floats(operation[3], size), _float_of(operation[7]), y_C)


@inlined
def _layer_norm(operation, row):  # type: ignore[no-untyped-def]
    """x, its step, weight, size, y, its step, ε, bias"""
    size = operation[4]
    x_C, y_C = _floats(operation[1] + row * operation[2], size), _floats(operation[5] + row * operation[6], size)
    layer_norm_of(x_C, _floats(operation[3], size), _floats(operation[8], size), _float_of(operation[7]), y_C)


@inlined
def _activate(operation, row):  # type: ignore[no-untyped-def]
    """x, its step, size, y, its step"""
    size = operation[3]
    x_F, y_F = _floats(operation[1] + row * operation[2], size), _floats(operation[4] + row * operation[5], size)
    if operation[0] == RELU:
        relu_of(x_F, y_F)
    else:
        gelu_of(x_F, y_F)


@inlined
def _quantize(operation, row):  # type: ignore[no-untyped-def]
    """x, its step, size, y, its step, scales, their step, levels, zero, least scale"""
    x_C = _floats(operation[1] + row * operation[2], operation[3])
    y_C = carray(_pointer(operation[4] + row * operation[5]), (operation[3],), np.uint8)
    levels, zero, least = np.float32(operation[8]), np.float32(operation[9]), _float_of(operation[10])
    _floats(operation[6] + row * operation[7], 1)[0] = quantize(x_C, levels, zero, least, y_C)


@inlined
def _silu_and_mul(operation, row):  # type: ignore[no-untyped-def]
    """x, its step, size of y, y, its step"""
    size, gate = operation[3], operation[1] + row * operation[2]
    silu_and_mul_of(_floats(gate, size), _floats(gate + 4 * size, size), _floats(operation[4] + row * operation[5], size))


@inlined
def _rotate_and_write(operation, row, cos_D, sin_D, slot, stored):  # type: ignore[no-untyped-def]
    """Projection, its step, H, K, D, S, keys, values, weights of the query's norm (0: none) and the key's, their ε, and
    whether to turn. All stay where they are, turned."""
    heads, kv_heads, size, block = operation[3], operation[4], operation[5], operation[6]
    of_row = operation[1] + row * operation[2]
    for h in range(heads + kv_heads):
        head_D = _floats(of_row + h * size * 4, size)
        if operation[9] != 0:
            rms_norm_of(head_D, _floats(operation[9] if h < heads else operation[10], size), _float_of(operation[11]), head_D)
        if operation[12] != 0:
            turn(head_D, cos_D, sin_D, head_D)
    for k in range(kv_heads):
        at = ((slot // block * kv_heads + k) * block + slot % block) * size * stored.itemsize
        key_D = _floats(of_row + (heads + k) * size * 4, size)
        value_D = _floats(of_row + (heads + kv_heads + k) * size * 4, size)
        put_all(key_D, carray(_pointer(operation[7] + at), (size,), stored.dtype))
        put_all(value_D, carray(_pointer(operation[8] + at), (size,), stored.dtype))


@inlined
def _attend(operation, n, heads, following, tables_TW, lengths_T, weights_HL, wide_keys, stored):  # type: ignore[no-untyped-def]
    """Projection with the queries turned, its step, H, K, D, S, keys, values, blocks of the layer, y, its step, scale. Of the
    key-value heads (first, end) of row n; `following` is (row, its first head) that comes next, row −1: none."""
    kv_heads, size, block = operation[4], operation[5], operation[6]
    if size % LANES == 0 and size <= _WIDEST and block % LANES == 0:
        next_n, next_head = following
        then = next_head, tables_TW[max(0, next_n)], lengths_T[next_n] if next_n >= 0 else 0
        _attend_in_panels(operation, n, heads, tables_TW[n], lengths_T[n], then, weights_HL, wide_keys, stored)
        return
    group, scale = operation[3] // kv_heads, _float_of(operation[12])
    shape = (operation[9], kv_heads, block, size)
    keys, values = carray(_pointer(operation[7]), shape, stored.dtype), carray(_pointer(operation[8]), shape, stored.dtype)
    q, out = operation[1] + n * operation[2], operation[10] + n * operation[11]
    for k in range(heads[0], heads[1]):
        of_group = k * group * size * 4
        q_GD = carray(_pointer(q + of_group), (group, size), np.float32)
        out_GD = carray(_pointer(out + of_group), (group, size), np.float32)
        attend_head(q_GD, keys[:, k], values[:, k], tables_TW[n], lengths_T[n], scale, weights_HL, out_GD)


@inlined
def _place(operation, first, k, table_W, at, token):  # type: ignore[no-untyped-def]
    """Where the token `at` of a sequence has its key or value; a token takes so many bytes."""
    block = operation[6]
    number = at // block
    return first + ((table_W[number] * operation[4] + k) * block + at - number * block) * token


@inlined
def _attend_in_panels(operation, n, heads, table_W, length, then, weights_HL, wide_keys, stored):  # type: ignore[no-untyped-def]
    """The same by registers, panel by panel of sixteen tokens, with the heads of a panel one after the other: so they lie in
    memory. Scores are computed of slots past the length too, and not used; values there are not read. What is needed `soon`
    tokens later is asked for meanwhile: keys, then values, then the keys of whoever is next."""
    size, block, group = operation[5], operation[6], operation[3] // operation[4]
    (first_head, end_head), (next_head, next_W, next_length) = heads, then
    row, weight_step = size * 4, weights_HL.strides[0]
    q, out = operation[1] + n * operation[2], operation[10] + n * operation[11]
    first_query, end_query = first_head * group, end_head * group
    weights = weights_HL.ctypes.data - first_query * weight_step
    in_bits = _float_of(operation[12]) * np.float32(LOG2_E)
    token, end = size * stored.itemsize, (length + LANES - 1) // LANES * LANES
    panel, to_next_head = LANES * token, block * token
    share = (panel // LINE + group - 1) // group * LINE
    soon = max(1, _SOON // ((end_head - first_head) * panel)) * LANES

    for at in range(0, length, LANES):
        keys = _place(operation, operation[7], first_head, table_W, at, token)
        ahead, asked = 0, panel
        if at + soon < end:
            ahead = _place(operation, operation[7], first_head, table_W, at + soon, token)
        elif at + soon - end < end:
            ahead = _place(operation, operation[8], first_head, table_W, at + soon - end, token)
        else:
            asked = 0
        for h in range(first_query, end_query, group):
            keys_now = keys
            if stored.itemsize == 2:
                widen(keys, LANES * size, wide_keys.ctypes.data)
                keys_now = wide_keys.ctypes.data
            part = ahead
            for g in range(h, h + group):
                if part < ahead + asked:  # all at once it would hold up what is needed now
                    prefetch_lines(part, min(share, ahead + asked - part))
                    part += share
                score_panel(q + g * row, size, keys_now, in_bits, weights + g * weight_step + at * 4)
            keys += to_next_head
            ahead += to_next_head
    for g in range(end_query - first_query):
        factor = np.float32(1) / softmax(weights_HL[g], length)
        for at in range(length):
            weights_HL[g, at] *= factor
    out_N = carray(_pointer(out + first_query * row), ((end_query - first_query) * size,), np.float32)
    for i in range(len(out_N)):
        out_N[i] = 0
    for at in range(0, length, LANES):
        ahead, asked = 0, panel
        if at + soon < end:
            ahead = _place(operation, operation[8], first_head, table_W, at + soon, token)
        elif at + soon - end < next_length:
            ahead = _place(operation, operation[7], next_head, next_W, at + soon - end, token)
        else:
            asked = 0
        values, there = _place(operation, operation[8], first_head, table_W, at, token), min(LANES, length - at)
        for h in range(first_query, end_query, group):
            if asked > 0:
                prefetch_lines(ahead, asked)
            for g in range(h, h + group, QUERIES):
                queries, of_queries, to = min(QUERIES, h + group - g), weights + g * weight_step + at * 4, out + g * row
                d = 0
                while d < size:
                    numbers, sums = values + d * stored.itemsize, to + d * 4
                    if size - d >= WIDE_VALUES * LANES:
                        weigh_wide_panel(queries, of_queries, weight_step, numbers, size, there, sums, row, stored)
                        d += WIDE_VALUES * LANES
                    else:
                        weigh_panel(queries, of_queries, weight_step, numbers, size, there, sums, row, stored)
                        d += LANES
            values += to_next_head
            ahead += to_next_head


@inlined
def _heads_each(operation, rows):  # type: ignore[no-untyped-def]
    """Key-value heads whose attention of a row is one part."""
    return operation[4] if rows >= _FEW else 1


@inlined
def _row_and_heads(operation, part, rows):  # type: ignore[no-untyped-def]
    """Those of a part of attention, the heads as (first, end)."""
    heads_each = _heads_each(operation, rows)
    ways = operation[4] // heads_each
    return part // ways, (part % ways * heads_each, (part % ways + 1) * heads_each)


@inlined
def _product_part(operation, part, rows):  # type: ignore[no-untyped-def]
    """x, its step, L, tiles, how many, tiles of a part, bias, plus (0: none), its step, y, its step, O, rows of a part; of
    bytes also scales of the rows, begins and scales of the outputs."""
    x, x_step, lines, tiles, num_tiles, each = (
        operation[1],
        operation[2],
        operation[3],
        operation[4],
        operation[5],
        operation[6],
    )
    bias, plus, plus_step, y, y_step = operation[7], operation[8], operation[9], operation[10], operation[11]
    of_bytes = operation[0] == PRODUCT_OF_BYTES
    groups = (num_tiles + each - 1) // each
    first_row, group = part // groups * operation[13], part % groups
    end_row = min(rows, first_row + operation[13])
    panels = (end_row - first_row + ROWS - 1) // ROWS
    height = (end_row - first_row + panels - 1) // panels
    if plus == 0:
        adds, plus, plus_step = 0, y, y_step
    else:
        adds = 1
    for t in range(group * each, min(num_tiles, (group + 1) * each)):
        tile, at = tiles + t * lines * LINE * WIDE, t * LINE * WIDE
        outputs = min(WIDE * LANES, operation[12] - t * WIDE * LANES)
        for row in range(first_row, end_row, height):
            count = min(height, end_row - row)
            from_x, from_plus, to_y = x + row * x_step, plus + row * plus_step + at, y + row * y_step + at
            if of_bytes:
                multiply_panel_of_bytes(
                    count,
                    from_x,
                    x_step,
                    operation[14] + row * SCALE_STEP,
                    tile,
                    lines,
                    operation[15] + at,
                    operation[16] + at,
                    bias + at,
                    from_plus,
                    plus_step,
                    adds * outputs,
                    to_y,
                    y_step,
                    outputs,
                )
            else:
                multiply_panel(
                    count, from_x, x_step, tile, lines, bias + at, from_plus, plus_step, adds * outputs, to_y, y_step, outputs
                )


@inlined
def _parts(operation, rows):  # type: ignore[no-untyped-def]
    kind = operation[0]
    if kind in (PRODUCT, PRODUCT_OF_BYTES):
        return (operation[5] + operation[6] - 1) // operation[6] * ((rows + operation[13] - 1) // operation[13])
    if kind == ATTEND:
        return rows * (operation[4] // _heads_each(operation, rows))
    return (rows + operation[COLUMNS - 1] - 1) // operation[COLUMNS - 1]


def _walk(  # type: ignore[no-untyped-def]
    program_PX, counters_PX, rows, cos_TD, sin_TD, slots_T, tables_TW, lengths_T, weights_HL, wide_keys, stored
):
    """Computes with whoever else does so with the same counters, zeros at first; returns when all is done. `stored`: any
    numbers of the kind that the cache holds, float32 or the bits of bfloat16; weights_HL and wide_keys
    [WIDE_KEYS]: this thread's own."""
    for p in range(len(program_PX)):
        operation = program_PX[p]
        kind, parts, each = operation[0], _parts(operation, rows), operation[COLUMNS - 1]
        taken, done = counters_PX[p, _TAKEN:].ctypes.data, counters_PX[p, _DONE:].ctypes.data
        part = _increment(taken)
        while part < parts:
            following = _increment(taken) if kind == ATTEND else 0  # known beforehand, so that memory can be asked for it
            if kind in (PRODUCT, PRODUCT_OF_BYTES):
                _product_part(operation, part, rows)
            elif kind == ATTEND:
                row, heads = _row_and_heads(operation, part, rows)
                next_row, (next_head, _) = _row_and_heads(operation, following, rows)
                then = next_row if following < parts else -1, next_head
                _attend(operation, row, heads, then, tables_TW, lengths_T, weights_HL, wide_keys, stored)
            else:
                for row in range(part * each, min(rows, (part + 1) * each)):
                    if kind == RMS_NORM:
                        _rms_norm(operation, row)
                    elif kind == LAYER_NORM:
                        _layer_norm(operation, row)
                    elif kind in (RELU, GELU):
                        _activate(operation, row)
                    elif kind == QUANTIZE:
                        _quantize(operation, row)
                    elif kind == SILU_AND_MUL:
                        _silu_and_mul(operation, row)
                    else:
                        _rotate_and_write(operation, row, cos_TD[row], sin_TD[row], slots_T[row], stored)
            _increment(done)
            part = following if kind == ATTEND else _increment(taken)
        spins = 0
        while _read(done) < parts:
            spins += 1
            _pause()
            if spins > _SPINS:
                _sched_yield()


def _walk_over(cache: Any) -> Loop:
    tables, rows = (int64[:, ::1], int64[:, ::1]), (float32[:, ::1], float32[:, ::1])
    return compiled(void(*tables, int64, *rows, int64[::1], int64[:, ::1], int64[::1], rows[0], float32[::1], cache[::1]))(
        _walk
    )


WALKS = {np.dtype(np.float32): _walk_over(float32), np.dtype(np.uint16): _walk_over(uint16)}  # by what the cache holds
