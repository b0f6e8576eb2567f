"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) and the ways to stretch them over longer contexts.

A pair of a head's values (i, i + D/2) is turned by the angle position · frequency[i]. All in float32, as the models were
trained; the tables reach as far as the longest sequence that is served.

Legend: T tokens, H heads, D head size, L positions.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor

from worker.model_config import DefaultRope, LinearRope, Llama3Rope, LongRope, ModelConfig, Rope, YarnRope

CosSin: TypeAlias = tuple[Tensor, Tensor]  # [T, 1, D / 2] each


class Rotary:
    """Cosines and sines of all positions, and what they do to queries and keys."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        assert config.rope is not None
        frequencies, attention_factor = inverse_frequencies(
            config.rope, config.head_dim, config.max_position_embeddings, config.max_model_len
        )
        angles_LD = torch.arange(config.max_model_len).float()[:, None] * frequencies
        self._cos_LD = (angles_LD.cos() * attention_factor).to(device)  # [L, D / 2]
        self._sin_LD = (angles_LD.sin() * attention_factor).to(device)

    def at(self, positions_T: Tensor) -> CosSin:
        """Cosines and sines [T, 1, D / 2] of these positions, for all layers of a step."""
        return self._cos_LD[positions_T].unsqueeze(1), self._sin_LD[positions_T].unsqueeze(1)


def rotate(x_TAD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, num_heads: int | None = None) -> Tensor:
    """(a, b) → (a cos − b sin, b cos + a sin), a and b the halves of each of the first `num_heads` heads (None: of all):
    [T, num_heads, D]."""
    num_heads = x_TAD.shape[1] if num_heads is None else num_heads
    x_THD = x_TAD[:, :num_heads]
    half = x_THD.shape[-1] // 2
    a, b = x_THD[..., :half], x_THD[..., half:]
    turned = torch.empty(x_THD.shape, dtype=torch.float32, device=x_THD.device)
    torch.mul(a, cos_T1D, out=turned[..., :half]).addcmul_(b, sin_T1D, value=-1)
    torch.mul(b, cos_T1D, out=turned[..., half:]).addcmul_(a, sin_T1D)
    return turned.to(x_THD.dtype)


def inverse_frequencies(rope: Rope, head_dim: int, max_position_embeddings: int, max_model_len: int) -> tuple[Tensor, float]:
    """Angle per position of each pair, [D / 2] float32, and what cosines and sines are multiplied by (attention factor)."""
    frequencies = 1.0 / rope.rope_theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    match rope:
        case DefaultRope():
            return frequencies, 1.0
        case LinearRope():  # position interpolation, Chen et al. 2023, arXiv:2306.15595
            return frequencies / rope.factor, 1.0
        case Llama3Rope():
            return _llama3(rope, frequencies), 1.0
        case YarnRope():
            factor = rope.factor or max_position_embeddings / rope.original_max_position_embeddings
            return _yarn(rope, frequencies, factor, head_dim), _yarn_attention_factor(rope, factor)
        case LongRope():
            return _longrope(rope, frequencies, max_model_len), _longrope_attention_factor(rope, max_position_embeddings)


def _llama3(rope: Llama3Rope, frequencies: Tensor) -> Tensor:
    """The Llama 3 Herd of Models (arXiv:2407.21783): long waves are stretched by `factor`, short ones are not, and between
    them (the wavelengths L / high_freq_factor and L / low_freq_factor) it goes over smoothly."""
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)  # of the original context
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = smooth.clamp(0, 1)
    return (1 - kept) * frequencies / rope.factor + kept * frequencies


def _yarn(rope: YarnRope, frequencies: Tensor, factor: float, head_dim: int) -> Tensor:
    """YaRN (Peng et al. 2023, arXiv:2309.00071, section 3.2): pairs that turn more than beta_fast times in the original
    context keep their frequency, those that turn less than beta_slow times are stretched, between them a linear ramp over i."""

    def pair_that_turns(times: float) -> float:
        length = rope.original_max_position_embeddings
        return head_dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = pair_that_turns(rope.beta_fast or 32), pair_that_turns(rope.beta_slow or 1)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    stretched = ((torch.arange(head_dim // 2).float() - low) / (high - low)).clamp(0, 1)
    return frequencies / factor * stretched + frequencies * (1 - stretched)


def _yarn_attention_factor(rope: YarnRope, factor: float) -> float:
    """YaRN, equation 22: 0.1 ln(factor) + 1, weighted by mscale over mscale_all_dim where both are given (DeepSeek-V2)."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    grown = 0.1 * math.log(factor) if factor > 1 else 0.0
    if rope.mscale and rope.mscale_all_dim:
        return (grown * rope.mscale + 1.0) / (grown * rope.mscale_all_dim + 1.0)
    return grown + 1.0


def _longrope(rope: LongRope, frequencies: Tensor, max_model_len: int) -> Tensor:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): a divisor per pair. Which of the two sets is chosen once, by the longest
    sequence that is served, and not by the current one's length: keys in the cache could not follow a change."""
    is_long = max_model_len > rope.original_max_position_embeddings
    return frequencies / torch.tensor(rope.long_factor if is_long else rope.short_factor, dtype=torch.float32)


def _longrope_attention_factor(rope: LongRope, max_position_embeddings: int) -> float:
    """√(1 + ln(factor) / ln(original length))."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    length = rope.original_max_position_embeddings
    factor = rope.factor or max_position_embeddings / length
    return math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
