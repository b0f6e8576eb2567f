"""What a loaded model takes of the memory: its packed weights and little more, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench import random_checkpoint
from bench.roofline import Shape
from worker.config import QUANTIZATIONS

MOST = 1.1  # times the weights as they are multiplied with
SHAPE = Shape("test", layers=4, hidden=768, heads=12, kv_heads=4, ffn=3072, vocab=12_288, max_len=512, tied=True)

# Loads a small model, for what libraries take for themselves, and then the one to be measured. What is mapped from files counts
# too: the checkpoint's pages must be gone.
SCRIPT = """
import sys
from pathlib import Path
import torch
from worker.loading import _release_freed_memory
from worker.models import footprint, load_model

def resident():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss:"))

small, large, quantization = *map(Path, sys.argv[1:3]), sys.argv[3]
kept = [load_model(small, torch.float32, "cpu", None, quantization)]
before = resident()
kept.append(load_model(large, torch.float32, "cpu", None, quantization))
_release_freed_memory()
print(resident() - before, footprint(large, torch.float32, quantization).resident)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    small = Shape("small", layers=1, hidden=64, heads=2, kv_heads=1, ffn=64, vocab=512, max_len=512, tied=True)
    folder = tmp_path_factory.mktemp("models")
    return random_checkpoint.write(small, folder / "small"), random_checkpoint.write(SHAPE, folder / "large")


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the kernel does not say what is resident")
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_loaded_model_takes_a_tenth_more_than_its_packed_weights(models: tuple[Path, Path], quantization: str) -> None:
    command = [sys.executable, "-c", SCRIPT, *map(str, models), quantization]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=Path(__file__).parents[2])
    grown, packed = map(int, done.stdout.split())
    assert packed > 50 << 20
    assert 0.95 * packed < grown < MOST * packed, f"{grown >> 20} MiB for {packed >> 20} MiB of weights"
