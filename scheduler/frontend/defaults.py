"""What a request gets that says nothing: the model's own generation_config.json, read as transformers' `generate` reads it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scheduler.errors import ModelFilesError
from scheduler.model_files import read_json

log = logging.getLogger(__name__)

# Values at which a setting changes nothing; others are said once, since this server does not apply them.
_NEUTRAL = {"encoder_repetition_penalty": 1, "no_repeat_ngram_size": 0, "num_beams": 1}


@dataclass(frozen=True, slots=True)
class ModelDefaults:
    """The model's own sampling and end tokens. Ranges as in SamplingParams."""

    temperature: float  # 0 = greedy: also when do_sample is false or absent
    top_k: int  # 0 = all
    top_p: float
    min_p: float
    eos_token_ids: tuple[int, ...]
    repetition_penalty: float = 1.0


def load(directory: Path, tokenizer_eos: int | None) -> ModelDefaults:
    """From generation_config.json; its end tokens, else config.json's, else the tokenizer's. Raises ModelFilesError."""
    path = directory / "generation_config.json"
    generation = read_json(path)
    for name, neutral in _NEUTRAL.items():
        if generation.get(name, neutral) not in (neutral, None):
            log.warning("%s: %s = %s is not applied by this server", path, name, generation[name])
    sampled = bool(generation.get("do_sample"))
    return ModelDefaults(
        temperature=_number(path, generation, "temperature", 1.0, 0, 100) if sampled else 0.0,
        top_k=max(0, int(_number(path, generation, "top_k", 0, -math.inf, 2**31))),
        top_p=_number(path, generation, "top_p", 1.0, 1e-9, 1),
        min_p=_number(path, generation, "min_p", 0.0, 0, 1),
        eos_token_ids=_end_tokens(generation, read_json(directory / "config.json"), tokenizer_eos),
        repetition_penalty=_number(path, generation, "repetition_penalty", 1.0, 1e-9, 10),
    )


def _number(path: Path, config: dict[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = config.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ModelFilesError(f"{path}: {name} is {value!r}, which is not a number in its range")
    return float(value)


def _end_tokens(generation: dict[str, Any], config: dict[str, Any], tokenizer_eos: int | None) -> tuple[int, ...]:
    for found in (generation.get("eos_token_id"), config.get("eos_token_id"), tokenizer_eos):
        if found is not None:
            tokens: Iterable[Any] = found if isinstance(found, list) else [found]
            return tuple(dict.fromkeys(token for token in tokens if isinstance(token, int) and token >= 0))
    return ()
