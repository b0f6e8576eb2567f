"""The kernels run on the GPU where there is one, else in Triton's interpreter (tests/conftest.py turns it on)."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

from worker import compiled, kernels

if find_spec("triton") is None:
    collect_ignore_glob = ["*"]


@pytest.fixture(autouse=True)
def loaded_kernels() -> Iterator[None]:
    compiled.unload()
    kernels.load()
    yield
    kernels.unload()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
