"""`python -m bench.cpu_limits`: the limits of this machine's CPU, measured in a few seconds, as one line of JSON.

A process of its own, so that who asks keeps its memory and its threads to itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

from bench.cpu_bounds import Limits

_SIDE = 2048  # of square matrices: 16 MiB in float32
_READ = 64 << 20  # float32 values: 256 MiB, beyond every cache
_REPEATS = 8


def measured() -> Limits:
    """By another process."""
    done = subprocess.run([sys.executable, "-m", "bench.cpu_limits"], stdout=subprocess.PIPE, text=True, check=True)
    return Limits(**json.loads(done.stdout))


def best(limits: list[Limits]) -> Limits:
    """The most that was seen of each."""
    return Limits(*(max(getattr(seen, name) for seen in limits) for name in Limits.__dataclass_fields__))


def _measure() -> Limits:
    import torch

    from worker.layers import products

    a, b, out = (torch.randn(_SIDE, _SIDE) for _ in range(3))
    small, other = (torch.randint(-127, 128, (_SIDE, _SIDE), dtype=torch.int8) for _ in range(2))
    values = torch.randn(_READ)
    matrix, vector = values.view(-1, 8192), torch.randn(8192)
    product = 2 * _SIDE**3
    # No way of multiplying or reading is the fastest on every machine: MKL does with half of what an AMD has, oneDNN does not.
    ways: list[Callable[[], object]] = [lambda: torch.mm(a, b, out=out)]
    if products.can_pack(torch.float32):
        packed = products.PackedProduct(b, None)
        ways.append(lambda: packed(a))
    reads = (lambda: values.sum(), lambda: torch.dot(values, values), lambda: torch.mv(matrix, vector), lambda: values.max())
    return Limits(
        fp32=product / min(_least_seconds(multiply) for multiply in ways),
        int8=product / _least_seconds(lambda: torch._int_mm(small, other)),
        bandwidth=_READ * 4 / min(_least_seconds(read) for read in reads),
    )


def _least_seconds(work: Callable[[], object]) -> float:
    """The best of some, after one to warm up."""
    work()
    took = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return min(took)


if __name__ == "__main__":
    print(json.dumps(asdict(_measure())))
