"""What it runs on, and what that can do at best: the limits that all other figures are held against."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator
from importlib.metadata import version

import torch

from bench.gpu.check import Check, Figure
from bench.gpu.timing import seconds

COPY, PRODUCT = "copy bandwidth, read + written", "bf16 matrix product"  # whoever started the part looks for these


def run(check: Check) -> None:
    check.attempt("environment", lambda: _versions(check), 0)
    check.attempt(COPY, lambda: _bandwidth(check), 5)
    check.attempt(PRODUCT, lambda: _product(check), 5)


def _versions(check: Check) -> Iterator[Figure]:
    names = ("torch", "triton", "transformers")
    versions = {"python": platform.python_version()} | {name: version(name) for name in names}
    about, memory = "CPU, kernels interpreted", 0.0
    if check.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about = f"{properties.name}, {properties.multi_processor_count} SMs, driver {_driver()}, CUDA {torch.version.cuda}"
        memory = properties.total_memory / 2**30
    words = ", ".join(f"{name} {number}" for name, number in versions.items())
    yield Figure("", about, memory, "GiB", note=words, more={"versions": versions})


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _bandwidth(check: Check) -> Iterator[Figure]:
    count = 1 << (12 if check.tiny else 30)  # 4 GiB
    source = torch.empty(count, dtype=torch.int32, device=check.device).random_()
    target = torch.empty_like(source)
    took = seconds(check.device, lambda _: target.copy_(source), 4)
    yield Figure("", COPY, 2 * source.nbytes / took, "B/s", "H200: 4.8 TB/s stated, 4.3 seen")


def _product(check: Check) -> Iterator[Figure]:
    size = 64 if check.tiny else 8192
    a, b = (torch.randn(size, size, device=check.device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    took = seconds(check.device, lambda _: torch.mm(a, b, out=out), 20)
    yield Figure("", PRODUCT, 2 * size**3 / took, "FLOP/s", "H200: 989 TFLOP/s stated, 790 seen")
