"""Triton's interpreter, made to run with this numpy and with bfloat16. Nothing here concerns a GPU.

It takes a loop's bounds by int(array of one number), which numpy refuses since 2.4; and it multiplies matrices of bfloat16 as
if the bits were whole numbers. And a function that a kernel calls patches the whole language again, on top, each time it is
called, which doubles the time of a kernel of small functions: here the language is patched once, by the kernel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.language import core  # noqa: F401 (patched where it is seen from, see _patch_language)
from triton.runtime import interpreter

_patch_lang = interpreter._patch_lang
_patch_lang_tensor = interpreter._patch_lang_tensor
_create_dot = interpreter.InterpreterBuilder.create_dot


def repair() -> None:
    interpreter._patch_lang = _patch_language
    interpreter.InterpretedFunction.__call__ = _call
    interpreter._patch_lang_tensor = _patch
    interpreter.InterpreterBuilder.create_dot = _dot


def _patch(tensor: Any, scope: Any) -> None:
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _patch_language(kernel: Any) -> Any:
    """The modules that this one sees, which are all that kernels and the library's functions see."""
    return _patch_lang(_patch_language)


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self.rewrite()(*args, **kwargs)


def _dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    return _create_dot(self, _widened(a), _widened(b), *rest)


def _widened(x: Any) -> Any:
    if x.dtype.scalar is not tl.bfloat16:
        return x
    return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
