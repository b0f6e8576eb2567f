"""From Python functions that describe a loop to machine code for this processor (LLVM, through llvmlite).

A kernel works on numbered tasks. Its threads are those of torch's own OpenMP pool, which are awake already; each takes the
next task that nobody has taken yet, so a thread that the system keeps from its processor holds nobody up. What a task computes
does not depend on who computes it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

I1, I8, I32, I64, F16, F32 = ir.IntType(1), ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.HalfType(), ir.FloatType()
I16 = ir.IntType(16)
VOID = ir.VoidType()

# Sums may be taken in another order, and a product and a sum be one instruction. NaN and infinities must come through.
FREE = ("reassoc", "contract")


class Builder(ir.IRBuilder):
    """llvmlite's builder, with loops and with vectors of `width` float32 values."""

    def __init__(self, block: ir.Block, width: int) -> None:
        super().__init__(block)
        self.width = width
        self.vector = ir.VectorType(F32, width)

    # ------------------------------------------------------------------------------------------------------------ numbers

    def plus(self, *terms: Any) -> Any:
        """Of int64 values and Python integers."""
        total = _int64(terms[0])
        for term in terms[1:]:
            total = self.add(total, _int64(term))
        return total

    def times(self, a: Any, b: Any) -> Any:
        return self.mul(_int64(a), _int64(b))

    def least(self, a: Any, b: Any) -> Any:
        a, b = _int64(a), _int64(b)
        return self.select(self.icmp_signed("<", a, b), a, b)

    # -------------------------------------------------------------------------------------------------------------- loops

    def fold(
        self, count: Any, first: Sequence[Any], body: Callable[[Any, list[Any]], Sequence[Any]], step: int = 1
    ) -> list[Any]:
        """values = first; for i in range(0, count, step): values = body(i, values). Returns the values."""
        before = self.block
        head, inside, after = (self.append_basic_block(name) for name in ("head", "inside", "after"))
        self.branch(head)
        self.position_at_end(head)
        i = self.phi(I64)
        i.add_incoming(I64(0), before)
        values = [self.phi(value.type) for value in first]
        for phi, value in zip(values, first, strict=True):
            phi.add_incoming(value, before)
        self.cbranch(self.icmp_signed("<", i, _int64(count)), inside, after)
        self.position_at_end(inside)
        following = body(i, list(values))
        i.add_incoming(self.add(i, I64(step)), self.block)
        for phi, value in zip(values, following, strict=True):
            phi.add_incoming(value, self.block)
        self.branch(head)
        self.position_at_end(after)
        return values

    @contextmanager
    def loop(self, count: Any, step: int = 1) -> Iterator[Any]:
        """for i in range(0, count, step)."""
        before = self.block
        head, inside, after = (self.append_basic_block(name) for name in ("head", "inside", "after"))
        self.branch(head)
        self.position_at_end(head)
        i = self.phi(I64)
        i.add_incoming(I64(0), before)
        self.cbranch(self.icmp_signed("<", i, _int64(count)), inside, after)
        self.position_at_end(inside)
        yield i
        i.add_incoming(self.add(i, I64(step)), self.block)
        self.branch(head)
        self.position_at_end(after)

    # ------------------------------------------------------------------------------------------------------------- memory

    def argument(self, arguments: Any, index: int) -> Any:
        return self.load(self.gep(arguments, [I64(index)]))

    def pointer(self, address: Any, kind: ir.Type) -> Any:
        return self.inttoptr(address, kind.as_pointer())

    def at(self, pointer: Any, index: Any) -> Any:
        return self.gep(pointer, [_int64(index)])

    def vload(self, pointer: Any, index: Any) -> Any:
        """`width` values of float32, float16 or bfloat16 (as 16-bit integers), as float32."""
        kind = pointer.type.pointee
        loaded = self.load(self.bitcast(self.at(pointer, index), ir.VectorType(kind, self.width).as_pointer()))
        loaded.align = 4 if kind == F32 else 2
        if kind == F32:
            return loaded
        if kind == F16:
            return self.fpext(loaded, self.vector)
        wide = ir.VectorType(I32, self.width)
        return self.bitcast(self.shl(self.zext(loaded, wide), self.integers(16)), self.vector)

    def vstore(self, value: Any, pointer: Any, index: Any) -> None:
        stored = self.store(value, self.bitcast(self.at(pointer, index), self.vector.as_pointer()))
        stored.align = 4

    def prefetch(self, pointer: Any, index: Any) -> None:
        """To the second level of the cache: the first level's few outstanding misses would be the bound."""
        place = self.bitcast(self.at(pointer, index), I8.as_pointer())
        self.intrinsic("llvm.prefetch.p0", VOID, [place, I32(0), I32(2), I32(1)])

    # ------------------------------------------------------------------------------------------------------------ vectors

    def intrinsic(self, name: str, result: ir.Type, operands: Sequence[Any], flags: Sequence[str] = ()) -> Any:
        known = self.module.globals.get(name)
        function = known or ir.Function(self.module, ir.FunctionType(result, [x.type for x in operands]), name)
        return self.call(function, operands, fastmath=flags)

    def constant(self, value: float) -> Any:
        return ir.Constant(self.vector, [value] * self.width)

    def integers(self, value: int) -> Any:
        return ir.Constant(ir.VectorType(I32, self.width), [value] * self.width)

    def splat(self, value: Any) -> Any:
        one = self.insert_element(ir.Constant(self.vector, ir.Undefined), value, I32(0))
        return self.shuffle_vector(one, ir.Constant(self.vector, ir.Undefined), self.integers(0))

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        return self.fadd(self.fmul(a, b, flags=FREE), c, flags=FREE)

    def total(self, value: Any) -> Any:
        return self.intrinsic(f"llvm.vector.reduce.fadd.v{self.width}f32", F32, [F32(0.0), value], FREE)

    def larger(self, a: Any, b: Any) -> Any:
        """b if it is larger, else a: a NaN in b is passed over."""
        return self.select(self.fcmp_ordered(">", b, a), b, a)

    def largest(self, value: Any) -> Any:
        return self.intrinsic(f"llvm.vector.reduce.fmax.v{self.width}f32", F32, [value])

    def exp2(self, x: Any) -> Any:
        """2^x of a vector of values of 0 at most, to 2e-7 of it; 0 from −126 down, NaN of NaN.

        2^x = 2^k · e^(r ln 2), k the nearest integer and |r| ≤ 1/2; the exponential is the polynomial of Cephes' expf."""
        w = self.width
        tiny = self.fcmp_ordered("<", x, self.constant(-126.0))
        clipped = self.select(tiny, self.constant(-126.0), x)
        k = self.intrinsic(f"llvm.rint.v{w}f32", self.vector, [clipped])
        r = self.fmul(self.fsub(clipped, k), self.constant(0.6931471805599453))
        series = self.constant(1.9875691500e-4)
        for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            series = self.multiply_add(series, r, self.constant(coefficient))
        power = self.fadd(self.multiply_add(series, self.fmul(r, r), r), self.constant(1.0))
        whole = self.intrinsic(f"llvm.fptosi.sat.v{w}i32.v{w}f32", ir.VectorType(I32, w), [k])
        scale = self.bitcast(self.shl(self.add(whole, self.integers(127)), self.integers(23)), self.vector)
        return self.select(tiny, self.constant(0.0), self.fmul(power, scale))


