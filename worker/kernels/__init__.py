"""The operations of a step as Triton kernels, one file each: formula, kernel, launch function. For GPUs; on CPU tensors they
run in Triton's interpreter, for tests. Tensors in, tensors out: no sequences, no plan, no model.

`load` is called once by a worker on a GPU. It is what imports triton, and what puts the launch functions here, where layers
find them; until then nothing fits.

Nothing is tuned at run time: a kernel's constants follow from shapes by a line of arithmetic beside its launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_loaded = False
_anywhere = False  # CPU tensors fit too


def load(anywhere: bool = False) -> str:
    """What was loaded, in words; empty: no triton here. anywhere: for tensors on a CPU too, as under TRITON_INTERPRET=1."""
    global _loaded, _anywhere
    # A submodule that is imported takes its name here; these lines then give the name to its function.
    global add_layer_norm, add_rms_norm, layer_norm, log_sum_exp, plain_layer_norm, rms_norm, silu_and_mul
    global norm_rotate_and_write, rotate_and_write, write_kv
    try:
        import triton
    except ImportError:
        return ""
    from worker.kernels.layer_norm import add_layer_norm, layer_norm, plain_layer_norm
    from worker.kernels.rms_norm import add_rms_norm, rms_norm
    from worker.kernels.sampling.log_sum_exp import log_sum_exp
    from worker.kernels.silu_and_mul import silu_and_mul
    from worker.kernels.write_kv import norm_rotate_and_write, rotate_and_write, write_kv

    interpreted = bool(triton.knobs.runtime.interpret)
    _loaded, _anywhere = True, anywhere or interpreted
    if interpreted:
        from worker.kernels.interpreter import repair

        repair()
    return f"triton {triton.__version__}" + (", interpreted" if interpreted else "")


def unload() -> None:
    global _loaded
    _loaded = False


def is_loaded() -> bool:
    return _loaded


def fits(x: Tensor) -> bool:
    """Whether the kernels can be run over it."""
    return (
        _loaded
        and (x.is_cuda or (_anywhere and x.device.type == "cpu"))
        and x.dtype in DTYPES
        and x.stride(-1) == 1
        and x.numel() > 0
    )
