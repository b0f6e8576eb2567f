"""`python -m worker.gpu.precompile --model DIR`: fills Triton's cache (TRITON_CACHE_DIR) with every kernel that a worker with
this model will launch, on a machine without a GPU: while an image is built, say.

It is the worker's own start that runs here, on CPU tensors, with one layer of random weights of the model's shape; where a
kernel would be launched it is compiled for the GPU instead. So what is compiled is what will be looked for.

With --stubs the cache also holds the C that Triton compiles when it first launches a kernel, so that the worker's machine needs
no compiler; this one needs it, and something called libcuda.so.1 in TRITON_LIBCUDA_PATH and LD_LIBRARY_PATH to link with.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from worker.config import DTYPES, ConfigError, WorkerConfig
from worker.model_config import ModelError

# Multiprocessors by compute capability.
SMS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 170}
_ROWS = 256  # of a step whose contexts are not divided among programs


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported, which is below
    try:
        with tempfile.TemporaryDirectory() as folder:
            names = compile_all(_one_layer(Path(options.model), Path(folder)), options)
    except (ConfigError, ModelError) as error:
        print(f"precompile: {error}", file=sys.stderr)
        return 1
    print(f"{len(names)} kernels for sm_{options.capability}: {', '.join(sorted(names))}")
    return 0


def compile_all(model_dir: Path, options: argparse.Namespace) -> set[str]:
    """The names of the kernels that were compiled, or found in the cache."""
    import numpy as np
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from worker import kernels
    from worker.attention import triton_paged
    from worker.gpu.blocks import DeviceBlocks
    from worker.gpu.executor import GpuExecutor
    from worker.kernels.heuristics import Gpu
    from worker.loading import load

    class Driver:
        """Of a GPU that is not there."""

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", options.capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    names: set[str] = set()
    launch = JITFunction.run
    pretended = Driver()
    make_stub = _stub_maker(pretended) if options.stubs else None

    def only_compile(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        names.add(kernel.__name__)
        compiled = launch(kernel, *args, **(kwargs | {"warmup": True}))
        if make_stub is not None:
            make_stub(compiled)
        return compiled

    driver.set_active(pretended)
    JITFunction.run = only_compile
    torch.empty = _zeroed(torch.empty)  # what kernels would have written is read as ids, too
    triton_paged.pretend(Gpu("cuda", options.capability, SMS.get(options.capability, SMS[90])))
    kernels.load(anywhere=True)
    config = WorkerConfig(
        connect="ipc://nobody",
        model=str(model_dir),
        device="cpu",
        dtype=options.dtype,
        weights="random:0",
        max_model_len=options.max_model_len,
        block_size=options.block_size,
        num_blocks=_blocks(options),
        swap_gib=1.0,
        max_batch_rows=_ROWS,
        max_step_tokens=options.max_step_tokens,
    )
    loaded = load(config, model_dir)
    moves, one = DeviceBlocks(loaded.kv), np.ones(1, np.int32)
    moves.swap_out(one, one)
    moves.swap_in(one, one)
    GpuExecutor(loaded, sizes=(1, _ROWS)).close()
    return names


def _stub_maker(pretended: Any) -> Callable[[Any], None]:
    """What builds a compiled kernel's launcher, where Triton will look for it. What all of them share is built at once; since
    Triton 3.7 that is everything."""
    from triton.backends.nvidia import driver

    sys.setdlopenflags(os.RTLD_LAZY)  # it is loaded, too, and the driver's functions are not there
    pretended.utils = driver.CudaUtils()

    def make(compiled: Any) -> None:
        driver.CudaLauncher(compiled.src, compiled.metadata)

    return make


def _zeroed(make: Callable[..., Any]) -> Callable[..., Any]:
    def zeroed(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        return made if made.is_meta else made.zero_()

    return zeroed


def _one_layer(model_dir: Path, folder: Path) -> Path:
    """A model of the same shape, but for its number of layers, which no kernel knows."""
    try:
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{model_dir / 'config.json'}: {error}") from None
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}), encoding="utf-8")
    return folder


def _blocks(options: argparse.Namespace) -> int:
    """Of a cache that holds one sequence."""
    return -(-int(options.max_model_len) // int(options.block_size)) + 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m worker.gpu.precompile", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="a directory with the model's config.json")
    add("--capability", type=int, default=90, metavar="N", help="compute capability, as 80, 90, 100 [90: H100, H200]")
    add("--dtype", default="bfloat16", choices=[name for name in DTYPES if name != "auto"])
    add("--block-size", type=int, default=16, metavar="N", help="as the worker's [16]")
    add("--max-model-len", type=int, default=4096, metavar="N", help="any that the model can; no kernel knows it [4096]")
    add("--max-step-tokens", type=int, default=2048, metavar="N", help="of a long chunk [2048]")
    add("--stubs", action="store_true", help="also build what Triton would compile with a C compiler at the first launch")
    return parser


if __name__ == "__main__":
    sys.exit(main())
