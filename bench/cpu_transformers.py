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

from bench.cpu_bounds import longest
from bench.cpu_workload import Outcome, Request, Times, peak_tree_bytes, single_rate
from worker import openmp

_PAGE = 32  # tokens of a block of the continuous batches' cache
_STEP_TOKENS = 512  # most of them in one step of the continuous batches, as of Carousel by default
_WARM_TOKENS = 8
_WARM_REQUESTS = 16
_GET_S = 1.0
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    # The best of passive (14.5 tok/s), active (15.8) and this (16.8), and what Carousel's worker does.
    **openmp.SETTINGS,
}

Generate: TypeAlias = Callable[[Sequence[Request], Sequence[float]], Times]


class EngineFailedError(Exception):
    """The process ended with an error; the text ends with what it said last."""


@dataclass(frozen=True)
class Taken:
    token_s: Times
    single_tokens_per_s: float
    peak_bytes: int | None
    ready_s: float


@dataclass(frozen=True)
class Place:
    """Where the model runs, and whether its weights are made up there."""

    device: str = "cpu"
    dtype: str = "float32"
    random_weights: bool = False


def run(
    engine: str,
    model: Path,
    requests: Sequence[Request],
    single: Request,
    arrival_s: Sequence[float] | None = None,
    place: Place = Place(),
    max_rows: int | None = None,
) -> tuple[Outcome, Times]:
    """One process from its start to its end. arrival_s: when each request comes, in order; None: all at 0. Static batches then
    are of those that wait when the one before has ended. max_rows: of the continuous batches; None: no bound. Times count from
    the first offer, not from a request's arrival. Raises EngineFailedError."""
    job = {"model": str(model), "requests": [asdict(r) for r in requests], "single": asdict(single), "began": time.time()}
    job |= {"arrival_s": list(arrival_s or [0.0] * len(requests)), "place": asdict(place), "max_rows": max_rows}
    command = [sys.executable, "-m", "bench.cpu_transformers", engine]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, env=_ENVIRONMENT | os.environ)
    if done.returncode:
        raise EngineFailedError(f"transformers' {engine} ended with exit code {done.returncode}: {done.stderr[-2000:]}")
    taken = Taken(**json.loads(done.stdout.splitlines()[-1]))
    more = {"ready_s": taken.ready_s, "single_tokens_per_s": taken.single_tokens_per_s}
    return Outcome.of(engine, requests, taken.token_s, taken.peak_bytes, **more), taken.token_s


def _work(engine: str, job: dict[str, Any]) -> Taken:
    requests, single = [Request(**fields) for fields in job["requests"]], Request(**job["single"])
    model, arrival_s = _model(Path(job["model"]), Place(**job["place"])), job["arrival_s"]
    if engine == "continuous":
        return _continuous(model, requests, arrival_s, single, job["began"], job["max_rows"])
    batch = int(engine.removeprefix("static-"))
    return _served(lambda some, arrivals: _static(model, some, arrivals, batch), requests, arrival_s, single, job["began"])


def _model(folder: Path, place: Place) -> Any:
    import torch

    kind, options = _transformers().AutoModelForCausalLM, {"attn_implementation": "sdpa", "dtype": getattr(torch, place.dtype)}
    if not place.random_weights:
        return kind.from_pretrained(folder, **options).to(place.device).eval()
    with torch.device(place.device):
        return kind.from_config(_transformers().AutoConfig.from_pretrained(folder), **options).eval()


def _transformers() -> Any:
    """Imported late, by the process that runs it alone; and its annotations are not for strict checks."""
    return importlib.import_module("transformers")


def _served(
    generate: Generate, requests: Sequence[Request], arrival_s: Sequence[float], single: Request, began: float
) -> Taken:
    ready_s = time.time() - began
    # A first batch takes longer than later ones; reversed, as prefixes are found again by some.
    warm = [Request(request.prompt_ids[::-1], _WARM_TOKENS) for request in requests[:_WARM_REQUESTS]]
    generate(warm, [0.0] * len(warm))
    alone = single_rate(generate([single], [0.0])[0])
    return Taken(generate(requests, arrival_s), alone, peak_tree_bytes(os.getpid()), ready_s)


class _Clock:
    """A streamer that keeps when each step's tokens came; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def arrived(arrival_s: Sequence[float], first: int, batch: int, now_s: float) -> int:
    """How many of the requests from `first` on, at most a batch, have come by now."""
    return sum(at <= now_s for at in arrival_s[first : first + batch])


def _static(model: Any, requests: Sequence[Request], arrival_s: Sequence[float], batch: int) -> Times:
    """A row's tokens count until it has as many as it asked for; the batch goes on until all have."""
    import torch

    begin = time.perf_counter()
    found: Times = []
    while len(found) < len(requests):
        first = len(found)
        time.sleep(max(0.0, arrival_s[first] - (time.perf_counter() - begin)))
        group = requests[first : first + max(1, arrived(arrival_s, first, batch, time.perf_counter() - begin))]
        width = max(len(request.prompt_ids) for request in group)
        padding = [width - len(request.prompt_ids) for request in group]
        rows = [[0] * pad + request.prompt_ids for pad, request in zip(padding, group, strict=True)]
        ids = torch.tensor(rows, device=model.device)
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding], device=model.device)
        config = _transformers().GenerationConfig(
            do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=longest(group)
        )
        clock = _Clock()
        model.generate(ids, attention_mask=mask, generation_config=config, streamer=clock)
        steps = [at - begin for at in clock.times[1:]]
        found += [steps[: request.max_tokens] for request in group]
    return found


def _continuous(
    model: Any, requests: Sequence[Request], arrival_s: Sequence[float], single: Request, began: float, max_rows: int | None
) -> Taken:
    everything = [*requests, single]
    pages = sum(-(-(len(request.prompt_ids) + request.max_tokens) // _PAGE) + 1 for request in everything)
    config = _transformers().ContinuousBatchingConfig(
        page_size=_PAGE, num_blocks=pages, max_batch_tokens=_STEP_TOKENS, max_requests_per_batch=max_rows or len(everything)
    )
    generation = _transformers().GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    with model.continuous_batching_context_manager(generation, continuous_batching_config=config) as manager:

        def generate(some: Sequence[Request], arrivals: Sequence[float]) -> Times:
            begin = time.perf_counter()
            ids: list[str] = []
            finished: dict[str, Any] = {}
            while len(finished) < len(some):
                now_s = time.perf_counter() - begin
                for request in some[len(ids) : len(ids) + arrived(arrivals, len(ids), len(some), now_s)]:
                    options = {"max_new_tokens": request.max_tokens, "record_timestamps": True, "eos_token_id": -1}
                    ids.append(manager.add_request(request.prompt_ids, **options))
                wait_s = _GET_S if len(ids) == len(some) else min(_GET_S, max(1e-3, arrivals[len(ids)] - now_s))
                output = manager.get_result(timeout=wait_s)
                if output is None and not manager.is_running():
                    raise RuntimeError("the continuous batching loop has ended")
                if output is not None and output.error is not None:
                    raise RuntimeError(output.error)
                if output is not None and output.is_finished():
                    finished[output.request_id] = output
            return [[at - begin for at in finished[name].timestamps] for name in ids]

        return _served(generate, requests, arrival_s, single, began)


if __name__ == "__main__":
    print(json.dumps(asdict(_work(sys.argv[1], json.load(sys.stdin)))))
