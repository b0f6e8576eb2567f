"""Loops for the CPU that torch has no operator for, written as LLVM code and compiled when the worker starts. An extra: where
llvmlite is not installed, or this processor is none that it knows, the worker computes the same out of torch operations.

Here lives code that makes code. It knows addresses and sizes; no tensor, no block table, no model.
"""

from __future__ import annotations

import importlib.util


def available() -> bool:
    return importlib.util.find_spec("llvmlite") is not None
