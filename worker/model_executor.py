"""The executor with a model: computes steps. Knows tensors and plans; no socket, no files.

A step that fails, for want of memory or by a fault, becomes a StepFailed of one line; the trace goes to this process's log,
and the executor can go on after reset().
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
import torch

from kvcache.storage import KVStorage
from wire import PlanHeader, ResultHeader, SamplingSpec, SequenceStart, StepPlan, StepResult, WorkerFacts
from wire.messages import I32
from worker import attention, determinism
from worker.batch import build
from worker.config import WorkerConfig
from worker.executor import Answer, Deliver, failure
from worker.loading import Loaded, load
from worker.logprobs import OfDraws, Told, of_prompts
from worker.models import Model
from worker.sampler import sample
from worker.sequences import PlanError, Sequences, StepRows

log = logging.getLogger(__name__)


class ModelExecutor:
    """Computes each step here and now, in the thread that submits it."""

    def __init__(
        self, model: Model, kv: KVStorage, facts: WorkerFacts, device: torch.device, deterministic: bool = False
    ) -> None:
        self.facts = facts
        self._model, self._kv, self._device = model, kv, device
        self._attention, self._one_by_one = attention.choose(device, deterministic), deterministic
        self._sequences = Sequences(facts)

    @staticmethod
    def of(config: WorkerConfig, model_dir: Path) -> ModelExecutor:
        """As told by a worker's options. Raises ModelError, SizingError or ConfigError."""
        return ModelExecutor.with_model(load(config, model_dir))

    @staticmethod
    def with_model(loaded: Loaded) -> ModelExecutor:
        executor = ModelExecutor(loaded.model, loaded.kv, loaded.facts, loaded.device, loaded.deterministic)
        executor._rehearse()
        if loaded.deterministic:
            determinism.check(loaded.model, loaded.kv, executor._attention, loaded.facts)
        return executor

    def reset(self) -> None:
        self._sequences.reset()

    def submit(self, plan: StepPlan, deliver: Deliver) -> None:
        for answer in self._answers(plan):
            deliver(answer)

    def close(self) -> None:
        del self._model, self._kv

    def _answers(self, plan: StepPlan) -> list[Answer]:
        began = time.perf_counter_ns()
        try:
            rows, tokens, told = self._step(plan)
        except PlanError as error:
            log.error("step %d: %s", plan.header.step_id, error)
            return [failure(plan, error)]
        except Exception as error:
            log.exception("step %d failed", plan.header.step_id)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            return [failure(plan, error)]
        header = ResultHeader(plan.header.group, plan.header.epoch, plan.header.step_id, time.perf_counter_ns() - began)
        result = StepResult(header, tokens, rows.sampled_slots.astype(np.uint16))
        logprobs = told.message(plan)
        return [result] if logprobs is None else [logprobs, result]

    @torch.inference_mode()
    def _step(self, plan: StepPlan) -> tuple[StepRows, I32, Told]:
        told = Told(self._one_by_one)
        rows = self._sequences.apply(plan)
        self._move_blocks(plan)
        if not len(rows.slots):
            return rows, np.empty(0, np.int32), told
        batch = build(self._sequences, rows, self._device)
        hidden_TC = self._model.forward(batch.input_ids, batch.positions, self._attention, self._kv, batch.attention)
        of_prompts(told, self._sequences, rows, hidden_TC, self._model.logits)
        if not len(rows.drawing):
            return rows, np.empty(0, np.int32), told
        logits_NV = self._model.logits(hidden_TC[batch.drawing])
        of_draws = OfDraws(self._sequences, rows, logits_NV)
        tokens = sample(logits_NV, self._sequences.sampling(rows), self._one_by_one)[: rows.num_sampled]
        of_draws.tell(told, rows, torch.from_numpy(tokens))
        self._sequences.feed(rows, tokens)
        return rows, tokens, told

    def _move_blocks(self, plan: StepPlan) -> None:
        if len(plan.swap_out_blocks):
            self._kv.swap_out(plan.swap_out_blocks, plan.swap_out_host_blocks)
        if len(plan.swap_in_blocks):
            self._kv.swap_in(plan.swap_in_host_blocks, plan.swap_in_blocks)
        if len(plan.copy_to):
            self._kv.copy(plan.copy_from, plan.copy_to)

    def _rehearse(self) -> None:
        """One step of one short sequence, so that what can't work fails before the hello, and libraries are warm."""
        sampling = SamplingSpec(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)
        start = SequenceStart(0, 0, 0, 1, 1, 0, 1, sampling)
        one = np.ones(1, np.int32)
        self._step(
            StepPlan(PlanHeader(0, 0, 0, (start,)), one, start_tokens=0 * one, start_blocks=one, slots=np.zeros(1, np.uint16))
        )
        self.reset()
