"""The real scheduler core and the real executor in one process, as the server has them in two: the core plans two steps ahead,
submit() launches, answers come from the executor's own thread. No gRPC, no ZeroMQ, no front end.
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from bench.roofline import Demand
from scheduler.core import Core, CoreConfig
from wire import AddHeader, AddRequest, EndReason, SamplingSpec, StepFailed, StepPlan, StepResult, WorkerFacts
from wire.messages import I32

I64 = NDArray[np.int64]

GREEDY = SamplingSpec(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)
_NORMAL = 2
_ANSWER_S = 120.0  # a step that takes longer does not end
_UNBOUNDED = 1 << 40


class EngineError(Exception):
    """A step failed, or the engine stood still; the text is one line."""


class Executor(Protocol):
    facts: WorkerFacts

    def reset(self) -> None: ...
    def submit(self, plan: StepPlan, deliver: Callable[[Any], None]) -> None: ...


@dataclass(frozen=True)
class Request:
    prompt: I32
    max_tokens: int  # it gets exactly so many
    sampling: SamplingSpec = GREEDY
    arrival_s: float = 0.0
    prefix_key: bytes = b""  # empty: past the prefix cache


@dataclass(frozen=True)
class Step:
    ended_s: float  # its answer was there
    device_s: float  # as the executor measured
    submit_s: float  # that the host took to launch it
    rows: int
    tokens: int  # computed
    held_tokens: int  # in blocks that sequences held
    used_tokens: int  # of them
    waiting: int  # requests


@dataclass
class Run:
    """What was seen; seconds since the first request came."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    seconds: float = 0.0  # to the last answer
    steps: list[Step] = field(default_factory=list)
    drawn: list[tuple[float, I64, I32]] = field(default_factory=list)  # when, by which requests, which tokens
    core_s: float = 0.0  # that planning and taking answers took

    @property
    def tokens_per_s(self) -> float:
        return (self.prompt_tokens + self.output_tokens) / self.seconds

    @property
    def output_tokens_per_s(self) -> float:
        return self.output_tokens / self.seconds

    def outputs(self, count: int) -> list[list[int]]:
        """Of each request."""
        found: list[list[int]] = [[] for _ in range(count)]
        for _, handles, tokens in self.drawn:
            for handle, token in zip(handles.tolist(), tokens.tolist(), strict=True):
                found[handle].append(token)
        return found

    def token_times(self, count: int) -> list[list[float]]:
        found: list[list[float]] = [[] for _ in range(count)]
        for at, handles, _ in self.drawn:
            for handle in handles.tolist():
                found[handle].append(at)
        return found


