"""What a simulated worker draws for a request that ignores end tokens: by its own formula, without a worker. For all outputs of
many requests at once, as one call of it costs as much as a hundred tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from worker.sim_executor import draw, prompt_hash

_NO_STOPS = -1


@dataclass(frozen=True, slots=True)
class Drawn:
    """An output."""

    prompt: Sequence[int]
    seed: int
    count: int  # tokens
    output_index: int = 0


def sim_tokens(outputs: Sequence[Drawn], vocab_size: int) -> list[list[int]]:
    """The tokens of each."""
    counts = np.array([output.count for output in outputs])
    keys = [prompt_hash(np.array(output.prompt, np.int32)) ^ output.seed for output in outputs]
    firsts = np.array([len(output.prompt) for output in outputs])
    begins = np.cumsum(counts) - counts
    tokens = draw(
        key=np.repeat(np.array(keys, np.uint64), counts),
        position=np.arange(counts.sum()) - np.repeat(begins - firsts, counts),
        output_index=np.repeat(np.array([output.output_index for output in outputs], np.int32), counts),
        stops=np.full((counts.sum(), 1), _NO_STOPS, np.int32),
        may_end=np.zeros(counts.sum(), bool),
        vocab_size=vocab_size,
        end_below=np.uint64(0),
    )
    return [part.tolist() for part in np.split(tokens, begins[1:])]
