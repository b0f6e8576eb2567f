"""What the core expects of the time until a first token: what counts, what does not, and when it thinks again."""

from __future__ import annotations

import pytest

from scheduler.core import CoreConfig
from scheduler.core.arrival import drain_time
from tests.helpers.core_driver import CoreDriver, Tracked
from tests.helpers.fake_worker import worker_facts
from wire import EndReason, Refused

MS = 1_000_000
SECOND = 1000 * MS


def driver(*, rows: int = 8, budget: int = 32, step_ms: float = 0.0, token_ms: float = 1.0, **config: object) -> CoreDriver:
    """A step costs step_ms, and token_ms for each token."""
    facts = worker_facts(num_blocks=400, block_size=4, max_batch_rows=rows, max_step_tokens=budget, max_model_len=2000)
    config_of = CoreConfig(max_batch_rows=rows, max_step_tokens=budget, target_itl_ns=0, **config)  # type: ignore[arg-type]
    core = CoreDriver(config_of, facts, tick=1)
    for num_tokens in (1, budget):
        core.core.step_cost.observe(num_tokens, 1, 0, int((step_ms + token_ms * num_tokens) * MS))
    return core


def comes_in(core: CoreDriver, num_prompt: int, left_ms: float, **options: object) -> bool:
    answer = core.add([7] * num_prompt, 2, deadline_ns=core.now + int(left_ms * MS), **options)  # type: ignore[arg-type]
    assert isinstance(answer, Tracked) or answer.code == "DEADLINE_EXCEEDED"
    return isinstance(answer, Tracked)


def learn_again(core: CoreDriver, token_ms: float) -> None:
    core.core.step_cost = driver(token_ms=token_ms).core.step_cost


def test_tokens_that_the_prefix_cache_has_cost_nothing() -> None:
    core = driver()
    core.accepted([7] * 400, 2, salt="")
    core.finish()
    learn_again(core, 1.0)
    assert not comes_in(core, 400, 100, salt="other")
    assert comes_in(core, 400, 100, salt="")


def test_a_deadline_goes_before_its_tenants_others_and_does_not_count_them() -> None:
    core = driver()
    for _ in range(10):
        core.accepted([7] * 100, 2)
    assert comes_in(core, 20, 100)


def test_prompts_that_wait_are_counted_one_by_one_not_as_a_long_one() -> None:
    core = driver(rows=1)
    core.core.step_cost.observe(32, 1, 32 * 500, 500 * MS)  # attention is most of it
    core.core.step_cost.observe(32, 1, 32 * 1000, 1000 * MS)
    core.accepted([7] * 8, 100)
    core.plan()
    alone = refused_for(core, 100)
    for number in range(9):
        core.accepted([7] * 100, 2, tenant=f"t{number}", priority=3)
    assert refused_for(core, 100) < 12 * alone


def refused_for(core: CoreDriver, num_prompt: int) -> float:
    """The estimate in milliseconds."""
    answer = core.add([7] * num_prompt, 2, deadline_ns=core.now + 1)
    assert isinstance(answer, Refused)
    return float(answer.details["estimate_ms"])


def test_who_waits_is_given_up_only_by_what_is_known_then() -> None:
    core = driver(rows=1, token_ms=10.0)
    core.accepted([7] * 8, 30, priority=3)
    core.step()
    waiting = core.accepted([7] * 20, 2, deadline_ns=core.now + 300 * MS)
    learn_again(core, 1.0)
    core.now += 150 * MS  # past the latest start of slow steps, before that of fast ones
    core.plan()
    assert waiting.end is None
    core.now += 140 * MS
    core.plan()
    assert waiting.end is not None and waiting.end.reason is EndReason.DEADLINE


def test_time_without_requests_does_not_count_as_slowness() -> None:
    core = driver(rows=1)
    for _ in range(4):
        core.accepted([7], 1)
        core.step()
        core.now += 3600 * SECOND
    for _ in range(3):
        core.accepted([7], 1)
    assert 0 < drain_time(core.core, 1) <= SECOND // 100


@pytest.mark.parametrize("num_others", [1, 3])
def test_outputs_of_one_request_take_turns_with_other_tenants(num_others: int) -> None:
    core = driver(rows=2)
    many = core.accepted([7] * 8, 20, num_outputs=8, tenant="many")
    core.step()
    others = [core.accepted([9] * 8, 20, tenant="few") for _ in range(num_others)]
    while not others[0].over:
        core.step()
    assert sum(sibling.over for sibling in many.siblings) <= 3
    core.finish()


def test_outputs_start_together_where_each_has_blocks_of_its_own() -> None:
    core = driver(rows=4, policy="static")
    core.accepted([7] * 8, 5, num_outputs=4)
    plan = core.plan()
    assert plan is not None and len(plan.header.starts) == 4
    core.finish()
