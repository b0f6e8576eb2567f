"""What every kernel variant takes on every GPU, by offline compilation; resources.json holds what is agreed on.

    python -m tests.worker.kernels.resources            compiles all and writes the table
    python -m tests.worker.kernels.resources TARGET …   prints what they take now

A process of its own: tests run Triton in its interpreter, which compiles nothing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec

from worker.kernels.heuristics import Gpu

os.environ.pop("TRITON_INTERPRET", None)
PATH = Path(__file__).with_name("resources.json")
GPUS = {
    "sm_80": Gpu("cuda", 80, 108),
    "sm_90": Gpu("cuda", 90, 132),
    "sm_100": Gpu("cuda", 100, 148),
    "gfx942": Gpu("hip", 94, 304),
}


def main(targets: list[str]) -> None:
    import triton

    from worker.kernels.offline import TARGETS, Compiled, compile_variant
    from worker.kernels.variants import variants

    taken: dict[str, dict[str, Compiled]] = {}
    for target in targets or GPUS:
        for row in variants(GPUS[target]):
            sizes = (row.signature, row.constexprs, row.num_warps, row.num_stages)
            taken.setdefault(target, {})[row.name] = compile_variant(row.kernel, *sizes, TARGETS[target])
    said = msgspec.json.encode({"triton": triton.__version__, "targets": taken})
    if targets:
        print(said.decode())
    else:
        PATH.write_bytes(_readable(msgspec.json.format(said, indent=2)))


def _readable(text: bytes) -> bytes:
    """One variant a line."""
    return text.replace(b"{\n        ", b"{").replace(b",\n        ", b", ").replace(b"\n      }", b"}") + b"\n"


if __name__ == "__main__":
    main(sys.argv[1:])
