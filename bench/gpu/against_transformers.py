"""G5: the engine ÷ transformers' own continuous batching, the same prompts on the same GPU."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.gpu import peers
from bench.gpu.check import Check, Figure
from bench.gpu.engine import burst
from bench.gpu.models import shape_of, start

_PROMPT, _OUTPUT = 256, 96
_GOALS = {32: 1.5, 256: 2.0}


def run(check: Check) -> None:
    check.attempt("transformers' continuous batching", lambda: _compared(check), 25)


def _compared(check: Check) -> Iterator[Figure]:
    shape = shape_of("llama-3-8b", check)
    prompt, output = check.count(_PROMPT, 4), check.count(_OUTPUT, 3)
    if check.quick:
        prompt, output = _PROMPT, _OUTPUT // 2
    bursts = {rows: burst(min(rows, 2) if check.tiny else rows, prompt, output, shape.vocab, rows) for rows in _GOALS}
    model = peers.random_model(check, shape, torch.bfloat16)
    theirs, problems = {}, []
    for rows, requests in bursts.items():
        try:
            theirs[rows] = peers.continuous_seconds(check, model, requests, len(requests))
        except Exception as error:
            problems.append(f"B = {rows}: {error}")
    del model
    peers.release(check)
    with tempfile.TemporaryDirectory() as folder:
        engine = start(check, shape, Path(folder), "bfloat16", 256, 4096).engine
    engine.serve(burst(2, prompt, 4, shape.vocab))
    for rows, requests in bursts.items():
        ours = engine.serve(requests).seconds
        tokens = len(requests) * output
        if rows not in theirs:
            yield Figure("", f"llama-3-8b: burst of {rows}", tokens / ours, "tokens/s", note="theirs failed")
            continue
        seconds, attention = theirs[rows]
        note = f"{tokens / ours:,.0f} ÷ {tokens / seconds:,.0f} output tokens/s, prompts of {prompt}, {attention}"
        what = f"llama-3-8b, B = {rows}: throughput ÷ transformers' continuous batching"
        yield Figure("G5", what, seconds / ours, "", "–", _GOALS[rows], note=note)
    if problems:
        raise RuntimeError("transformers: " + "; ".join(problems))
