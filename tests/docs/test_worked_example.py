"""The worked example of docs/architecture.md is what the core does, number by number."""

from __future__ import annotations

import re
from collections import deque
from pathlib import Path

import numpy as np

from scheduler.core import Core, CoreConfig
from wire import AddHeader, AddRequest, ResultHeader, SamplingSpec, StepPlan, StepResult, WorkerFacts

NAMES = "ABCD"
END_TOKEN = 9
FACTS = WorkerFacts(
    device="sim",
    pid=1,
    description="",
    architecture="",
    dtype="float32",
    vocab_size=1000,
    max_model_len=64,
    block_size=4,
    num_blocks=10,
    kv_bytes_per_token=1,
    num_parameters=1,
    max_batch_rows=3,
    max_step_tokens=8,
)


def test_worked_example_is_what_the_core_does() -> None:
    page = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()
    block = re.search(r"```trace\n(.*?)```", page, re.DOTALL)
    assert block is not None
    assert block[1].splitlines() == trace()


def trace() -> list[str]:
    core = Core(CoreConfig(max_batch_rows=3, max_step_tokens=8))
    core.worker_joined(FACTS, 0)

    def add(handle: int, num_prompt: int, max_tokens: int) -> None:
        sampling = SamplingSpec(0.0, 0, 1.0, 0.0, 0, stop_token_ids=(END_TOKEN,))
        header = AddHeader(handle, NAMES[handle], 0, 2, max_tokens, sampling)
        assert core.add(AddRequest(header, np.arange(100, 100 + num_prompt, dtype=np.int32)), 0, 0) is None

    add(0, 10, 4)
    add(1, 3, 6)
    add(2, 5, 3)
    lines: list[str] = []
    in_flight: deque[StepPlan] = deque()
    token, names = 500, dict[int, str]()
    for now in range(100):
        while (plan := core.plan(now)) is not None:
            in_flight.append(plan)
            lines.append(describe(core, plan, names))
        if now == 2:
            add(3, 6, 2)
            lines.append("D arrives and waits")
        if core.is_idle:
            return lines
        step = in_flight.popleft().header.step_id
        sampled = core.in_flight[0].sampled
        drawn = list[int]()
        for slot in sampled.tolist():
            token += 1
            drawn.append(END_TOKEN if names[slot] == "B" and step == 4 else token)
        result = StepResult(ResultHeader(0, 1, step, 1), np.array(drawn, np.int32), sampled)
        lines.append(describe_result(core, result, now, bool(len(sampled)), names))
    raise AssertionError("the example does not end")


def describe(core: Core, plan: StepPlan, names: dict[int, str]) -> str:
    starts, at = [], 0
    for start in plan.header.starts:
        request = core.rows.sequence(start.slot)
        names[start.slot] = request.request_id
        blocks = " ".join(map(str, plan.start_blocks[at : at + start.num_blocks].tolist()))
        starts.append(f"{request.request_id} on blocks {blocks}")
        at += start.num_blocks
    rows = zip(plan.slots.tolist(), plan.num_tokens.tolist(), strict=True)
    parts = [", ".join(f"{names[slot]} computes {count}" for slot, count in rows)]
    if starts:
        parts.append("starts " + ", ".join(starts))
    grown = zip(plan.grow_slots.tolist(), plan.grow_blocks.tolist(), strict=True)
    if len(plan.grow_slots):
        parts.append(", ".join(f"{names[slot]} grows by block {block}" for slot, block in grown))
    parts.append(f"free {core.kv.pool.num_free}, retiring {core.kv.pool.num_retiring}")
    return f"plan {plan.header.step_id}: " + " | ".join(parts)


def describe_result(core: Core, result: StepResult, now: int, sampled: bool, names: dict[int, str]) -> str:
    outputs = core.apply(result, now)
    head = f"result {result.header.step_id}: "
    if not sampled:
        return head + "nothing sampled"
    if not outputs:
        return head + f"{names[int(result.slots[0])]}'s token is dropped"
    batch = outputs[0].batch
    text = ", ".join(f"{NAMES[h]} gets {t}" for h, t in zip(batch.handles.tolist(), batch.tokens.tolist(), strict=True))
    ends = ", ".join(f"{NAMES[ended.handle]} ends: {ended.reason.value}" for ended in batch.header.ended)
    return head + text + (f" | {ends}" if ends else "")
