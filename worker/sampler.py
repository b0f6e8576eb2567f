"""Drawing the next tokens of a whole batch from its logits. Knows rows and their parameters; no sequences, no model.

A token depends on its row's logits and on (seed, position, output_index) only, never on the other rows: the draw is the
argmax of scaled, filtered logits + Gumbel noise (Gumbel 1954; the noise is philox.py's), which follows the softmax exactly.
Ties go to the lowest id. Bias and penalties come first. Filters come in transformers' order: temperature, top-k, top-p, min-p;
each keeps everything that is no worse than the last one kept, so tokens that tie at an edge stay together.

Legend: N rows, V vocabulary, M rows that draw at random, K best tokens, G groups of four tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wire.messages import I32
from worker import compiled, philox
from worker.sampling_columns import SamplingRows

F32 = NDArray[np.float32]

GREEDY_BELOW = 1e-5  # temperatures: dividing by less would only overflow float32
_NEAR = 2.0  # tokens whose score is this close to the best compete first
_NUCLEUS_TRY = 512  # best tokens among which the nucleus is looked for before the whole row is sorted
_MINUS_INFINITY = float("-inf")


def sample(logits_NV: Tensor, rows: SamplingRows, one_by_one: bool = False) -> I32:
    """The tokens [N]. `logits_NV` is float32 and ours to write to. A row with a NaN or an infinite best gets its argmax.
    one_by_one: what filters add up of a row is the same, to the last digit, whatever the other rows are."""
    adjust(logits_NV, rows)
    in_loops = compiled.samples(logits_NV)
    best_N, token_N = compiled.best(logits_NV) if in_loops else logits_NV.max(dim=-1)
    tokens = token_N.cpu().numpy().astype(np.int32)
    at_random = (rows.temperature >= GREEDY_BELOW) & np.isfinite(best_N.cpu().numpy())
    chosen = np.flatnonzero(at_random)
    if len(chosen) and in_loops:
        columns = (rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.seed, rows.position, rows.output_index)
        tokens[chosen] = compiled.draw(logits_NV, chosen, [column[chosen] for column in columns])
    elif len(chosen):
        scores_MV = _scaled(logits_NV, rows, chosen)
        for part in parts(len(chosen), one_by_one):
            keep(scores_MV[part], rows.top_k[chosen[part]], rows.top_p[chosen[part]], rows.min_p[chosen[part]])
        tokens[chosen] = draw(scores_MV, rows.seed[chosen], rows.position[chosen], rows.output_index[chosen])
    return tokens


def sample_slowly(logits_NV: Tensor, rows: SamplingRows) -> I32:
    """Twin of sample(): one row after the other, whole sorts, noise for the whole vocabulary."""
    tokens = np.empty(len(logits_NV), np.int32)
    for i, logits_V in enumerate(logits_NV.clone()):
        adjust_slowly(logits_V, rows, i)
        if rows.temperature[i] < GREEDY_BELOW or not torch.isfinite(logits_V.max()):
            tokens[i] = int(logits_V.argmax())
            continue
        scores_V = logits_V / torch.tensor(rows.temperature[i])
        keep_slowly(scores_V, int(rows.top_k[i]), float(rows.top_p[i]), float(rows.min_p[i]))
        noise_V = whole_noise(len(scores_V), rows.seed[i], rows.position[i], rows.output_index[i])
        tokens[i] = int((scores_V.cpu().numpy() + noise_V).argmax())
    return tokens


def parts(count: int, one_by_one: bool) -> list[slice]:
    """Rows that are filtered together."""
    return [slice(i, i + 1) for i in range(count)] if one_by_one else [slice(0, count)]


def _scaled(logits_NV: Tensor, rows: SamplingRows, chosen: NDArray[np.intp]) -> Tensor:
    """Logits over temperature of the chosen rows, as a copy."""
    temperature_M1 = torch.from_numpy(rows.temperature[chosen])[:, None].to(logits_NV.device)
    return logits_NV[torch.from_numpy(chosen).to(logits_NV.device)] / temperature_M1


# ---------------------------------------------------------------------------------------------- bias, penalties and mask


def adjust(logits_NV: Tensor, rows: SamplingRows) -> None:
    """In place: logit bias; then repetition penalty (arXiv:1909.05858, section 4.1), presence and frequency penalties (as the
    OpenAI API defines them); then −inf for what must not be drawn."""
    if len(rows.bias):
        at = (torch.from_numpy(rows.bias.rows), torch.from_numpy(rows.bias.tokens))
        logits_NV[at] += torch.from_numpy(rows.bias.values).to(logits_NV.device)
    if len(rows.seen):
        seen = rows.seen
        at = (torch.from_numpy(seen.rows), torch.from_numpy(seen.tokens))
        more = rows.presence_penalty[seen.rows] * (seen.values > 0) + rows.frequency_penalty[seen.rows] * seen.values
        repetition, more_X = (torch.from_numpy(x).to(logits_NV.device) for x in (rows.repetition_penalty[seen.rows], more))
        logits_X = logits_NV[at]
        logits_NV[at] = torch.where(logits_X > 0, logits_X / repetition, logits_X * repetition) - more_X
    if len(rows.masked[0]):
        logits_NV[torch.from_numpy(rows.masked[0]), torch.from_numpy(rows.masked[1])] = _MINUS_INFINITY


def adjust_slowly(logits_V: Tensor, rows: SamplingRows, i: int) -> None:
    """Twin of adjust() for row i, token by token."""
    for row, token, bias in zip(rows.bias.rows, rows.bias.tokens, rows.bias.values, strict=True):
        if row == i:
            logits_V[token] += float(bias)
    for row, token, times in zip(rows.seen.rows, rows.seen.tokens, rows.seen.values, strict=True):
        if row == i:
            penalty = float(rows.repetition_penalty[i])
            logits_V[token] = logits_V[token] / penalty if logits_V[token] > 0 else logits_V[token] * penalty
            logits_V[token] -= float(rows.presence_penalty[i] * np.float32(times > 0) + rows.frequency_penalty[i] * times)
    logits_V[torch.from_numpy(rows.masked[1][rows.masked[0] == i])] = _MINUS_INFINITY


# --------------------------------------------------------------------------------------------------------------- filters


def keep(scores_MV: Tensor, top_k: I32, top_p: F32, min_p: F32) -> None:
    """Puts −inf in the place of every token that a filter drops, on the rows that ask for one."""
    vocab = scores_MV.shape[1]
    with_k = np.flatnonzero((top_k > 0) & (top_k < vocab))
    if len(with_k):
        _drop_below(scores_MV, with_k, _kth_best(scores_MV, with_k, top_k[with_k]))
    with_p = np.flatnonzero(top_p < 1)
    if len(with_p):
        bounded = (top_k[with_p] > 0) & (top_k[with_p] < vocab)
        width = max(_NUCLEUS_TRY * int(not bounded.all()), int(top_k[with_p][bounded].max(initial=1)))
        _drop_below(scores_MV, with_p, _nucleus_edge(scores_MV, with_p, top_p[with_p], min(width, vocab)))
    with_min = np.flatnonzero(min_p > 0)
    if len(with_min):
        scores = scores_MV[with_min]
        share = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
        scores_MV[with_min] = scores.masked_fill(share < torch.from_numpy(min_p[with_min])[:, None].to(share), _MINUS_INFINITY)


def keep_slowly(scores_V: Tensor, top_k: int, top_p: float, min_p: float) -> None:
    """Twin of keep() for one row, by a whole sort."""
    best_V = scores_V.sort(descending=True).values
    if 0 < top_k < len(scores_V):
        scores_V[scores_V < best_V[top_k - 1]] = _MINUS_INFINITY
    if top_p < 1:
        best_V = scores_V.sort(descending=True).values
        mass_V = torch.exp(best_V - best_V[0]).double()
        before_V = mass_V.cumsum(0) - mass_V
        kept = int((before_V < top_p * mass_V.sum()).sum())
        scores_V[scores_V < best_V[max(kept, 1) - 1]] = _MINUS_INFINITY
    if min_p > 0:
        scores_V[torch.exp(scores_V - scores_V.max()) < torch.tensor(min_p)] = _MINUS_INFINITY


def _drop_below(scores_MV: Tensor, rows: NDArray[np.intp], edge: Tensor) -> None:
    scores = scores_MV[rows]
    scores_MV[rows] = scores.masked_fill(scores < edge[:, None], _MINUS_INFINITY)


def _kth_best(scores_MV: Tensor, rows: NDArray[np.intp], top_k: I32) -> Tensor:
    best = scores_MV[rows].topk(int(top_k.max()), dim=-1).values
    return best.gather(1, torch.from_numpy(top_k.astype(np.int64) - 1)[:, None].to(best.device))[:, 0]


def _nucleus_edge(scores_MV: Tensor, rows: NDArray[np.intp], top_p: F32, width: int) -> Tensor:
    """Score of the last token of each row's nucleus: the best tokens before which less than top_p of the mass lies."""
    scores = scores_MV[rows]
    mass = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    wanted = torch.from_numpy(top_p.astype(np.float64)).to(mass.device) * mass.sum(dim=-1, dtype=torch.float64)
    best = scores.topk(width, dim=-1).values
    edge, inside = _edge_of(best, wanted)
    outgrown = torch.nonzero(~inside)[:, 0]
    if width < scores.shape[1] and len(outgrown):
        edge[outgrown], _ = _edge_of(scores[outgrown].sort(dim=-1, descending=True).values, wanted[outgrown])
    return edge


