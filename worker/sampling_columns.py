"""How each sequence's tokens are drawn, as columns indexed by slot; and of one step's rows, what the sampler needs of them.

Knows tokens and parameters. No torch, no logits.

Legend: S slots, L largest number of tokens, N rows that draw, W widest list of stop tokens or biases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from wire.messages import I32, SamplingSpec

Index = NDArray[np.intp]
I64 = NDArray[np.int64]
F32 = NDArray[np.float32]

_NOBODY = np.empty(0, np.intp)


@dataclass(slots=True)
class Entries:
    """Some (row, token id) pairs, each at most once, with a number for each."""

    rows: Index = field(default_factory=lambda: _NOBODY)
    tokens: Index = field(default_factory=lambda: _NOBODY)
    values: F32 = field(default_factory=lambda: np.empty(0, np.float32))

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(slots=True)
class SamplingRows:
    """How the tokens of N rows are drawn; columns of length N."""

    temperature: F32  # 0 = greedy
    top_k: I32  # 0 = all
    top_p: F32
    min_p: F32
    seed: NDArray[np.uint64]
    position: I64  # of the token to be drawn
    output_index: I32
    repetition_penalty: F32  # 1 = off
    presence_penalty: F32  # 0 = off
    frequency_penalty: F32  # 0 = off
    masked: tuple[Index, Index] = (_NOBODY, _NOBODY)  # (row, token id) that must not be drawn: stop tokens before min_tokens
    bias: Entries = field(default_factory=Entries)  # added to the logits
    seen: Entries = field(default_factory=Entries)  # tokens of the rows that have a penalty; how often in the output


class SamplingColumns:
    """`put` what a new sequence asks for; `of` the rows of a step."""

    def __init__(self, rows: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self.temperature = np.zeros(rows, np.float32)
        self.top_k = np.zeros(rows, np.int32)
        self.top_p = np.ones(rows, np.float32)
        self.min_p = np.zeros(rows, np.float32)
        self.seed = np.zeros(rows, np.uint64)
        self.min_tokens = np.zeros(rows, np.int64)
        self.repetition_penalty = np.ones(rows, np.float32)
        self.presence_penalty = np.zeros(rows, np.float32)
        self.frequency_penalty = np.zeros(rows, np.float32)
        self.logprobs = np.full(rows, -1, np.int32)  # most likely tokens to tell of, −1: nothing is told
        self.prompt_logprobs = np.full(rows, -1, np.int32)
        # Lists of token ids, −1 past a list's end; they widen as longer ones come.
        self.stop_token_ids: I32 = np.full((rows, 4), -1, np.int32)  # [S, W]
        self.bias_token_ids: I32 = np.full((rows, 4), -1, np.int32)  # [S, W]
        self.bias: F32 = np.zeros((rows, 4), np.float32)

    def put(self, slot: int, spec: SamplingSpec) -> None:
        self.temperature[slot] = spec.temperature
        self.top_k[slot] = min(max(spec.top_k, 0), self._vocab_size)
        self.top_p[slot] = spec.top_p
        self.min_p[slot] = spec.min_p
        self.seed[slot] = spec.seed & 0xFFFF_FFFF_FFFF_FFFF
        self.min_tokens[slot] = spec.min_tokens
        self.repetition_penalty[slot] = spec.repetition_penalty
        self.presence_penalty[slot] = spec.presence_penalty
        self.frequency_penalty[slot] = spec.frequency_penalty
        self.logprobs[slot] = spec.logprobs
        self.prompt_logprobs[slot] = spec.prompt_logprobs
        # A token beyond the vocabulary can't be drawn: nothing to mask, nothing to add to.
        self.stop_token_ids = _listed(self.stop_token_ids, slot, [t for t in spec.stop_token_ids if self._exists(t)], -1)
        biased = {token: bias for token, bias in spec.logit_bias if self._exists(token)}
        self.bias_token_ids = _listed(self.bias_token_ids, slot, list(biased), -1)
        self.bias = _listed(self.bias, slot, list(biased.values()), 0)

    def _exists(self, token: int) -> bool:
        return 0 <= token < self._vocab_size

    def of(self, slots: Index, position: I64, output_index: I32, tokens: I32, num_prompt: I64) -> SamplingRows:
        """For draws of the tokens at `position` [N] in these slots. tokens [S, L], the first num_prompt [S] of them prompt."""
        return SamplingRows(
            temperature=self.temperature[slots],
            top_k=self.top_k[slots],
            top_p=self.top_p[slots],
            min_p=self.min_p[slots],
            seed=self.seed[slots],
            position=position,
            output_index=output_index[slots],
            repetition_penalty=self.repetition_penalty[slots],
            presence_penalty=self.presence_penalty[slots],
            frequency_penalty=self.frequency_penalty[slots],
            masked=self._masked(slots, position - num_prompt[slots]),
            bias=self._bias(slots),
            seen=self._seen(slots, position, tokens, num_prompt),
        )

    def _masked(self, slots: Index, num_outputs: I64) -> tuple[Index, Index]:
        early = np.flatnonzero(num_outputs < self.min_tokens[slots])
        stops = self.stop_token_ids[slots[early]]
        row, column = np.nonzero(stops >= 0)
        return early[row], stops[row, column].astype(np.intp)

    def _bias(self, slots: Index) -> Entries:
        biased = np.flatnonzero(self.bias_token_ids[slots, 0] >= 0)
        if not len(biased):
            return Entries()
        ids = self.bias_token_ids[slots[biased]]
        row, column = np.nonzero(ids >= 0)
        return Entries(biased[row], ids[row, column].astype(np.intp), self.bias[slots[biased[row]], column])

    def _seen(self, slots: Index, position: I64, tokens: I32, num_prompt: I64) -> Entries:
        """The distinct tokens before `position`, counted where they are of the output. Prompts count for repetition only."""
        repeats = self.repetition_penalty[slots] != 1
        punished = np.flatnonzero(repeats | (self.presence_penalty[slots] != 0) | (self.frequency_penalty[slots] != 0))
        if not len(punished):
            return Entries()
        count = position[punished]
        row = np.repeat(punished, count)
        column = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        token, is_output = tokens[slots[row], column], column >= num_prompt[slots[row]]
        pairs, which = np.unique(row * np.int64(self._vocab_size) + token, return_inverse=True)
        times = np.bincount(which, weights=is_output, minlength=len(pairs)).astype(np.float32)
        return Entries(pairs // self._vocab_size, pairs % self._vocab_size, times)


def _listed(lists: NDArray, slot: int, values: Sequence[float], nothing: float) -> NDArray:
    """The array with `values` in the slot's row and `nothing` behind them; a wider one if they are too many."""
    rows, width = lists.shape
    if len(values) > width:
        wider = np.full((rows, 2 * len(values)), nothing, lists.dtype)
        wider[:, :width] = lists
        lists = wider
    lists[slot] = nothing
    lists[slot, : len(values)] = values
    return lists
