"""Whom the core refuses, with which status, field and delay, and that it takes everybody else."""

from __future__ import annotations

import re

import numpy as np
import pytest

from scheduler.core import Core, CoreConfig
from tests.helpers.core_driver import CoreDriver, Tracked
from tests.helpers.fake_worker import GREEDY, worker_facts
from wire import AddHeader, AddRequest, Refused

SECOND = 1_000_000_000


def driver(**config: int) -> CoreDriver:
    return CoreDriver(CoreConfig(**config), worker_facts(num_blocks=16, block_size=4, max_model_len=100))


def refused(answer: Tracked | Refused) -> Refused:
    assert isinstance(answer, Refused)
    return answer


@pytest.mark.parametrize(
    ("prompt", "options", "code", "field", "words"),
    [
        ([], {}, "INVALID_ARGUMENT", "prompt", "empty"),
        ([1, 1000], {}, "INVALID_ARGUMENT", "prompt.token_ids", "not below 1000"),
        ([-1, 5], {}, "INVALID_ARGUMENT", "prompt.token_ids", "not below 1000"),
        ([1], {"stop": [3, 1000]}, "INVALID_ARGUMENT", "stopping.stop_token_ids", "not below 1000"),
        ([1], {"stop": [-1]}, "INVALID_ARGUMENT", "stopping.stop_token_ids", "not below 1000"),
        ([1], {"stop": [2**40]}, "INVALID_ARGUMENT", "stopping.stop_token_ids", "not below 1000"),
        ([1], {"priority": 0}, "INVALID_ARGUMENT", "scheduling.priority", "unknown priority class 0"),
        ([1], {"priority": 4}, "INVALID_ARGUMENT", "scheduling.priority", "unknown priority class 4"),
        ([1] * 100, {}, "INVALID_ARGUMENT", "prompt", "100 tokens, the model's length is 100"),
        ([1] * 90, {"max_tokens": 11}, "INVALID_ARGUMENT", "stopping.max_tokens", r"prompt \(90\) \+ max_tokens \(11\)"),
        ([1] * 50, {"max_tokens": 16}, "FAILED_PRECONDITION", "", "needs 17 blocks for 66 tokens, .* has 16 of 4 tokens"),
        ([1] * 65, {"max_tokens": 1}, "FAILED_PRECONDITION", "", "needs 17 blocks"),
        ([1] * 65, {}, "FAILED_PRECONDITION", "", "needs 17 blocks"),
    ],
)
def test_a_request_that_can_never_run_is_refused(
    prompt: list[int], options: dict[str, object], code: str, field: str, words: str
) -> None:
    core = driver()
    answer = refused(core.add(prompt, handle=77, **options))  # type: ignore[arg-type]
    assert (answer.handle, answer.code, answer.field, answer.retry_after_ns) == (77, code, field, 0)
    assert re.search(words, answer.message), answer.message
    assert core.core.load(0).refused_requests == 1 and core.core.is_idle


@pytest.mark.parametrize(("prompt", "max_tokens", "outputs"), [(64, 1, 1), (50, 15, 15), (64, 0, 1), (60, 0, 5), (10, 0, 55)])
def test_a_request_as_large_as_the_pool_is_taken(prompt: int, max_tokens: int, outputs: int) -> None:
    core = driver()
    request = core.accepted([1] * prompt, max_tokens)
    core.finish()
    assert len(request.got) == outputs


@pytest.mark.parametrize(("prompt", "max_tokens", "outputs"), [(99, 1, 1), (99, 0, 1), (90, 10, 10), (90, 0, 10)])
def test_a_request_as_long_as_the_model_is_taken(prompt: int, max_tokens: int, outputs: int) -> None:
    core = CoreDriver(CoreConfig(), worker_facts(num_blocks=64, max_model_len=100))
    request = core.accepted([1] * prompt, max_tokens)
    core.finish()
    assert len(request.got) == outputs