def _edge_of(best: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The last of the descending scores before which less than `wanted` mass lies, and whether the nucleus ends in `best`."""
    mass = torch.exp(best - best[:, :1]).double()
    through = mass.cumsum(dim=-1)
    kept = (through - mass < wanted[:, None]).sum(dim=-1).clamp(min=1)
    return best.gather(1, kept[:, None] - 1)[:, 0], through[:, -1] >= wanted


# ----------------------------------------------------------------------------------------------------------------- draws


def whole_noise(vocab: int, seed: np.uint64, position: np.int64, output_index: np.int32) -> F32:
    """The Gumbel noise of every token of one draw, [V]."""
    groups = np.arange(-(-vocab // philox.LANES), dtype=np.uint64)
    seeds, positions, indices = (np.full(len(groups), value, np.uint64) for value in (seed, position, output_index))
    return philox.gumbel(philox.words(seeds, groups, positions, indices)).ravel()[:vocab]


def draw(scores_MV: Tensor, seed: NDArray[np.uint64], position: NDArray[np.int64], output_index: I32) -> I32:
    """argmax over V of scores + noise, with noise only for tokens that can win: noise ends at GUMBEL_MAX, so once some
    token has reached a sum, all whose score is more than that below it are out. Each row's best score must be finite."""
    vocab = scores_MV.shape[1]
    if vocab % philox.LANES:
        scores_MV = torch.nn.functional.pad(scores_MV, (0, -vocab % philox.LANES), value=_MINUS_INFINITY)
    keys = (seed, position.astype(np.uint64), output_index.astype(np.uint64))
    top_M = scores_MV.amax(dim=-1)
    near_MV = scores_MV >= (top_M - _NEAR)[:, None]
    top, edge, nothing = top_M.cpu().numpy(), (top_M - _NEAR).cpu().numpy(), np.full(len(top_M), -np.inf, np.float32)
    sum_M, token_M = _contest(scores_MV, near_MV, keys, edge, top, nothing)
    reach_MV = scores_MV + float(philox.GUMBEL_MAX) >= torch.from_numpy(sum_M)[:, None].to(scores_MV.device)
    far_sum_M, far_token_M = _contest(scores_MV, reach_MV & ~near_MV, keys, nothing, edge, sum_M)
    wins = (far_sum_M > sum_M) | ((far_sum_M == sum_M) & (far_token_M < token_M))
    return np.where(wins, far_token_M, token_M).astype(np.int32)


def _contest(
    scores_MV: Tensor, candidates_MV: Tensor, keys: tuple[NDArray[np.uint64], ...], lowest: F32, highest: F32, reached: F32
) -> tuple[F32, NDArray[np.intp]]:
    """Best sum of score and noise among each row's candidates, and the lowest token that has it; −inf and V where none comes
    up to `reached`. The candidates' scores lie in [lowest, highest], so most words need no logarithm to see that they lose."""
    rows, vocab = scores_MV.shape
    best, token = np.full(rows, -np.inf, np.float32), np.full(rows, vocab, np.intp)
    candidates_MG4 = candidates_MV.view(rows, -1, philox.LANES)
    groups = candidates_MG4.any(dim=-1).nonzero()
    if not len(groups):
        return best, token
    row_G, group_G = groups.cpu().numpy().T  # row_G ascends
    candidates_G4 = candidates_MG4[groups[:, 0], groups[:, 1]].cpu().numpy()
    words_G4 = philox.words(keys[0][row_G], group_G.astype(np.uint64), keys[1][row_G], keys[2][row_G]) * candidates_G4
    present, begin = np.unique(row_G, return_index=True)
    best_word = np.maximum.reduceat(words_G4.ravel(), begin * philox.LANES)
    reached = reached.copy()
    reached[present] = np.maximum(reached[present], lowest[present] + philox.gumbel(best_word))
    group, lane = np.nonzero(candidates_G4 & (words_G4 >= _least_word(reached, highest)[row_G][:, None]))
    row, candidate = row_G[group], group_G[group] * philox.LANES + lane
    scores = scores_MV[torch.from_numpy(row), torch.from_numpy(candidate)].cpu().numpy()
    sums = scores + philox.gumbel(words_G4[group, lane])
    np.maximum.at(best, row, sums)
    winning = sums == best[row]
    np.minimum.at(token, row[winning], candidate[winning])
    return best, token


def _least_word(reached: F32, highest: F32) -> NDArray[np.uint64]:
    """The least random word with which a score of at most `highest` may come up to `reached`; rounded down, with room for the
    rounding of the sum to float32."""
    high, goal = highest.astype(np.float64), reached.astype(np.float64)
    noise = goal - high - 1e-5 - 2.0**-22 * (np.abs(high) + np.abs(goal))
    uniform = np.exp(-np.exp(-np.clip(noise, -4.0, 20.0)))
    return (uniform * 2.0**23).astype(np.uint64) << np.uint64(9)