def _int64(value: Any) -> Any:
    return I64(value) if isinstance(value, int) else value


# ----------------------------------------------------------------------------------------------------------------- kernels

Task = Callable[[Builder, Any, Any], None]  # (builder, pointer to the arguments, number of the task)


class Kernel:
    """run(arguments, tasks, threads): all tasks 0 .. tasks − 1, in at most that many threads. `arguments` is the address of an
    array of int64, which the task knows how to read."""

    def __init__(self, name: str, task: Task) -> None:
        module = ir.Module(name)
        _emit_run(module, _emit_worker(module, _emit_task(module, task)))
        compiled = llvm.parse_assembly(str(module))
        compiled.verify()
        machine = _target_machine()  # one for each engine, which takes it over
        passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
        passes.getModulePassManager().run(compiled, passes)
        self._engine = llvm.create_mcjit_compiler(compiled, machine)
        self._engine.finalize_object()
        kind = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
        self.run = kind(self._engine.get_function_address("run"))


def _emit_task(module: ir.Module, task: Task) -> ir.Function:
    function = ir.Function(module, ir.FunctionType(VOID, [I64.as_pointer(), I64]), "task")
    function.linkage = "internal"
    builder = Builder(function.append_basic_block(), vector_width())
    task(builder, *function.args)
    builder.ret_void()
    return function