def demand(requests: Sequence[Request]) -> Demand:
    """What they need at the least."""
    prompts = [len(request.prompt) for request in requests]
    decodes = [request.max_tokens - 1 for request in requests]  # the first token comes with the prompt
    return Demand(
        prompt_tokens=sum(prompts),
        output_tokens=sum(decodes),
        pairs=sum(n * (n + 1) // 2 for n in prompts),
        context=sum(d * p + d * (d + 1) // 2 for p, d in zip(prompts, decodes, strict=True)),
        longest_output=max(decodes),
    )


class Engine:
    """An executor that serves one session after the other."""

    def __init__(self, executor: Executor) -> None:
        self.facts = executor.facts
        self._executor = executor
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._submitted: deque[float] = deque()  # of plans in flight: what launching each took

    def session(self, num_blocks: int | None = None, **options: Any) -> Session:
        """A core with an empty cache. num_blocks: of the pool, no more are used. options: of CoreConfig. A prompt's chunks are
        as large as a step allows, unless target_itl_ns is given."""
        self.drain()  # of a run that failed or was stopped
        facts = self.facts
        if num_blocks is not None:
            assert num_blocks <= facts.num_blocks
            longest = min(facts.max_model_len, num_blocks * facts.block_size)
            facts = structs.replace(facts, num_blocks=num_blocks, max_model_len=longest)
        sizes = {"max_batch_rows": facts.max_batch_rows, "max_step_tokens": facts.max_step_tokens, "target_itl_ns": 0}
        queues = {"max_queue_requests": _UNBOUNDED, "max_queue_tokens": _UNBOUNDED, "max_unread_tokens": 1 << 30}
        core = Core(CoreConfig(**{**sizes, **queues, **options}))
        self._executor.reset()
        core.worker_joined(facts, _now())
        return Session(self, core)

    def serve(
        self,
        requests: Sequence[Request],
        *,
        num_blocks: int | None = None,
        stop: Callable[[Run], bool] | None = None,
        **options: Any,
    ) -> Run:
        """In a session of their own."""
        return self.session(num_blocks, **options).serve(requests, stop)

    def submit(self, plan: StepPlan) -> None:
        began = time.perf_counter()
        self._executor.submit(plan, self._answers.put)
        self._submitted.append(time.perf_counter() - began)

    @property
    def is_busy(self) -> bool:
        return bool(self._submitted)

    def answer(self) -> tuple[StepResult, float]:
        """The oldest plan's, and what launching it took."""
        while True:
            try:
                answer = self._answers.get(timeout=_ANSWER_S)
            except queue.Empty:
                self._submitted.clear()
                raise EngineError(f"no answer to a step within {_ANSWER_S:.0f} s") from None
            if isinstance(answer, StepFailed | StepResult):
                submit_s = self._submitted.popleft()
                if isinstance(answer, StepResult):
                    return answer, submit_s
                raise EngineError(f"a step failed: {answer.message}")

    def drain(self) -> None:
        """Waits for the plans in flight, whatever becomes of them."""
        while self._submitted:
            with contextlib.suppress(EngineError):
                self.answer()


class Session:
    """One core, with what its prefix cache holds."""

    def __init__(self, engine: Engine, core: Core) -> None:
        self._engine, self._core = engine, core
        self._num_served = 0  # handles so far

    def serve(self, requests: Sequence[Request], stop: Callable[[Run], bool] | None = None) -> Run:
        """All requests until their end, or until `stop` says so after a step; then the session is over."""
        engine, core, run = self._engine, self._core, Run()
        before = core.load(0)
        coming = sorted(enumerate(requests, self._num_served), key=lambda numbered: numbered[1].arrival_s)[::-1]
        began = time.perf_counter()
        while coming or not core.is_idle:
            while coming and coming[-1][1].arrival_s <= time.perf_counter() - began:
                _add(core, *coming.pop())
            planning = time.perf_counter()
            while (plan := core.plan(_now())) is not None:
                run.core_s += time.perf_counter() - planning
                engine.submit(plan)
                planning = time.perf_counter()
            run.core_s += time.perf_counter() - planning
            if engine.is_busy:
                self._take(run, began)
            elif coming:
                time.sleep(max(0.0, coming[-1][1].arrival_s - (time.perf_counter() - began)))
            elif not core.is_idle:
                raise EngineError(f"{core.num_requests} requests are left, and nothing is planned")
            if stop is not None and stop(run):
                break
        core.plan(_now())  # lets go of a static batch's padding
        run.seconds = run.steps[-1].ended_s if run.steps else 0.0
        after = core.load(0)
        run.prompt_tokens = after.prompt_tokens - before.prompt_tokens
        run.cached_tokens = after.cached_tokens - before.cached_tokens
        run.preemptions = after.preemptions - before.preemptions
        self._num_served += len(requests)
        engine.drain()
        return run

    def _take(self, run: Run, began: float) -> None:
        result, submit_s = self._engine.answer()
        at, core = time.perf_counter(), self._core
        step = core.in_flight[0]
        padding = len(step.plan.padding)
        run.steps.append(
            Step(
                ended_s=at - began,
                device_s=result.header.duration_ns / 1e9,
                submit_s=submit_s,
                rows=len(step.plan.slots) + padding,
                tokens=int(step.plan.num_tokens.sum()) + padding,
                held_tokens=step.held_blocks * core.kv.block_size,
                used_tokens=step.kv_tokens,
                waiting=step.num_waiting,
            )
        )
        for output in core.apply(result, _now()):
            batch = output.batch
            run.output_tokens += len(batch.handles)
            run.drawn.append((at - began, batch.handles.astype(np.int64) - self._num_served, batch.tokens))
            for ended in batch.header.ended:
                if ended.reason is not EndReason.LENGTH:
                    raise EngineError(f"request {ended.handle} ended with {ended.reason.name}: {ended.message}")
        run.core_s += time.perf_counter() - at


def _add(core: Core, handle: int, request: Request) -> None:
    header = AddHeader(handle, str(handle), _now(), _NORMAL, request.max_tokens, request.sampling)
    header.prefix_key = request.prefix_key
    refused = core.add(AddRequest(header, request.prompt), 0, _now())
    if refused is not None:
        raise EngineError(f"request {handle} was refused: {refused}")


def _now() -> int:
    return time.perf_counter_ns()


def random_prompts(count: int, length: int, vocab: int, seed: int = 0) -> list[I32]:
    return list(np.random.default_rng(seed).integers(3, vocab, (count, length), dtype=np.int32))


def burst(count: int, prompt: int, output: int, vocab: int, seed: int = 0) -> list[Request]:
    """All at once, all alike."""
    return [Request(ids, output) for ids in random_prompts(count, prompt, vocab, seed)]
