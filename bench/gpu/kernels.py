"""The kernels one by one, against what the GPU's memory or its matrix units allow: random data, buffers taken in turn that the
L2 cache does not hold together.

Legend: B rows, C tokens of context each, T tokens, H query heads, K key-value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.gpu.check import Check, Figure
from bench.gpu.timing import seconds

_BLOCK = 16  # tokens
_IN_TURN = 256 << 20  # bytes: five times an H200's L2 cache
_HEADS = {"GQA 32/8/128": (32, 8, 128), "MHA 40/40/128": (40, 40, 128)}
_MOST_CONTEXT = 8192  # of a captured decode step: how many splits there are depends on it


def run(check: Check) -> None:
    from worker import kernels

    kernels.load()
    for name in _HEADS:
        for rows, context in ((64, 1024), (16, 1024), (8, 8192), (256, 1024))[: 1 if check.tiny else None]:
            what = f"paged decode attention, {name}, {rows} × {context}"
            check.attempt(what, lambda: _decode(check, what, name, rows, context), 2)  # noqa: B023
    for tokens in (4096, 16384)[: 1 if check.tiny else None]:
        check.attempt(f"paged prefill, {tokens}", lambda: _prefill(check, tokens), 4)  # noqa: B023
    for what, measure in _OTHERS.items():
        check.attempt(what, lambda: measure(check, what), 2)  # noqa: B023


def _dtype(check: Check) -> torch.dtype:
    return torch.float32 if check.device == "cpu" else torch.bfloat16


def _random(check: Check, *shape: int) -> Tensor:
    return torch.randn(shape, device=check.device, dtype=_dtype(check))


def _copies(check: Check, num_bytes: int) -> int:
    return 1 if check.tiny else max(1, min(64, math.ceil(_IN_TURN / num_bytes)))


def _share(check: Check, target: str, what: str, num_bytes: float, took: float, goal: float | None = None) -> Figure:
    rate = num_bytes / took
    limit = f"copy {check.limits.bandwidth / 1e12:.3g} TB/s"
    note = f"{took * 1e6:.1f} µs, {rate / 1e12:.3g} TB/s"
    return Figure(target, f"{what}: share of copy bandwidth", rate / check.limits.bandwidth, "", limit, goal, note=note)


# ------------------------------------------------------------------------------------------------------------- attention


def _paged(check: Check, rows: int, context: int, queries: int, kv_heads: int, dim: int) -> tuple[Any, Tensor]:
    """Inputs of `rows` rows, the last `queries` tokens of `context` each, on shuffled blocks; and a layer's cache."""
    from worker.attention.base import AttentionInputs

    blocks = -(-context // _BLOCK)
    tables = 1 + np.random.default_rng(0).permutation(rows * blocks).astype(np.int32).reshape(rows, blocks)
    query_start = np.arange(rows + 1, dtype=np.int32) * queries
    positions = np.arange(context - queries, context)
    slots = (tables[:, positions // _BLOCK].astype(np.int64) * _BLOCK + positions % _BLOCK).reshape(-1)
    lens = np.full(rows, context, np.int32)
    inputs = AttentionInputs.of(query_start, lens, tables, slots, check.device)
    return inputs, _random(check, 2, 1 + rows * blocks, kv_heads, _BLOCK, dim)


def _decode(check: Check, what: str, name: str, rows: int, context: int) -> Iterator[Figure]:
    from worker.attention.triton_paged import AttentionPlan, AttentionShape, attend

    heads, kv_heads, dim = (4, 2, 32) if check.tiny else _HEADS[name]
    rows, context = (2, 40) if check.tiny else (rows, context)
    inputs, layer = _paged(check, rows, context, 1, kv_heads, dim)
    copies = _copies(check, layer.nbytes)
    layers = [layer, *(layer.clone() for _ in range(copies - 1))]
    q = _random(check, rows, heads, dim)
    out = torch.empty_like(q)
    plan = AttentionPlan.of_decode(rows, 64 if check.tiny else _MOST_CONTEXT, AttentionShape.of(q, layer))
    took = seconds(check.device, lambda i: attend(q, layers[i % copies], inputs, plan, dim**-0.5, out), max(4, copies))
    read = 2 * rows * context * kv_heads * dim * q.itemsize + q.nbytes + out.nbytes
    yield _share(check, "G9", what, read, took, 0.88)


def _prefill(check: Check, tokens: int) -> Iterator[Figure]:
    from worker.attention.triton_paged import AttentionPlan, AttentionShape, attend

    heads, kv_heads, dim = (4, 2, 32) if check.tiny else _HEADS["GQA 32/8/128"]
    tokens = 24 if check.tiny else tokens
    inputs, layer = _paged(check, 1, tokens, tokens, kv_heads, dim)
    q = _random(check, tokens, heads, dim)
    out = torch.empty_like(q)
    plan = AttentionPlan.of(inputs.query_start_cpu, inputs.context_lens_cpu, AttentionShape.of(q, layer))
    ours = seconds(check.device, lambda _: attend(q, layer, inputs, plan, dim**-0.5, out), 4)
    flops = 2 * tokens * (tokens + 1) * heads * dim
    rate = f"{flops / ours / 1e12:.0f} TFLOP/s of {check.limits.peak / 1e12:.0f}"
    table = inputs.block_tables[0].long()
    k, v = (half[table].transpose(1, 2).reshape(-1, kv_heads, dim)[:tokens] for half in layer)
    exact = _contiguous(q, k, v, heads // kv_heads)()
    error = float((out.float() - exact[0].transpose(0, 1).float()).abs().max())
    backends = {"cuDNN": (SDPBackend.CUDNN_ATTENTION, 0.75), "FlashAttention-2": (SDPBackend.FLASH_ATTENTION, 1.0)}
    if check.device == "cpu":
        backends = {"torch's loops": (SDPBackend.MATH, 1.0)}
    missing = []
    for name, (backend, goal) in backends.items():
        attention = _contiguous(q, k, v, heads // kv_heads)
        try:
            with sdpa_kernel(backend):
                theirs = seconds(check.device, lambda _: attention(), 4)  # noqa: B023
        except RuntimeError as error_there:
            missing.append(f"{name}: {error_there}")
            if "captur" in str(error_there):  # torch is left in the middle of it: no more figures from this process
                break
            continue
        note = f"{ours * 1e6:.0f} µs, {rate}; theirs {theirs * 1e6:.0f} µs; largest difference of an output {error:.2g}"
        what = f"paged prefill, {tokens} tokens, GQA: speed ÷ {name} on contiguous input"
        yield Figure("G10", what, theirs / ours, "", "1.0", goal, note=note)
    if missing:
        raise RuntimeError("; ".join(missing))


def _contiguous(q: Tensor, k: Tensor, v: Tensor, group: int) -> Callable[[], Tensor]:
    """torch's attention over the same numbers, its keys and values once for each query head: the fastest it takes."""
    q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    return lambda: scaled_dot_product_attention(q, k, v, is_causal=True)


# ------------------------------------------------------------------------------------------------------------ the others


def _rows(check: Check) -> int:
    return 3 if check.tiny else 8192


def _add_rms_norm(check: Check, what: str) -> Iterator[Figure]:
    from worker.kernels.rms_norm import add_rms_norm

    size = 64 if check.tiny else 4096
    xs = [_random(check, _rows(check), size) for _ in range(4)]
    weight = _random(check, size)
    took = seconds(check.device, lambda i: add_rms_norm(xs[i % 2], xs[2 + i % 2], weight, 1e-5), 8)
    yield _share(check, "", what, 4 * xs[0].nbytes, took)


def _rotate_and_write(check: Check, what: str) -> Iterator[Figure]:
    from worker.kernels.write_kv import rotate_and_write

    heads, kv_heads, dim = (4, 2, 32) if check.tiny else _HEADS["GQA 32/8/128"]
    tokens = _rows(check)
    inputs, layer = _paged(check, 1, tokens, tokens, kv_heads, dim)
    qkvs = [_random(check, tokens, heads + 2 * kv_heads, dim) for _ in range(2)]
    cos, sin = (torch.randn(tokens, 1, dim // 2, device=check.device) for _ in range(2))
    took = seconds(check.device, lambda i: rotate_and_write(qkvs[i % 2], heads, cos, sin, layer, inputs.slot_mapping), 8)
    yield _share(check, "", what, 2 * qkvs[0].nbytes + cos.nbytes + sin.nbytes, took)


def _silu_and_mul(check: Check, what: str) -> Iterator[Figure]:
    from worker.kernels.silu_and_mul import silu_and_mul

    x = _random(check, _rows(check), 2 * (96 if check.tiny else 14336))
    took = seconds(check.device, lambda _: silu_and_mul(x), 4)
    yield _share(check, "", what, 1.5 * x.nbytes, took)


def _sampler(check: Check, what: str) -> Iterator[Figure]:
    from worker.kernels.sampling.sample import DrawColumns, sample

    rows, vocab = (2, 300) if check.tiny else (256, 128_256)
    # Peaked as a trained model's: some 30 tokens share the most of the mass. And flat: the whole vocabulary does.
    for name, temperature, top_p, spread in (
        ("greedy", 0.0, 1.0, 3.0),
        ("temperature", 1.0, 1.0, 3.0),
        ("temperature and top-p 0.95, peaked", 1.0, 0.95, 3.0),
        ("temperature and top-p 0.95, flat", 1.0, 0.95, 1.0),
    ):
        logits = [spread * torch.randn(rows, vocab, device=check.device) for _ in range(2)]

        def column(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((rows,), value, dtype=dtype, device=check.device)

        slots = torch.arange(rows, dtype=torch.int32, device=check.device)
        columns = DrawColumns(
            temperature=column(temperature, torch.float32),
            top_k=column(0, torch.int32),
            top_p=column(top_p, torch.float32),
            min_p=column(0, torch.float32),
            seed=column(5, torch.int64),
            position=slots,
            output_index=column(0, torch.int32),
        )
        last = torch.zeros(rows, dtype=torch.int32, device=check.device)
        took = seconds(check.device, lambda i: sample(logits[i % 2], columns, slots, last), 4)  # noqa: B023
        yield _share(check, "", f"{what}, {rows} rows, {name}, read once", logits[0].nbytes, took)


_OTHERS: dict[str, Callable[[Check, str], Iterator[Figure]]] = {
    "RMSNorm with residual": _add_rms_norm,
    "rotation and KV write": _rotate_and_write,
    "SiLU·mul": _silu_and_mul,
    "sampler": _sampler,
}
