"""`python -m bench.cpu_transformers ENGINE`: transformers' static or continuous batches, in a process of their own.

A job comes on standard input as JSON, token times go to standard output. ENGINE: static-N (`model.generate` on batches of N,
left-padded, one after the other) or continuous (ContinuousBatchingManager over paged SDPA).
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from bench.cpu_bounds import groups, longest
from bench.cpu_workload import Outcome, Request, Times, peak_tree_bytes, single_rate
from worker import openmp

_PAGE = 32  # tokens of a block of the continuous batches' cache
_STEP_TOKENS = 512  # most of them in one step of the continuous batches, as of Carousel by default
_WARM_TOKENS = 8
_GET_S = 1.0
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    # The best of passive (14.5 tok/s), active (15.8) and this (16.8), and what Carousel's worker does.
    **openmp.SETTINGS,
}

Generate: TypeAlias = Callable[[Sequence[Request]], Times]


class EngineFailedError(Exception):
    """The process ended with an error; the text ends with what it said last."""


@dataclass(frozen=True)
class Taken:
    token_s: Times
    single_tokens_per_s: float
    peak_bytes: int | None
    ready_s: float


def run(engine: str, model: Path, requests: Sequence[Request], single: Request) -> tuple[Outcome, Times]:
    """One process from its start to its end. Raises EngineFailedError."""
    job = {"model": str(model), "requests": [asdict(r) for r in requests], "single": asdict(single), "began": time.time()}
    command = [sys.executable, "-m", "bench.cpu_transformers", engine]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, env=_ENVIRONMENT | os.environ)
    if done.returncode:
        raise EngineFailedError(f"transformers' {engine} ended with exit code {done.returncode}: {done.stderr[-2000:]}")
    taken = Taken(**json.loads(done.stdout.splitlines()[-1]))
    more = {"ready_s": taken.ready_s, "single_tokens_per_s": taken.single_tokens_per_s}
    return Outcome.of(engine, requests, taken.token_s, taken.peak_bytes, **more), taken.token_s


def _work(engine: str, job: dict[str, Any]) -> Taken:
    import torch

    requests, single = [Request(**fields) for fields in job["requests"]], Request(**job["single"])
    model = (
        _transformers()
        .AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, attn_implementation="sdpa")
        .eval()
    )
    if engine == "continuous":
        return _continuous(model, requests, single, job["began"])
    batch = int(engine.removeprefix("static-"))
    return _served(lambda some: _static(model, some, batch), requests, single, job["began"])


def _transformers() -> Any:
    """Imported late, by the process that runs it alone; and its annotations are not for strict checks."""
    return importlib.import_module("transformers")


def _served(generate: Generate, requests: Sequence[Request], single: Request, began: float) -> Taken:
    ready_s = time.time() - began
    generate([Request(single.prompt_ids, _WARM_TOKENS)])
    alone = single_rate(generate([single])[0])
    return Taken(generate(requests), alone, peak_tree_bytes(os.getpid()), ready_s)


class _Clock:
    """A streamer that keeps when each step's tokens came; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _static(model: Any, requests: Sequence[Request], batch: int) -> Times:
    """A row's tokens count until it has as many as it asked for; the batch goes on until all have."""
    import torch

    begin = time.perf_counter()
    found: Times = []
    for group in groups(requests, batch):
        width = max(len(request.prompt_ids) for request in group)
        padding = [width - len(request.prompt_ids) for request in group]
        ids = torch.tensor([[0] * pad + request.prompt_ids for pad, request in zip(padding, group, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding])
        config = _transformers().GenerationConfig(
            do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=longest(group)
        )
        clock = _Clock()
        model.generate(ids, attention_mask=mask, generation_config=config, streamer=clock)
        steps = [at - begin for at in clock.times[1:]]
        found += [steps[: request.max_tokens] for request in group]
    return found


def _continuous(model: Any, requests: Sequence[Request], single: Request, began: float) -> Taken:
    everything = [*requests, single]
    pages = sum(-(-(len(request.prompt_ids) + request.max_tokens) // _PAGE) + 1 for request in everything)
    config = _transformers().ContinuousBatchingConfig(
        page_size=_PAGE, num_blocks=pages, max_batch_tokens=_STEP_TOKENS, max_requests_per_batch=len(everything)
    )
    generation = _transformers().GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    with model.continuous_batching_context_manager(generation, continuous_batching_config=config) as manager:

        def generate(some: Sequence[Request]) -> Times:
            begin = time.perf_counter()
            ids = [
                manager.add_request(r.prompt_ids, max_new_tokens=r.max_tokens, record_timestamps=True, eos_token_id=-1)
                for r in some
            ]
            finished: dict[str, Any] = {}
            while len(finished) < len(ids):
                output = manager.get_result(timeout=_GET_S)
                if output is None and not manager.is_running():
                    raise RuntimeError("the continuous batching loop has ended")
                if output is not None and output.error is not None:
                    raise RuntimeError(output.error)
                if output is not None and output.is_finished():
                    finished[output.request_id] = output
            return [[at - begin for at in finished[name].timestamps] for name in ids]

        return _served(generate, requests, single, began)


if __name__ == "__main__":
    print(json.dumps(asdict(_work(sys.argv[1], json.load(sys.stdin)))))
