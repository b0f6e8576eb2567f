"""What int8 costs in accuracy: how it is added up, and that the tool runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from bench.quantization import Sums, main
from tests.helpers.checkpoints import make_checkpoint


def test_equal_logits_have_no_error_and_the_perplexity_of_the_text() -> None:
    sums, logits = Sums(), torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [1.0, 1.0, 1.0]]))
    sums.add(logits, logits, [2, 0, 1])  # after 2 comes 0: a half; after 0 comes 1: a quarter
    loss = sums.loss()
    assert loss.perplexity == pytest.approx(math.sqrt(2 * 4))
    assert (loss.max_error, loss.mean_error, loss.same_best, loss.divergence) == (0, 0, 1, 0)


def test_errors_are_of_logits_and_the_last_token_is_not_scored() -> None:
    sums, exact = Sums(), torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    sums.add(exact, torch.tensor([[0.0, 1.0], [2.0, 1.0], [0.0, 1.0]]), [0, 1, 1])
    loss = sums.loss()
    assert (loss.max_error, loss.mean_error, loss.same_best) == (2, pytest.approx(2 / 6), 0.5)
    assert loss.divergence > 0


def test_the_tool_measures_a_checkpoint_and_writes_a_line(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "llama", tokenizer=True)
    out = tmp_path / "out.jsonl"
    done = CliRunner().invoke(main, f"--model {model} --window 40 --count 3 --json {out}".split())
    assert done.exit_code == 0, done.output
    results = json.loads(out.read_text())["results"]
    assert results["none"]["max_error"] == 0
    assert 0 < results["activations"]["mean_error"] < results["int8"]["mean_error"] < 0.2
    assert results["int8"]["perplexity"] == pytest.approx(results["none"]["perplexity"], rel=0.05)
