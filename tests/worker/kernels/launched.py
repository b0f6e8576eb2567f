"""Which binaries launches look for in Triton's cache, and which offline compilation puts there: for one attention step of
Llama-3-8B's shape on sm_90, with nothing launched. Prints the two sets of keys.

    python -m tests.worker.kernels.launched

A process of its own: Triton believes in a GPU here.
"""

from __future__ import annotations

import os
from typing import Any

import msgspec
import numpy as np
import torch

os.environ.pop("TRITON_INTERPRET", None)


def main() -> None:
    from triton.runtime import driver

    from worker.attention.base import AttentionInputs
    from worker.attention.triton_paged import AttentionPlan, AttentionShape, attend
    from worker.kernels import block_copy, merge_splits, paged_attention
    from worker.kernels.heuristics import Gpu
    from worker.kernels.offline import SM_90, binary_of
    from worker.kernels.variants import variants

    class Driver:
        """Of a GPU that is not there."""

        def get_current_target(self) -> Any:
            return SM_90

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    driver.set_active(Driver())
    launched: list[str] = []

    def watch(kernel: Any) -> None:
        run = kernel.run

        def compiled_only(*args: Any, **kwargs: Any) -> None:
            launched.append(run(*args, **{**kwargs, "warmup": True}).hash)

        kernel.run = compiled_only

    kernels = (
        paged_attention.paged_attention_kernel,
        merge_splits.merge_splits_kernel,
        block_copy.copy_blocks_kernel,
        block_copy.gather_blocks_kernel,
        block_copy.scatter_blocks_kernel,
    )
    for kernel in kernels:
        watch(kernel)

    gpu = Gpu("cuda", 90, 132)
    shape = AttentionShape(32, 8, 128, torch.bfloat16, torch.device("cpu"), gpu)
    qkv = torch.zeros(2100, 48, 128, dtype=torch.bfloat16)
    kv_layer = torch.zeros(2, 5, 8, 16, 128, dtype=torch.bfloat16)
    for query_lens, context in (([1, 2099], 5000), ([1] * 40, 100), ([200], 301)):
        query_start = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
        context_lens = np.full(len(query_lens), context, np.int32)
        tables = np.zeros((len(query_lens), 1 + context // 16), np.int32)
        tokens = int(query_start[-1])
        inputs = AttentionInputs.of(query_start, context_lens, tables, np.zeros(tokens, np.int64))
        q_THD = qkv[:tokens, :32]
        out = torch.empty(q_THD.shape, dtype=q_THD.dtype)
        attend(q_THD, kv_layer, inputs, AttentionPlan.of(query_start, context_lens, shape), 0.1, out)
    mover, ids = block_copy.BlockMover([kv_layer]), torch.zeros(3, dtype=torch.int32)
    stage = torch.zeros(3, 1, 2, *kv_layer.shape[2:], dtype=kv_layer.dtype)
    mover.copy(ids, ids)
    mover.gather(ids, stage)
    mover.scatter(stage, ids)

    offline = {}
    for row in variants(gpu):
        if row.kernel in kernels and row.name.endswith(("llama-3-8b", "blocks")):
            sizes = (row.signature, row.constexprs, row.num_warps, row.num_stages)
            offline[binary_of(row.kernel, *sizes, SM_90).hash] = row.name
    print(msgspec.json.encode({"launched": launched, "offline": offline}).decode())


if __name__ == "__main__":
    main()
