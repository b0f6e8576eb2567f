"""What a deterministic worker promises, tried on its own model at its start: the logits of a sequence depend, bit for bit, on
its tokens alone; not on how it is divided into chunks, nor on which rows stand beside it, how many, and where.

All that is ours computes row by row. That the library's products do so, in tiles that were seen to agree, is what it does on
the processors that we know, but nothing that it promises: where it does not, the worker does not start.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvcache.storage import KVStorage
from wire import WorkerFacts
from worker.attention.base import AttentionBackend, AttentionInputs
from worker.config import ConfigError
from worker.layers.products import TILES
from worker.models import Model

_LENGTH = TILES[-1] + 6  # tokens of the sequence: more than a tile holds
_COMPANY = ((3, 0), (20, 20), (40, 7), (0, 1))  # tokens that stand before and behind its chunks


def check(model: Model, kv: KVStorage, attention: AttentionBackend, facts: WorkerFacts) -> None:
    """Raises ConfigError. Writes to block 0, which nobody reads, and to the first blocks of the pool, of which nobody has any
    yet."""
    length = min(_LENGTH, facts.max_model_len, facts.num_blocks * facts.block_size)
    tokens, others = (np.random.default_rng(seed).integers(0, facts.vocab_size, _LENGTH) for seed in (0, 1))
    trial = _Trial(model, kv, attention, tokens[:length], others)
    cuts = sorted({1, length // 3, length - 1} & set(range(1, length)))
    chunks = np.diff([0, *cuts, length]).tolist()
    if not torch.equal(trial.logits([length], [(0, 0)]), trial.logits(chunks, _COMPANY[: len(chunks)])):
        raise ConfigError(
            "--deterministic: with the libraries of this processor the rows of a step change each other's last digits"
            f" (torch {torch.__version__}): serve without it"
        )


class _Trial:
    """One sequence in the first blocks of the pool; whoever keeps it company is one token long, each."""

    def __init__(
        self, model: Model, kv: KVStorage, attention: AttentionBackend, tokens: np.ndarray, company: np.ndarray
    ) -> None:
        self._model, self._kv, self._attention = model, kv, attention
        self._tokens, self._company = tokens, company
        self._block_size = kv.layers[0].shape[3]

    @torch.inference_mode()
    def logits(self, chunks: Sequence[int], company: Sequence[tuple[int, int]]) -> Tensor:
        """[length, vocabulary] of the sequence, computed in these chunks, each in its company."""
        ends = np.cumsum(chunks)
        return torch.cat([self._chunk(end - n, end, *beside) for n, end, beside in zip(chunks, ends, company, strict=True)])

    def _chunk(self, first: int, end: int, before: int, behind: int) -> Tensor:
        others, size = self._company[: before + behind], self._block_size
        at = np.arange(first, end)
        counts = np.array([1] * before + [end - first] + [1] * behind)
        tables = np.zeros((len(counts), -(-end // size)), np.int32)
        tables[before] = 1 + np.arange(tables.shape[1])
        inputs = AttentionInputs.of(
            np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
            np.array([1] * before + [end] + [1] * behind, np.int32),
            tables,
            np.concatenate((np.zeros(before, np.int64), size + at, np.zeros(behind, np.int64))),
        )
        ids = np.concatenate((others[:before], self._tokens[first:end], others[before:]))
        positions = np.concatenate((np.zeros(before, np.int64), at, np.zeros(behind, np.int64)))
        arrays = (torch.from_numpy(array) for array in (ids, positions))
        hidden_TC = self._model.forward(*arrays, self._attention, self._kv, inputs)
        return self._model.logits(hidden_TC)[before : before + end - first]
