"""Where Triton's interpreter differs from a GPU."""

from __future__ import annotations

import torch


def as_stored(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 as a kernel stores it: rounded to nearest, but the interpreter (on CPU tensors) cuts bfloat16 off."""
    if dtype is torch.bfloat16 and x.device.type == "cpu":
        return (x.contiguous().view(torch.int32) & -65536).view(torch.float32).bfloat16()
    return x.to(dtype)
