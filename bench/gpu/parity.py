"""The whole engine on the GPU against transformers: greedy tokens in float32, logits in bfloat16."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.gpu.check import Check, Figure
from bench.gpu.engine import Request, random_prompts
from bench.gpu.models import start_config, transformers
from bench.roofline import SHAPES
from worker.config import WorkerConfig

# Head size, query and key-value heads as in models that are served; the rest small.
_ENTRIES: dict[str, dict[str, Any]] = {
    "llama": dict(head_dim=128, num_attention_heads=8, num_key_value_heads=2, hidden_size=512, intermediate_size=1024),
    "qwen3": dict(head_dim=128, num_attention_heads=6, num_key_value_heads=2, hidden_size=384, intermediate_size=768),
    "opt": dict(hidden_size=512, ffn_dim=1024, num_attention_heads=4),
}
_TINY: dict[str, dict[str, Any]] = {
    "llama": dict(head_dim=32, num_attention_heads=4, num_key_value_heads=2, hidden_size=64),
    "qwen3": dict(head_dim=32, num_attention_heads=2, num_key_value_heads=1, hidden_size=64),
    "opt": dict(hidden_size=64, num_attention_heads=2),
}
_VOCAB = 384
_BF16_FACTOR = 2.0  # our error may be so many times that of transformers in bfloat16, both against float32


def run(check: Check) -> None:
    for architecture in _ENTRIES:
        with tempfile.TemporaryDirectory() as folder:
            name = f"engine parity, {architecture}"
            check.attempt(f"{name}, float32", lambda: _tokens(check, architecture, Path(folder)), 10)  # noqa: B023
            check.attempt(f"{name}, bfloat16", lambda: _logits(check, architecture, Path(folder)), 5)  # noqa: B023


def _helper(name: str) -> Any:
    """Of the tests: they are not installed, and not for strict checks."""
    return importlib.import_module(f"tests.helpers.{name}")


def _config(check: Check, folder: Path, dtype: str) -> WorkerConfig:
    sizes: dict[str, Any] = {"max_batch_rows": check.count(16, 4), "max_step_tokens": check.count(256, 32)}
    return WorkerConfig(
        connect="inproc://none",
        model=str(folder),
        device=check.device,
        dtype=dtype,
        max_model_len=512,
        num_blocks=160,
        swap_gib=0.0,
        threads=1 if check.device == "cpu" else None,
        **sizes,
    )


def _tokens(check: Check, architecture: str, folder: Path) -> Iterator[Figure]:
    layers = check.count(4, 2)
    entries = (_TINY if check.tiny else _ENTRIES)[architecture]
    _helper("checkpoints").make_checkpoint(folder, architecture, num_hidden_layers=layers, **entries)
    reference, draw = _helper("reference"), np.random.default_rng(7)
    count = check.count(12, 2)
    lengths = draw.integers(1, check.count(200, 12), count).tolist()
    outputs = draw.integers(check.count(32, 2), check.count(64, 4), count).tolist()
    prompts = [random_prompts(1, length, _VOCAB, seed)[0] for seed, length in enumerate(lengths)]
    expected = reference.greedy(folder, [prompt.tolist() for prompt in prompts], outputs)
    started = start_config(_config(check, folder, "float32"), folder, SHAPES["smollm-135m"])
    requests = [Request(prompt, tokens) for prompt, tokens in zip(prompts, outputs, strict=True)]
    tight = -(-max(map(sum, zip(lengths, outputs, strict=True))) // 16) + 3  # blocks: some must give way
    for name, blocks in (("", 160), (", with preemptions", tight)):
        run = started.engine.serve(requests, num_blocks=blocks)
        comparison = reference.Comparison()
        wrong = []
        for at, (got, wanted) in enumerate(zip(run.outputs(count), expected, strict=True)):
            try:
                comparison.add(f"request {at}", got, wanted)
            except AssertionError as error:
                wrong.append(str(error))
        note = f"{count} requests, {run.output_tokens} tokens, {len(comparison.ties)} near ties, {run.preemptions} preemptions"
        what = f"{architecture}, float32: requests that differ from transformers{name}"
        yield Figure("parity", what, len(wrong), "", "0", 0, True, "; ".join([note, *wrong[:2]]), {"wrong": wrong})
        allowed = max(1, comparison.num_tokens * reference.TIES_PER_TOKEN)
        what = f"{architecture}, float32: near ties decided otherwise{name}"
        yield Figure("parity", what, len(comparison.ties), "", "a gap below 1e-4", allowed, True)
    started.executor.close()


def _logits(check: Check, architecture: str, folder: Path) -> Iterator[Figure]:
    """Of one prompt's every token. The error of transformers itself in bfloat16 is the measure."""
    prompt = torch.from_numpy(random_prompts(1, check.count(200, 12), _VOCAB, 3)[0]).long()
    models = transformers().AutoModelForCausalLM
    exact = _reference_logits(models, folder, torch.float32, prompt, "cpu")
    theirs = _error(_reference_logits(models, folder, torch.bfloat16, prompt, check.device), exact)
    got = _our_logits(check, folder, prompt)
    ours = _error(got, exact)
    agree = float((got.argmax(-1) == exact.argmax(-1)).float().mean())
    note = f"relative RMS error {ours:.2%}, transformers' own {theirs:.2%}; the best token is float32's for {agree:.1%}"
    what = f"{architecture}, bfloat16: error of the logits ÷ that of transformers"
    yield Figure("parity", what, ours / theirs, "", "1", _BF16_FACTOR, True, note)


def _reference_logits(models: Any, folder: Path, dtype: torch.dtype, prompt: torch.Tensor, device: str) -> torch.Tensor:
    model = models.from_pretrained(folder, dtype=dtype).eval().to(device)
    with torch.inference_mode():
        logits: torch.Tensor = model(prompt[None].to(device)).logits[0].float().cpu()
    return logits


def _our_logits(check: Check, folder: Path, prompt: torch.Tensor) -> torch.Tensor:
    """In two chunks, so that keys and values are read back from the cache."""
    from worker import compiled, kernels, loading
    from worker.attention.base import AttentionInputs
    from worker.attention.triton_paged import TritonPagedAttention

    loaded = loading.load(_config(check, folder, "bfloat16"), folder)
    if check.device == "cpu":
        compiled.unload()
        kernels.load()
    size, count, hidden = loaded.facts.block_size, len(prompt), []
    table = np.random.default_rng(0).permutation(np.arange(1, 1 + -(-count // size), dtype=np.int32))
    for first, end in ((0, count // 2), (count // 2, count)):
        positions = np.arange(first, end)
        slots = table[positions // size].astype(np.int64) * size + positions % size
        query_start, lens = np.array([0, end - first], np.int32), np.array([end], np.int32)
        inputs = AttentionInputs.of(query_start, lens, table[None], slots, loaded.device)
        ids = prompt[first:end].to(loaded.device)
        at = torch.from_numpy(positions).to(loaded.device)
        with torch.inference_mode():
            hidden.append(loaded.model.forward(ids, at, TritonPagedAttention(), loaded.kv, inputs).clone())
    with torch.inference_mode():
        logits: torch.Tensor = loaded.model.logits(torch.cat(hidden)).float().cpu()
    return logits


def _error(logits: torch.Tensor, exact: torch.Tensor) -> float:
    return float((logits - exact).square().mean().sqrt() / exact.square().mean().sqrt())
