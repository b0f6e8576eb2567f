"""A recorded model gives what its layers give one after the other, and each row the same bits in any company."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcache.storage import KVStorage
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.paged_model import PagedModel
from worker import compiled
from worker.models.recorded import Recorded

panels = pytest.importorskip("worker.compiled.panels", reason="numba is not installed")
pytestmark = pytest.mark.skipif(not panels.HAS_FLOATS, reason="this processor has no AVX512")

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama biases": ("llama", dict(attention_bias=True, mlp_bias=True, num_key_value_heads=6)),
    "llama odd": (
        "llama",
        dict(hidden_size=90, intermediate_size=167, num_attention_heads=5, num_key_value_heads=1, head_dim=18),
    ),
    "qwen3": ("qwen3", dict(head_dim=40)),
    "opt": ("opt", dict(ffn_dim=210)),
    "opt gelu": ("opt", dict(activation_function="gelu", ffn_dim=203)),
    "opt-350m": ("opt", dict(do_layer_norm_before=False, word_embed_proj_dim=48)),
    "opt plain norms": ("opt", dict(layer_norm_elementwise_affine=False)),
}
STEPS = [  # rows and how many tokens of each: prompts, chunks, single tokens, and more rows than before
    [(0, 5)],
    [(0, 1), (1, 70), (2, 1)],
    [(2, 1), (0, 1), (1, 1)],
    [(3, 33), (1, 2), (4, 17), (0, 40)],
    [(row, 1) for row in range(30)],
]


@pytest.fixture(autouse=True)
def _loops() -> Iterator[None]:
    compiled.load()
    yield
    compiled.unload()


@pytest.fixture(params=SHAPES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    architecture, overrides = SHAPES[request.param]
    return make_checkpoint(tmp_path, architecture, **overrides)


def logits(model: PagedModel, only: int | None = None) -> list[Tensor]:
    """Of STEPS, or of what they compute of one row."""
    model.forget()
    tokens, got = torch.randint(0, 300, (30, 200), generator=torch.Generator().manual_seed(0)).tolist(), []
    done = dict.fromkeys(range(30), 0)
    for step in STEPS:
        rows = []
        for row, count in step:
            rows.append((row, tokens[row][done[row] : done[row] + count]))
            done[row] += count
        chosen = [row for row in rows if only in (None, row[0])]
        got += model.step(chosen) if chosen else []
    return got


@pytest.mark.parametrize(
    "quantization", ["none", pytest.param("int8", marks=pytest.mark.skipif(not panels.HAS_BYTES, reason="no VNNI"))]
)
def test_as_the_layers_one_after_the_other(folder: Path, quantization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = PagedModel(folder, quantization=quantization, num_blocks=200)
    runs, run = [], compiled.run
    monkeypatch.setattr(compiled, "run", lambda *arguments: runs.append(run(*arguments)))
    got = logits(model)
    assert len(runs) == len(STEPS)
    monkeypatch.setattr(Recorded, "forward", lambda *_: None)
    whole, expected = torch.cat(got), torch.cat(logits(model))
    # A number that is rounded to another integer changes all that comes after it.
    assert (whole - expected).norm() < (1e-5 if quantization == "none" else 0.02) * expected.norm()
    assert len(runs) == len(STEPS)


def test_a_row_is_the_same_bits_in_any_company(folder: Path) -> None:
    model = PagedModel(folder, num_blocks=200)
    of_row = [got for got, (row, _) in zip(logits(model), [pair for step in STEPS for pair in step], strict=True) if row == 1]
    assert torch.equal(torch.cat(of_row), torch.cat(logits(model, only=1)))


def test_another_cache_and_none_that_is_float32(folder: Path) -> None:
    model = PagedModel(folder, num_blocks=200)
    first = logits(model)
    shape = model.config
    model.kv = KVStorage(shape.num_layers, 200, shape.num_kv_heads, 16, shape.head_dim, torch.float32, "cpu")
    assert torch.equal(torch.cat(logits(model)), torch.cat(first))
    model.kv = KVStorage(shape.num_layers, 200, shape.num_kv_heads, 16, shape.head_dim, torch.float16, "cpu")
    torch.testing.assert_close(torch.cat(logits(model)), torch.cat(first), atol=0.05, rtol=0)  # by the layers
