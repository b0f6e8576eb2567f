"""Models by their shape: a config.json, weights made up on the device, and the worker's GPU side around them."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from bench.gpu.check import Check
from bench.gpu.engine import Engine
from bench.roofline import SHAPES, Machine, Shape
from worker.config import WorkerConfig

if TYPE_CHECKING:
    from worker.gpu.executor import GpuExecutor

_TINY = {"layers": 2, "hidden": 64, "heads": 2, "ffn": 96, "vocab": 256, "max_len": 256}


def shape_of(name: str, check: Check) -> Shape:
    shape = SHAPES[name]
    if not check.tiny:
        return shape
    return replace(shape, **_TINY, kv_heads=2 if shape.kv_heads == shape.heads else 1)  # type: ignore[arg-type]


def machine_of(check: Check) -> Machine:
    return Machine("this GPU", 0, check.limits.bandwidth, check.limits.peak, "measured in this run")


def transformers() -> Any:
    """Its annotations are not for strict checks."""
    return importlib.import_module("transformers")


def config_of(shape: Shape) -> Any:
    """transformers' configuration of this shape."""
    sizes: dict[str, Any] = dict(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.max_len,
        tie_word_embeddings=shape.tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    if not shape.gated:
        return transformers().OPTConfig(
            ffn_dim=shape.ffn, word_embed_proj_dim=shape.hidden, architectures=["OPTForCausalLM"], **sizes
        )
    return transformers().LlamaConfig(
        intermediate_size=shape.ffn,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        architectures=["LlamaForCausalLM"],
        **sizes,
    )


@dataclass(frozen=True)
class Started:
    engine: Engine
    executor: GpuExecutor
    shape: Shape
    seconds: dict[str, float]  # of the start, by part


def start(
    check: Check, shape: Shape, folder: Path, dtype: str, max_rows: int, max_step_tokens: int, swap_gib: float | None = 0.0
) -> Started:
    """Loads, sizes the KV cache by all memory, captures. swap_gib None: the worker's own choice."""
    config_of(shape).save_pretrained(folder)
    sizes: dict[str, Any] = {"max_batch_rows": max_rows, "max_step_tokens": max_step_tokens}
    if check.tiny:
        sizes = {"max_batch_rows": 4, "max_step_tokens": 32}
    if check.device == "cpu":
        swap_gib = 0.0
        sizes |= {"num_blocks": 64, "threads": 1}
    # The interpreter has no half precision worth the name.
    dtype = "float32" if check.device == "cpu" else dtype
    config = WorkerConfig(
        connect="inproc://none",
        model=str(folder),
        device=check.device,
        dtype=dtype,
        weights="random:1",
        max_model_len=shape.max_len,
        swap_gib=swap_gib,
        **sizes,
    )
    return start_config(config, folder, shape)


def start_config(config: WorkerConfig, folder: Path, shape: Shape) -> Started:
    from worker import compiled, kernels, loading
    from worker.gpu import memory
    from worker.gpu.executor import GpuExecutor

    took: dict[str, float] = {}
    with _timed(took, "weights", loading, "load_model"), _timed(took, "profile", memory, "measure"):
        began = time.perf_counter()
        loaded = loading.load(config, folder)
        took["load"] = time.perf_counter() - began
    if config.device == "cpu":
        compiled.unload()
        kernels.load()
    began = time.perf_counter()
    executor = GpuExecutor(loaded)
    took["capture"] = time.perf_counter() - began
    return Started(Engine(executor), executor, shape, took)


@contextmanager
def _timed(took: dict[str, float], name: str, module: Any, function: str) -> Iterator[None]:
    """Adds what the module's function takes."""
    inner = getattr(module, function)

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            took[name] = took.get(name, 0) + time.perf_counter() - began

    with patch.object(module, function, timed):
        yield