def _emit_worker(module: ir.Module, task: ir.Function) -> ir.Function:
    """void worker(int64 *job): while ((i = job[TAKEN]++) < job[TASKS]) task(job[ARGUMENTS], i)."""
    function = ir.Function(module, ir.FunctionType(VOID, [I64.as_pointer()]), "worker")
    builder = Builder(function.append_basic_block(), vector_width())
    (job,) = function.args
    count, arguments = builder.argument(job, 1), builder.pointer(builder.argument(job, 2), I64)
    head, inside, after = (builder.append_basic_block(name) for name in ("head", "inside", "after"))
    builder.branch(head)
    builder.position_at_end(head)
    number = builder.atomic_rmw("add", job, I64(1), "monotonic")
    builder.cbranch(builder.icmp_signed("<", number, count), inside, after)
    builder.position_at_end(inside)
    builder.call(task, [arguments, number])
    builder.branch(head)
    builder.position_at_end(after)
    builder.ret_void()
    return function


def _emit_run(module: ir.Module, worker: ir.Function) -> None:
    """worker(job) in so many threads at once."""
    function = ir.Function(module, ir.FunctionType(VOID, [I64, I64, I64]), "run")
    builder = Builder(function.append_basic_block(), vector_width())
    arguments, tasks, threads = function.args
    job = builder.alloca(I64, 3)
    for number, value in enumerate((I64(0), tasks, arguments)):
        builder.store(value, builder.at(job, number))
    if _openmp():
        threads = builder.least(threads, tasks)
        kind = ir.FunctionType(VOID, [worker.type, job.type, I32, I32])
        parallel = ir.Function(module, kind, "GOMP_parallel")
        with builder.if_else(builder.icmp_signed(">", threads, I64(1))) as (several, one):
            with several:
                builder.call(parallel, [worker, job, builder.trunc(threads, I32), I32(0)])
            with one:
                builder.call(worker, [job])
    else:
        builder.call(worker, [job])
    builder.ret_void()


@cache
def _openmp() -> bool:
    """Whether torch's threads can be had: GNU's OpenMP, or LLVM's or Intel's, which answer to the same name."""
    try:
        address = ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError):
        return False
    llvm.add_symbol("GOMP_parallel", address)
    return True


# --------------------------------------------------------------------------------------------------------------- processor


def _target_machine() -> llvm.TargetMachine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    features["prefer-256-bit"] = False  # or vectors of 512 bits would be cut in two on some processors
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=features.flatten(), opt=3, jit=True)


@cache
def vector_width() -> int:
    """float32 values of a vector register."""
    features = llvm.get_host_cpu_features()
    return 16 if features.get("avx512f") else 8 if features.get("avx2") else 4


@cache
def num_accumulators() -> int:
    """Vectors that a loop can keep in registers, others beside them."""
    features = llvm.get_host_cpu_features()
    return 24 if features.get("avx512f") or features.get("neon") else 10
