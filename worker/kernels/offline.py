"""Compiles a kernel for a GPU that is not there, and reads from the binary what it takes: registers, spills, shared memory.

No kernel is known here, and no device is needed. The signature and attributes are those that a launch with the variant's
arguments would give, so that what is compiled here is what runs. Needs triton imported without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

SM_80, SM_90, SM_100 = (GPUTarget("cuda", capability, 32) for capability in (80, 90, 100))
GFX942 = GPUTarget("hip", "gfx942", 64)
TARGETS = {"sm_80": SM_80, "sm_90": SM_90, "sm_100": SM_100, "gfx942": GFX942}

_ALIGNED = [["tt.divisibility", 16]]
_LISTS_CONSTEXPRS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)  # among what it says of a launch's arguments


class Compiled(msgspec.Struct, frozen=True):
    """What one variant takes on one target."""

    registers: int  # of a thread (on AMD: vector registers, accumulation registers among them)
    spills: int  # bytes of a thread's stack (on AMD: registers)
    shared: int  # bytes of a program
    narrow: int = 0  # loads of two bytes from global memory, where alignment is not known (on AMD: not counted)


def compile_variant(
    kernel: triton.JITFunction[Any],
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    num_warps: int,
    num_stages: int,
    target: GPUTarget,
) -> Compiled:
    """What binary_of(…) takes."""
    binary = binary_of(kernel, signature, constexprs, num_warps, num_stages, target)
    if target.backend == "hip":
        return _of_amdgcn(binary.asm["amdgcn"], binary.metadata.shared)
    narrow = len(re.findall(r"ld\.global[^;]*b16", binary.asm["ptx"]))
    return _of_cubin(binary.asm["cubin"], binary.metadata.shared, narrow)


def binary_of(
    kernel: triton.JITFunction[Any],
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    num_warps: int,
    num_stages: int,
    target: GPUTarget,
) -> CompiledKernel:
    """`signature`: the type of every argument that isn't in `constexprs`, as "*bf16" or "i32", and "i32:16" for a multiple of
    16 on which the kernel specializes; pointers are taken to be aligned to 16 bytes, as tensors are. On NVIDIA the binary goes
    to Triton's cache under the key by which a launch looks for it."""
    types = {name: "constexpr" if name in constexprs else signature[name] for name in kernel.arg_names}
    attributes = {}
    for parameter in kernel.params:
        type_, _, multiple = types[parameter.name].partition(":")
        types[parameter.name] = type_
        if type_ == "constexpr" and _LISTS_CONSTEXPRS:
            attributes[(parameter.num,)] = []
        if type_ in ("constexpr", "fp32") or parameter.do_not_specialize:
            continue
        is_aligned = multiple == "16" or type_.startswith("*")
        attributes[(parameter.num,)] = _ALIGNED if is_aligned and not parameter.do_not_specialize_on_alignment else []
    source = ASTSource(kernel, types, dict(constexprs), attributes)
    return triton.compile(source, target=target, options={"num_warps": num_warps, "num_stages": num_stages})


def _of_cubin(cubin: bytes, shared: int, narrow: int) -> Compiled:
    """By the cuobjdump that comes with triton: ` Function f:  REG:62 STACK:0 SHARED:0 LOCAL:0 …`, bytes of spilled registers
    in STACK."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", said)[1]) for word in ("REG", "STACK"))  # type: ignore[index]
    return Compiled(registers, stack, shared, narrow)


def _of_amdgcn(assembly: str, shared: int) -> Compiled:
    registers, spills = (int(re.search(rf"\.{key}:\s*(\d+)", assembly)[1]) for key in ("vgpr_count", "vgpr_spill_count"))  # type: ignore[index]
    return Compiled(registers, spills, shared)
