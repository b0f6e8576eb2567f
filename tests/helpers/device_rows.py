"""The columns of worker.sampling_columns.SamplingRows as the sampler's kernels take them."""

from __future__ import annotations

import numpy as np
import torch

from worker.sampling_columns import Entries, SamplingRows


def sampling_rows(count: int, **columns: object) -> SamplingRows:
    """Columns by name, one value or one for each row; the rest as in a request that asks for nothing."""
    defaults = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "seed": 7, "position": 0, "output_index": 0}
    defaults |= {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
    types = {"top_k": np.int32, "seed": np.uint64, "position": np.int64, "output_index": np.int32}
    made = {
        name: np.broadcast_to(np.asarray(columns.pop(name, default), types.get(name, np.float32)), (count,)).copy()
        for name, default in defaults.items()
    }
    return SamplingRows(**made, **columns)  # type: ignore[arg-type]


def mixed_rows(count: int, seed: int) -> SamplingRows:
    """Every combination of parameters, and greedy rows among them."""
    choose = np.random.default_rng(seed)
    return sampling_rows(
        count,
        temperature=choose.choice([0.0, 0.3, 1.0, 2.5], count, p=[0.1, 0.2, 0.4, 0.3]),
        top_k=choose.choice([0, 1, 5, 50, 10_000], count),
        top_p=choose.choice([1.0, 0.999, 0.95, 0.5, 0.01, 0.0], count),
        min_p=choose.choice([0.0, 0.05, 0.5], count, p=[0.6, 0.2, 0.2]),
        seed=choose.integers(0, 2**64, count, dtype=np.uint64),
        position=choose.integers(0, 2**32, count),
        output_index=choose.integers(0, 4, count),
    )


def draw_columns(rows: SamplingRows, device: torch.device):
    from worker.kernels.sampling.sample import DrawColumns

    names = ("temperature", "top_k", "top_p", "min_p", "position", "output_index")
    columns = {name: torch.from_numpy(getattr(rows, name)).to(device) for name in names}
    return DrawColumns(seed=torch.from_numpy(rows.seed.view(np.int64)).to(device), **columns)


def adjust_columns(rows: SamplingRows, count: int, vocab: int, device: torch.device):
    """And `seen` [rows, vocabulary], a row for each that has seen a token, in descending order."""
    from worker.kernels.sampling.adjust import AdjustColumns

    masked = Entries(rows.masked[0], rows.masked[1], np.zeros(len(rows.masked[0]), np.float32))
    (bias_tokens, bias_values), (masked_tokens, _) = _lists(rows.bias, count), _lists(masked, count)
    seen, seen_row = torch.zeros(count, vocab, dtype=torch.int32), np.full(count, -1, np.int32)
    for row, token, times in zip(rows.seen.rows, rows.seen.tokens, rows.seen.values, strict=True):
        seen_row[row] = count - 1 - row
        seen[count - 1 - row, token] = 2 * int(times) + int(times == 0 or token % 2)
    columns = AdjustColumns(
        *(torch.from_numpy(getattr(rows, f"{name}_penalty")).to(device) for name in ("repetition", "presence", "frequency")),
        *(torch.from_numpy(x).to(device) for x in (seen_row, bias_tokens, bias_values, masked_tokens)),
    )
    return columns, seen.to(device)


def _lists(entries: Entries, count: int) -> tuple[np.ndarray, np.ndarray]:
    width = int(np.bincount(entries.rows, minlength=1).max()) + 1
    tokens, values, filled = np.full((count, width), -1, np.int32), np.zeros((count, width), np.float32), np.zeros(count, int)
    for row, token, value in zip(entries.rows, entries.tokens, entries.values, strict=True):
        tokens[row, filled[row]], values[row, filled[row]] = token, value
        filled[row] += 1
    return tokens, values
