"""Safetensors files, whole and damaged: weights arrive in the model's dtype, and what is wrong is said in one line."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.checkpoints import make_checkpoint, write_config
from tests.helpers.paged_model import PagedModel
from worker.model_config import ModelError
from worker.models import Model, footprint, load_model
from worker.weights import Checkpoint, CheckpointError

UP, EMBEDDING = "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("whole"), "llama")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("sharded"), "llama", max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def load(folder: Path) -> Model:
    model, _ = load_model(folder, torch.float32, "cpu", None)
    return model


def error_of(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load(folder)
    assert isinstance(error.value, ModelError)
    assert "\n" not in str(error.value)
    return str(error.value)


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Rewrites model.safetensors with changed tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


def logits(folder: Path) -> torch.Tensor:
    return PagedModel(folder).prompt(0, list(range(30)))


def test_shards_hold_the_same_as_one_file(whole: Path, sharded: Path) -> None:
    assert logits(whole).equal(logits(sharded))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_dtypes_become_the_models(tmp_path: Path, stored: torch.dtype, target: torch.dtype) -> None:
    folder = make_checkpoint(tmp_path, "llama", dtype=stored)
    model, config = load_model(folder, target, "cpu", None)
    assert config.dtype == str(stored).removeprefix("torch.")
    tensors = load_file(folder / "model.safetensors")
    with Checkpoint(folder, "cpu", target) as weights:
        assert weights.take(UP, 160, 96).equal(tensors[UP].to(target))
        table = weights.table(EMBEDDING, 384, 96)
    assert table.dtype == (stored if stored.itemsize < target.itemsize else target)  # no wider than it must be
    assert table.to(target).equal(tensors[EMBEDDING].to(target))
    assert model.norm.weight.dtype == target  # type: ignore[attr-defined]
    assert model.embedding(torch.arange(3)).equal(tensors[EMBEDDING][:3].to(target))  # type: ignore[attr-defined]


def test_without_a_dtype_the_checkpoints_own_is_taken(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "opt", dtype=torch.bfloat16)
    for entry in (dict(dtype="bfloat16"), dict(dtype=None)):
        write_config(folder, **entry)
        model, _ = load_model(folder, None, "cpu", None)
        assert model.norm.weight.dtype == torch.bfloat16  # type: ignore[attr-defined]


def test_stacked_tensors_stand_one_below_the_other(whole: Path) -> None:
    tensors = load_file(whole / "model.safetensors")
    gate = UP.replace("up", "gate")
    with Checkpoint(whole, "cpu", torch.float32) as weights:
        assert weights.stack({gate: 160, UP: 160}, 96).equal(torch.cat((tensors[gate], tensors[UP])))


def test_parameters_are_counted_once(tmp_path: Path) -> None:
    tied = load(make_checkpoint(tmp_path / "tied", "llama", tie_word_embeddings=True))
    untied = load(make_checkpoint(tmp_path / "untied", "llama"))
    stored = load_file(tmp_path / "untied" / "model.safetensors")
    assert untied.num_parameters == sum(tensor.numel() for tensor in stored.values())
    assert untied.num_parameters - tied.num_parameters == 384 * 96


def test_tied_weights_may_be_stored_twice(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama", tie_word_embeddings=True)
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert load(folder)


def test_a_narrower_copy_of_tied_weights_is_the_same(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama", tie_word_embeddings=True)

    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors[EMBEDDING].bfloat16()
        tensors[EMBEDDING] = tensors["lm_head.weight"].float()

    edit(folder, narrow)
    assert load(folder)


def test_tied_weights_that_differ_are_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama", tie_word_embeddings=True)
    path = edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))
    message = "config.json ties it to the embedding (tie_word_embeddings), but it differs from it"
    assert error_of(folder) == f"{path}: tensor lm_head.weight: {message}"


def test_names_without_the_base_models_prefix(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "opt")
    expected = logits(folder)

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    edit(folder, strip)
    assert logits(folder).equal(expected)


def test_computed_tables_of_old_checkpoints_are_passed_over(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path)
    edit(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert load(folder)


def test_a_missing_shard(sharded: Path, tmp_path: Path) -> None:
    folder = copy(sharded, tmp_path)
    gone = sorted(folder.glob("*.safetensors"))[1]
    names = set(load_file(gone))
    gone.unlink()
    message = error_of(folder)
    assert message.startswith(f"{gone}: the shard is missing; tensor ")
    assert message.split("tensor ")[1].split()[0] in names


@pytest.mark.parametrize("keep", [0, 5, 300, 5000, -4])
def test_a_truncated_file(whole: Path, tmp_path: Path, keep: int) -> None:
    path = copy(whole, tmp_path) / "model.safetensors"
    content = path.read_bytes()[:keep]
    path.write_bytes(content)
    message = error_of(path.parent)
    assert message.startswith(f"{path}: truncated")
    assert ("header" in message) == (keep in (0, 5, 300))
    if keep in (5000, -4):
        assert f"the file at {len(content):,}" in message
        assert any(f"tensor {name} " in message for name in load_file(whole / "model.safetensors"))


def test_a_truncated_shard_is_named(sharded: Path, tmp_path: Path) -> None:
    path = sorted(copy(sharded, tmp_path).glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-1])
    assert error_of(path.parent).startswith(f"{path}: truncated: tensor ")


def test_what_is_no_safetensors_file_at_all(whole: Path, tmp_path: Path) -> None:
    path = copy(whole, tmp_path) / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 4) + b"not json, but long enough")
    assert error_of(path.parent).startswith(f"{path}: ")


def test_a_wrong_shape(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path)
    path = edit(folder, lambda tensors: tensors.update({UP: torch.zeros(160, 95)}))
    assert error_of(folder) == f"{path}: tensor {UP} has shape [160, 95], config.json makes it [160, 96]"


def test_a_wrong_number_of_dimensions(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path)
    path = edit(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(96, 1)}))
    assert error_of(folder) == f"{path}: tensor model.norm.weight has shape [96, 1], config.json makes it [96]"


def test_a_missing_tensor(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path)
    edit(folder, lambda tensors: tensors.pop(UP))
    assert error_of(folder) == f"{folder}: tensor {UP} is missing"


def test_a_bias_that_config_json_does_not_mention_is_unexpected(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path)
    bias = "model.layers.0.self_attn.q_proj.bias"
    path = edit(folder, lambda tensors: tensors.update({bias: torch.zeros(96)}))
    assert error_of(folder) == f"{path}: tensor {bias} has no place in this architecture"


def test_more_layers_than_config_json_says(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path)
    write_config(folder, num_hidden_layers=1)
    assert "tensor model.layers.1." in error_of(folder) and ", and 8 more, has no place" in error_of(folder)


def test_a_tensor_that_is_in_no_index_is_unexpected(sharded: Path, tmp_path: Path) -> None:
    folder = copy(sharded, tmp_path)
    path = sorted(folder.glob("*.safetensors"))[0]
    save_file(load_file(path) | {"extra": torch.zeros(2)}, path)
    assert error_of(folder) == f"{path}: tensor extra has no place in this architecture"


def test_a_tensor_that_is_not_where_the_index_says(sharded: Path, tmp_path: Path) -> None:
    folder = copy(sharded, tmp_path)
    index = folder / "model.safetensors.index.json"
    entries = json.loads(index.read_text())
    others = set(entries["weight_map"].values()) - {entries["weight_map"][UP]}
    entries["weight_map"][UP] = min(others)
    index.write_text(json.dumps(entries))
    assert error_of(folder).startswith(f"{folder / min(others)}: tensor {UP} is missing, though")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "weights.bin", 7])
def test_an_index_that_leads_elsewhere(sharded: Path, tmp_path: Path, name: object) -> None:
    folder = copy(sharded, tmp_path)
    index = folder / "model.safetensors.index.json"
    entries = json.loads(index.read_text())
    entries["weight_map"][UP] = name
    index.write_text(json.dumps(entries))
    assert error_of(folder) == f"{index}: tensor {UP}: {name!r} is no safetensors file of this directory"


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_an_index_that_cannot_be_read(sharded: Path, tmp_path: Path, text: str) -> None:
    folder = copy(sharded, tmp_path)
    (folder / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json: no weight_map that can be read" in error_of(folder)


def test_integers_are_no_weights(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path)
    path = edit(folder, lambda tensors: tensors.update({UP: torch.zeros(160, 96, dtype=torch.int8)}))
    assert error_of(folder) == f"{path}: tensor {UP} is stored as I8; F32, F16, BF16 are implemented"


def test_pickles_are_refused_unread(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"whatever")
    assert error_of(folder).startswith(f"{folder / 'pytorch_model.bin'}: pickled weights are not read")


def test_a_size_that_no_memory_could_hold_is_a_wrong_shape(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path)
    write_config(folder, vocab_size=10**12)
    assert "tensor model.embed_tokens.weight has shape [384, 96], config.json makes it [1000000000000, 96]" in error_of(folder)


def test_a_file_without_tensors(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path)
    edit(folder, lambda tensors: tensors.clear())
    write_config(folder, dtype=None)
    with pytest.raises(CheckpointError, match=r"tensor model\.embed_tokens\.weight is missing"):
        load_model(folder, None, "cpu", None)


def test_no_weights_at_all(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path)
    (folder / "model.safetensors").unlink()
    assert error_of(folder) == f"{folder}: holds neither model.safetensors nor model.safetensors.index.json"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_no_file_stays_mapped(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path)
    with Checkpoint(folder, "cpu", torch.float32) as weights:
        weights.take(UP, 160, 96)
        assert str(folder) in Path("/proc/self/maps").read_text()
    model = load(folder)
    assert str(folder) not in Path("/proc/self/maps").read_text() and model.num_parameters > 0


# ------------------------------------------------------------------------------------------------------------------ random


def test_random_weights_are_the_same_for_a_seed_and_need_no_file(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    first, again, other = (load_model(folder, torch.float32, "cpu", None, weights=f"random:{seed}")[0] for seed in (1, 1, 2))
    states = [dict(model.named_parameters()) for model in (first, again, other)]
    table = "embedding.table"
    assert states[0][table].equal(states[1][table]) and not states[0][table].equal(states[2][table])
    assert 0.018 < float(states[0][table].std()) < 0.022
    assert (states[0]["norm.weight"] == 1).all()
    assert footprint(folder, torch.float32, "none", "random:1").resident > 4 * first.num_parameters * 0.99


def test_random_weights_have_the_shape_of_the_stored_ones(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "opt")
    stored, made = (load_model(folder, None, "cpu", None, weights=weights)[0] for weights in ("stored", "random:5"))
    assert stored.num_parameters == made.num_parameters
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(stored.parameters(), made.parameters(), strict=True))
