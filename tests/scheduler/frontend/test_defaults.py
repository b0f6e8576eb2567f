"""What generation_config.json means to a request that says nothing: what it means to transformers' `generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scheduler.errors import ModelFilesError
from scheduler.frontend.defaults import ModelDefaults, load


def load_from(
    directory: Path, generation: dict[str, Any] | None, config: dict[str, Any] | None = None, eos: int | None = None
) -> ModelDefaults:
    for name, content in (("generation_config", generation), ("config", config)):
        if content is not None:
            (directory / f"{name}.json").write_text(json.dumps(content))
    return load(directory, eos)


def test_without_a_file_it_is_greedy(tmp_path: Path) -> None:
    assert load_from(tmp_path, None) == ModelDefaults(0.0, 0, 1.0, 0.0, ())


@pytest.mark.parametrize(
    "generation", [{"temperature": 0.6, "top_p": 0.9}, {"do_sample": False, "temperature": 0.6, "top_p": 0.9}]
)
def test_without_do_sample_it_is_greedy_and_keeps_the_filters(generation: dict[str, Any], tmp_path: Path) -> None:
    assert load_from(tmp_path, generation) == ModelDefaults(0.0, 0, 0.9, 0.0, ())


def test_with_do_sample_its_values_hold(tmp_path: Path) -> None:
    generation = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05}
    assert load_from(tmp_path, generation) == ModelDefaults(0.6, 20, 0.95, 0.05, ())


def test_with_do_sample_alone_the_temperature_is_1(tmp_path: Path) -> None:
    assert load_from(tmp_path, {"do_sample": True, "temperature": None, "top_k": None}) == ModelDefaults(1.0, 0, 1.0, 0.0, ())


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "expected"),
    [
        ({"eos_token_id": 7}, {"eos_token_id": 8}, 9, (7,)),
        ({"eos_token_id": [7, 5, 7]}, {"eos_token_id": 8}, 9, (7, 5)),
        ({}, {"eos_token_id": 8}, 9, (8,)),
        ({"eos_token_id": None}, {}, 9, (9,)),
        ({}, {}, None, ()),
    ],
)
def test_end_tokens(
    generation: dict[str, Any], config: dict[str, Any], tokenizer: int | None, expected: tuple[int, ...], tmp_path: Path
) -> None:
    assert load_from(tmp_path, generation, config, tokenizer).eos_token_ids == expected


@pytest.mark.parametrize("value", [-1, 1.5, "0.9", True, float("nan")])
def test_a_value_out_of_range_is_named(value: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match=r"generation_config\.json: top_p"):
        load_from(tmp_path, {"top_p": value})


def test_what_is_not_applied_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_from(tmp_path, {"no_repeat_ngram_size": 0, "num_beams": 1})
    assert not caplog.records
    load_from(tmp_path, {"num_beams": 4})
    assert "num_beams = 4 is not applied" in caplog.text


def test_the_models_own_repetition_penalty_is_taken(tmp_path: Path) -> None:
    assert load_from(tmp_path, {"repetition_penalty": 1.05}).repetition_penalty == 1.05