def test_before_any_worker_has_joined_nothing_is_accepted() -> None:
    add = AddRequest(AddHeader(5, "r", 0, 2, 1, GREEDY), np.array([1], np.int32))
    answer = Core(CoreConfig()).add(add, 0, 0)
    assert answer == Refused(5, "UNAVAILABLE", "no worker has joined yet", retry_after_ns=SECOND)


def test_while_the_worker_is_away_requests_are_queued() -> None:
    core = driver()
    core.lost()
    request = core.accepted([1, 2], 3)
    assert core.plan() is None
    core.joined()
    core.finish()
    assert len(request.got) == 3


def test_a_draining_server_refuses_new_requests_and_finishes_the_others() -> None:
    core = driver()
    request = core.accepted([1, 2], 3)
    core.core.drain()
    answer = refused(core.add([1], 3))
    assert (answer.code, answer.message, answer.retry_after_ns) == ("UNAVAILABLE", "the server is draining", SECOND)
    core.finish()
    assert len(request.got) == 3


def test_the_same_request_id_is_refused_while_it_lives_and_taken_afterwards() -> None:
    core = driver()
    core.accepted([1], 2, request_id="twin")
    answer = refused(core.add([1], 2, request_id="twin", frontend=1))
    assert answer.code == "ALREADY_EXISTS" and "with this request_id is alive" in answer.message
    core.finish()
    core.accepted([1], 2, request_id="twin")
    core.finish()


def test_handles_are_unique_in_their_front_end_only() -> None:
    core = driver()
    core.accepted([1], 2, handle=1, frontend=0)
    core.accepted([1], 2, handle=1, frontend=1)
    assert refused(core.add([1], 2, handle=1, frontend=1)).code == "ALREADY_EXISTS"
    core.finish()
    core.accepted([1], 2, handle=1, frontend=1)
    core.finish()


def test_the_queue_is_bounded_by_requests() -> None:
    core = driver(max_queue_requests=2)
    core.accepted([1], 1), core.accepted([2], 1)
    answer = refused(core.add([3], 1))
    assert answer.code == "RESOURCE_EXHAUSTED" and answer.message == "2 requests with 2 prompt tokens wait already"
    assert answer.retry_after_ns == SECOND
    core.plan()  # both are admitted
    core.accepted([3], 1)
    core.finish()


def test_the_queue_is_bounded_by_prompt_tokens() -> None:
    core = driver(max_queue_tokens=10)
    core.accepted([1] * 6, 1)
    assert refused(core.add([1] * 5, 1)).code == "RESOURCE_EXHAUSTED"
    core.accepted([1] * 4, 1)
    assert core.core.load(0).waiting_tokens == 10
    core.finish()


def test_a_prompt_beyond_the_bound_is_taken_when_nobody_waits() -> None:
    core = driver(max_queue_tokens=10)
    core.accepted([1] * 30, 1)
    assert refused(core.add([1], 1)).code == "RESOURCE_EXHAUSTED"
    core.finish()


def test_cancelling_a_waiting_request_makes_room() -> None:
    core = driver(max_queue_requests=1)
    core.accepted([1], 1, request_id="a")
    assert refused(core.add([1], 1)).code == "RESOURCE_EXHAUSTED"
    core.cancel("a")
    core.accepted([1], 1)
    core.finish()


@pytest.mark.parametrize(("gap", "delay"), [(1, SECOND // 100), (250_000_000, 250_000_000), (100 * SECOND, 60 * SECOND)])
def test_the_delay_is_the_rate_at_which_requests_have_been_ending(gap: int, delay: int) -> None:
    """Between a hundredth of a second and a minute."""
    core = driver(max_queue_requests=1)
    for name in "abc":
        core.accepted([1], 1, request_id=name)
        core.now += gap - 2 * core.tick
        core.cancel(name)
    core.accepted([1], 1)
    assert refused(core.add([1], 1)).retry_after_ns == pytest.approx(delay, rel=1e-6)
    core.finish()
