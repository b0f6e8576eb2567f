"""From logits to tokens on the device: each row's parameters are fetched by its slot, worker/kernels/sampling does the rest.
Nothing is read on the host, so a captured step may hold it.

Legend: N rows that draw, V vocabulary, L entries of a list.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from worker.gpu.state import DeviceState
from worker.kernels.sampling.adjust import AdjustColumns, adjust, count_drawn
from worker.kernels.sampling.sample import DrawColumns, sample


@dataclass(frozen=True, slots=True)
class Lists:
    """Of N rows; −1 past a list's end."""

    bias_tokens: Tensor  # [N, L] int32
    bias: Tensor  # [N, L] float32
    stop_tokens: Tensor  # [N, L'] int32

    @classmethod
    def kept(cls, state: DeviceState, slots_N: Tensor) -> Lists:
        """Those that the device keeps."""
        kept = (state.bias_tokens_SL, state.bias_SL, state.stop_tokens_SL)
        return cls(*(lists.index_select(0, slots_N) for lists in kept))


def draw(logits_NV: Tensor, state: DeviceState, slots_N: Tensor, positions_N: Tensor, lists: Lists | None) -> Tensor:
    """The tokens [N] int32 at these positions; each becomes its slot's last token. The logits, float32, are overwritten.
    lists None: those that the device keeps."""
    lists = Lists.kept(state, slots_N) if lists is None else lists
    columns = state.of(slots_N)
    early = positions_N < columns["min_position"]
    masked_tokens = torch.where(early[:, None], lists.stop_tokens, -1)
    adjusted = AdjustColumns(
        repetition_penalty=columns["repetition_penalty"],
        presence_penalty=columns["presence_penalty"],
        frequency_penalty=columns["frequency_penalty"],
        seen_row=columns["seen_row"],
        bias_tokens=lists.bias_tokens,
        bias_values=lists.bias,
        masked_tokens=masked_tokens,
    )
    adjust(logits_NV, adjusted, state.seen_SV)
    drawn = DrawColumns(
        temperature=columns["temperature"],
        top_k=columns["top_k"],
        top_p=columns["top_p"],
        min_p=columns["min_p"],
        seed=state.seeds_S.index_select(0, slots_N),
        position=positions_N,
        output_index=columns["output_index"],
    )
    tokens_N = sample(logits_NV, drawn, slots_N, state.last_tokens_S)
    count_drawn(state.seen_SV, adjusted.seen_row, tokens_N)
    return tokens_N
