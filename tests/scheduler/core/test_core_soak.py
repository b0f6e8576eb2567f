"""The core under long seeded runs of random inputs. Where the state machine looks for the smallest case that breaks a law,
this one keeps the batch busy: long queues, full pools, many requests that come and go in every phase."""

from __future__ import annotations

import random

import msgspec
import pytest

from scheduler.core import CoreConfig
from tests.helpers.core_driver import CoreDriver
from tests.helpers.fake_worker import worker_facts

VOCAB = 200


def busy_driver(policy: str, rng: random.Random) -> CoreDriver:
    config = CoreConfig(
        policy=policy,
        max_batch_rows=rng.choice([2, 5, 8]),
        max_step_tokens=rng.choice([8, 13, 40]),
        max_queue_requests=rng.choice([6, 1000]),
        static_batch_size=rng.choice([0, 3]),
    )
    block_size = rng.choice([1, 3, 4])
    facts = worker_facts(
        num_blocks=rng.randint(60, 160) // block_size, block_size=block_size, vocab_size=VOCAB, max_model_len=58
    )
    return CoreDriver(config, facts)


def disturb(driver: CoreDriver, rng: random.Random) -> None:
    match rng.choices(["end", "frontend", "failed", "lost", "joined", "other"], [70, 4, 8, 8, 4, 6])[0]:
        case "end" if driver.requests:
            request = rng.choice(driver.requests[-12:])
            how = rng.choice(["abort", "cancel", "truncate"])
            if how == "abort":
                driver.abort(request)
            elif how == "cancel":
                driver.cancel(request.request_id)
            else:
                driver.truncate(request, rng.randint(0, len(request.got)))
        case "frontend":
            driver.frontend_lost(rng.randrange(3))
        case "failed" if driver.core.in_flight:
            driver.step_failed()
        case "lost":
            driver.lost()
            driver.plan()
            driver.joined()
        case "joined":
            driver.joined()
        case "other":
            driver.joined(msgspec.structs.replace(driver.facts, num_blocks=max(20, driver.facts.num_blocks - 3)))


def arrive(driver: CoreDriver, rng: random.Random) -> None:
    driver.add(
        [rng.randrange(VOCAB) for _ in range(rng.choice([1, 5, 12, 30]))],
        rng.choice([0, 1, 3, 9, 20]),
        priority=rng.choice([1, 2, 2, 3]),
        frontend=rng.randrange(3),
        stop=rng.choice([(), (), (rng.randrange(VOCAB),), range(0, VOCAB, 15)]),
        min_tokens=rng.choice([0, 0, 4]),
    )


def soak(policy: str, seed: int, length: int) -> CoreDriver:
    rng = random.Random(f"{policy} {seed}")
    driver = busy_driver(policy, rng)
    for _ in range(length):
        what = rng.random()
        if what < 0.2:
            arrive(driver, rng)
        elif what < 0.24:
            disturb(driver, rng)
        elif what < 0.65:
            driver.plan()
        elif driver.core.in_flight:
            driver.answer()
    driver.finish()
    return driver


@pytest.mark.parametrize("policy", ["continuous", "static"])
def test_laws_hold_on_busy_batches(policy: str) -> None:
    drivers = [soak(policy, seed, length=200) for seed in range(60)]
    ends = [request.end.reason for driver in drivers for request in driver.requests if request.end is not None]
    assert set(ends) >= {"stop", "length", "cancelled"}
    preemptions = sum(driver.core.counters.preemptions for driver in drivers)
    assert (preemptions > 100) == (policy == "continuous"), "the pools are small enough to mean something"


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["continuous", "static"])
def test_laws_hold_on_busy_batches_for_long(policy: str) -> None:
    for seed in range(1000, 1100):
        soak(policy, seed, length=500)
