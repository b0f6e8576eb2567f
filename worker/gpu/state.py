"""What the device knows of each sequence, by slot: its block table, the token that it drew last, how it draws. It follows the
mirror (worker.sequences), which has checked everything; only what a plan changed is sent.

Legend: S slots, and one more, the dump, which padding uses: its table stays zeros, it draws greedily. W blocks of a table, V
vocabulary, L entries of a list, n sequences that start.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from wire.messages import StepPlan
from worker.gpu.streams import to_device
from worker.kernels.sampling.adjust import fill_seen
from worker.sampling_columns import SamplingColumns
from worker.sequences import Sequences

LIST = 32  # stop tokens or biases of a sequence that the device keeps; who has more is drawn for with lists sent each step

_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_INTEGERS = ("top_k", "output_index", "seen_row", "min_position")


class DeviceState:
    """Changed between steps by what is launched in order with them; never read by the host."""

    def __init__(self, num_slots: int, table_width: int, vocab_size: int, device: torch.device) -> None:
        self.dump, self.device = num_slots, device
        rows = num_slots + 1

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.block_tables_SW = zeros(rows, table_width)
        self.last_tokens_S = zeros(rows)
        self.columns = zeros(len(_FLOATS) + len(_INTEGERS), rows)  # floats by their bits
        self.seeds_S = zeros(rows, dtype=torch.int64)
        self.bias_tokens_SL = zeros(rows, LIST).fill_(-1)
        self.bias_SL = zeros(rows, LIST, dtype=torch.float32)
        self.stop_tokens_SL = zeros(rows, LIST).fill_(-1)
        self.seen_SV = zeros(rows, vocab_size)  # of sequences that have a penalty (kernels.sampling.adjust)
        self.columns[:, self.dump] = torch.from_numpy(_neutral())

    def start(self, plan: StepPlan, sequences: Sequences) -> None:
        """Takes up the sequences that the plan starts."""
        starts = plan.header.starts
        if not starts:
            return
        slots = np.fromiter((start.slot for start in starts), np.int64, len(starts))
        where = to_device(slots, self.device)
        columns = sequences.columns
        self.columns[:, where] = to_device(_columns(sequences, slots), self.device)
        self.seeds_S[where] = to_device(columns.seed[slots].view(np.int64), self.device)
        for lists, target, nothing in (
            (columns.bias_token_ids, self.bias_tokens_SL, -1),
            (columns.bias, self.bias_SL, 0),
            (columns.stop_token_ids, self.stop_tokens_SL, -1),
        ):
            target[where] = to_device(_narrow(lists[slots], nothing), self.device)
        for slot in slots[has_penalty(columns, slots)].tolist():
            given = sequences.tokens[slot, : sequences.num_given[slot]]
            fill_seen(self.seen_SV, slot, to_device(given, self.device), int(sequences.num_prompt[slot]))

    def of(self, slots_N: Tensor) -> dict[str, Tensor]:
        """The columns of these slots, [N] each, by name."""
        rows = self.columns.index_select(1, slots_N)
        named = dict(zip((*_FLOATS, *_INTEGERS), rows, strict=True))
        return named | {name: named[name].view(torch.float32) for name in _FLOATS}

    @property
    def num_bytes(self) -> int:
        return sum(each.nbytes for each in vars(self).values() if isinstance(each, Tensor))


def has_penalty(columns: SamplingColumns, slots: np.ndarray) -> np.ndarray:
    """Which of the slots weigh the tokens that were there before, [n] bool."""
    punishes = (columns.presence_penalty[slots] != 0) | (columns.frequency_penalty[slots] != 0)
    wanted: np.ndarray = punishes | (columns.repetition_penalty[slots] != 1)
    return wanted


def has_long_list(columns: SamplingColumns, slots: np.ndarray) -> bool:
    """Whether one of the slots has more stop tokens or biases than the device keeps."""
    lists = (columns.bias_token_ids, columns.stop_token_ids)
    return any(bool((each[slots, LIST:] >= 0).any()) for each in lists if each.shape[1] > LIST)


def _columns(sequences: Sequences, slots: np.ndarray) -> np.ndarray:
    """[floats and integers, n] int32."""
    columns = sequences.columns
    floats = [getattr(columns, name)[slots].astype(np.float32).view(np.int32) for name in _FLOATS]
    seen_row = np.where(has_penalty(columns, slots), slots, -1)
    min_position = sequences.num_prompt[slots] + columns.min_tokens[slots]
    integers = [columns.top_k[slots], sequences.output_index[slots], seen_row, min_position]
    return np.stack([*floats, *(each.astype(np.int32) for each in integers)])


def _neutral() -> np.ndarray:
    floats = np.array([0, 1, 0, 1, 0, 0], np.float32).view(np.int32)
    return np.concatenate((floats, np.array([0, 0, -1, 0], np.int32)))


def _narrow(lists: np.ndarray, nothing: float) -> np.ndarray:
    """[n, LIST]."""
    out = np.full((len(lists), LIST), nothing, lists.dtype)
    width = min(LIST, lists.shape[1])
    out[:, :width] = lists[:, :width]
    return out
