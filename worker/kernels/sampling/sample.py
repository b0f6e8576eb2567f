"""The launch of the sampler's kernels, one behind the other; nothing between them waits or reads on the host."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from worker.kernels.sampling.best import best_kernel
from worker.kernels.sampling.draw import draw_kernel, finish_kernel
from worker.kernels.sampling.filters import NEAR, SEARCH_BLOCK, filter_kernel, gather_kernel
from worker.kernels.sampling.order import BLOCK, PARTS, parts_of


@dataclass(frozen=True, slots=True)
class DrawColumns:
    """How N rows are drawn, as worker.sampling_columns.SamplingRows, on the device."""

    temperature: Tensor  # float32; below 1e-5: greedy
    top_k: Tensor  # int32; 0 = all
    top_p: Tensor  # float32
    min_p: Tensor  # float32
    seed: Tensor  # int64, the bits of an unsigned one
    position: Tensor  # int64 (or int32), of the token to be drawn
    output_index: Tensor  # int32

    def check(self, num_rows: int) -> None:
        for field in fields(self):
            column = getattr(self, field.name)
            assert column.shape == (num_rows,) and column.is_contiguous()
        assert self.temperature.dtype == self.top_p.dtype == self.min_p.dtype == torch.float32
        assert self.top_k.dtype == self.output_index.dtype == torch.int32 and self.seed.dtype == torch.int64


def sample(logits_NV: Tensor, columns: DrawColumns, slots_N: Tensor, last_tokens_S: Tensor) -> Tensor:
    """The tokens, int32 [N], which are also written to last_tokens[slots]. Logits may be half precision and are not changed.
    Rows of padding may share a slot that nobody reads."""
    num_rows, vocab = logits_NV.shape
    assert num_rows > 0 and 0 < vocab < 1 << 19 and logits_NV.stride(1) == 1
    assert slots_N.shape == (num_rows,) and slots_N.dtype == last_tokens_S.dtype == torch.int32
    assert slots_N.is_contiguous() and last_tokens_S.is_contiguous()
    columns.check(num_rows)
    num_parts, blocks_of_part = parts_of(num_rows, vocab)
    of_parts = torch.empty((4, num_rows, PARTS), dtype=torch.int64, device=logits_NV.device)
    best, drawn, mass, near_mass = of_parts.unbind()
    num_near, edge, tokens = torch.empty((3, num_rows), dtype=torch.int32, device=logits_NV.device).unbind()
    near = torch.empty((num_rows, NEAR), dtype=logits_NV.dtype, device=logits_NV.device)

    shape, stride = (num_rows, num_parts), logits_NV.stride(0)
    best_kernel[shape](logits_NV, best, num_near, vocab, stride, blocks_of_part, BLOCK=BLOCK, PARTS=PARTS, num_warps=4)
    gather_kernel[shape](
        logits_NV, best, columns.temperature, columns.top_k, columns.top_p, mass, near_mass, num_near, near,
        vocab, stride, num_parts, blocks_of_part, BLOCK=BLOCK, PARTS=PARTS, NEAR=NEAR, num_warps=8,
    )  # fmt: skip
    filter_kernel[(num_rows,)](
        logits_NV, best, columns.temperature, columns.top_k, columns.top_p, mass, near_mass, num_near, near, edge,
        vocab, stride, num_parts, SEARCH_BLOCK=SEARCH_BLOCK, PARTS=PARTS, NEAR=NEAR, num_warps=16,
    )  # fmt: skip
    draw_kernel[shape](
        logits_NV, best, edge, columns.temperature, columns.min_p, columns.seed, columns.position, columns.output_index,
        drawn, vocab, stride, num_parts, blocks_of_part, BLOCK=BLOCK, PARTS=PARTS, num_warps=4,
    )  # fmt: skip
    finish_kernel[(num_rows,)](
        best, drawn, columns.temperature, slots_N, tokens, last_tokens_S, num_parts, PARTS=PARTS, num_warps=1
    )  # fmt: skip
    return tokens
