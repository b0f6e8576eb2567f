"""OpenVINO GenAI's continuous batching, stepped by hand. Runs in its own environment."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import version
from itertools import count

import numpy as np
import openvino as ov  # type: ignore[import-not-found]
import openvino_genai as genai  # type: ignore[import-not-found]
from harness import Request, job, measure  # type: ignore[import-not-found]

_STEP_TOKENS = 512

_job = job()
_scheduler = genai.SchedulerConfig()
_scheduler.cache_size = _job["kv_gib"]
_scheduler.max_num_seqs = _job["max_rows"]
_scheduler.max_num_batched_tokens = _STEP_TOKENS
_scheduler.dynamic_split_fuse = True
_scheduler.enable_prefix_caching = False
_pipeline = genai.ContinuousBatchingPipeline(
    _job["model"], _scheduler, "CPU", {"INFERENCE_NUM_THREADS": _job["threads"], **_job["options"]}
)
_ids = count()


def _config(max_tokens: int) -> genai.GenerationConfig:
    return genai.GenerationConfig(max_new_tokens=max_tokens, min_new_tokens=max_tokens, ignore_eos=True, do_sample=False)


def generate(requests: Sequence[Request]) -> list[list[float]]:
    began = time.perf_counter()
    handles = [
        _pipeline.add_request(next(_ids), ov.Tensor(np.array([ids], np.int64)), _config(max_tokens))
        for ids, max_tokens in requests
    ]
    token_s: list[list[float]] = [[] for _ in requests]
    while _pipeline.has_non_finished_requests():
        _pipeline.step()
        now = time.perf_counter() - began
        for handle, times in zip(handles, token_s, strict=True):
            while handle.can_read():
                for output in handle.read().values():
                    times += [now] * len(output.generated_ids)
    return token_s


measure(_job, generate, {name: version(name) for name in ("openvino", "openvino-genai", "optimum-intel")})
