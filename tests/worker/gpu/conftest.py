"""The GPU's side runs on the GPU where there is one, else on the CPU, its kernels in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from worker import compiled, kernels


@pytest.fixture(autouse=True, scope="module")
def loaded_kernels() -> Iterator[None]:
    pytest.importorskip("triton")
    compiled.unload()
    kernels.load()
    yield
    kernels.unload()
