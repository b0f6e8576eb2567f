"""What an image's build puts into Triton's cache is what a worker looks for: each kernel once, whatever the number of rows."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers.checkpoints import make_checkpoint

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]


def precompile(cache: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "worker.gpu.precompile", *arguments]
    environment |= {"TRITON_CACHE_DIR": str(cache)} | variables
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200)


def binaries(cache: Path) -> Counter[str]:
    return Counter(path.stem for path in cache.glob("*/*.cubin"))


def test_every_kernel_is_compiled_once_and_found_again(tmp_path: Path) -> None:
    head = dict(head_dim=64, num_attention_heads=4, num_key_value_heads=2, hidden_size=64)
    model = make_checkpoint(tmp_path / "model", "qwen3", max_position_embeddings=4096, **head)
    for weights in model.glob("*.safetensors"):
        weights.unlink()  # a shape is enough
    cache = tmp_path / "cache"
    said = precompile(cache, "--model", str(model))
    assert said.returncode == 0, said.stderr
    found = binaries(cache)
    assert {"paged_attention_kernel", "norm_rotate_and_write_kernel", "draw_kernel", "copy_blocks_kernel"} <= found.keys()
    assert said.stdout.startswith(f"{len(found)} kernels for sm_90: ")
    twice = {name for name, count in found.items() if count > 1}
    assert twice <= {"paged_attention_kernel"}, "its variants are few, by the heuristics"
    assert precompile(cache, "--model", str(model)).returncode == 0
    assert binaries(cache) == found, "nothing was left to compile"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="the stubs are C")
def test_with_stubs_nothing_is_left_for_a_compiler(tmp_path: Path) -> None:
    head = dict(head_dim=64, num_attention_heads=4, num_key_value_heads=2, hidden_size=64)
    model = make_checkpoint(tmp_path / "model", "llama", max_position_embeddings=4096, **head)
    cache, stub = tmp_path / "cache", tmp_path / "stub"
    stub.mkdir()
    subprocess.run(["gcc", "-shared", "-o", str(stub / "libcuda.so.1"), "-x", "c", "/dev/null"], check=True)
    where = {"TRITON_LIBCUDA_PATH": str(stub), "LD_LIBRARY_PATH": str(stub)}
    said = precompile(cache, "--model", str(model), "--stubs", **where)
    assert said.returncode == 0, said.stderr
    built = Counter(path.name.split(".")[0] for path in cache.glob("*/*.so"))
    assert built["cuda_utils"] == 1
    if [int(part) for part in triton.__version__.split(".")[:2]] < [3, 7]:  # later ones launch through cuda_utils
        assert built["__triton_launcher"] >= len(binaries(cache)) // 2
    assert precompile(cache, "--model", str(model), "--stubs", CC="/bin/false", **where).returncode == 0
    emptied = precompile(tmp_path / "empty", "--model", str(model), "--stubs", CC="/bin/false", **where)
    assert emptied.returncode != 0, "an empty cache needs one"


def test_what_has_no_config_is_refused_in_one_line(tmp_path: Path) -> None:
    said = precompile(tmp_path / "cache", "--model", str(tmp_path))
    assert said.returncode == 1 and said.stderr.startswith("precompile: ") and said.stderr.count("\n") == 1
