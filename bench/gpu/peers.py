"""What transformers does on the same GPU with the same shape: padded static batches, and its own continuous batching.

The model is made up on the device: its weights have no influence on its speed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.gpu.check import Check
from bench.gpu.engine import Request
from bench.gpu.models import config_of, transformers
from bench.roofline import Shape

_WAIT_S = 1.0


def random_model(check: Check, shape: Shape, dtype: torch.dtype) -> Any:
    dtype = torch.float32 if check.device == "cpu" else dtype
    with torch.device(check.device):
        model = transformers().AutoModelForCausalLM.from_config(config_of(shape), dtype=dtype, attn_implementation="sdpa")
    model.generation_config.eos_token_id = None
    return model.eval()


def release(check: Check) -> None:
    """After the last name of a model is gone."""
    gc.collect()
    if check.device == "cuda":
        torch.cuda.empty_cache()


class _Clock:
    """A streamer that keeps when each step's tokens came; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@dataclass(frozen=True)
class Static:
    """Batches of `model.generate`, one after the other."""

    seconds: float  # of all batches
    num_batches: int
    num_measured: int  # the first ones; the others' time follows from their longest output
    step_s: float


def static_batches(check: Check, model: Any, requests: Sequence[Request], rows: int, budget_s: float) -> Static:
    """All prompts are equally long. A batch takes prefill + (longest output − 1) · step; those that time does not allow to run
    are put in with the mean prefill and step of those that ran."""
    groups = [requests[at : at + rows] for at in range(0, len(requests), rows)]
    _generate(check, model, [replace_tokens(request, 3) for request in groups[0]])  # warms up
    began, prefills, steps, total = time.perf_counter(), list[float](), list[float](), 0.0
    for group in groups:
        if prefills and time.perf_counter() - began > budget_s:
            break
        first, last = _generate(check, model, group)
        longest = max(request.max_tokens for request in group)
        prefills.append(first)
        steps.append((last - first) / max(1, longest - 1))
        total += last
    prefill_s, step_s = sum(prefills) / len(prefills), sum(steps) / len(steps)
    for group in groups[len(prefills) :]:
        total += prefill_s + step_s * (max(request.max_tokens for request in group) - 1)
    return Static(total, len(groups), len(prefills), step_s)


def replace_tokens(request: Request, max_tokens: int) -> Request:
    return Request(request.prompt, max_tokens)


def _generate(check: Check, model: Any, group: Sequence[Request]) -> tuple[float, float]:
    """Seconds to the first token and to the last."""
    ids = torch.tensor([request.prompt.tolist() for request in group], device=check.device)
    longest = max(request.max_tokens for request in group)
    config = transformers().GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=longest)
    clock, began = _Clock(), time.perf_counter()
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=clock)
    made = out.shape[1] - ids.shape[1]
    if made != longest:
        raise RuntimeError(f"generate made {made} tokens of {longest}")
    return clock.times[1] - began, clock.times[-1] - began


def continuous_seconds(check: Check, model: Any, requests: Sequence[Request], rows: int) -> tuple[float, str]:
    """Of all requests, at most `rows` at a time, after a few to warm up; and the attention that was used. transformers chooses
    it, and where that needs something that is not here, it is told to take torch's."""
    try:
        return _continuous(model, requests, rows)
    except Exception as error:
        chosen = f"{model.config._attn_implementation}: {error}"
        model.set_attn_implementation("paged|sdpa")
        return _continuous(model, requests, rows)[0], f"paged|sdpa, as its own choice failed ({chosen[:80]})"


def _continuous(model: Any, requests: Sequence[Request], rows: int) -> tuple[float, str]:
    size = 16 if len(requests[0].prompt) < 64 else 256
    # One group for each of `rows` and some spare ones; transformers would take nine tenths of the memory.
    blocks = sum(-(-(len(r.prompt) + r.max_tokens) // size) + 1 for r in requests)
    config = transformers().ContinuousBatchingConfig(
        block_size=size, num_blocks=blocks, max_batch_tokens=max(rows, 4096 if size == 256 else 32), max_requests_per_batch=rows
    )
    generation = transformers().GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    with model.continuous_batching_context_manager(generation, continuous_batching_config=config) as manager:
        _all(manager, [replace_tokens(request, 4) for request in requests[:rows]])
        began = time.perf_counter()
        _all(manager, requests)
        return time.perf_counter() - began, str(model.config._attn_implementation)


def _all(manager: Any, requests: Sequence[Request]) -> None:
    names = {manager.add_request(r.prompt.tolist(), max_new_tokens=r.max_tokens, eos_token_id=-1) for r in requests}
    wanted = sum(request.max_tokens for request in requests)
    made, deadline = 0, time.monotonic() + 60
    while names:
        output = manager.get_result(timeout=_WAIT_S)
        if output is None:
            if not manager.is_running():
                raise RuntimeError("transformers' continuous batching loop has ended")
            if time.monotonic() > deadline:
                raise RuntimeError("transformers' continuous batching did not end within a minute")
            continue
        if output.error is not None:
            raise RuntimeError(output.error)
        if output.is_finished():
            made += len(output.generated_tokens)
            names.discard(output.request_id)
    if made != wanted:
        raise RuntimeError(f"transformers' continuous batching made {made} tokens of {wanted}")
