"""Log-probabilities of drawn tokens and of prompt tokens, for the rows that asked for them: the model's own, before penalties,
temperature and filters. Knows logits and rows; no socket.

Legend: T tokens of the step, C hidden size, N rows that draw, M of them that asked, V vocabulary, K most likely tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from wire import LogprobRun, Logprobs, LogprobsHeader, StepPlan
from worker import kernels
from worker.gpu.streams import to_device
from worker.sequences import Sequences, StepRows

_PART = 64  # prompt tokens whose logits are in memory together


class Told:
    """Gathers what a step has to tell, where it was computed; `message` brings it to the host. one_by_one: each row's numbers
    are the same, to the last digit, whatever the other rows are."""

    def __init__(self, one_by_one: bool = False) -> None:
        self.one_by_one = one_by_one
        self._runs: list[LogprobRun] = []
        self._logprobs: list[Tensor] = []
        self._token_ids: list[Tensor] = []

    def add(self, row: int, position: int, logits_NV: Tensor, total_N: Tensor, token_ids_N: Tensor, num_best: int) -> None:
        """Of the tokens at `position` and behind it; logits_NV: of what may stand there, total_N: their log_sum_exp."""
        num_best = min(num_best, logits_NV.shape[1])
        own = token_ids_N.to(logits_NV.device, torch.int64)[:, None]
        best = logits_NV.topk(num_best, dim=1)
        self._runs.append(LogprobRun(row, position, len(own), num_best))
        told = torch.cat((logits_NV.gather(1, own), best.values), dim=1) - total_N[:, None]
        self._logprobs.append(told.flatten())
        self._token_ids.append(torch.cat((own, best.indices), dim=1).flatten())

    def message(self, plan: StepPlan) -> Logprobs | None:
        if not self._runs:
            return None
        header = LogprobsHeader(plan.header.group, plan.header.epoch, plan.header.step_id, tuple(self._runs))
        token_ids = torch.cat(self._token_ids).to(torch.int32)
        return Logprobs(header, torch.cat(self._logprobs).cpu().numpy(), token_ids.cpu().numpy())


def of_prompts(told: Told, sequences: Sequences, rows: StepRows, hidden_TC: Tensor, logits: Callable[[Tensor], Tensor]) -> None:
    """Of the prompt tokens behind those that this step computes, in the rows that asked; a sequence's first token has none."""
    count = len(rows.slots) - rows.num_padding
    asked = sequences.columns.prompt_logprobs[rows.slots[:count]] >= 0
    if not asked.any():
        return
    at = np.cumsum(rows.count) - rows.count  # each row's first token in the step
    for row in np.flatnonzero(asked).tolist():
        slot, first, begin = int(rows.slots[row]), int(rows.first[row]), int(at[row])
        end = min(first + int(rows.count[row]), int(sequences.num_prompt[slot]) - 1)
        for position in range(first, end, _PART):
            until = min(position + _PART, end)
            logits_NV = logits(hidden_TC[begin + position - first : begin + until - first])
            token_ids = to_device(sequences.tokens[slot, position + 1 : until + 1], logits_NV.device)
            num_best = int(sequences.columns.prompt_logprobs[slot])
            told.add(slot, position + 1, logits_NV, log_sum_exp(logits_NV, told.one_by_one), token_ids, num_best)


class OfDraws:
    """Of the tokens that the drawing rows draw. Made before the logits are adjusted for sampling."""

    def __init__(self, sequences: Sequences, rows: StepRows, logits_NV: Tensor) -> None:
        self._num_best = sequences.columns.logprobs[rows.slots[rows.drawing[: rows.num_sampled]]]
        self._asked = np.flatnonzero(self._num_best >= 0)
        # A copy. By indices that are on the device: for others everybody would wait.
        self._logits_MV = logits_NV[to_device(self._asked, logits_NV.device)] if len(self._asked) else logits_NV[:0]

    def tell(self, told: Told, rows: StepRows, tokens_N: Tensor) -> None:
        if not len(self._asked):
            return
        total_M = log_sum_exp(self._logits_MV, told.one_by_one)
        for m, i in enumerate(self._asked.tolist()):
            row = rows.drawing[i]
            position = int(rows.first[row] + rows.count[row])
            logits, total = self._logits_MV[m : m + 1], total_M[m : m + 1]
            told.add(int(rows.slots[row]), position, logits, total, tokens_N[i : i + 1], int(self._num_best[i]))


def log_sum_exp(logits_NV: Tensor, one_by_one: bool) -> Tensor:
    """one_by_one: of each row alone, so that its last digits do not depend on how many there are."""
    if kernels.fits(logits_NV):
        return kernels.log_sum_exp(logits_NV)
    if not one_by_one:
        return logits_NV.logsumexp(dim=1)
    return torch.cat([row.logsumexp(dim=1) for row in logits_NV.split(1)])
