"""Nobody starves: a request of the lowest class, or of another tenant, ends however many others come, and after a known number
of admissions.

The bound. X is the request, k the number of others alive when it comes, m = max_preemptions, K = oldest_every, R the rows.
 1. Waiting: every K-th admission goes to whoever waits longest (queue, rule 1). Only the k can be older than X, and each of
    them comes back at most m times before it is protected: X is admitted within K * (1 + k * (1 + m)) admissions. Later, when
    the k are gone, within K; the first number holds each time.
 2. How often: X loses its row at most m times, then it comes back with all its blocks, and stays. It waits at most 1 + m times.
 3. Running: in a step in which its prompt may have something, X computes at least one of its tokens, but for two kinds of
    steps. Prompts that were admitted before it may take the whole budget: (R - 1) * L tokens at most, L the model's length, at
    least one a step. And it may sit out until blocks that plans in flight still name come back: 2 steps, the depth of the
    pipeline; when older rows want those too, it has lost its row, see 2. Prompts of a higher class go before its own, but for
    one step in K. Between two preemptions it computes at most P + M tokens, P of the prompt and M outputs: within
    K * (3 * (P + M) + R * L) steps, in each of which at most R others are admitted.
Together: X ends within (1 + m) * (K * (1 + k * (1 + m)) + R * K * (3 * (P + M) + R * L)) admissions of others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hypothesis import example, given, settings
from hypothesis import strategies as st

from scheduler.core import CoreConfig
from tests.helpers.core_driver import CoreDriver
from tests.helpers.fake_worker import worker_facts
from wire import EndReason

BATCH, NORMAL, INTERACTIVE = 1, 2, 3
MODEL_LENGTH = 25


@dataclass(frozen=True)
class World:
    rows: int
    budget: int
    num_blocks: int
    oldest_every: int
    max_preemptions: int
    num_host_blocks: int
    num_before: int  # requests of others, alive when it comes
    prompt: int
    max_tokens: int
    depth: int  # plans in flight


@dataclass(frozen=True)
class Shape:
    """Of one of the others."""

    prompt: int
    max_tokens: int
    num_outputs: int = 1


worlds = st.builds(
    World,
    rows=st.integers(1, 4),
    budget=st.integers(1, 13),
    num_blocks=st.integers(7, 14),
    oldest_every=st.sampled_from([1, 2, 3, 5]),
    max_preemptions=st.integers(1, 3),
    num_host_blocks=st.sampled_from([0, 0, 6]),
    num_before=st.integers(0, 3),
    prompt=st.integers(1, 12),
    max_tokens=st.integers(1, 12),
    depth=st.integers(1, 2),
)
floods = st.lists(
    st.builds(Shape, st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, 1, 1, 2])), min_size=1, max_size=5
)


def bound(world: World, num_rows: int, num_older: int) -> int:
    """Of admissions. num_older: k."""
    waiting = world.oldest_every * (1 + num_older * (1 + world.max_preemptions))
    running = num_rows * world.oldest_every * (3 * (world.prompt + world.max_tokens) + num_rows * MODEL_LENGTH)
    return (1 + world.max_preemptions) * (waiting + running)


def flooded(world: World, flood: list[Shape], *, priority: int, others: int) -> tuple[int, int]:
    """Admissions of others until the request of class `priority` has ended, while requests of class `others` and of another
    tenant never cease to wait; and the bound."""
    facts = worker_facts(
        num_blocks=world.num_blocks,
        max_batch_rows=world.rows,
        max_step_tokens=world.budget,
        max_model_len=MODEL_LENGTH,
        num_host_blocks=world.num_host_blocks,
        swap_block_ns=1,
    )
    config = CoreConfig(
        max_batch_rows=world.rows,
        max_step_tokens=world.budget,
        oldest_every=world.oldest_every,
        max_preemptions=world.max_preemptions,
        target_itl_ns=0,
        max_queue_requests=10_000,
    )
    driver, number = CoreDriver(config, facts), 0

    def pour(most_waiting: int) -> None:
        nonlocal number
        while len(driver.core.queue) < most_waiting:
            shape = flood[number % len(flood)]
            driver.accepted(
                [number % 900 + 1] * shape.prompt,
                shape.max_tokens,
                priority=others,
                tenant="others",
                num_outputs=shape.num_outputs,
            )
            number += 1

    pour(world.num_before)
    older = sum(len(request.siblings) for request in driver.requests if request.output_index == 0)
    request = driver.accepted([901 + i for i in range(world.prompt)], world.max_tokens, priority=priority, tenant="mine")
    most, num_admitted = bound(world, driver.core.rows.max_rows, older), 0
    while not request.over and num_admitted <= most:
        pour(2 * world.rows + 2)
        plan = driver.plan()
        starts = plan.header.starts if plan is not None else ()
        num_admitted += sum(start.sequence_id != request.sequence_id for start in starts)
        if plan is None or len(driver.core.in_flight) >= world.depth:
            assert driver.core.in_flight, "the batch stands still"
            driver.answer()
        for other in driver.requests[-40:]:
            if not other.over and other.got:
                driver.credit((other, len(other.got)))
    assert request.end is not None and request.end.reason is EndReason.LENGTH, f"{num_admitted} others were admitted"
    return num_admitted, most


@settings(max_examples=60, deadline=None, derandomize=True)
@given(worlds, floods)
def test_a_flood_of_another_tenant_starves_nobody(world: World, flood: list[Shape]) -> None:
    num_admitted, most = flooded(world, flood, priority=NORMAL, others=NORMAL)
    assert num_admitted <= most


@settings(max_examples=60, deadline=None, derandomize=True)
@given(worlds, floods)
def test_a_flood_of_a_higher_class_whose_prompts_fit_the_steps_starves_nobody(world: World, flood: list[Shape]) -> None:
    world = replace(world, budget=world.rows * MODEL_LENGTH)
    num_admitted, most = flooded(world, flood, priority=BATCH, others=INTERACTIVE)
    assert num_admitted <= most


@settings(max_examples=60, deadline=None, derandomize=True)
@given(worlds, floods)
@example(
    World(
        rows=4,
        budget=8,
        num_blocks=14,
        oldest_every=5,
        max_preemptions=1,
        num_host_blocks=0,
        num_before=0,
        prompt=12,
        max_tokens=3,
        depth=2,
    ),
    [Shape(prompt=8, max_tokens=1)],
)
def test_a_flood_of_a_higher_class_with_prompts_that_fill_every_step_starves_nobody(world: World, flood: list[Shape]) -> None:
    flood = [replace(shape, prompt=max(6, shape.prompt), max_tokens=min(2, shape.max_tokens)) for shape in flood]
    num_admitted, most = flooded(world, flood, priority=BATCH, others=INTERACTIVE)
    assert num_admitted <= most
