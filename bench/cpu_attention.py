"""`python -m bench.cpu_attention`: target C4. The worker's attention over scattered blocks against torch's over contiguous keys
and values, both for one token a row; as a line of JSON. Heads of the 135M shape (9 query, 3 key-value, 64 wide), blocks of 16.

A process of its own, as bench.cpu_limits is. What is worked out once a step (the plan) is shared by 30 layers; it counts as one
thirtieth.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

_LAYERS, _HEADS, _KV_HEADS, _HEAD, _BLOCK = 30, 9, 3, 64, 16
_CASES = ((64, 128), (16, 512), (4, 2048), (1, 512))  # rows, tokens of context
_REPEATS = 7


def measured() -> dict[str, float]:
    """By another process: contiguous ÷ paged time, by case."""
    done = subprocess.run([sys.executable, "-m", "bench.cpu_attention"], stdout=subprocess.PIPE, text=True, check=True)
    return {name: float(value) for name, value in json.loads(done.stdout).items()}


def _measure() -> dict[str, float]:
    return {f"{rows} rows of {context}": _ratio(rows, context) for rows, context in _CASES}


def _ratio(rows: int, context: int) -> float:
    """Keys and values of every layer are others, so none is in a cache that the last layer filled."""
    import torch
    import torch.nn.functional as F

    from worker import compiled
    from worker.attention.base import AttentionInputs
    from worker.attention.cpu import CpuAttention, queries_of

    width = -(-context // _BLOCK)
    blocks = 1 + rows * width
    shuffled = 1 + np.random.default_rng(0).permutation(rows * width).reshape(rows, width).astype(np.int32)
    layers = [torch.randn(2, blocks, _KV_HEADS, _BLOCK, _HEAD) for _ in range(_LAYERS)]
    together = [torch.randn(2, rows, _KV_HEADS, context, _HEAD) for _ in range(_LAYERS)]
    q_RHD, attention = torch.randn(rows, _HEADS, _HEAD), CpuAttention()
    slots = shuffled[:, -1].astype(np.int64) * _BLOCK + (context - 1) % _BLOCK

    def paged() -> None:
        starts, lengths = np.arange(rows + 1, dtype=np.int32), np.full(rows, context, np.int32)
        inputs = AttentionInputs.of(starts, lengths, shuffled, slots)
        for layer in layers:
            attention.attend(q_RHD, layer, inputs, _HEAD**-0.5)

    def recorded() -> None:
        starts, lengths = np.arange(rows + 1, dtype=np.int32), np.full(rows, context, np.int32)
        queries = queries_of(np.arange(rows), AttentionInputs.of(starts, lengths, shuffled, slots))
        compiled.run(program, turns, torch.from_numpy(slots), queries.tables[queries.row], queries.length)

    if compiled.has_programs():
        program, turns = compiled.new_program(rows), (torch.ones(rows, 1, _HEAD // 2),) * 2
        qkv, out = (program.scratch(name, heads * _HEAD) for name, heads in (("qkv", _HEADS + 2 * _KV_HEADS), ("out", _HEADS)))
        for layer in layers:
            program.attend(qkv, _HEADS, compiled.array(layer), _HEAD**-0.5, out)

    def contiguous() -> None:  # the query heads of a group read their key-value head together
        for keys, values in together:
            F.scaled_dot_product_attention(q_RHD.view(rows, _KV_HEADS, -1, _HEAD), keys, values)

    with torch.inference_mode():
        return _least_seconds(contiguous) / _least_seconds(recorded if compiled.has_programs() else paged)


def _least_seconds(work: Callable[[], object]) -> float:
    work()
    took = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return min(took)


if __name__ == "__main__":
    from worker import compiled, openmp

    openmp.set_defaults()
    compiled.load()
    print(json.dumps(_measure()))
