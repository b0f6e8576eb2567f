"""What the meter says of steps, held against times that are kept token by token."""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise

import numpy as np
import pytest

from scheduler.core import Core, CoreConfig
from scheduler.step_meter import INTER_TOKEN_SECONDS, STEP_TOKENS, StepMeter
from tests.helpers.fake_worker import worker_facts
from wire import AddHeader, AddRequest, Distribution, Facts, MetricsReply, ResultHeader, SamplingSpec, StepResult

GREEDY = SamplingSpec(0.0, 0, 1.0, 0.0, 0)
MS = 1_000_000
FACTS = Facts("0", "continuous", 0, True, False, "", 64, 8, 10, 100)


class Loop:
    """A core, its meter, and every token's time by handle."""

    def __init__(self, num_blocks: int, rows: int = 8) -> None:
        self.core = Core(CoreConfig(max_batch_rows=rows, max_step_tokens=64, target_itl_ns=0))
        self.meter = StepMeter(rows)
        self.now = 1000 * MS
        self.times: dict[int, list[int]] = {}
        self.step_tokens: list[int] = []
        self.core.worker_joined(worker_facts(num_blocks=num_blocks, max_batch_rows=rows), self.now)

    def add(self, handle: int, num_prompt: int, max_tokens: int) -> None:
        header = AddHeader(handle, f"r{handle}", self.now, 2, max_tokens, GREEDY)
        assert self.core.add(AddRequest(header, np.arange(1, num_prompt + 1, dtype=np.int32)), 0, self.now) is None

    def step(self, duration_ms: int) -> None:
        """Plans as far as the pipeline goes, then one result, so long after the last one."""
        while (plan := self.core.plan(self.now)) is not None:
            if plan.header.starts:
                self.meter.planned(self.core, plan)
        if not self.core.in_flight:
            return
        self.now += duration_ms * MS
        step = self.core.in_flight[0]
        self.step_tokens.append(step.num_tokens)
        header = ResultHeader(0, self.core.epoch, step.step_id, duration_ms * MS)
        tokens = np.full(len(step.sampled), 3, np.int32)
        result = StepResult(header, tokens, step.sampled.astype(np.uint16))
        for output in self.core.apply(result, self.now):
            for handle in output.batch.handles.tolist():
                self.times.setdefault(handle, []).append(self.now)
        self.meter.result(step, result, self.now)

    def run(self) -> None:
        duration_ms = 1
        while self.core.num_requests:
            duration_ms = duration_ms % 37 + 5
            self.step(duration_ms)

    def reply(self) -> MetricsReply:
        return self.meter.reply(self.core, FACTS, 1)

    def gaps(self) -> list[int]:
        return [after - before for times in self.times.values() for before, after in pairwise(times)]


def distribution(bounds: tuple[float, ...], values: list[float]) -> Distribution:
    counts = [0] * (len(bounds) + 1)
    for value in values:
        counts[bisect_left(bounds, value)] += 1
    return Distribution(bounds, tuple(counts), sum(values))


def test_gaps_between_tokens_are_those_of_each_output_though_rows_come_and_go() -> None:
    loop = Loop(num_blocks=500)
    for handle in range(1, 21):  # more than there are rows: slots are taken again
        loop.add(handle, num_prompt=5 + 17 * (handle % 4), max_tokens=3 + handle % 7)
        loop.step(9)
    loop.run()
    told = loop.reply()
    expected = distribution(INTER_TOKEN_SECONDS, [gap / 1e9 for gap in loop.gaps()])
    assert told.inter_token_seconds.counts == expected.counts
    assert told.inter_token_seconds.total == pytest.approx(expected.total)
    assert sum(expected.counts) == sum(3 + handle % 7 - 1 for handle in range(1, 21))


def test_a_preempted_output_waited_for_its_next_token_too() -> None:
    loop = Loop(num_blocks=30)
    for handle in range(1, 5):
        loop.add(handle, num_prompt=20, max_tokens=60)
    loop.run()
    assert loop.core.counters.preemptions > 0
    told = loop.reply().inter_token_seconds
    assert sum(told.counts) == 4 * 59
    # It counts from when the row was lost: at most two steps from its last token, which may have come after that.
    assert told.total == pytest.approx(sum(loop.gaps()) / 1e9, abs=loop.core.counters.preemptions * 2 * 0.042)
    assert max(loop.gaps()) > 500 * MS and sum(told.counts[bisect_left(told.bounds, 0.5) :]) > 0


def test_steps_are_measured_by_tokens_and_time() -> None:
    loop = Loop(num_blocks=500)
    loop.add(1, num_prompt=100, max_tokens=5)
    loop.add(2, num_prompt=30, max_tokens=5)
    loop.run()
    told = loop.reply()
    assert told.step_tokens == distribution(STEP_TOKENS, [float(tokens) for tokens in loop.step_tokens])
    assert sum(told.step_seconds.counts) == len(loop.step_tokens)


def test_late_words_of_a_worker_that_was_given_up_are_no_step() -> None:
    loop = Loop(num_blocks=500)
    loop.add(1, num_prompt=10, max_tokens=5)
    plan = loop.core.plan(loop.now)
    assert plan is not None
    step = loop.core.in_flight[0]
    late = StepResult(ResultHeader(0, loop.core.epoch - 1, step.step_id, MS), np.array([3], np.int32), np.array([0], np.uint16))
    loop.meter.result(step, late, loop.now)
    assert sum(loop.reply().step_seconds.counts) == 0


def test_blocks_and_their_empty_slots_are_told() -> None:
    loop = Loop(num_blocks=500)
    size = loop.core.kv.block_size
    loop.add(1, num_prompt=size + 1, max_tokens=50)
    loop.step(5)
    reply = loop.reply()
    assert reply.block_size == size and reply.load.held_blocks == 2
    assert 0 < reply.empty_slots < size and reply.shared_blocks == 0
